"""A model's chat: the tokens of the first messages, and those that follow the policy's own turn.

The policy's turn is never rendered again: a template may drop or rewrite what it wrote. What follows is found
by a marker that stands for the turn. Only what the template puts behind the marker is used, from the token
that ends a turn on. This runs in worker processes, so it must not import torch, even indirectly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from dapo.config import ConfigError
from dapo.episodes.environment import Message

TURN = "\ue0f0turn\ue0f0"  # stands for the policy's turn; these characters have no meaning in Unicode
OPEN, CLOSE = "\ue0f1", "\ue0f2"  # around a control token in the environment's text
MARKED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]")
QUESTION: Message = {"role": "user", "content": "question"}
SYSTEM: Message = {"role": "system", "content": "system"}
REFUSALS = (jinja2.TemplateError, ValueError, TypeError, KeyError, RecursionError)


class ChatError(ConfigError):
    """The model's chat template cannot go on after the policy's turn. The message says why."""


@dataclass(frozen=True)
class Suffix:
    """What follows the policy's turn."""

    tokens: list[int] | None  # None: they have no room
    num_neutralised: int  # control tokens in the messages, which became ordinary text


@dataclass(frozen=True)
class Chat:
    """A model's chat template, tokenizer and stop tokens, in a form that can be sent to other processes."""

    template: str
    tokenizer: str  # JSON of a tokenizers.Tokenizer
    special_tokens: dict[str, str]  # variables of the template: bos_token, …
    arguments: dict[str, Any]  # data.template_arguments
    stop_ids: tuple[int, ...]

    def start(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Return the tokens of an environment's first messages, up to where the policy writes.

        Raises:
            ChatError: the template refuses them.
        """
        marked, _ = self._mark(list(messages))
        try:
            text = self._render(marked, tools, goes_on=True)
        except REFUSALS as error:
            raise ChatError(f"the chat template refuses the first messages: {_line(error)}") from error
        return self._encode(text)

    def after(
        self, last: int, messages: Sequence[Message], tools: Sequence[dict[str, Any]], room: int
    ) -> Suffix:
        """Return the tokens that follow the policy's turn, up to where it writes again; none unless they are
        fewer than `room`. `last`: token id that ended its turn; the template's own is not repeated.

        Raises:
            ChatError: the template cannot continue with such messages.
        """
        # each token is at least a character of a known length: what is far too long is not tokenized
        if sum(len(str(message.get("content"))) for message in messages) > room * self._longest:
            return Suffix(None, 0)
        marked, count = self._mark(list(messages))
        tokens = self._encode(self._text_after(marked, tools))
        if tokens[:1] == [last]:
            tokens = tokens[1:]
        return Suffix(tokens if len(tokens) < room else None, count)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of a turn, without the stop token that ends it."""
        if tokens and tokens[-1] in self.stop_ids:
            tokens = tokens[:-1]
        return self._own.decode(tokens, skip_special_tokens=False)

    def check(self, tools: Sequence[dict[str, Any]]) -> None:
        """Raise ChatError if the template cannot continue after the policy's turn, with a tool's answer if
        there are tools, else with a user's message.
        """
        name = _name_of(tools[0]) if tools else ""
        said: Message = {"role": "tool", "content": "42", "name": name} if tools else QUESTION
        text = self._text_after([said], tools)
        if (
            self._own.decode(self._own.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            != text
        ):
            raise ChatError(
                f"the model's tokenizer does not give back what its chat template writes: {text!r}"
            )

    # --- text ---

    def _render(self, messages: list[Message], tools: Sequence[dict[str, Any]], goes_on: bool) -> str:
        variables = {**self.special_tokens, **self.arguments}
        made, _ = render_jinja_template(
            conversations=[messages],
            tools=list(tools) or None,
            chat_template=self.template,
            add_generation_prompt=goes_on,
            **variables,
        )
        return str(made[0])

    def _text_after(self, messages: list[Message], tools: Sequence[dict[str, Any]]) -> str:
        """Return the text that follows the policy's turn, from the token that ends it on."""
        role, failure = str(messages[0].get("role")), ""
        if role in self._known:
            begun = [self._known[role]]
        else:
            begun = [(before, None) for before in self._beginnings(role, tools)]
        for before, own in begun:
            try:
                if own is None:
                    own = self._behind_turn(self._render(before, tools, goes_on=False))
                whole = self._behind_turn(self._render([*before, *messages], tools, goes_on=True))
                text = self._from_end_of_turn(own, whole)
                shown = str(messages[-1].get("content"))
                if role not in self._known and _letters(shown) not in _letters(text):
                    raise ValueError(f"it leaves out {shown[:60]!r}")
            except REFUSALS as error:
                failure = failure or _line(error)
                continue
            self._known[role] = before, own
            return text
        refused = f"the model's chat template cannot continue after the policy's turn with a {role} message"
        raise ChatError(f"{refused}: {failure}; use another model or template")

    def _beginnings(self, role: str, tools: Sequence[dict[str, Any]]) -> Iterator[list[Message]]:
        """Yield conversations up to the policy's turn: templates differ in what they take."""
        turns: list[Message] = [{"role": "assistant", "content": TURN}]
        if role == "tool":
            name = _name_of(tools[0]) if tools else "tool"
            forms: list[Any] = [{}, "{}"]
            turns = [turns[0] | {"tool_calls": [_call(name, form)]} for form in forms] + turns
        for turn in turns:
            yield [SYSTEM, QUESTION, turn]
            yield [QUESTION, turn]

    def _behind_turn(self, text: str) -> str:
        parts = text.split(TURN)
        if len(parts) != 2:
            raise ValueError(f"it writes the policy's turn {len(parts) - 1} times")
        return parts[1]

    def _from_end_of_turn(self, own: str, whole: str) -> str:
        """Return what is to be appended, given what stands behind the policy's turn alone, and with more."""
        found = [(own.rfind(stop), stop) for stop in self._stops if stop in own]
        start = max(found)[0] if found else len(own)
        if whole.startswith(own):
            return whole[start:]
        rest = whole[start:]
        if whole.startswith(own[:start]) and any(rest.startswith(stop) for stop in self._stops):
            return rest  # another end of turn, once something follows
        raise ValueError(f"it rewrites {own[:60]!r} behind the turn to {whole[:60]!r}")

    # --- tokens ---

    def _mark(self, value: Any) -> tuple[Any, int]:
        """Return messages whose control tokens are marked, and how many there are. Roles are left alone."""
        if isinstance(value, str):
            value = re.sub(f"[{OPEN}{CLOSE}]", "", value).replace(TURN, "")
            return self._control.subn(f"{OPEN}\\g<0>{CLOSE}", value)
        if isinstance(value, dict):
            pairs = {name: (each, 0) if name == "role" else self._mark(each) for name, each in value.items()}
            return {name: each for name, (each, _) in pairs.items()}, sum(n for _, n in pairs.values())
        if isinstance(value, list | tuple):
            found = [self._mark(each) for each in value]
            return [each for each, _ in found], sum(n for _, n in found)
        return value, 0

    def _encode(self, text: str) -> list[int]:
        """Return the tokens of rendered text: marked control tokens as ordinary text."""
        tokens: list[int] = []
        for i, piece in enumerate(MARKED.split(text)):
            if piece:
                tokens += (
                    self._as_text(piece) if i % 2 else self._own.encode(piece, add_special_tokens=False).ids
                )
        return tokens

    def _as_text(self, control: str) -> list[int]:
        tokens = self._plain.encode(control, add_special_tokens=False).ids
        if self._control_ids.isdisjoint(tokens):
            return list(tokens)
        # its model knows the control token too: character by character it does not
        return [t for c in control for t in self._plain.encode(c, add_special_tokens=False).ids]

    @cached_property
    def _known(self) -> dict[str, tuple[list[Message], str | None]]:
        """The conversation that the template continued with a message of that role, and what it wrote behind
        the policy's turn alone.
        """
        return {}

    @cached_property
    def _own(self) -> Tokenizer:
        return Tokenizer.from_str(self.tokenizer)

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without the tokens that were added to it."""
        return Tokenizer.from_str(json.dumps(json.loads(self.tokenizer) | {"added_tokens": []}))

    @cached_property
    def _control_tokens(self) -> dict[int, str]:
        """Control tokens: special ones, and added ones that the template writes."""
        added = self._own.get_added_tokens_decoder().items()
        return {i: each.content for i, each in added if each.special or each.content in self.template}

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self._control_tokens)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self._control_tokens.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _stops(self) -> list[str]:
        return [text for id in self.stop_ids if (text := self._own.id_to_token(id))]

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._own.get_vocab()))


def _letters(text: str) -> str:
    """Return a text without what templates change in it: spaces, quotes' escapes, marks."""
    return re.sub(rf"\\[nrt]|[\s\\{OPEN}{CLOSE}]", "", text)


def _call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def _name_of(tool: dict[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", "tool"))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
