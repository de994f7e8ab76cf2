"""The code of a worker process, which calls reward functions. It must not import torch, even indirectly."""

from __future__ import annotations

import importlib
import os
import reprlib
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

Verdict = bool | float


class Failure(NamedTuple):
    """A call that returned no verdict: "returned nan", "raised KeyError: 'x' (rules.py:7)"."""

    what: str


class Job(NamedTuple):
    """A call to make: `functions[function](response, answer)`."""

    function: int
    response: str
    answer: str


def serve(connection: Connection, paths: Sequence[str], timeout: float) -> None:
    """Import the functions, send None, then answer each list of jobs until the other side closes."""
    # Ctrl-C is for the main process; and processes that a function starts end with this group
    os.setpgid(0, 0)
    try:
        try:
            functions = [import_function(path) for path in paths]
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's module may raise anything
            connection.send(Failure(str(error)))
            return
        connection.send(None)
        while True:
            for job in connection.recv():
                # its default action ends this process if the main process died and cannot
                signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
                verdict = judge(functions[job.function], job.response, job.answer)
                signal.setitimer(signal.ITIMER_REAL, 0)
                connection.send(verdict)
    except (EOFError, OSError):
        return


def judge(function: Callable[[str, str], Any], response: str, answer: str) -> Verdict | Failure:
    """Return the function's verdict as a bool or a finite float, or how it failed."""
    try:
        return checked(function(response, answer))
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's function may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        return Failure(f"raised {type(error).__name__}: {text} ({place.filename}:{place.lineno})")


def checked(verdict: Any) -> Verdict | Failure:
    """Return a verdict as a bool or a finite float; anything else as a failure: None → "returned None"."""
    if getattr(verdict, "shape", None) == ():  # a scalar of NumPy or torch
        verdict = verdict.item()
    if isinstance(verdict, bool):
        return verdict
    # neither NaN nor an integer beyond floats
    if isinstance(verdict, int | float) and abs(verdict) <= 1e308:
        return float(verdict)
    return Failure(f"returned {reprlib.repr(verdict)}")


def import_function(path: str) -> Callable[[str, str], Any]:
    """Import a function by its path, "dapo.reward:is_correct". Raise ValueError if there is none."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        expected = "module:name of f(response, answer), or http://host:port/path"
        raise ValueError(f"{path}: {error}; expected {expected}") from error
    if not callable(function):
        raise ValueError(f"{path} is {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]
