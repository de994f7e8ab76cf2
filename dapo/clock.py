"""Where a step's seconds go: `@timed("update")` on a method, one `take()` per step."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_seconds: defaultdict[str, float] = defaultdict(float)


_phases: list[str] = []  # that this rank is in, innermost last
_beats = 0


def beat() -> None:
    """Say that this rank gets on: a sample came in, a microbatch was computed, a tensor was sent."""
    global _beats
    _beats += 1


def pulse() -> tuple[int, str]:
    """Beats so far, the beginning and end of every phase among them, and the phase that this rank is in, ""
    between phases.
    """
    return _beats, " > ".join(_phases)


_listeners: list[Callable[[str], None]] = []


def listen(listener: Callable[[str], None]) -> None:
    """Tell `listener` of every phase as it begins."""
    _listeners.append(listener)


def timed(phase: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Add the wall time of every call to `phase`. A phase inside another counts in both."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for listener in _listeners:
                listener(phase)
            start = time.perf_counter()
            _phases.append(phase)
            beat()
            try:
                return function(*args, **kwargs)
            finally:
                _phases.pop()
                beat()
                _seconds[phase] += time.perf_counter() - start

        return call

    return decorate


def take() -> dict[str, float]:
    """Seconds by phase since the last call, on this rank: {"time/rollout": 1.2, …}."""
    taken = {f"time/{phase}": seconds for phase, seconds in _seconds.items()}
    _seconds.clear()
    return taken
