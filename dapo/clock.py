"""Seconds of a step by phase, and the process's heartbeat.

`@timed("update")` on a method, `take()` once a step.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Range = Callable[[str], AbstractContextManager[object]]

_lock = threading.Lock()
_seconds: defaultdict[str, float] = defaultdict(float)
_heartbeats = 0
_waits = 0
_phases: dict[int, list[str]] = {}  # thread id → the phases it is in, innermost last
_listeners: list[Callable[[str], None]] = []
_range: Range = nullcontext  # a phase's name → what its calls are put into


def heartbeat() -> None:
    """Report progress: a sample came in, a microbatch was computed, a tensor was sent."""
    global _heartbeats
    with _lock:
        _heartbeats += 1


def waiting() -> None:
    """Report that a phase's own thread waits, in a loop that ends the wait by a timeout of its own.

    It is no progress, and no hang either. Ignored from a thread that is in no phase.
    """
    global _waits
    with _lock:
        _waits += threading.get_ident() in _phases


def progress() -> tuple[int, int, str]:
    """Return the number of heartbeats so far, that of `waiting` calls, and the phases, "" between phases.

    Phases of one thread are nested, those of several threads stand side by side: "update | rollout > sync".
    Each phase counts a heartbeat at its beginning and one at its end.
    """
    with _lock:
        return _heartbeats, _waits, " | ".join(" > ".join(phases) for phases in _phases.values())


def listen(listener: Callable[[str], None]) -> None:
    """Call `listener` with the name of every phase as it begins."""
    _listeners.append(listener)


def forget(listener: Callable[[str], None]) -> None:
    """Call a listener no more."""
    _listeners[:] = [other for other in _listeners if other != listener]


def put_into(range: Range = nullcontext) -> None:
    """Put the calls of every phase into `range(phase)`, from now on: a profiler shows them as ranges."""
    global _range
    _range = range


def timed(phase: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Add the wall time of every call to `phase`. A phase inside another counts in both."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for listener in _listeners:
                listener(phase)
            start = time.perf_counter()
            _enter(phase)
            try:
                with _range(phase):
                    return function(*args, **kwargs)
            finally:
                _leave(phase, time.perf_counter() - start)

        return call

    return decorate


def take() -> dict[str, float]:
    """Return this process's seconds by phase since the last call: {"time/rollout": 1.2, …}."""
    with _lock:
        taken = {f"time/{phase}": seconds for phase, seconds in _seconds.items()}
        _seconds.clear()
    return taken


def _enter(phase: str) -> None:
    with _lock:
        _phases.setdefault(threading.get_ident(), []).append(phase)
    heartbeat()


def _leave(phase: str, seconds: float) -> None:
    thread = threading.get_ident()
    with _lock:
        _phases[thread].pop()
        if not _phases[thread]:
            del _phases[thread]
        _seconds[phase] += seconds
    heartbeat()
