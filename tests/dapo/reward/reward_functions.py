"""Reward functions for the tests. Workers import this file: nothing here may import torch."""

import os
import re
import signal
import subprocess
import sys
import time


def long_bool(response, answer):
    return response == answer


def graded(response, answer):
    return float(response)


def counted(response, answer):
    return int(response)


def silent(response, answer):
    return None


def wordy(response, answer):
    return "yes"


def listed(response, answer):
    return [True]


def arrayed(response, answer):
    import numpy

    return numpy.array([1.0, 2.0])


def numpy_scalar(response, answer):
    import numpy

    return numpy.bool_(response == answer) if answer != "half" else numpy.float32(0.5)


def huge_integer(response, answer):
    return 10**400


def raising(response, answer):
    raise KeyError("no such\nrule")


def leaving(response, answer):
    sys.exit(3)


def obedient(response, answer):
    """Does what the response says."""
    if response == "sleep":
        time.sleep(600)
    if response == "deaf":  # as C code that never returns to the interpreter
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGTERM, signal.SIGINT])
        time.sleep(600)
    if response == "die":
        os._exit(9)
    if response.startswith("spawn "):
        child = subprocess.Popen(["sleep", "600"])
        with open(response.removeprefix("spawn "), "w") as file:
            file.write(str(child.pid))
        time.sleep(600)
    return response == answer


def catastrophic(response, answer):
    return re.fullmatch(r"(a+)+b", response) is not None


def is_free_of_torch(response, answer):
    return "torch" not in sys.modules and "dapo.types" not in sys.modules


def process_id(response, answer):
    time.sleep(0.01)
    return os.getpid()


def slow(response, answer):
    time.sleep(0.02)
    return response == f"Answer: {answer}"


def one_or_two(response, answer):
    return response in ("1", "2")


NOT_A_FUNCTION = 3
