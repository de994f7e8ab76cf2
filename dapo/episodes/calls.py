"""Tool calls in the policy's turn, in the form that the model's chat template asks for.

A turn may hold anything, and a megabyte of it: nothing here raises, or scans a text again and again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from dapo.config import ConfigError
from dapo.episodes.environment import ToolCall

Tools = Sequence[Mapping[str, Any]]  # JSON schemas
Reader = Callable[[str, Tools], list[ToolCall]]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TAG = "<|python_tag|>"
MOST = 256  # calls of a turn that are read
# thoughts that an answer begins with, ended or not
_THOUGHTS = re.compile(r"(?:\s*<think>.*?(?:</think>|\Z))*", re.DOTALL)
_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[;\s]*")  # calls
_HEAD = re.compile(r"<(?:function|parameter)=([^<>\n]+)>")


def reader_of(template: str) -> Reader:
    """Return what reads the tool calls that a chat template asks for.

    Raises:
        ConfigError: it asks for none, or in a form that is not known.
    """
    if "<arg_key>" not in template:
        if "<function=" in template:
            return read_xml
        if OPEN in template:
            return read_hermes
        if "ipython" in template and '"parameters"' in template:
            return read_llama
    known = "known are <tool_call> with JSON or <function=…>, and JSON of name and parameters"
    raise ConfigError(f"the model's chat template asks for tool calls in no known form: {known}")


def read_hermes(text: str, tools: Tools) -> list[ToolCall]:
    """Read calls as Hermes and Qwen write them: `<tool_call>{"name": "f", "arguments": {…}}</tool_call>`."""
    return _limited(_hermes(_answer(text)))


def read_llama(text: str, tools: Tools) -> list[ToolCall]:
    """Read calls as Llama 3.1 writes them: `{"name": "f", "parameters": {…}}`, several separated by ";"."""
    return _limited(_llama(_answer(text)))


def read_xml(text: str, tools: Tools) -> list[ToolCall]:
    """Read calls as Qwen3-Coder and Qwen3.5 write them: `<tool_call><function=f><parameter=x>…</parameter>
    </function></tool_call>`. Values that are no text by their schema are JSON.
    """
    bodies = _answer(text).split(OPEN)[1:]
    return _limited(_of_xml(b.partition(CLOSE)[0], tools) if CLOSE in b else UNCLOSED for b in bodies)


UNCLOSED = ToolCall("", {}, f"{CLOSE} is missing")


def _limited(calls: Iterator[ToolCall]) -> list[ToolCall]:
    read = list(islice(calls, MOST))
    return [*read, ToolCall("", {}, f"more than {MOST} calls")] if next(calls, None) else read


def _answer(text: str) -> str:
    """Return what follows the thoughts that a turn begins with, for they hold no calls yet. The first thought
    may have begun in the prompt.
    """
    before, closed, rest = text.partition("</think>")
    answer = rest if closed else before
    return answer[_after(_THOUGHTS, answer, 0) :]


# --- JSON ---


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse)


def _hermes(text: str) -> Iterator[ToolCall]:
    end = 0
    while (start := text.find(OPEN, end)) >= 0:
        begin = _after(_SPACE, text, start + len(OPEN))
        failure: Exception | None = None
        value: Any = None
        end = begin
        try:
            value, end = _DECODER.raw_decode(text, begin)  # markers may be in its strings
        except (ValueError, RecursionError) as error:
            failure = error
        close = _after(_SPACE, text, end)
        if failure is None and text.startswith(CLOSE, close):
            end = close + len(CLOSE)
            yield _call(value)
            continue
        following = text.find(OPEN, end)
        limit = len(text) if following < 0 else following
        close = text.find(CLOSE, end, limit)
        if close < 0:
            yield UNCLOSED
            end = limit
        else:
            yield _no_json(failure or ValueError(f"{text[end:close].strip()[:40]!r} follows"))
            end = close + len(CLOSE)


def _llama(text: str) -> Iterator[ToolCall]:
    before, tag, behind = text.partition(TAG)
    text = (behind if tag else before).replace(TAG, "").strip()
    at = 0
    while text.startswith("{", at):
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            if text.find('"name"', at) >= 0:  # an answer that only looks like JSON is no call
                yield _no_json(error)
            return
        if "name" not in value:
            return
        yield _call(value)
        at = _after(_BETWEEN, text, end)


def _call(value: Any) -> ToolCall:
    """Return the call that JSON describes."""
    if not isinstance(value, dict) or "name" not in value:
        return ToolCall("", {}, "'name' is missing")
    arguments: Any = next((value[name] for name in ("arguments", "parameters") if name in value), {})
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments)
        except (ValueError, RecursionError) as error:
            return _no_json(error)
    arguments = {} if arguments is None else arguments
    if not isinstance(value["name"], str) or not isinstance(arguments, dict):
        return ToolCall("", {}, "no JSON of a call: name is to be text, and arguments an object")
    return ToolCall(value["name"], arguments)


def _no_json(error: Exception) -> ToolCall:
    what = error.msg if isinstance(error, json.JSONDecodeError) else error  # without its place in the turn
    return ToolCall("", {}, f"no JSON of a call: {what}"[:200])


# --- XML ---


def _of_xml(text: str, tools: Tools) -> ToolCall:
    text = text.strip()
    head = _HEAD.match(text)
    if not head or not text.startswith("<function=") or not text.endswith("</function>"):
        return ToolCall("", {}, "<function=name> … </function> is missing")
    name, body = head[1].strip(), text[head.end() : -len("</function>")]
    kinds = _kinds(name, tools)
    arguments: dict[str, Any] = {}
    at = _after(_SPACE, body, 0)
    while at < len(body):
        head = _HEAD.match(body, at)
        end = body.find("</parameter>", head.end()) if head else -1
        if not head or end < 0 or not body.startswith("<parameter=", at):
            return ToolCall("", {}, "<parameter=name> … </parameter> is missing")
        value = body[head.end() : end].removeprefix("\n").removesuffix("\n")
        arguments[head[1].strip()] = _value(value, kinds.get(head[1].strip(), set()))
        at = _after(_SPACE, body, end + len("</parameter>"))
    return ToolCall(name, arguments)


def _kinds(name: str, tools: Tools) -> dict[str, set[str]]:
    """Return parameter → types of its values by the tool's schema; none: not known."""
    schemas = [tool.get("function", tool) for tool in tools]
    found = next((schema.get("parameters") for schema in schemas if schema.get("name") == name), None)
    properties = found.get("properties") if isinstance(found, Mapping) else None
    return {key: _types(each) for key, each in properties.items()} if isinstance(properties, Mapping) else {}


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    found = schema.get("type")
    types = {each for each in (found if isinstance(found, list) else [found]) if isinstance(each, str)}
    if any(isinstance(value, str) for value in schema.get("enum") or ()):
        types.add("string")
    if schema.get("nullable"):
        types.add("null")
    return types.union(*(_types(o) for name in ("anyOf", "oneOf") for o in schema.get(name) or ()))


def _value(text: str, types: set[str]) -> Any:
    """Return a parameter's value, given the types that its schema allows."""
    if "null" in types and text.strip() in ("null", "None"):
        return None
    if types and types <= {"string", "null"}:
        return text
    if "boolean" in types and text.strip() in ("True", "False"):  # as templates write them
        return text.strip() == "True"
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


def _after(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Return where what matches a pattern at `start` ends; it may be empty."""
    found = pattern.match(text, start)
    return found.end() if found else start
