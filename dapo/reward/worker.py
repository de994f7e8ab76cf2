"""The code of a worker process, which calls reward functions. It must not import torch, even indirectly."""

from __future__ import annotations

import contextlib
import importlib
import os
import reprlib
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from dapo.watch import streams

Verdict = bool | float


class Failure(NamedTuple):
    """A call that returned no verdict: "returned nan", "raised KeyError: 'x' (rules.py:7)"."""

    what: str


class Job(NamedTuple):
    """A call to make, of the function with that number."""

    function: int
    response: str
    answer: str


class Reply(NamedTuple):
    """The answer to a job: `has_answer` is None where the function's module defines no `answer_of`."""

    verdict: Verdict | Failure
    has_answer: bool | None = None


class Function:
    """A reward function and, if its module defines them, `answer_of`, which returns the answer found in a
    response, or None; and the path of `is_same`, which says whether two answers are one.

    Raises:
        ValueError: there is no such function.
    """

    def __init__(self, path: str):
        self.call = import_function(path)
        module = path.partition(":")[0]
        answer_of = getattr(sys.modules[module], "answer_of", None)
        self.answer_of: Callable[[str], str | None] | None = answer_of if callable(answer_of) else None
        self.is_same = f"{module}:is_same" if hasattr(sys.modules[module], "is_same") else None

    def judge(self, response: str, answer: str) -> Reply:
        """Return the function's verdict as a bool or a finite float, or how it failed."""
        process = os.getpid()
        try:
            verdict = checked(self.call(response, answer))
            has_answer = None if self.answer_of is None else self.answer_of(response) is not None
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's function may raise anything
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:300]
            verdict = Failure(f"raised {type(error).__name__}: {text} ({place.filename}:{place.lineno})")
            has_answer = None
        if os.getpid() != process:  # a child that the function left behind: its parent has the verdict
            os._exit(0)
        return Reply(verdict, has_answer)


def serve(connection: Connection, paths: Sequence[str]) -> None:
    """Import the functions, send None, then reply to each list of jobs until the other side closes."""
    streams.keep_open()  # a function may print
    with contextlib.suppress(EOFError, OSError):
        try:
            functions = [Function(path) for path in paths]
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's module may raise anything
            connection.send(Failure(str(error)))
            return
        connection.send(None)
        while True:
            for job in connection.recv():
                connection.send(functions[job.function].judge(job.response, job.answer))


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
