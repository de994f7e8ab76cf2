"""A sample of several turns, for the report page: who wrote which of its tokens.

n = tokens of the sample's response.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np

COUNTS = ("turns", "calls", "unreadable", "failed", "neutralised", "attempts")
# Calls as the templates ask for them that episodes can be played with; JSON alone ends with its turn
CALL = re.compile(
    r"<tool_call>.*?(?:</tool_call>|(?=<tool_call>)|\Z)"
    r'|\A\s*(?:<\|python_tag\|>)?\s*\{\s*"(?:name|type)"\s*:.*?(?=<\||\Z)',
    re.DOTALL,
)
THOUGHT = "</think>"  # what stands before it is no call yet


@dataclass(frozen=True)
class Message:
    """A message of an episode. `name` is the tool's that wrote it, or empty."""

    role: str
    content: str
    name: str

    @property
    def author(self) -> str:
        """Its author in the page's words is "policy", "environment", or a tool: "tool calculator"."""
        kind = {"assistant": "policy", "user": "environment"}.get(self.role, self.role)
        return f"{kind} {self.name}".strip()


@dataclass(frozen=True)
class Conversation:
    """A dump's column `episode`: the messages from the first on, and what was counted."""

    messages: list[Message]
    counts: dict[str, int]  # by the names in COUNTS

    @classmethod
    def read(cls, text: str) -> Conversation:
        """Read the column's JSON. Raise ValueError if it is none, or lacks something."""
        try:
            content = json.loads(text)
            messages = [
                Message(str(each["role"]), _plain(each.get("content", "")), each.get("name") or "")
                for each in content["messages"]
            ]
            return cls(messages, {name: int(content[f"num_{name}"]) for name in COUNTS})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None

    @property
    def num_first(self) -> int:
        """Number of messages before the policy's first turn: its prompt."""
        own = [i for i, message in enumerate(self.messages) if message.role == "assistant"]
        return own[-self.counts["turns"] :][0] if own and self.counts["turns"] else len(self.messages)

    @property
    def task(self) -> str:
        """Text of the last message before the policy's first turn."""
        return self.messages[self.num_first - 1].content if self.num_first else ""

    def parts(self) -> list[list[Message]]:
        """Return the messages after the prompt: each turn of the policy, and what stands between two of them.

        `[[policy's], [tool's, tool's], [policy's]]`
        """
        parts: list[list[Message]] = []
        for message in self.messages[self.num_first :]:
            if message.role == "assistant" or not parts or parts[-1][0].role == "assistant":
                parts.append([])
            parts[-1].append(message)
        return parts


def _plain(content: Any) -> str:
    """Return a message's content as text; templates may take lists, too."""
    return content if isinstance(content, str) else json.dumps(content)


def turns(
    conversation: Conversation, loss_mask: Sequence[bool], pieces: list[str] | None
) -> list[dict[str, Any]]:
    """Return the turns of a sample in order, as the page takes them.

    Args:
        loss_mask: [n], True where the policy wrote the token.
        pieces: [n], the text of each token; None without a tokenizer.

    Returns:
        Of each turn `by`, its authors, and `turn`, its number if it is the policy's. Then `start` and `end`,
        its tokens, and `marked`, spans of tokens in it: the policy's calls, or what others wrote, between
        what the chat template adds. Or `text`, without a tokenizer, and of what the policy has not read.
    """
    parts, spans = conversation.parts(), [] if pieces is None else _spans(loss_mask)
    roles = [part[0].role == "assistant" for part in parts[: len(spans)]]
    if roles != [loss_mask[start] for start, _ in spans]:
        parts = []  # they do not say who wrote what
    found: list[dict[str, Any]] = []
    for span, part in zip_longest(spans, parts):
        part = part or []
        own = loss_mask[span[0]] if span else part[0].role == "assistant"
        turn: dict[str, Any] = {"by": "policy" if own else _authors(part)}
        if own:
            turn["turn"] = 1 + sum("turn" in each for each in found)
        if span and pieces:
            text = "".join(pieces[span[0] : span[1]])
            places = _calls(conversation, text) if own else _contents(text, part)
            turn |= {"start": span[0], "end": span[1], "marked": _tokens(pieces, span, places)}
        else:
            turn["text"] = "\n".join(message.content for message in part)
        found.append(turn)
    return found


def _spans(loss_mask: Sequence[bool]) -> list[tuple[int, int]]:
    """Return (start, end) of each run of tokens that are all the policy's, or all not."""
    edges = (np.flatnonzero(np.diff(np.array(loss_mask, bool))) + 1).tolist()
    return list(pairwise([0, *edges, len(loss_mask)])) if len(loss_mask) else []


def _authors(part: list[Message]) -> str:
    return ", ".join(dict.fromkeys(message.author for message in part)) or "environment"


def _calls(conversation: Conversation, text: str) -> list[tuple[int, int]]:
    """Return (start, end) of the calls in a turn of the policy, in characters; none if none was counted."""
    thought, mark, rest = text.rpartition(THOUGHT)
    start = len(thought + mark)
    calls = CALL.finditer(rest) if conversation.counts["calls"] else ()
    return [(start + call.start(), start + call.end()) for call in calls]


def _contents(text: str, part: list[Message]) -> list[tuple[int, int]]:
    """Return (start, end) of the messages in a text, in characters; none if the template has changed one."""
    places, at = [], 0
    for content in (message.content.strip() for message in part):
        start = text.find(content, at)
        if start < 0:
            return []
        at = start + len(content)
        places.append((start, at))
    return places


def _tokens(pieces: list[str], span: tuple[int, int], places: list[tuple[int, int]]) -> list[list[int]]:
    """Return (start, end) in tokens for each place in characters of the tokens in `span`. Empty places have
    none.
    """
    start, end = span
    ends = np.cumsum([len(piece) for piece in pieces[start:end]])
    first = np.searchsorted(ends, [a for a, _ in places], "right") + start
    last = np.searchsorted(ends, [b for _, b in places], "left") + start
    return [[int(i), int(j) + 1] for i, j, (a, b) in zip(first, last, places, strict=True) if a < b]
