"""Prompts → tokens: chats by the model's chat template, text as it stands."""

from __future__ import annotations

import copy
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2

from dapo.config import ConfigError
from dapo.rollout.rows import BadRow, Messages

if TYPE_CHECKING:
    import numpy as np

    from dapo.rollout.data_files import Row

# arguments of apply_chat_template that are not the template's
SET_HERE = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length",
    "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors",
    "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation",
}  # fmt: skip
# how templates ask for the date
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
SWITCHES = ("yes", "no", "on", "off")  # text, which most templates take for true
NONE: Mapping[str, str] = {}
SAMPLE = 16  # rows whose tokens say which tokenizer it is


@dataclass(frozen=True)
class Turns:
    """A rollout of several turns asks this of its prompts."""

    environment: str | None = None  # it writes the first messages: a row is no prompt, but what it gets
    tools: Sequence[Mapping[str, Any]] = ()  # JSON schemas for the chat template


ONE_TURN = Turns()


class Renderer:
    """Turns prompts into tokens.

    Args:
        arguments: data.template_arguments, variables of the template.
        dates: what the template gets where it asks for the date, by format; others are the present.
        turns: an environment's rows have no tokens; tools are named to the policy.

    Raises:
        ConfigError: the template has no such variable.
    """

    def __init__(
        self,
        tokenizer: Any,
        arguments: Mapping[str, Any],
        dates: Mapping[str, str] = NONE,
        turns: Turns = ONE_TURN,
    ):
        self.tokenizer, self.arguments, self.turns = copy.copy(tokenizer), arguments, turns
        template = tokenizer.chat_template  # or several, by name
        if not isinstance(template, str | dict | None):
            raise ConfigError(f"the model's chat_template is {type(template).__name__}; expected text")
        self.template = "\n".join(template.values()) if isinstance(template, dict) else template or ""
        for name, value in arguments.items():
            if name in SET_HERE:
                raise ConfigError(f"data.template_arguments.{name} is set by the run: remove it")
            if not re.search(rf"\b{re.escape(name)}\b", self.template):
                missing = "the model's chat template has no such variable"
                raise ConfigError(f"data.template_arguments.{name}: {missing}; remove it")
            is_switch = str(value).lower() in SWITCHES
            if is_switch and not re.search(rf"""["']{value}["']""", self.template):
                raise ConfigError(f"data.template_arguments.{name}={value!r}: write true or false")
        now, formats = datetime.now(), {text for _, text in _CLOCK.findall(self.template)}
        self.dates = {text: dates.get(text, now.strftime(text)) for text in sorted(formats)}
        if self.dates:
            self.tokenizer.chat_template = self._dated(template)

    def tokens(self, prompt: str | Messages, place: str) -> list[int]:
        """Return a prompt's tokens.

        Raises:
            BadRow: the template refuses the chat, or the prompt is empty.
            ConfigError: a chat, and there is no template.
        """
        if self.turns.environment:
            return []
        if self.turns.tools and isinstance(prompt, str):
            raise BadRow(f"{place}: the prompt is text; with rollout.tools it has to be a list of messages")
        tokens = self._of_text(prompt) if isinstance(prompt, str) else self._of_chat(prompt, place)
        if not tokens:
            raise BadRow(f"{place}: the prompt is empty")
        return tokens

    def text(self, tokens: np.ndarray) -> str:
        """Return the text of a prompt's tokens, special ones included: what the model sees."""
        return str(self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def fingerprint(self, rows: Sequence[Row]) -> bytes:
        """Return what else decides the tokens: template, arguments, and the tokens of samples."""
        chats = [row for row in rows if not isinstance(row.prompt, str)]
        contents = [
            row.prompt if isinstance(row.prompt, str) else str(row.prompt[-1].get("content"))
            for row in rows[:SAMPLE]
        ]
        samples = [self.tokenizer(text)["input_ids"] for text in [string.printable, *contents]]
        has_turns = self.turns != ONE_TURN
        template = [self.template, json.dumps(self.arguments, sort_keys=True)] if chats or has_turns else []
        turns = [self.turns.environment, *self.turns.tools] if has_turns else []
        return json.dumps([*template, *map(list, samples), *turns]).encode()

    def _of_text(self, text: str) -> list[int]:
        """Tokenize text for a model to continue: begun once, and not ended.

        The tokenizer may add a token at both ends, also to text that begins with it already.
        """
        whole = list(self.tokenizer(text)["input_ids"])
        bare = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        num_before = next(n for n in range(len(whole) + 1) if whole[n : n + len(bare)] == bare)
        before = whole[:num_before]
        tokens = bare if bare[:num_before] == before else before + bare
        eos = getattr(self.tokenizer, "eos_token_id", None)  # not every tokenizer has one
        while bare and tokens[-1:] == [eos]:
            tokens.pop()
        return tokens if tokens != before else []

    def _of_chat(self, chat: Messages, place: str) -> list[int]:
        """Render a chat up to where the assistant goes on: in a message that it has begun, or a new one."""
        if not self.template:
            wanted = "the prompt is a chat and the model's tokenizer has no chat template"
            raise ConfigError(f"{place}: {wanted}: give the prompt as text")
        is_begun = chat[-1]["role"] == "assistant"
        if is_begun and not chat[-1].get("content", "").strip() and len(chat) > 1:
            chat, is_begun = chat[:-1], False
        way: dict[str, Any] = {"continue_final_message" if is_begun else "add_generation_prompt": True}
        if self.turns.tools:
            way["tools"] = list(self.turns.tools)
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, **way, **self.arguments)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the model's chat template is wrong: {error}") from error
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BadRow(f"{place}: the chat template refuses the prompt: {reason}") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _dated(self, template: Any) -> Any:
        """Return a chat template, or several by name, with the date written where they ask for it."""
        if isinstance(template, dict):
            return {name: self._dated(text) for name, text in template.items()}
        return _CLOCK.sub(lambda call: repr(self.dates[call[2]]), template)
