"""Checks answers of environments, and makes plain values of them: only these leave the worker's process.

This must not import torch, even indirectly.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from dapo.config import ConfigError
from dapo.episodes.environment import Environment, Message, Turn
from dapo.episodes.tools import MOST
from dapo.reward.worker import import_function

ROLES = ("user", "tool", "system", "developer", "assistant")
FORM = "expected a list of {role, content}, both text"


class Wrong(Exception):
    """An environment returned something else than it may. The message says what, and what is expected."""


def messages_of(found: Any) -> list[Message]:
    """Return an environment's messages. Raise Wrong if they are none."""
    if not isinstance(found, list):
        raise Wrong(f"{type(found).__name__}; {FORM}")
    for message in found:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise Wrong(f"{_shown(message)}; {FORM}")
        if message.get("role") not in ROLES:
            raise Wrong(f"a message with role {_shown(message.get('role'))}; known: {', '.join(ROLES)}")
    return [_plain(message) for message in found]


def turn_of(turn: Any) -> Turn:
    """Return an environment's turn. Raise Wrong unless it is one."""
    if not isinstance(turn, Turn):
        raise Wrong(f"{type(turn).__name__}; expected a Turn")
    reward = turn.reward
    try:
        is_number = isinstance(reward, Real) and not isinstance(reward, bool) and math.isfinite(reward)
    except OverflowError:  # an integer beyond any float
        is_number = False
    if not is_number:
        raise Wrong(f"a reward of {_shown(reward)}; expected a finite number")
    if not (turn.is_correct is None or isinstance(turn.is_correct, bool | np.bool_)):
        raise Wrong(f"is_correct={_shown(turn.is_correct)}; expected True, False or None")
    messages = messages_of(turn.messages)
    if not messages and not turn.is_done:
        raise Wrong("no messages, and is not done")
    is_correct = None if turn.is_correct is None else bool(turn.is_correct)
    return Turn(messages, bool(turn.is_done), float(reward), is_correct)


def schemas_of(found: Any) -> list[dict[str, Any]]:
    """Return the schemas of an environment's tools. Raise Wrong if they are none."""
    wanted = "expected a list of JSON schemas, each with a name"
    if not isinstance(found, list):
        raise Wrong(f"{type(found).__name__}; {wanted}")
    for schema in found:
        function = schema.get("function", schema) if isinstance(schema, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Wrong(f"{_shown(schema)}; {wanted}")
    return [_plain(schema) for schema in found]


def cut(messages: list[Message]) -> list[Message]:
    """Return messages that the policy does not read as they are recorded: at most MOST characters in all."""
    left, found = MOST, []
    for message in messages:
        text = message["content"][:left]
        left -= len(text)
        names = {"name": str(message["name"])[:80]} if "name" in message else {}
        found.append({"role": message["role"], **names, "content": text})
    return found


def import_environment(path: str) -> Callable[[], Environment]:
    """Import the class at `path`, "module:Class".

    Raises:
        ConfigError: there is none, or it lacks reset or step.
    """
    try:
        kind = import_function(path)
    except ValueError as error:
        raise ConfigError(f"rollout.environment={str(error).partition('; expected')[0]}") from error
    wanted = "expected a class with reset(row, seed) and step(reply), as dapo.episodes.Environment"
    if not inspect.isclass(kind):
        raise ConfigError(f"rollout.environment={path} is {type(kind).__name__}; {wanted}")
    for name, count in (("reset", 2), ("step", 1)):
        method = getattr(kind, name, None)
        if method is None or method is getattr(Environment, name):
            raise ConfigError(f"rollout.environment={path} has no method {name}; {wanted}")
        try:
            inspect.signature(method).bind(None, *[None] * count)
        except TypeError as error:
            raise ConfigError(f"rollout.environment={path}.{name}: {error}; {wanted}") from error
    try:
        inspect.signature(kind).bind()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rollout.environment={path} has to be made without arguments: {error}") from error
    return kind  # type: ignore[return-value]  # as far as can be seen


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Return it as JSON has it: text of the user's own class could not be read elsewhere. Raise Wrong."""
    if all(type(each) is str and each.isascii() for pair in value.items() for each in pair):
        return value
    try:
        # half a character, a surrogate, is no text to a tokenizer
        text = json.dumps(value, ensure_ascii=False).encode(errors="replace")
        plain: dict[str, Any] = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise Wrong(f"{_shown(value)}; expected what JSON can hold: {error}") from error
    return plain


def _shown(value: Any) -> str:
    return repr(value)[:80]
