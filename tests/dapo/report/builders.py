"""Runs to report on, made in a moment: metrics, dumps and traces as a run writes them."""

import json
import re
from pathlib import Path

import numpy as np
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


def data_of(file: Path):
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text())[1]
    )
