"""Chat models of a few ten thousand parameters, made from demonstrations; shared by examples' make_base.py.

The tokenizer has a token for each byte and for each of the words it is given. The chat template is ChatML
with Qwen2.5's tool calls and tool results, and names the tools instead of describing them: so small a model
learns nothing from a schema.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

Messages = list[dict[str, Any]]
PAD, START, END = SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROLES = ["system", "user", "assistant"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
BATCH = 32

TEMPLATE = r"""
{%- if tools %}
    {{- '<|im_start|>system\nTools: ' }}
    {%- for tool in tools %}
        {{- tool.function.name + (', ' if not loop.last else '<|im_end|>\n') }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\n' if message.content or not loop.first }}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()


def make_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer with the same ids in any tokenizer class for Qwen2, which are byte-level BPEs.

    `words`: texts that are one token wherever they stand.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in [*ROLES, *TAGS, *words]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=PAD,
        additional_special_tokens=[START],
        chat_template=TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.125,  # 1 / sqrt(hidden)
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


@dataclass(frozen=True)
class Phase:
    """A phase of training: 30 steps of linear warm-up, and linear decay to a tenth of the learning rate."""

    steps: int
    lr: float
    demonstrate: Callable[[random.Random], Messages]  # → an episode, from the first message to the last turn


@dataclass(frozen=True)
class School:
    """Turns demonstrations into what a model is trained on: the tokens that episodes have."""

    tokenizer: PreTrainedTokenizerFast
    tools: list[dict[str, Any]] | None = None

    def tokens(self, episode: Messages) -> tuple[list[int], list[bool]]:
        """Return an episode's tokens, up to the last turn's end, and which of them the policy wrote."""
        text = self.tokenizer.apply_chat_template(episode, tools=self.tools, tokenize=False)
        ids: list[int] = self.tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
        begin = self.tokenizer(f"{START}assistant\n", add_special_tokens=False)["input_ids"]
        is_written, is_turn = [], False
        for i, id in enumerate(ids):
            is_written.append(is_turn)
            is_turn = (is_turn and id != self.tokenizer.eos_token_id) or ids[
                i + 1 - len(begin) : i + 1
            ] == begin
        return ids, is_written

    def batches(self, phase: Phase, rng: random.Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (inputs, targets), both [BATCH, n]; targets are −100 where the policy has not written.

        Batches are not sorted by length, which depends on the kind of episode: a batch of guesses would
        unlearn what one of calls has taught.
        """
        while True:
            examples = [self.tokens(phase.demonstrate(rng)) for _ in range(BATCH)]
            longest = max(len(ids) for ids, _ in examples)
            tokens = torch.full((BATCH, longest), self.tokenizer.pad_token_id)
            is_learned = torch.zeros(BATCH, longest, dtype=torch.bool)
            for row, (ids, is_written) in enumerate(examples):
                tokens[row, : len(ids)] = torch.tensor(ids)
                is_learned[row, : len(ids)] = torch.tensor(is_written)
            yield tokens[:, :-1], tokens.masked_fill(~is_learned, -100)[:, 1:]

    def train(self, model: Qwen2ForCausalLM, phase: Phase, rng: random.Random) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.01)
        stream = self.batches(phase, rng)
        for step in range(phase.steps):
            decay = 0.1 + 0.9 * (1 - step / phase.steps)
            optimizer.param_groups[0]["lr"] = phase.lr * min(1, (step + 1) / 30) * decay
            inputs, targets = next(stream)
            logits = model(inputs, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 100 == 0 or step + 1 == phase.steps:
                print(f"step {step + 1}, loss {loss.item():.3f}", flush=True)


def make_base(target: Path, school: School, phases: Sequence[Phase]) -> None:
    """Train a model from scratch, and write it and its tokenizer in Hugging Face format."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = random.Random(7)
    model = make_model(school.tokenizer)
    print(f"{model.num_parameters():,} parameters")
    for phase in phases:
        school.train(model, phase, rng)
    eos, pad = school.tokenizer.eos_token_id, school.tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    model.save_pretrained(target)
    school.tokenizer.save_pretrained(target)
