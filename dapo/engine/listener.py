"""Says which process listens at a port of this machine, so that no other one gets a key. Linux only.

Any user may read who listens where, and take a port that a server has chosen but not opened yet.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

from dapo.http import NoAnswer

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LISTENING = "0A"  # linux/net/tcp_states.h


class Taken(NoAnswer):
    """A process of somebody else listens at the port. The message is one line that names both."""


class Listener:
    """The socket that listens at a port, as long as a process of the guardian's session holds it."""

    def __init__(self, url: str, guardian: Popen[Any]):
        self.url = url  # http://host:port
        self.port = int(url.rpartition(":")[2])
        self.guardian = guardian  # its process id is the session's
        self._held = "", ""  # /proc/<pid>/fd/<n>, and what it is a link to

    def require(self) -> None:
        """Raise NoAnswer unless the guardian's session listens at the port; Taken if anybody else does.

        It costs one system call while the socket found at the last call is still held: nobody else can have
        its port then.
        """
        descriptor, held = self._held
        if not held or _target(descriptor) != held:
            self._held = self._find()

    def is_held(self) -> bool:
        """Return True if the guardian's session listens at the port; raise Taken if anybody else does."""
        try:
            self.require()
        except Taken:
            raise
        except NoAnswer:
            return False
        return True

    def _find(self) -> tuple[str, str]:
        found = "", ""
        for inode, user in _listening(self.port):
            held = f"socket:[{inode}]"
            ours = (pid for pid in _pids() if _session_of(pid) == self.guardian.pid)
            # once the guardian has ended, its id may be another process's
            if self.guardian.poll() is not None or not (descriptor := _holder(held, ours)):
                by = _holder(held, _pids()).split("/")  # ["", "proc", pid, …], or [""] if we may not see
                process = f"process {by[2]}" if len(by) > 2 else "a process"
                raise Taken(f"port {self.port} is held by {process} of user {_name(user)}")
            found = descriptor, held
        if not found[1]:
            raise NoAnswer(f"nobody listens at port {self.port}")
        return found


def _listening(port: int) -> Iterator[tuple[str, int]]:
    """Yield inode and user id of each socket that listens at this port, at any of the machine's addresses."""
    for table in TABLES:
        with contextlib.suppress(FileNotFoundError):  # a machine without IPv6
            for line in table.read_text().splitlines()[1:]:
                _, local, _, state, _, _, _, user, _, inode, *_ = line.split()
                if state == LISTENING and int(local.split(":")[1], 16) == port:
                    yield inode, int(user)


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:  # it has ended, or the system hides it from us
        return 0


def _holder(held: str, pids: Iterator[int]) -> str:
    """Return the first descriptor of these processes that is this socket; "" if we see none."""
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            for number in os.listdir(f"/proc/{pid}/fd"):
                if _target(descriptor := f"/proc/{pid}/fd/{number}") == held:
                    return descriptor
    return ""


def _target(descriptor: str) -> str:
    try:
        return os.readlink(descriptor)
    except OSError:
        return ""


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)
