"""The wish to stop: SIGINT, SIGTERM, SIGHUP or SIGUSR1 at any rank."""

from __future__ import annotations

import select
import signal
import socket
import threading
import time
from typing import Any

from torch._C._distributed_c10d import Store

from dapo.types import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
CHECK_EVERY = 1.0  # seconds between two checks of the store by the main rank


class Interruption:
    """A call returns True once such a signal has reached this rank; on the main rank, any rank.

    A handler in Python waits until the main thread leaves C code, which may be a collective that lasts as
    long as a rollout. So a thread receives the signal's number too, and informs the main rank through
    the ranks' store. A second Ctrl-C, more than 2 seconds later, ends the process. SIGHUP stays ignored under
    nohup. Linux delivers signals to the main thread, which must be the one that makes this object.
    """

    def __init__(self, store: Store, is_main: bool):
        self.store, self.is_main = store, is_main
        self.since: float | None = None
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._watch, name="interruption", daemon=True)
        self._thread.start()

    def __call__(self) -> bool:
        return self.since is not None

    def close(self) -> None:
        """Stop the thread; the handlers stay: a signal while the run ends ends nothing half-way."""
        signal.set_wakeup_fd(-1)
        self._write.send(b"\0")
        self._thread.join(CHECK_EVERY)
        if not self._thread.is_alive():  # a store that has ended may keep it longer
            self._read.close()
            self._write.close()

    def _handle(self, number: int, frame: Any) -> None:
        if self.since is not None and number == signal.SIGINT and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt
        self._note(number)

    def _note(self, number: int) -> None:
        if self.since is None:
            Interrupted.number = number
            self.since = time.monotonic()

    def _watch(self) -> None:
        poll = select.poll()  # select() takes no descriptor above 1023, and a large mesh has more sockets
        poll.register(self._read, select.POLLIN)
        try:
            while True:
                ready = poll.poll(1000 * CHECK_EVERY if self.is_main else None)
                numbers = self._read.recv(64) if ready else b""
                if 0 in numbers:  # `close` sent it
                    return
                for number in filter(SIGNALS.__contains__, numbers):
                    self._note(number)
                    self.store.set("signal", str(number))
                if self.is_main and self.store.check(["signal"]):
                    self._note(int(self.store.get("signal")))
        except RuntimeError:  # the store has ended with the launcher: a rank's guardian signals every rank
            return
