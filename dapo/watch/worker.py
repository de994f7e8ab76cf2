"""The guardian of a reward worker: the worker's parent process, which ends it and everything it started.

It does so when the worker has ended or SIGTERM arrives, when the main process has ended, however that was,
and when the worker and what it started need too much memory. Orphans come back to the guardian, so that a
process that left the worker's group and session ends, too. Linux only. It must not import torch, even
indirectly.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from dapo.watch.rank import has_ended, open_process

MEMORY_EXCEEDED = 113  # exit status
CHECK_EVERY = 0.1  # seconds between two checks of the main process and of the memory
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_SIGNALS = {signal.SIGTERM, signal.SIGCHLD}  # blocked, and waited for: no handler runs in between
_PAGE = os.sysconf("SC_PAGE_SIZE")


Serve = Callable[[socket.socket, Sequence[str]], None]


def guard(serve: Serve, connection: socket.socket, paths: Sequence[str], main: int, max_bytes: int) -> None:
    """Run a worker, which calls `serve(connection, paths)`, until it or process `main` has ended.

    End it, and exit with MEMORY_EXCEEDED, once it needs more than `max_bytes` of memory.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    os.setpgid(0, 0)  # Ctrl-C is for the main process
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    guardian = os.getpid()
    watched = open_process(main)
    if watched is None:
        return
    worker = os.fork()
    if worker == 0:
        os.close(watched)
        os.setpgid(0, 0)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        _work(serve, connection, paths, guardian)
    connection.close()
    status = _watch(worker, watched, max_bytes)
    with contextlib.suppress(OSError):
        os.killpg(worker, signal.SIGKILL)
    _end_descendants()
    sys.exit(status)


def _work(serve: Serve, connection: socket.socket, paths: Sequence[str], guardian: int) -> NoReturn:
    status = 1
    try:
        if os.getppid() == guardian:  # else it ended before its end could become this process's
            serve(connection, paths)
            status = 0
    except BaseException:  # noqa: BLE001  # whatever it was, this process must not become a second guardian
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _watch(worker: int, main: int, max_bytes: int) -> int:
    """Wait for one of the reasons to end. Return the exit status that says which. `main` is for has_ended."""
    while True:
        received = signal.sigtimedwait(_SIGNALS, CHECK_EVERY)
        if received and received.si_signo == signal.SIGTERM:
            return 0
        if has_ended(main):
            return 0
        while pid := os.waitpid(-1, os.WNOHANG)[0]:
            if pid == worker:
                return 0
        if memory(descendants(os.getpid()), max_bytes) > max_bytes:
            return MEMORY_EXCEEDED


def _end_descendants() -> None:
    # killed ones are listed until they are waited for, and what they started meanwhile is listed then
    while pids := descendants(os.getpid()):
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def descendants(pid: int) -> list[int]:
    """Return the ids of all processes below `pid`, ended ones included until somebody waits for them."""
    found: list[int] = []
    parents = [pid]
    while parents:
        tasks = f"/proc/{parents.pop()}/task"
        with contextlib.suppress(OSError):  # it ended meanwhile
            for task in os.listdir(tasks):
                with open(f"{tasks}/{task}/children") as file:
                    children = [int(child) for child in file.read().split()]
                found += children
                parents += children
    return found


def memory(pids: Iterable[int], enough: int = 0) -> int:
    """Return the bytes of main memory that processes hold, each shared page counted once.

    Counting shared pages takes long: up to `enough` bytes the plain sum, which is never less, is returned.
    """
    pids = list(pids)
    plain = sum(_resident(pid) for pid in pids)
    return plain if plain <= enough else sum(_proportional(pid) for pid in pids)


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * _PAGE
    return 0


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return _resident(pid)  # a process that cannot be dumped shows no more
