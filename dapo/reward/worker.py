"""The code of a worker process, which calls reward functions. It must not import torch, even indirectly."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import reprlib
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from dapo.types import reason
from dapo.watch import frames, streams

Verdict = bool | float | tuple[float, bool]  # the pair: a reward, and whether it is correct
EXTRAS = (
    "row",
    "prompt",
    "messages",
    "truncated",
    "conversation",
)  # what a function may take by name: reward.function


class Failure(NamedTuple):
    """A call that returned no verdict: "returned nan", "raised KeyError: 'x' (rules.py:7)"."""

    what: str


class Job(NamedTuple):
    """A call to make, of the function with that number."""

    function: int
    response: str
    answer: str
    extras: tuple[tuple[str, Any], ...] = ()  # (name, value) of what the function asks for
    tokens: bytes = b""  # int32, in place of the response: decode them first


class Reply(NamedTuple):
    """The answer to a job: `has_answer` is None where the function's module defines no `answer_of`.

    `text` is what the job's tokens were decoded to, in replies of the first function.
    """

    verdict: Verdict | Failure
    has_answer: bool | None = None
    text: str | None = None


class Function:
    """A reward function and, if its module defines them, `answer_of`, which returns the answer found in a
    response, or None; and the path of `is_same`, which says whether two answers are one.

    `extras` are the names of what it asks for beside response and answer.

    Raises:
        ValueError: there is no such function, or it requires a parameter that nobody knows.
    """

    def __init__(self, path: str):
        self.call = import_function(path)
        self.extras = _extras_of(self.call, path)
        module = path.partition(":")[0]
        answer_of = getattr(sys.modules[module], "answer_of", None)
        self.answer_of: Callable[[str], str | None] | None = answer_of if callable(answer_of) else None
        self.is_same = f"{module}:is_same" if hasattr(sys.modules[module], "is_same") else None

    def judge(self, job: Job) -> Reply:
        """Return the function's verdict, or how it failed."""
        process = os.getpid()
        try:
            extras = copy.deepcopy(dict(job.extras))  # calls share them, and the function may change them
            verdict = checked(self.call(job.response, job.answer, **extras))
            has_answer = None if self.answer_of is None else self.answer_of(job.response) is not None
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's function may raise anything
            verdict = Failure(f"raised {described(error)}")
            has_answer = None
        if os.getpid() != process:  # a child that the function left behind: its parent has the verdict
            os._exit(0)
        return Reply(verdict, has_answer)


def described(error: BaseException) -> str:
    """Return kind, message and place of an error, in one line: "KeyError: 'x' (rules.py:7)"."""
    return f"{type(error).__name__}: {reason(error)[:300]}{place_of(error)}"


def place_of(error: BaseException) -> str:
    """Return where an error was raised: " (rules.py:7)"; nothing if it never was."""
    places = traceback.extract_tb(error.__traceback__)[-1:]
    return "".join(f" ({each.filename}:{each.lineno})" for each in places)


def serve(connection: socket.socket, paths: Sequence[str]) -> None:
    """Import the functions, send None, then reply to each list of jobs until the other side closes.

    What comes before the jobs is None or the JSON of a tokenizers.Tokenizer, which decodes their tokens, once
    if they follow each other. None is sent then, too: decoding takes none of a call's time.
    """
    streams.keep_open()  # a function may print

    def send(message: Reply | Failure | None) -> None:
        connection.sendall(frames.frame(message))

    with suppress(OSError):  # the other side has ended
        try:
            functions = [Function(path) for path in paths]
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's module may raise anything
            send(Failure(f"reward.function={reason(error)}"))
            return
        received = frames.messages(connection)
        tokenizer: str | None = next(received, None)
        try:
            decode = None if tokenizer is None else _decoder(tokenizer)
        except Exception as error:  # noqa: BLE001  # tokenizers raises it itself
            send(Failure(f"policy.model: no reward worker can load its tokenizer: {reason(error)}"))
            return
        send(None)
        tokens, text = b"", ""
        for jobs in received:
            for job in jobs:
                if decode and job.tokens:
                    if job.tokens != tokens:
                        tokens, text = job.tokens, decode(job.tokens)
                        send(None)
                    job = job._replace(response=text)
                reply = functions[job.function].judge(job)
                is_first = job.tokens and job.function == 0
                send(reply._replace(text=text) if is_first else reply)


def _decoder(tokenizer: str) -> Callable[[bytes], str]:
    """Return what makes text of token ids, without special tokens."""
    from tokenizers import Tokenizer  # nothing else here needs it

    loaded = Tokenizer.from_str(tokenizer)
    return lambda tokens: loaded.decode(memoryview(tokens).cast("i").tolist(), skip_special_tokens=True)


def checked(verdict: Any) -> Verdict | Failure:
    """Return a verdict as a bool, a finite float, or a pair of both; anything else as a failure: None →
    "returned None".
    """
    if isinstance(verdict, tuple) and len(verdict) == 2:
        reward, is_correct = map(_checked_scalar, verdict)
        if isinstance(reward, float) and isinstance(is_correct, bool):
            return reward, is_correct
    found = _checked_scalar(verdict)
    return Failure(f"returned {reprlib.repr(verdict)}") if found is None else found


def _checked_scalar(value: Any) -> bool | float | None:
    """Return a bool or a finite number, which may be a scalar of NumPy or torch; None for anything else."""
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, bool):
        return value
    # neither NaN nor an integer beyond floats
    return float(value) if isinstance(value, int | float) and abs(value) <= 1e308 else None


def _extras_of(function: Callable[..., Any], path: str) -> tuple[str, ...]:
    """Return which of EXTRAS a function has a parameter for. Raise ValueError if that is not all it needs."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function in C need not say
        return ()
    if (
        inspect.isclass(function)
        or inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
    ):
        raise ValueError(
            f"{path} is a class, async, or a generator; expected a function that returns a verdict"
        )
    parameters = signature.parameters.values()
    if [p.name for p in parameters][:2] == ["answer", "response"]:
        raise ValueError(f"{path} takes (answer, response), but is called as f(response, answer): swap them")
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    extras = tuple(name for name in EXTRAS if name in named)
    try:
        signature.bind("", "", **dict.fromkeys(extras))
    except TypeError as error:
        expected = f"expected f(response, answer), and by name any of {', '.join(EXTRAS)}"
        raise ValueError(f"{path}: {error}; {expected}") from None
    return extras


def import_function(path: str) -> Callable[..., Any]:
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
