"""Families of chat templates in short, each with a tokenizer, and what stands between two turns."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from dapo.episodes.chat import Chat
from dapo.episodes.environment import Message

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
LISTED = "{% if tools %}Tools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}\nCall as CALL{% endif %}"
HERMES = LISTED.replace("CALL", '<tool_call>{"name": …, "arguments": {…}}</tool_call>')
CALLS = (
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}"
)
# the last message of a user, before which thoughts are dropped
LAST = (
    "{% set s = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set s.last = loop.index0 %}{% endif %}{% endfor %}"
)
KEPT = "{{ m.content if loop.index0 > s.last else m.content.split('</think>')[-1].lstrip('\\n') }}"

CHATML = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}"
    "{% else %}{% set first = 'You help.' %}{% endif %}"
    "<|im_start|>system\n{{ first }}" + HERMES + "<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if not loop.previtem or loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\nTURN" + CALLS + "<|im_end|>\n"
    "{% elif m.role != 'system' or not loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nBEGUN{% endif %}"
)
NO_THOUGHT = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
LLAMA = (
    "{{ bos_token }}{% set dated = day is defined and day %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and m.tool_calls %}{% set c = m.tool_calls[0].function %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}<|eot_id|>'
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{{ m.content | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if loop.first and dated %}Day {{ day }}\n{% endif %}"
    "{% if loop.first %}" + LISTED.replace("CALL", '{"name": …, "parameters": {…}}') + "{% endif %}"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% if tools %}<|system|>\n" + HERMES + "{% endif %}" + LAST + "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>\n" + KEPT + CALLS + "{% elif m.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}<|observation|>{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    + HERMES
    + "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}" + CALLS + ""
    "{{ eos_token }}{% elif m.role == 'tool' %}<｜output▁begin｜>{{ m.content }}<｜output▁end｜>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, its tokens, and the text between two turns of the policy, from what ends the first."""

    name: str
    written: str  # the template; a line may begin behind a block
    special: tuple[str, ...]
    stops: tuple[str, ...]
    between: Callable[[Sequence[Message]], str]
    added: tuple[str, ...] = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    bos: str = ""
    arguments: tuple[tuple[str, Any], ...] = ()
    thinks: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def template(self) -> str:
        return self.written.replace("%}\n", "%}{{ '\\n' }}")

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return train(self.special, self.added)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(self.tokenizer.token_to_id(stop) for stop in self.stops)

    def end(self, messages: Sequence[Message], rng: random.Random) -> int:
        """The token with which the policy ends its turn, before these messages."""
        if self.name != "glm":
            return self.stop_ids[0]
        if rng.random() < 0.1:  # a marker of another role
            return rng.choice(self.stop_ids)
        return self.stop_ids[1 if messages[0]["role"] == "tool" else 0]

    def chat(self, template: str | None = None, **arguments: Any) -> Chat:
        special = {"bos_token": self.bos, "eos_token": self.stops[0]}
        given = dict(self.arguments) | arguments
        return Chat(template or self.template, self.tokenizer.to_str(), special, given, self.stop_ids)

    def fast(self) -> Any:
        """Its Hugging Face tokenizer."""
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer, bos_token=self.bos or None, eos_token=self.stops[0]
        )
        made.chat_template = self.template
        return made


@cache
def train(special: tuple[str, ...], added: tuple[str, ...]) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    text = [
        " ".join(WORDS),
        "You help. Call as system user assistant ipython\n\n answer Tools:",
        json.dumps(TOOL),
    ] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    made.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
    made.add_tokens([AddedToken(each, special=False, normalized=False) for each in added])
    return made


def chatml_between(messages: Sequence[Message]) -> str:
    text, open_role = "<|im_end|>\n", ""
    for message in messages:
        if message["role"] == "tool":
            text += "" if open_role else "<|im_start|>user"
            text += f"\n<tool_response>\n{message['content']}\n</tool_response>"
            open_role = "tool"
        else:
            text += "<|im_end|>\n" if open_role else ""
            text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
            open_role = ""
    return text + ("<|im_end|>\n" if open_role else "") + "<|im_start|>assistant\n"


def llama_between(messages: Sequence[Message]) -> str:
    text = "<|eot_id|>"
    for message in messages:
        role, content = message["role"], message["content"].strip()
        if role == "tool":
            role, content = "ipython", json.dumps(message["content"], ensure_ascii=False)
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    return text + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def glm_between(messages: Sequence[Message]) -> str:
    text, before = "", ""
    for message in messages:
        if message["role"] == "tool":
            text += "" if before == "tool" else "<|observation|>"
            text += f"\n<tool_response>\n{message['content']}\n</tool_response>"
        else:
            text += f"<|{message['role']}|>\n{message['content']}"
        before = message["role"]
    return text + "<|assistant|>\n"


def r1_between(messages: Sequence[Message]) -> str:
    text = "<｜end▁of▁sentence｜>"
    for message in messages:
        is_tool = message["role"] == "tool"
        begin, end = ("<｜output▁begin｜>", "<｜output▁end｜>") if is_tool else ("<｜User｜>", "")
        text += f"{begin}{message['content']}{end}"
    return text + "<｜Assistant｜><think>\n"


WORDS = (  # noqa: SIM905
    "the number is higher or lower than your guess so try again with 15 and 3 plus 4 makes 7 I think that "
    "answer Let me think about it step by step because wait no the result was 42 def f(x): return x + 1 "
    '{"name": "add", "arguments": {"a": 1}}'
).split()
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML_STOPS = ("<|im_end|>", "<|endoftext|>")
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

FAMILIES = [
    Family(
        "chatml",
        CHATML.replace("TURN", "{{ m.content }}").replace("BEGUN", ""),
        CHATML_TOKENS,
        CHATML_STOPS,
        chatml_between,
        added=("<tool_call>", "</tool_call>"),
        thinks=False,
    ),
    Family(
        "chatml_think",
        LAST + CHATML.replace("TURN", KEPT).replace("BEGUN", NO_THOUGHT),
        CHATML_TOKENS,
        CHATML_STOPS,
        chatml_between,
        ADDED,
    ),
    Family(
        "llama",
        LLAMA,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
        ("<|eot_id|>",),
        llama_between,
        added=(),
        bos="<|begin_of_text|>",
        arguments=(("day", "1 May"),),
        thinks=False,
    ),
    Family(
        "glm",
        GLM,
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        ("<|user|>", "<|observation|>", "<|endoftext|>"),
        glm_between,
        ADDED,
    ),
    Family(
        "r1",
        R1,
        (
            "<｜begin｜>",
            "<｜end▁of▁sentence｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜output▁begin｜>",
            "<｜output▁end｜>",
        ),
        ("<｜end▁of▁sentence｜>",),
        r1_between,
        bos="<｜begin｜>",
    ),
]


def split_randomly(tokenizer: tokenizers.Tokenizer, text: str, rng: random.Random) -> list[int]:
    """Tokens of a text as a policy may sample them: seldom the tokenizer's own."""
    tokens: list[int] = []
    for piece in re.findall(r"\s?\S+|\s+", text):
        cut = rng.randrange(1, len(piece)) if len(piece) > 2 and rng.random() < 0.4 else len(piece)
        for part in filter(None, (piece[:cut], piece[cut:])):
            tokens += tokenizer.encode(part, add_special_tokens=False).ids
    return tokens


def words(rng: random.Random, most: int = 8) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))
