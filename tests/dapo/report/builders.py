"""Runs to report on, made in a moment: metrics, dumps and traces as a run writes them."""

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers

from dapo.learn.traces import Trace
from dapo.rollout import dump
from dapo.rollout.buffer import Buffer
from dapo.types import Group, Prompt, Sample

HOSTILE = 'a</script><img src=x onerror=document.title="hurt"><!-- <b>bold</b> \x00\u2028 é😀 «data» &amp;'


def make_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Byte-level: every text has tokens, and a character that was not seen is several of them."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        ["the answer is the number the answer"] * 3, vocab_size=260, show_progress=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def make_groups(
    step: int, tokenizer: tokenizers.Tokenizer, responses: list[str], num_groups: int = 3
) -> list[Group]:
    """Groups all correct, all wrong and mixed in turn; the last sample of each is cut off."""
    groups = []
    for place in range(num_groups):
        prompt = tokenizer.encode(f"what is {place}? {responses[0]}").ids
        group = Group((step << 20) + place, Prompt(place, np.array(prompt, np.int32), "42"))
        for index, response in enumerate(responses):
            tokens = np.array(tokenizer.encode(response).ids, np.int32)
            n = len(tokens)
            sample = Sample(
                group.id,
                index,
                tokens,
                behavior_logprobs=-np.linspace(0, 3, n, dtype=np.float32),
                loss_mask=np.ones(n, bool),
                versions=((0, 0, n),),
                finish_reason="length" if index == len(responses) - 1 else "stop",
                text=response,
                is_correct=[True, False, index == 0][place % 3],
            )
            group.samples.append(sample)
        groups.append(group)
    return groups


def make_run(
    directory: Path,
    *,
    steps: int = 3,
    responses: tuple[str, ...] = ("the answer", "is the number"),
    dumps: int = 1,
    lr: float = 1e-6,
) -> Path:
    tokenizer = make_tokenizer(directory / "hf")
    config = (
        f"run: {{dir: {json.dumps(str(directory))}}}\noptim: {{lr: {lr}}}\npolicy: {{model: elsewhere}}\n"
    )
    (directory / "config.yaml").write_text(config)
    rows = [make_row(step) for step in range(steps)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollouts = directory / "rollouts"
    for step in range(dumps):
        buffer = Buffer(8, is_dynamic=True)
        for group in make_groups(step, tokenizer, list(responses)):
            buffer.offer(group)
        traces = [make_trace(sample) for group in buffer.kept for sample in group.samples]
        with dump.Writer() as writer:
            writer.write(dump.path_of(rollouts, step), buffer, fraction=1.0)
            writer.write_traces(dump.traces_path_of(rollouts, step), traces)
    return directory


def make_row(step: int) -> dict[str, float]:
    return {
        "step": step,
        "rollout/reward": step / 7,
        "rollout/length": 100 + step,
        "groups/kept": 2,
        "groups/all_wrong": 1,
        "time/rollout": 2.0,
        "time/step": 5.0,
        "odd/metric": 1.0,
    }


def make_trace(sample: Sample) -> Trace:
    """The second token clipped low, the third high, by e^∓1."""
    at, change = np.arange(sample.length), np.zeros(sample.length, np.float32)
    change[1:3] = [-1, 1]
    old = sample.behavior_logprobs
    return Trace(sample.group, sample.index, old, old + change, at == 1, at == 2)


Messages = list[dict[str, Any]]
QUESTION = [{"role": "user", "content": "what is 3 * 4?"}]
# the policy thinks, calls two tools, one of them by a call that cannot be read, and answers
ASKED = [
    {
        "role": "assistant",
        "content": 'the <tool_call>\n{"name": "times"}\n</tool_call><tool_call>{"na</tool_call>',
    },
    {"role": "tool", "content": "12 é", "name": "times"},
    {"role": "tool", "content": "no JSON: <|im_end|>", "name": ""},
    {"role": "assistant", "content": "the answer is 12"},
]
# a game of three turns, whose last one is cut off
GUESSED = [
    {"role": "assistant", "content": "is the number 5?"},
    {"role": "user", "content": "higher"},
    {"role": "assistant", "content": "is the number 7?"},
    {"role": "user", "content": "lower"},
    {"role": "assistant", "content": "is the"},
]


def chatml(messages: Messages) -> list[tuple[bool, str]]:
    """The parts of a response in ChatML, up to the policy's last: did the policy write it, and its text."""
    parts = []
    for own, run in groupby(messages, lambda message: message["role"] == "assistant"):
        for message in run if own else ():
            parts.append((True, message["content"] + "<|im_end|>"))
        said = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in run]
        if not own:
            parts.append((False, "\n" + "".join(said) + "<|im_start|>assistant\n"))
    return parts if parts[-1][0] else parts[:-1]


def make_episodes(
    directory: Path, *episodes: Messages | None, prompt: Messages = QUESTION, **counts: int
) -> Path:
    """A run whose only group has these samples, the first one correct. None: a sample of one turn."""
    run = make_run(directory, dumps=0)
    tokenizer = make_tokenizer(directory / "hf")
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(directory / "hf" / "tokenizer.json"))
    asked = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in prompt)
    group = Group(7, Prompt(0, np.array(tokenizer.encode(asked).ids, np.int32), "12"))
    columns = []
    for index, episode in enumerate(episodes):
        parts = chatml(episode) if episode else [(True, "the answer<|im_end|>")]
        tokens = [np.array(tokenizer.encode(text).ids, np.int32) for _, text in parts]
        mask = np.concatenate([np.full(len(part), own) for (own, _), part in zip(parts, tokens, strict=True)])
        n = len(mask)
        surprise = np.linspace(0, 3, n, dtype=np.float32) * mask
        sample = Sample(7, index, np.concatenate(tokens), -surprise, mask, ((0, 0, n),), "stop", parts[-1][1])
        sample.is_correct = index == 0
        group.samples.append(sample)
        num_turns = sum(own for own, _ in parts)
        named = {f"num_{name}": 0 for name in ("calls", "unreadable", "failed", "neutralised")}
        named |= {"num_turns": num_turns, "num_attempts": 1} | counts
        columns.append(json.dumps({"messages": [*prompt, *episode], **named}) if episode else None)
    buffer = Buffer(8, is_dynamic=True)
    buffer.offer(group)
    path = dump.path_of(directory / "rollouts", 0)
    with dump.Writer() as writer:
        writer.write(path, buffer, fraction=1.0)
        traces = [make_trace(sample) for sample in group.samples]
        writer.write_traces(dump.traces_path_of(directory / "rollouts", 0), traces)
    table = pq.read_table(path).append_column("episode", pa.array(columns, pa.string()))
    pq.write_table(table, path, write_page_checksum=True)
    return run


def data_of(file: Path):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text())[1]
    )
