"""Tool calls as models write them, well and badly: read, or an error, and never an exception."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dapo.config import ConfigError
from dapo.episodes.calls import MOST, Reader, read_hermes, read_llama, read_xml, reader_of
from dapo.episodes.environment import ToolCall
from tests.dapo.episodes.families import FAMILIES

READERS: list[Reader] = [read_hermes, read_llama, read_xml]
SCHEMA = {
    "name": "f",
    "parameters": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "share": {"type": "number"},
            "is_on": {"type": "boolean"},
            "parts": {"type": "array"},
            "more": {"type": "object"},
            "perhaps": {"type": ["string", "null"]},
            "either": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "spare": {"type": "string", "nullable": True},
            "kind": {"enum": ["1", "2"]},
            "both": {"type": ["integer", "string"]},
            "any": {},
            "odd": True,
        },
    },
}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": SCHEMA}]


def block(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


def hermes(text: str) -> list[ToolCall]:
    return read_hermes(text, TOOLS)


def llama(text: str) -> list[ToolCall]:
    return read_llama(text, TOOLS)


def xml(text: str) -> list[ToolCall]:
    return read_xml(text, TOOLS)


def parameter(name: str, value: str) -> str:
    return f"<parameter={name}>\n{value}\n</parameter>"


def function(*parameters: str, name: str = "f") -> str:
    return block("\n".join([f"<function={name}>", *parameters, "</function>"]))


CALL = '{"name": "f", "arguments": {"a": 1}}'
F = ToolCall("f", {"a": 1})
NESTED = {"a": {"b": [{"c": "}}{"}, [], {}]}, "d": 'say "{"'}


# --- which form ---


@pytest.mark.parametrize(
    ("family", "reader"),
    [(family, read_llama if family.name == "llama" else read_hermes) for family in FAMILIES],
    ids=[family.name for family in FAMILIES],
)
def test_the_form_is_the_templates(family: Any, reader: Reader) -> None:
    assert reader_of(family.template) is reader


def test_another_form_is_known_or_refused() -> None:
    assert reader_of("<tool_call>\n<function=name>") is read_xml
    for template in ("", "<tool_call>{name}\n<arg_key>", "<｜tool▁call▁begin｜>", "ipython"):
        with pytest.raises(ConfigError, match="asks for tool calls in no known form: known are <tool_call>"):
            reader_of(template)


# --- Hermes ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no call", []),
        (block(CALL), [F]),
        (f"<tool_call>{CALL}</tool_call>", [F]),
        (f"So I ask.\n{block(CALL)}\n{block(CALL)} done", [F, F]),
        (block('{"arguments": {}, "name": "f"}'), [ToolCall("f", {})]),
        (block('{"name": "f"}'), [ToolCall("f", {})]),
        (block('{"name": "f", "arguments": null}'), [ToolCall("f", {})]),
        (block('{"name": "f", "parameters": {"a": 1}}'), [F]),
        (block(json.dumps({"name": "f", "arguments": json.dumps({"a": 1})})), [F]),
        (block(json.dumps({"name": "f", "arguments": NESTED})), [ToolCall("f", NESTED)]),
        (block('{"name": "f", "arguments": {"a": "two\nlines"}}'), [ToolCall("f", {"a": "two\nlines"})]),
        # markers in a text are text
        *(
            (block(json.dumps({"name": "f", "arguments": {"a": each}})) * 2, [ToolCall("f", {"a": each})] * 2)
            for each in ("</tool_call>", "<tool_call>", "<think>", block("x"))
        ),
    ],
)
def test_calls_of_hermes(text: str, expected: list[ToolCall]) -> None:
    assert hermes(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"<tool_call>\n{CALL}", "</tool_call> is missing"),
        ("<tool_call>", "</tool_call> is missing"),
        (block(CALL[:-1]), "no JSON of a call: Expecting"),
        (block(CALL + "}"), "no JSON of a call: '}"),
        (block("{'name': 'f'}"), "no JSON of a call: Expecting property name"),
        (block('{"arguments": {}}'), "'name' is missing"),
        (block("[1]"), "'name' is missing"),
        (block('"name"'), "'name' is missing"),
        (block("1"), "'name' is missing"),
        (block("null"), "'name' is missing"),
        (block('{"name": 7}'), "name is to be text"),
        (block('{"name": null}'), "name is to be text"),
        (block('{"name": "f", "arguments": [1]}'), "arguments an object"),
        (block('{"name": "f", "arguments": "[1]"}'), "arguments an object"),
        (block('{"name": "f", "arguments": "no"}'), "no JSON of a call: Expecting value"),
        (block('{"name": "f", "arguments": {"a": NaN}}'), "NaN is no JSON"),
        (block('{"name": "f", "arguments": {"a": -Infinity}}'), "-Infinity is no JSON"),
        (block('{"name": "f", "arguments": ' + "[" * 10**5), "no JSON of a call: maximum recursion"),
        (block('{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}"), "no JSON of a call: Exceeds"),
    ],
)  # fmt: skip
def test_what_is_no_call_of_hermes_says_why(text: str, why: str) -> None:
    [call] = hermes(text)
    assert (call.name, call.arguments) == ("", {}) and why in call.error and len(call.error) <= 200
    assert hermes(f"{text}\n{block(CALL)}") == [call, F]  # the next one is read


# --- thoughts ---


@pytest.mark.parametrize("read", [hermes, llama, xml])
def test_thoughts_hold_no_calls(read: Callable[[str], list[ToolCall]]) -> None:
    call = {
        hermes: block(CALL),
        llama: CALL,
        xml: function(parameter("a", "1")),
    }[read]
    assert read(call) == [F]
    for text in (f"<think>\n{call}\n</think>", f"{call}</think>", f"<think>{call}", f" <think>{call}{call}",
                 f"</think><think>{call}", f"<think>a</think> <think>{call}</think>"):  # fmt: skip
        assert read(text) == []
    for text in (
        f"<think>\n{call}\n</think>\n\n{call}",
        f"{call}</think>{call}",
        f"a</think><think></think>\n{call}",
    ):
        assert read(text) == [F]


# --- Llama ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no call", []),
        ("{x}", []),
        ('{"a": 1}', []),
        ('{"name": "f", "parameters": {"a": 1}}', [F]),
        ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', [F]),
        ('I ask. <|python_tag|>{"name": "f", "parameters": {"a": 1}}', [F]),
        ('I ask {"name": "f", "parameters": {"a": 1}}', []),  # it is to be the whole answer
        (f"  {CALL};\n {CALL}; ", [F, F]),
        (f"<|python_tag|>{CALL}; <|python_tag|>{CALL}", [F, F]),
        (f"{CALL} and so", [F]),
        ('{"name": "f", "parameters": "{\\"a\\": 1}"}', [F]),
        (json.dumps({"type": "function", "name": "f", "parameters": NESTED}), [ToolCall("f", NESTED)]),
    ],
)
def test_calls_of_llama(text: str, expected: list[ToolCall]) -> None:
    assert llama(text) == expected


@pytest.mark.parametrize(
    "text", [CALL[:-1], '{"name": "f", "parameters": }', '{"name": 3}', '{"name": "f", "parameters": [1]}']
)
def test_what_is_no_call_of_llama_says_why(text: str) -> None:
    [call] = llama(text)
    assert "no JSON of a call" in call.error and call.name == ""
    assert llama(f"{CALL}; {text}") == [F, call]


# --- XML ---


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("text", "42", "42"),
        ("text", "null", "null"),
        ("text", '{"a": 1}', '{"a": 1}'),
        ("text", "\n two\n\nlines \n", "\n two\n\nlines \n"),
        ("text", "a < b > <parameter= </p", "a < b > <parameter= </p"),
        ("text", "", ""),
        ("count", "42", 42),
        ("count", " -3 ", -3),
        ("count", "many", "many"),
        ("share", "0.5", 0.5),
        ("share", "NaN", "NaN"),
        ("is_on", "true", True),
        ("is_on", "True", True),
        ("is_on", "False", False),
        ("is_on", "perhaps", "perhaps"),
        ("parts", "[1, [2]]", [1, [2]]),
        ("more", json.dumps(NESTED, indent=1), NESTED),
        ("perhaps", "null", None),
        ("perhaps", "None", None),
        ("perhaps", "7", "7"),
        ("either", "7", "7"),
        ("either", "null", None),
        ("spare", "null", None),
        ("spare", "7", "7"),
        ("kind", "1", "1"),
        ("both", "1", 1),
        ("both", "one", "one"),
        ("any", "1", 1),
        ("any", "one", "one"),
        ("any", "True", "True"),
        ("odd", "1", 1),
        ("unknown", "1", 1),
        ("more", "[" * 10**5, "[" * 10**5),
        ("count", "9" * 5000, "9" * 5000),
    ],
)
def test_values_of_xml_have_the_types_of_the_schema(name: str, text: str, value: Any) -> None:
    [call] = xml(function(parameter(name, text)))
    assert call == ToolCall("f", {name: value}) and type(call.arguments[name]) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no call", []),
        (function(), [ToolCall("f", {})]),
        ("<tool_call><function=f><parameter=a>1</parameter></function></tool_call>", [F]),
        (f"So I ask.\n{function(parameter('a', '1'))}\n{function(parameter('a', '1'))}", [F, F]),
        (
            function(parameter("text", "x"), parameter("count", "2"), name="f "),
            [ToolCall("f", {"text": "x", "count": 2})],
        ),
        (function(parameter("text", "</function>")), [ToolCall("f", {"text": "</function>"})]),
        (function(parameter("text", "7"), name="g"), [ToolCall("g", {"text": 7})]),  # of no known tool
    ],
)
def test_calls_of_xml(text: str, expected: list[ToolCall]) -> None:
    assert xml(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<tool_call>\n<function=f>\n</function>", "</tool_call> is missing"),
        (block("<function=f>"), "<function=name> … </function> is missing"),
        (block("<function=>\n</function>"), "<function=name> … </function> is missing"),
        (block("<parameter=f>\n</function>"), "<function=name> … </function> is missing"),
        (block(CALL), "<function=name> … </function> is missing"),
        (function("<parameter=a>\n1"), "<parameter=name> … </parameter> is missing"),
        (function("<parameter=a\n1</parameter>"), "<parameter=name> … </parameter> is missing"),
        (function("<function=a>1</parameter>"), "<parameter=name> … </parameter> is missing"),
        (function("a = 1"), "<parameter=name> … </parameter> is missing"),
        (function(parameter("a", "1"), "or so"), "<parameter=name> … </parameter> is missing"),
        (function(parameter("a", "</parameter>")), "<parameter=name> … </parameter> is missing"),
    ],
)
def test_what_is_no_call_of_xml_says_why(text: str, why: str) -> None:
    assert xml(text) == [ToolCall("", {}, why)]
    assert xml(f"{text}\n{function(parameter('a', '1'))}")[-1] == F


def test_schemas_may_lack_anything() -> None:
    text = function(parameter("a", "1"))
    odd: list[Any] = [None, {}, {"properties": None}, {"properties": {"a": {"type": None, "anyOf": None}}}]
    named = [[{"name": "f", "parameters": each}] for each in odd]
    for tools in ([], [{}], [{"name": "f"}], [{"function": {"name": "f"}}], *named):
        assert read_xml(text, tools) == [F]


# --- anything at all ---

PIECES = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "<function=f>", "</function>", "<function=",
    "<parameter=a>", "</parameter>", "<parameter=", ">", "{", "}", "[", "]", '"', "\\", '"name"',
    '"arguments"', '"parameters"', ":", ",", "1", "null", "\n", " ", ";", "<|python_tag|>", CALL, "é",
    "\ud800", "\0", "-", "NaN", "f", "\\u", "e9",
]  # fmt: skip


@pytest.mark.parametrize("read", READERS)
def test_nothing_that_is_written_raises(read: Reader) -> None:
    rng = random.Random(5)
    found = []
    for _ in range(6000):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 25)))
        text = (
            rng.choice(["", "<tool_call>", '<tool_call>{"name": "f", ', "<tool_call><function=f>", "{"])
            + text
        )
        found += read(text + rng.choice(["", "</tool_call>", "</function></tool_call>"]), TOOLS)
    assert {bool(call.error) for call in found} == {True, False}
    assert all(isinstance(c.name, str) and isinstance(c.arguments, dict) for c in found)
    assert all((c.name, c.arguments) == ("", {}) for c in found if c.error)


JUNK = [
    *PIECES, " ", "\n", "x", "<tool_call> ", "<tool_call>{", '<tool_call>{"a":"', '<tool_call>["x","', "{};",
    '{"name":"f"};', "</think><think>", "<think></think>", "<think> ", "<parameter=a>1</parameter>",
    "<parameter=a> ", "</function> ", "<function=f></function>", '{"a":', "<tool_call></tool_call>",
]  # fmt: skip


@pytest.fixture
def no_hang() -> Iterator[None]:
    """Fail what takes minutes instead of a second or two."""

    def hangs(number: int, frame: object) -> None:
        raise AssertionError("it scans the text again for each piece")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("read", READERS)
def test_a_megabyte_of_junk_is_read_once(read: Reader, no_hang: None) -> None:
    """A scan of all for each piece would be of 10¹¹ characters."""
    for piece in JUNK:
        for start in ("", "<tool_call>", "<tool_call><function=f>", "<think>"):
            text = start + piece * (10**6 // len(piece)) + "</function></tool_call>"
            assert len(read(text, TOOLS)) <= MOST + 1


def test_of_too_many_calls_the_rest_is_one_error() -> None:
    for read, text in ((hermes, block(CALL)), (llama, f"{CALL};"), (xml, function(parameter("a", "1")))):
        assert read(text * MOST) == [F] * MOST
        assert read(text * 5000) == [F] * MOST + [ToolCall("", {}, f"more than {MOST} calls")]
