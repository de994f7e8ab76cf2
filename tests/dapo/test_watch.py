"""Signals at any rank, and the guardian of a rank, each in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dapo.watch.rank import has_ended, open_process

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guardians are for Linux")

# a rank: guarded, it starts a child in a session of its own, which starts one too, and waits
RANK = """
import os, subprocess, sys, time
from dapo.watch.rank import guard
guard(float(sys.argv[1]))
nested = "import subprocess as s, time; s.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", nested], start_new_session=True)
print(os.getpid(), flush=True)
if "deaf" in sys.argv:
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""
# torchrun: starts a rank, and waits
LAUNCHER = """
import os, subprocess, sys
os.environ["TORCHELASTIC_RUN_ID"], os.environ["LOCAL_RANK"] = "1", "0"
subprocess.run([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
"""
# waits in C code, as in a collective, and prints what the interruption knows then
INTERRUPTED = """
import os, resource, sys, threading, time
import torch.distributed as dist
from dapo.types import Interrupted
from dapo.watch.interruption import Interruption
store = dist.HashStore()
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
others = [os.dup(0) for _ in range(1100)]  # as a mesh of many ranks has them
num_open = len(os.listdir("/proc/self/fd"))
is_interrupted = Interruption(store, is_main=False)

def watch():
    while not store.check(["signal"]):
        time.sleep(0.01)
    print(store.get("signal").decode(), is_interrupted(), Interrupted().signal, flush=True)
    lock.release()

lock = threading.Lock()
lock.acquire()
threading.Thread(target=watch, daemon=True).start()
print("ready", flush=True)
lock.acquire()  # no handler runs in here
is_interrupted.close()
sys.exit(len(os.listdir("/proc/self/fd")) - num_open)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
        **pipes,
    )
    limit = threading.Timer(120, process.kill)  # a test that waits for a line fails then
    limit.daemon = True
    limit.start()
    return process


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.fixture
def family() -> Iterator[list[psutil.Process]]:
    """Processes that must have ended when the test ends; what has not is killed."""
    processes: list[psutil.Process] = []
    yield processes
    alive = psutil.wait_procs(processes, timeout=15)[1]
    for process in alive:
        process.kill()
    assert not alive, "it has outlasted its rank"


def everything_below(process: int, num: int) -> list[psutil.Process]:
    """Wait until `num` processes are below this one, guardians included."""
    deadline = time.monotonic() + 20
    while len(found := psutil.Process(process).children(recursive=True)) < num:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def test_what_a_killed_rank_has_started_ends_in_sessions_of_its_own_too(family):
    rank = start(RANK, "5")
    number = int(line_of(rank))
    family += everything_below(number, 3)
    rank.kill()
    rank.wait()


def test_a_stopped_guardian_wakes_when_its_rank_ends(family):
    rank = start(RANK, "5")
    number = int(line_of(rank))
    family += everything_below(number, 3)
    [guardian] = [process for process in family if "watch/rank.py" in " ".join(process.cmdline())]
    time.sleep(0.5)  # it has started
    guardian.suspend()
    rank.kill()
    rank.wait()


def test_a_rank_whose_launcher_is_killed_gets_sigterm_and_the_reason_is_printed_once(family):
    launcher = start(LAUNCHER, RANK, "30")
    number = int(line_of(launcher))
    family += [psutil.Process(number), *everything_below(number, 3)]
    launcher.kill()
    assert launcher.stderr
    assert launcher.stderr.read() == (
        f"dapo: the launcher, process {launcher.pid}, has ended without its ranks: they save and stop\n"
    )


def test_a_rank_that_does_not_end_after_its_launcher_is_killed_in_the_end(family):
    launcher = start(LAUNCHER, RANK, "1", "deaf")
    number = int(line_of(launcher))
    family += [psutil.Process(number), *everything_below(number, 3)]
    launcher.kill()
    assert launcher.stderr
    assert f"process {number} has not ended 1 s after its launcher: it is killed" in launcher.stderr.read()


def test_without_a_launcher_a_rank_goes_on_when_its_parent_ends(family):
    code = LAUNCHER.replace('os.environ["TORCHELASTIC_RUN_ID"], os.environ["LOCAL_RANK"] = "1", "0"', "")
    parent = start(code, RANK, "1")
    number = int(line_of(parent))
    family += [psutil.Process(number), *everything_below(number, 3)]
    parent.kill()
    parent.wait()
    time.sleep(1)
    assert psutil.pid_exists(number) and psutil.Process(number).status() == psutil.STATUS_SLEEPING
    psutil.Process(number).kill()


def test_a_process_that_nobody_waits_for_has_ended_too():
    process = subprocess.Popen(["sleep", "600"])
    descriptor = open_process(process.pid)
    assert descriptor is not None and not has_ended(descriptor)
    process.send_signal(signal.SIGSTOP)
    assert not has_ended(descriptor), "it is only stopped"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(descriptor), "it waits for its parent"
    process.wait()
    assert has_ended(descriptor)
    assert open_process(process.pid) is None and has_ended(None)
    os.close(descriptor)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_noted_and_passed_on_while_the_main_thread_is_in_c_code(number):
    process = start(INTERRUPTED)
    assert line_of(process) == "ready"
    process.send_signal(number)
    assert line_of(process) == f"{int(number)} True {int(number)}"
    assert process.wait(20) == 0, process.stderr
