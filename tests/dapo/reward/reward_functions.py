"""Reward functions for the tests. Workers import this file: nothing here may import torch."""

import json
import mmap
import multiprocessing
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
    return look_up(response)


def look_up(name):
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


def cut_off(response, answer):
    """Hangs for "hang", after a part of what may be a reply has left."""
    if response == "hang":
        frame = sys._getframe()
        while frame.f_code.co_name != "serve":
            frame = frame.f_back
        os.write(frame.f_locals["connection"].fileno(), bytes([0, 0, 1, 0, 0, 0, 0, 0, 0]))
        time.sleep(600)
    return response == answer


def dying(response, answer):
    os._exit(9)


def dying_at_2(response, answer):
    return os._exit(1) if response == "2" else response == answer


def forked(response, answer):
    """Returns twice: in this process and in a child, which the first does not wait for."""
    os.fork()
    return response == answer


def parallel(response, answer):
    with multiprocessing.Pool(2) as pool:
        return sum(pool.map(int, response.split("+"))) == int(answer)


def forgetful(response, answer):
    """Leaves a process behind that nobody waits for, and writes its id to the file that the answer names."""
    process = multiprocessing.Process(target=time.sleep, args=(600,))
    process.start()
    with open(answer, "a") as file:
        file.write(f"{os.getpid()} {process.pid}\n")
    return True


def escaping(response, answer):
    """Starts a process in a session of its own, whose parent has ended, writes its id and hangs."""
    escape = "sleep 600 & echo $! >> " + answer
    subprocess.run(["setsid", "sh", "-c", escape], check=True)
    with open(answer, "a") as file:
        file.write(f"{os.getpid()}\n")
    if response == "die":
        os._exit(9)
    time.sleep(600)


def hoarding(response, answer):
    """Holds as many MiB as the response says, here or in a process that it starts; or reserves them only."""
    where, size = response.split()
    num_bytes = int(size) << 20
    if where == "reserved":
        with mmap.mmap(-1, num_bytes):
            time.sleep(0.5)
        return True
    code = f"import time; block = bytearray(b'x') * {num_bytes}; time.sleep({600 if num_bytes >> 27 else 0})"
    if where == "below":
        subprocess.run([sys.executable, "-c", code], check=True)
    else:
        exec(code)
    return True


def catastrophic(response, answer):
    return re.fullmatch(r"(a+)+b", response) is not None


def is_free_of_torch(response, answer):
    return not {"torch", "numpy"} & sys.modules.keys()


def process_id(response, answer):
    time.sleep(0.01)
    return os.getpid()


def slow(response, answer):
    time.sleep(0.02)
    return response == f"Answer: {answer}"


def one_or_two(response, answer):
    return response in ("1", "2")


def evaluated(response, answer):
    return eval(response)


def pair(response, answer):
    return float(response), response == answer


def seeing(response, answer, row, prompt, *, messages, truncated=None, tolerance=0.1):
    return json.loads(response) == [row, prompt, messages, truncated]


def looking(response, answer, row, prompt, messages):
    """Sees a chain sum of examples/arithmetic."""
    assert (row, messages) == ({}, None) and prompt.endswith("=") and eval(prompt[:-1]) == int(answer)
    return f"Answer: {answer}" in response


def level(response, answer, row):
    return row.pop("level") == response  # as a careless function may


def calls_once(response, answer, conversation):
    """True if the response is that of the last turn, after one answer of a tool."""
    if conversation is None:
        return False
    last, tools = conversation[-1], [message for message in conversation if message["role"] == "tool"]
    return last == {"role": "assistant", "content": response} and len(tools) == 1


def unfinished(response, answer, truncated):
    return truncated


class Callable:
    def __call__(self, response, answer, *more, prompt, **others):
        return prompt == response


called = Callable()
by_position = eval("lambda response, answer, row, /: True")
in_c = max


def demanding(response, answer, tolerance):
    return True


def first_row(row, answer):
    return True


def alone(response):
    return True


NOT_A_FUNCTION = 3


async def later(response, answer):
    return True


def one_by_one(response, answer):
    yield True


def swapped(answer, response):
    return True


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("not even this")


def evil(response, answer):
    raise Unprintable
