"""A worker process under its guardian, as its main process has it."""

from __future__ import annotations

import atexit
import os
import socket
import weakref
from collections.abc import Sequence

from dapo.watch import forked
from dapo.watch.frames import Channel
from dapo.watch.worker import MEMORY_EXCEEDED, Serve, guard

END_TIMEOUT = 5.0  # seconds for a guardian to end its worker


class Guarded:
    """A process that calls `serve(connection, paths)`; `channel` is the other end of its connection.

    Its guardian alone is a child of multiprocessing here. It is no daemon, because those may have no
    children, and a user's function may use multiprocessing itself.
    """

    def __init__(self, serve: Serve, paths: Sequence[str], max_bytes: int, name: str):
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        arguments = (serve, theirs, paths, os.getpid(), max_bytes)
        self.guardian = forked.context.Process(target=guard, args=arguments, name=name)
        forked.start(self.guardian)
        theirs.close()
        _running.add(self)

    def end(self) -> bool:
        """End it and all that it started. Return True if it was being ended for its memory."""
        self.channel.close()
        self.guardian.terminate()
        self.guardian.join(END_TIMEOUT)
        if self.guardian.exitcode is None:
            self.guardian.kill()  # its worker dies with it
            self.guardian.join()
        return self.guardian.exitcode == MEMORY_EXCEEDED


_running: weakref.WeakSet[Guarded] = weakref.WeakSet()


def _end_running(process: int = os.getpid()) -> None:
    """End all workers of this process, which multiprocessing would otherwise wait for when it exits."""
    if os.getpid() == process:  # not those of the process that this one is a fork of
        for worker in list(_running):
            worker.end()


atexit.register(_end_running)  # before multiprocessing's own function, which was registered earlier
