"""A model's chat: the tokens of the first messages, and those that follow the policy's own turn.

The policy's turn is never rendered again: a template may drop or rewrite what it wrote. What follows is found
by a marker that stands for the turn. Only what the template puts behind the marker is used, from the token
that ends a turn on. This runs in worker processes, so it must not import torch, even indirectly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any

import jinja2
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from dapo.config import ConfigError
from dapo.episodes.environment import Message

# private characters, which have no meaning in Unicode; messages lose theirs
TURN = "\ue0f0turn\ue0f0"  # stands for the policy's turn
BREAK = "\ue0f1"  # inside a control token, or a piece of one, in a message: it is ordinary text
PRIVATE = re.compile("[\ue0f0\ue0f1]")
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, from JSON: no tokenizer takes it
MARKER = re.compile(r"<[|｜].*[|｜]>")  # how most control tokens are written
QUESTION: Message = {"role": "user", "content": "question"}
SYSTEM: Message = {"role": "system", "content": "system"}
REFUSALS = (
    jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


class ChatError(ConfigError):
    """The model's chat template cannot go on after the policy's turn. The message says why."""


@dataclass(frozen=True)
class Suffix:
    """Holds what follows the policy's turn."""

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

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone: what is derived from them is derived again in another process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def start(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        """Return the tokens of an environment's first messages, up to where the policy writes: a new message,
        or one of the assistant that they end with.

        Raises:
            ChatError: the template refuses them.
        """
        marked = self._marked(messages)
        is_begun = marked[-1].get("role") == "assistant"
        if is_begun and not str(marked[-1].get("content")).strip() and len(marked) > 1:
            marked, is_begun = marked[:-1], False
        try:
            text = self._render(marked, self._mark(list(tools)), goes_on=not is_begun, is_begun=is_begun)
        except REFUSALS as error:
            raise ChatError(f"the chat template refuses the first messages: {_line(error)}") from error
        return self._encode(text)[0]

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
        tokens, count = self._encode(self._text_after(self._marked(messages), tools))
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

    def _render(
        self, messages: list[Message], tools: Sequence[dict[str, Any]], goes_on: bool, is_begun: bool = False
    ) -> str:
        variables = {**self.special_tokens, **self.arguments}
        made, _ = render_jinja_template(
            conversations=[messages],
            tools=list(tools) or None,
            chat_template=self.template,
            add_generation_prompt=goes_on,
            continue_final_message=is_begun,
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
                for shown in (str(message.get("content")) for message in messages):
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

    def _marked(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages without control tokens, see `_broken`. Roles are left alone: they are of a few."""
        roles = [{"role": message["role"]} if "role" in message else {} for message in messages]
        return [self._mark(message) | role for message, role in zip(messages, roles, strict=True)]

    def _mark(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._broken(value)
        if isinstance(value, dict):
            return {self._mark(name): self._mark(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(each) for each in value]
        return value

    def _broken(self, text: str) -> str:
        """Return a text with a break inside each control token, and inside what could be a piece of one with
        the text that the template writes before or after.
        """
        text = SURROGATE.sub("\ufffd", PRIVATE.sub("", text))
        end = len(text.rstrip())
        start = min(len(text) - len(text.lstrip()), end)
        heads, tails = self._pieces
        lengths = range(1, min(self._longest, end - start) + 1)
        at = {found.start() + 1 for found in self._control.finditer(text)}
        at |= {end - n + 1 for n in lengths if text[end - n : end] in heads}
        at |= {start + n - 1 for n in lengths if text[start : start + n] in tails}
        if not at:
            return text
        bounds = [0, *sorted(at), len(text)]
        return BREAK.join(text[i:j] for i, j in pairwise(bounds))

    def _encode(self, text: str) -> tuple[list[int], int]:
        """Return the tokens of rendered text, and how many control tokens became ordinary text: those with a
        break inside.
        """
        if BREAK not in text:
            return self._own.encode(text, add_special_tokens=False).ids, 0
        tokens: list[int] = []
        count, plain = 0, ""
        end = 0
        for own in [*self._control.finditer(text), None]:  # the template's own
            part = text[end : own.start() if own else None].replace(BREAK, "")
            start = 0
            for forged in self._control.finditer(part):
                plain += part[start : forged.start()]
                tokens += self._own.encode(plain, add_special_tokens=False).ids + self._as_text(forged[0])
                count, plain, start = count + 1, "", forged.end()
            plain += part[start:] + (own[0] if own else "")
            end = own.end() if own else end
        return tokens + self._own.encode(plain, add_special_tokens=False).ids, count

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
        return _unlimited(Tokenizer.from_str(self.tokenizer))

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without the tokens that were added to it."""
        bare = json.loads(self.tokenizer) | {"added_tokens": []}
        return _unlimited(Tokenizer.from_str(json.dumps(bare)))

    @cached_property
    def _control_tokens(self) -> dict[int, str]:
        """Control tokens by id: special ones, those that end a turn, added ones that the template writes, or
        their counterparts (<think>, </think>), and such as <|this|>. Spaces are none, nor a single character.
        """
        return {
            id: token.content
            for id, token in self._own.get_added_tokens_decoder().items()
            if len(token.content.strip()) > 1
            and (
                token.special
                or id in self.stop_ids
                or token.content in self.template
                or token.content.replace("</", "<") in self.template
                or token.content.replace("<", "</") in self.template
                or MARKER.fullmatch(token.content)
            )
        }

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self._control_tokens)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        longest_first = sorted(self._control_tokens.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _pieces(self) -> tuple[frozenset[str], frozenset[str]]:
        """Beginnings and ends of control tokens, shorter than whole ones."""
        whole = self._control_tokens.values()
        heads = frozenset(token[:n] for token in whole for n in range(1, len(token)))
        return heads, frozenset(token[n:] for token in whole for n in range(1, len(token)))

    @cached_property
    def _stops(self) -> list[str]:
        return [text for id in self.stop_ids if (text := self._own.id_to_token(id))]

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self._own.get_vocab()))


def _letters(text: str) -> str:
    """Return a text without what templates change in it: spaces, quotes' escapes, marks."""
    return re.sub(rf"\\[nrt]|[\s\\{BREAK}]", "", text)


def _unlimited(tokenizer: Tokenizer) -> Tokenizer:
    """Return it without limits on its texts' lengths, which its file may have from training."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


def _name_of(tool: dict[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", "tool"))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
