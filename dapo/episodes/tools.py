"""Tools from plain functions: their schemas, and an environment that calls what the policy asks for."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from dapo.config import ConfigError
from dapo.episodes.environment import Message, Reply, ToolCall, Turn
from dapo.episodes.user_code import Raised, TimeUp
from dapo.reward.worker import import_function, place_of

MOST = 8192  # characters of a tool's answer; the rest is cut off
Tool = Callable[..., Any]
Caller = Callable[[Callable[[], Any]], Awaitable[Any]]  # UserCode.call, for an episode


def load(paths: Sequence[str]) -> dict[str, Tool]:
    """Import the functions at these paths, "module:name"; return them by name.

    Raises:
        ConfigError: there is no such function, or two have one name.
    """
    tools: dict[str, Tool] = {}
    for path in paths:
        try:
            function = import_function(path)
        except ValueError as error:
            what = str(error).partition("; expected")[0]
            raise ConfigError(f"rollout.tools={what}; expected module:function") from error
        name = getattr(function, "__name__", "")
        if not inspect.isfunction(function):
            raise ConfigError(f"rollout.tools={path} is {type(function).__name__}; expected a plain function")
        if name in tools:
            raise ConfigError(f"rollout.tools={path}: another tool is called {name!r} too: rename one")
        tools[name] = function
    return tools


def schemas(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Return the JSON schemas of tools, from their types and docstrings.

    Raises:
        ConfigError: a tool has no types, or no docstring that describes it and each argument.
    """
    from transformers.utils import chat_template_utils as hf  # imports torch, which the tools do not need

    found = []
    for path, function in zip(paths, load(paths).values(), strict=True):
        try:
            found.append(hf.get_json_schema(function))
        except (hf.DocstringParsingException, hf.TypeHintParsingException, NameError) as error:
            line = " ".join(str(error).split()).rstrip("!.")
            wanted = "give it types, and a docstring with a line for each argument below Args:"
            raise ConfigError(f"rollout.tools={path}: {line}; {wanted}") from error
    return found


class ToolBox:
    """Answers the policy's tool calls. It keeps nothing between them. `warn`: called with what a tool raised,
    and where.
    """

    def __init__(self, tools: dict[str, Tool], warn: Callable[[str], None] = lambda text: None):
        self.tools, self.warn = tools, warn

    async def step(self, reply: Reply, call: Caller, failure: str = "") -> tuple[Turn, int]:
        """Return the answers to the turn's calls, and how many of them are errors. Without calls the episode
        is done. `failure`: what became of the process when they were called before; they are not called.
        """
        if reply.is_truncated or not reply.tool_calls:
            return Turn(is_done=True), 0
        late = [failure] if failure else []  # why no others are called
        lock = asyncio.Lock()
        answers = await asyncio.gather(*(self._answer(each, call, late, lock) for each in reply.tool_calls))
        messages: list[Message] = [
            {"role": "tool", "name": each.name, "content": text}
            for each, (text, _) in zip(reply.tool_calls, answers, strict=True)
        ]
        return Turn(messages), sum(is_error for _, is_error in answers)

    async def _answer(
        self, asked: ToolCall, call: Caller, late: list[str], lock: asyncio.Lock
    ) -> tuple[str, bool]:
        """Return the text of an answer, and whether the tool failed.

        Calls that are not async are made one by one, none after one that was late: a turn may hold hundreds.
        """
        if asked.error:
            return f"Error: the call cannot be read: {asked.error}", False
        if asked.name not in self.tools:
            return f"Error: there is no tool {asked.name!r}; there is {', '.join(self.tools)}"[:MOST], True
        function = self.tools[asked.name]
        try:
            inspect.signature(function).bind(**asked.arguments)
        except TypeError as error:
            return f"Error: {asked.name}: {error}"[:MOST], True
        async with nullcontext() if inspect.iscoroutinefunction(function) else lock:
            if late:
                return f"Error: {late[0]}", True
            try:
                return _shown(await call(partial(function, **asked.arguments))), False
            except TimeUp:
                late.append(f"not called, for {asked.name} did not answer in time")
                return f"Error: {asked.name} did not answer in time", True
            except Raised as error:
                kind, place = type(error.error).__name__, place_of(error.error)
                self.warn(f"{asked.name} raised {kind}{place}; the policy reads that")
                return f"Error: {error}"[:MOST], True


def _shown(answer: Any) -> str:
    """Return an answer as text, else as JSON. Raise Raised if there is none."""
    try:
        text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)
    except Exception as error:  # `str` is the user's
        raise Raised(error) from error
    return text if len(text) <= MOST else f"{text[:MOST]} … ({len(text) - MOST} characters more)"
