"""The guardian of one server: `python server.py TRAINER LOG COMMAND…` runs COMMAND until it ends, SIGTERM
arrives, or process TRAINER has ended.

Then it kills all that the command started: one process group, which SGLang's own children do not leave. The
command's output goes to LOG, without the API key in the environment. Linux and standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from types import FrameType
from typing import IO, NoReturn

KEY_VARIABLE = "DAPO_ENGINE_KEY"
CHECK_EVERY = 0.25  # seconds
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Log:
    """Appends whole lines to a file that only its owner may read."""

    def __init__(self, path: str):
        self.file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0)
        self.key = os.environ.get(KEY_VARIABLE, "").encode()
        self.line = b""

    def write(self, data: bytes, is_last: bool = False) -> None:
        text = self.line + data
        end = len(text) if is_last else max(text.rfind(b"\n"), text.rfind(b"\r")) + 1  # \r: progress bars
        self.line = text[end:]
        with contextlib.suppress(OSError):  # the disk is full: the server runs without its log
            self.file.write(text[:end].replace(self.key, b"***") if self.key else text[:end])


def main(trainer: int, log: Log, command: list[str]) -> int:
    """Run the command. Return its exit status, or 128 + the signal that ended it."""
    signal.signal(signal.SIGTERM, _exit)
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_PDEATHSIG, signal.SIGCONT)  # if this process is stopped, the trainer's end wakes it

    def die_with_guardian() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # SGLang's children watch their parent in the same way

    child = Popen(
        command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, process_group=0, preexec_fn=die_with_guardian
    )
    assert child.stdout is not None
    try:
        # the parent's id, not an end-of-file on a pipe: a fork of the trainer would keep that open
        while os.getppid() == trainer and child.poll() is None:
            _copy(child.stdout, log)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end(child, child.stdout, log)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end(child: Popen[bytes], pipe: IO[bytes], log: Log) -> None:
    with contextlib.suppress(ProcessLookupError):  # all have ended
        # not SIGTERM: a server has nothing to save, and SGLang would finish its requests first
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    while _copy(pipe, log):
        pass
    log.write(b"", is_last=True)


def _copy(pipe: IO[bytes], log: Log) -> bool:
    """Copy output to the log. Return True if there was any within CHECK_EVERY seconds."""
    ready, _, _ = select.select([pipe], [], [], CHECK_EVERY)
    data = os.read(pipe.fileno(), 1 << 16) if ready else b""
    log.write(data)
    if ready and not data:
        time.sleep(CHECK_EVERY)  # it closed its output, but may still run
    return bool(data)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Log(sys.argv[2]), sys.argv[3:]))
