"""One row of a data file → its prompt and its ground truth, both checked."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any

from dapo.config import ConfigError

ROLES = {"system", "developer", "user", "assistant", "tool"}
# how a message, or a list of them, begins that was written into a text column; and what else it has
_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](?:role|content)["']\s*:""")
_FIELDS = re.compile(r"""\s*\[?\s*\{\s*["'](?=.*["']role["']\s*:)(?=.*["']content["']\s*:)""", re.DOTALL)
# other formats of messages, which are refused whether a column holds them or their text
_FROM = re.compile(r"""\s*\[?\s*\{\s*(?=["'])(?=.*["']from["']\s*:)(?=.*["']value["']\s*:)""", re.DOTALL)
_LISTS = re.compile(r"""\s*\{\s*["'](?:messages|conversations)["']\s*:\s*\[""")
_SHORT_EXPONENT = re.compile(r"[-+.0-9]+[eE][-+]?[0-9]{1,3}")

Messages = list[dict[str, Any]]


class BadRow(ConfigError):
    """A row cannot be used. The message names file and row; data.on_error=skip leaves the row out."""


class Number(float):
    """A JSON number with a point or an exponent, and how it is written."""

    def __new__(cls, text: str) -> Number:
        self = super().__new__(cls, text)
        self.text = text
        return self

    text: str


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; bytes are UTF-8.

    Raises:
        ValueError: it is not JSON, not UTF-8, nested too deeply, or an object has a key twice.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")  # json would guess at UTF-16
    try:
        return json.loads(text, parse_float=Number, parse_int=_whole, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def prompt_and_answer(row: Any, place: str) -> tuple[str | Messages, str]:
    """Return the prompt and the ground truth of a row. `place` names file and row.

    The ground truth is reward_model.ground_truth, or where there is none, `answer`.

    Raises:
        BadRow: one of them is missing or not what is expected.
    """
    if not isinstance(row, dict):
        raise BadRow(f"{place}: {type(row).__name__}; expected {{prompt, answer}}")
    if row.get("prompt") is None:
        raise BadRow(f"{place}: no column 'prompt'; expected {{prompt, answer}}")
    prompt = _prompt(row["prompt"], place)
    answer = _answer(row, place)
    try:
        (key_of(prompt) + answer).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise BadRow(f"{place}: prompt or answer holds {half}, half of a surrogate pair: no text") from None
    except RecursionError:
        raise BadRow(f"{place}: column 'prompt' is nested too deeply") from None
    return prompt, answer


def task_and_answer(row: Any, place: str) -> tuple[str, str]:
    """Return an environment's row as text, by which it is compared with others, and no ground truth.

    Raises:
        BadRow: it is no object.
    """
    if not isinstance(row, dict):
        raise BadRow(f"{place}: {type(row).__name__}; expected an object, which the environment's reset gets")
    try:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        text.encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise BadRow(f"{place}: no text can be made of it: {type(error).__name__}") from None
    return text, ""


def key_of(prompt: str | Messages) -> str:
    """Return a text that is the same for equal prompts only."""
    return (
        "text " + prompt
        if isinstance(prompt, str)
        else json.dumps(prompt, sort_keys=True, ensure_ascii=False)
    )


def _answer(row: dict[str, Any], place: str) -> str:
    rule = row.get("reward_model")
    if isinstance(rule, str) and rule.lstrip().startswith("{"):
        rule = _json_column(rule, "reward_model", place)
    truth, column = rule.get("ground_truth") if isinstance(rule, dict) else None, "reward_model.ground_truth"
    if truth is None:
        truth, column = row.get("answer"), column if "reward_model" in row else "answer"
    if truth is None:
        raise BadRow(f"{place}: no column {column!r}; expected reward_model.ground_truth, or answer")
    if isinstance(truth, str):
        return truth
    if not isinstance(truth, int | float | Decimal) or isinstance(truth, bool):
        raise BadRow(f"{place}: column {column!r} is {type(truth).__name__}; expected text or a number")
    if not math.isfinite(truth):
        raise BadRow(f"{place}: column {column!r} is {truth}; expected text or a number")
    return _digits(truth)


def _digits(number: int | float | Decimal) -> str:
    """Return a number's digits without an exponent, as JSON has them: 1e-05 → "0.00001", 1.50 → "1.50"."""
    text = number.text if isinstance(number, Number) else str(number)
    return format(Decimal(text), "f") if _SHORT_EXPONENT.fullmatch(text) else text


def _prompt(prompt: Any, place: str) -> str | Messages:
    """Return text, or messages whose content is text; messages in a text column are read as JSON."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow(f"{place}: the prompt is empty")
        if not any(pattern.match(prompt) for pattern in (_MESSAGES, _FIELDS, _FROM, _LISTS)):
            return prompt
        prompt = _json_column(prompt, "prompt", place)
    if not isinstance(prompt, list) or not prompt or not all(isinstance(part, dict) for part in prompt):
        found = type(prompt).__name__
        raise BadRow(f"{place}: column 'prompt' is {found}; expected text or a list of {{role, content}}")
    messages = [_message(message, place) for message in prompt]
    if not any(message.get("content", "").strip() or message.get("tool_calls") for message in messages):
        raise BadRow(f"{place}: the prompt is empty")
    return messages


def _message(message: dict[str, Any], place: str) -> dict[str, Any]:
    if message.get("role") not in tuple(ROLES):  # not hashed: it may be a list
        known = ", ".join(sorted(ROLES))
        raise BadRow(f"{place}: chat role {message.get('role')!r} is not known; known: {known}")
    kept = {name: value for name, value in message.items() if value is not None}  # parquet fills up with null
    if "content" in kept or not kept.get("tool_calls"):
        kept["content"] = _text(message.get("content"), place)
    return kept


def _text(content: Any, place: str) -> str:
    """Return the text of a message's content, which may be a list of text parts."""
    parts = content if isinstance(content, list) else [content]
    texts = []
    for part in parts:
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise BadRow(f"{place}: content of type {part['type']!r}; expected text")
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise BadRow(f"{place}: content is {type(text).__name__}; expected text, or a list of text parts")
        texts.append(text)
    return "".join(texts)


def _json_column(text: str, column: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise BadRow(f"{place}: column {column!r} looks like JSON, and is not: {error}") from None


def _whole(text: str) -> int:
    if len(text) > 4300:  # Python's limit
        raise ValueError(f"a whole number of {len(text)} digits, more than 4300: write it as text")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} is given twice")
    return found
