"""Adds up the seconds in which an engine, or one of its servers, had nothing to generate."""

from __future__ import annotations

import threading
import time


class Idle:
    """A watch that runs while there is nothing to do. Any thread may use it."""

    def __init__(self) -> None:
        self._since: float | None = time.monotonic()  # None: there is something to do
        self._seconds = 0.0  # until then
        self._lock = threading.Lock()

    def note(self, is_idle: bool) -> None:
        """Note that there is nothing to do from now on, or something."""
        with self._lock:
            self._add(is_idle)

    def take(self) -> float:
        """Return the seconds since the last call."""
        with self._lock:
            self._add(self._since is not None)
            seconds, self._seconds = self._seconds, 0.0
            return seconds

    def _add(self, is_idle: bool) -> None:
        now = time.monotonic()
        if self._since is not None:
            self._seconds += now - self._since
        self._since = now if is_idle else None
