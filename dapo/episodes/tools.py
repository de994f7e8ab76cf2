"""Tools from plain functions: their schemas, and an environment that calls what the policy asks for."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from dapo.config import ConfigError
from dapo.episodes.environment import Message, Reply, ToolCall, Turn
from dapo.reward.worker import import_function
from dapo.types import reason

MOST = 8192  # characters of a tool's answer; the rest is cut off
Tool = Callable[..., Any]
# calls a function with arguments, within the time that is left
Caller = Callable[[Tool, dict[str, Any]], Awaitable[Any]]


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
            raise ConfigError(f"rollout.tools={str(error).partition('; expected')[0]}") from error
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
            line = " ".join(str(error).split())
            wanted = "give it types, and a docstring with a line for each argument below Args:"
            raise ConfigError(f"rollout.tools={path}: {line}; {wanted}") from error
    return found


class TimeUp(Exception):
    """A call of the user's code took longer than rollout.turn_seconds."""


class ToolBox:
    """Answers the policy's tool calls. It keeps nothing between them."""

    def __init__(self, tools: dict[str, Tool]):
        self.tools = tools

    async def step(self, reply: Reply, call: Caller) -> tuple[Turn, int]:
        """Return the answers to the turn's calls, and how many of them are errors. Without calls the episode
        is done.
        """
        if reply.is_truncated or not reply.tool_calls:
            return Turn(is_done=True), 0
        answers = await asyncio.gather(*(self._answer(each, call) for each in reply.tool_calls))
        messages: list[Message] = [
            {"role": "tool", "name": each.name, "content": text}
            for each, (text, _) in zip(reply.tool_calls, answers, strict=True)
        ]
        return Turn(messages), sum(is_error for _, is_error in answers)

    async def _answer(self, asked: ToolCall, call: Caller) -> tuple[str, bool]:
        """Return the text of an answer, and whether the tool failed."""
        if asked.error:
            return f"Error: the call cannot be read: {asked.error}", False
        if asked.name not in self.tools:
            return f"Error: there is no tool {asked.name!r}; there is {', '.join(self.tools)}", True
        function = self.tools[asked.name]
        try:
            inspect.signature(function).bind(**asked.arguments)
        except TypeError as error:
            return f"Error: {asked.name}: {error}", True
        try:
            answer = await call(function, asked.arguments)
        except TimeUp:
            return f"Error: {asked.name} did not answer in time", True
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's function may raise anything
            return f"Error: {type(error).__name__}: {reason(error)}"[:MOST], True
        return _shown(answer), False


def _shown(answer: Any) -> str:
    text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False, default=str)
    return text if len(text) <= MOST else f"{text[:MOST]} … ({len(text) - MOST} characters more)"
