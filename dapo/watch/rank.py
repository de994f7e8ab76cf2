"""The guardian of a rank: `python rank.py RANK LAUNCHER MARK SECONDS`, four arguments that `guard` gives.

Once process RANK has ended, however it ended, it ends every process that bears the mark: what the rank has
started, and what those have started, in process groups and sessions of their own too. If process LAUNCHER
(torchrun; 0: none) ends first, it asks the rank to save and stop, and ends it if it has not after SECONDS. A
script of the standard library, for Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

MARK = "DAPO_STARTED_BY"  # environment variable of all that a rank starts
PR_SET_PDEATHSIG = 1  # linux/prctl.h
CHECK_EVERY = 0.25  # seconds between two checks whether a process has ended
GRACE = 5.0  # seconds for marked processes to end by themselves, as servers' guardians do


_command: list[str] = []  # of this process's guardian, once it has one
_guardian: subprocess.Popen[bytes] | None = None


def guard(seconds: float) -> None:
    """Start the guardian of this process, before the process starts any other. A second call does nothing."""
    if sys.platform == "linux" and not _command:
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
        mark = f"{os.getpid()}.{time.time_ns()}"
        script = [sys.executable, "-I", "-S", __file__]
        _command.extend([*script, str(os.getpid()), str(launcher), mark, str(seconds)])
        renew()
        os.environ[MARK] = mark


def renew() -> None:
    """Start the guardian again if it has ended. If no process can be started now, the next call may."""
    global _guardian
    if _command and (_guardian is None or _guardian.poll() is not None):
        null = subprocess.DEVNULL
        environment = {name: value for name, value in os.environ.items() if name != MARK}
        # in a session of its own it does not receive Ctrl-C
        with contextlib.suppress(OSError):
            _guardian = subprocess.Popen(
                _command, env=environment, stdin=null, stdout=null, start_new_session=True
            )


def main(rank: int, launcher: int, mark: str, seconds: float) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)  # if it is stopped, the rank's end wakes it
    if _is_orphaned(rank, launcher):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(rank, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while os.getppid() == rank and time.monotonic() < deadline:
            time.sleep(CHECK_EVERY)
        if os.getppid() == rank:
            say(f"process {rank} has not ended {seconds:.0f} s after its launcher: it is killed")
            os.kill(rank, signal.SIGKILL)
    _end_marked(f"{MARK}={mark}".encode())


def _is_orphaned(rank: int, launcher: int) -> bool:
    """Wait until the rank, the parent, or its launcher has ended. Return True if the launcher ended first."""
    watched = open_process(launcher) if launcher else None
    while os.getppid() == rank:
        if launcher and has_ended(watched):
            if os.environ.get("LOCAL_RANK") == "0":
                say(f"the launcher, process {launcher}, has ended without its ranks: they save and stop")
            return True
        time.sleep(CHECK_EVERY)
    return False


def open_process(process: int) -> int | None:
    """Return a descriptor for `has_ended`; None if the process has ended.

    Not a pidfd, which older kernels and many builds of Python lack.
    """
    try:
        return os.open(f"/proc/{process}/statm", os.O_RDONLY)
    except FileNotFoundError:
        return None


def has_ended(descriptor: int | None) -> bool:
    """Return True if the process has ended, even if nobody waits for it, or its id is another's by now."""
    try:
        return descriptor is None or os.pread(descriptor, 1, 0) == b"0"  # pages in its address space
    except ProcessLookupError:
        return True


def _end_marked(mark: bytes) -> None:
    begin = time.monotonic()
    while marked := list(_marked(mark)):
        if time.monotonic() - begin > GRACE:
            for process in marked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


def _marked(mark: bytes) -> Iterator[int]:
    for name in filter(str.isdigit, os.listdir("/proc")):
        # another user's process, one that has ended, or the kernel's
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as environment:
            if mark in environment.read().split(b"\0"):
                yield int(name)


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(f"dapo: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
