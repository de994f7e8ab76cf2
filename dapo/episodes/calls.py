"""Tool calls in the policy's turn, in the form that the model's chat template asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dapo.config import ConfigError
from dapo.episodes.environment import ToolCall

Tools = Sequence[Mapping[str, Any]]  # JSON schemas
Reader = Callable[[str, Tools], list[ToolCall]]

THOUGHT = "</think>"  # what stands before it is no call yet
_BLOCK = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def reader_of(template: str) -> Reader:
    """Return what reads the tool calls that a chat template asks for.

    Raises:
        ConfigError: it asks for none, or in a form that is not known.
    """
    if "<arg_key>" not in template:
        if "<function=" in template:
            return read_xml
        if "<tool_call>" in template:
            return read_hermes
        if "ipython" in template and '"parameters"' in template:
            return read_llama
    known = "known are <tool_call> with JSON or <function=…>, and JSON of name and parameters"
    raise ConfigError(f"the model's chat template asks for tool calls in no known form: {known}")


def read_hermes(text: str, tools: Tools) -> list[ToolCall]:
    """Read calls as Hermes and Qwen write them: `<tool_call>{"name": "f", "arguments": {…}}</tool_call>`."""
    return [_of_json(body, ("arguments",)) if end else UNCLOSED for body, end in _blocks(text)]


def read_llama(text: str, tools: Tools) -> list[ToolCall]:
    """Read calls as Llama 3.1 writes them: `{"name": "f", "parameters": {…}}`, several separated by ";"."""
    rest = _answer(text).replace("<|python_tag|>", "").strip()
    calls: list[ToolCall] = []
    while rest.startswith("{"):
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(rest)
        except (ValueError, RecursionError):
            # an answer that only looks like JSON is none
            return [*calls, _of_json(rest, ())] if '"name"' in rest else calls
        if "name" not in value:
            return calls
        calls.append(_of_json(rest[:end], ("parameters", "arguments")))
        rest = rest[end:].lstrip("; \n")
    return calls


def read_xml(text: str, tools: Tools) -> list[ToolCall]:
    """Read calls as Qwen3-Coder and Qwen3.5 write them: `<tool_call><function=f><parameter=x>…</parameter>
    </function></tool_call>`. Values that are no text are JSON.
    """
    return [_of_xml(body, tools) if end else UNCLOSED for body, end in _blocks(text)]


UNCLOSED = ToolCall("", {}, "</tool_call> is missing")


def _answer(text: str) -> str:
    return text.rpartition(THOUGHT)[2]


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    return ((block[1], block[2]) for block in _BLOCK.finditer(_answer(text)))


def _of_json(text: str, names: Sequence[str]) -> ToolCall:
    """Read a call; `names`: what its arguments are called."""
    try:
        call = json.loads(text, strict=False)
        arguments: Any = next((call[name] for name in names if name in call), {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments, strict=False)
        if not isinstance(call["name"], str) or not isinstance(arguments, dict):
            raise TypeError("name is to be text, and arguments an object")
    except KeyError as error:
        return ToolCall("", {}, f"{error} is missing")
    except (ValueError, TypeError, RecursionError) as error:
        return ToolCall("", {}, f"no JSON of a call: {error}"[:200])
    return ToolCall(call["name"], arguments)


def _of_xml(text: str, tools: Tools) -> ToolCall:
    function = _FUNCTION.fullmatch(text)
    if not function:
        return ToolCall("", {}, "<function=name> … </function> is missing")
    name, body = function[1].strip(), function[2]
    schemas = [tool.get("function", tool) for tool in tools]
    parameters: Any = next((s.get("parameters", {}) for s in schemas if s.get("name") == name), {})
    kinds = {key: value.get("type") for key, value in parameters.get("properties", {}).items()}
    if _PARAMETER.sub("", body).strip():
        return ToolCall("", {}, "<parameter=name> … </parameter> is missing")
    pairs = ((each[1].strip(), each[2]) for each in _PARAMETER.finditer(body))
    return ToolCall(name, {key: _value(text, kinds.get(key)) for key, text in pairs})


def _value(text: str, kind: Any) -> Any:
    """Return a parameter's value. `kind`: its type in the schema; None: not known."""
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
