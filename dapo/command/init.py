"""Writes a commented config for a model and a data file, after looking at both.

dapo init models/Qwen2.5-7B prompts.jsonl --gpu h100 --gpus 8
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from dapo import files
from dapo.config import Config, ConfigError, Data, plain_yaml
from dapo.model import hub
from dapo.model.parameters import num_parameters
from dapo.model.shape import ModelShape, max_tokens, read_shape
from dapo.model.tokenizer import check_vocabulary, load_tokenizer
from dapo.plan import choose
from dapo.plan.choose import Choice, Machine
from dapo.plan.time import HARDWARE, MACHINE
from dapo.rollout.data_files import Summary
from dapo.rollout.prompts import load_prompts
from dapo.types import Prompt

ANY_LENGTH = 2**30  # tokens
SAMPLE = 500  # prompts whose text is looked at
FORMATS = {
    "answer_line": "answer:",
    "boxed": "\\boxed",
}  # reward.answer_format → what a prompt that asks for it has
USUAL = 0.9  # share of prompts


@dataclass(frozen=True)
class Seen:
    """Facts that the model's directory and the data file give."""

    model: Path  # as it is given: it may be a name on the hub
    directory: Path
    data: Path
    shape: ModelShape
    positions: int | None  # of the model; None: it does not say
    prompts: list[Prompt]
    summary: Summary
    asking: dict[str, float]  # answer format → share of prompts that ask for it

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each prompt, int64 [prompts]."""
        return np.array([len(prompt.tokens) for prompt in self.prompts])


def look(model: Path, data: Path) -> Seen:
    """Read both.

    Raises:
        ConfigError: one of them cannot be used.
    """
    directory, [file, *more] = hub.model(model, has_weights=False), hub.data_files(data, "data.train")
    if more:
        raise ConfigError(f"{data} has {1 + len(more)} files: name one, as org/name:folder/file.parquet")
    shape, tokenizer = read_shape(directory), load_tokenizer(directory)
    check_vocabulary(directory, tokenizer)
    options = Data(train=file, max_prompt_length=ANY_LENGTH, too_long="drop", on_error="skip")
    prompts, summary = load_prompts(file, tokenizer, options)
    texts = [tokenizer.decode(prompt.tokens) for prompt in prompts[:SAMPLE]]
    asking = {
        name: sum(mark in text.lower() for text in texts) / len(texts) for name, mark in FORMATS.items()
    }
    return Seen(model, directory, data, shape, max_tokens(directory), prompts, summary, asking)


def write(out: Path, seen: Seen, machine: Machine) -> list[str]:
    """Write a config. Return what was looked at, what was assumed, and the next commands, as lines.

    Raises:
        ConfigError: the file is there, or the model does not fit on the machine.
    """
    if out.exists():
        raise ConfigError(f"{out} is there: choose another name with --out, or remove it")
    common = _common(out, seen, machine)
    layout = choose.layout(common, seen.directory, seen.shape, machine)
    facts, assumed = _facts(seen, machine), _assumptions(seen)
    files.write_text(out, _yaml([*facts, *assumed], [*common, *layout.choices]))
    launch = f"dapo train {out}" + (f" --nproc {layout.ranks}" if layout.ranks > 1 else "")
    plan = f"dapo plan {out} --gpu {machine.gpu} --world-size {layout.ranks}"
    return [*facts, *assumed, f"written   {out}", f"next      {plan}", f"          {launch}"]


def _facts(seen: Seen, machine: Machine) -> list[str]:
    shape, lengths, room = (
        seen.shape,
        seen.lengths,
        f", {seen.positions:,} positions" if seen.positions else "",
    )
    middle, most = int(np.median(lengths)), int(lengths.max())
    return [
        f"model     {seen.model}: {shape.model_type}, {num_parameters(shape):,} parameters{room}",
        f"data      {seen.summary}",
        f"prompts   half have at most {middle:,} tokens, the longest has {most:,}",
        f"machine   {machine}",
    ]


def _assumptions(seen: Seen) -> list[str]:
    """Return what neither model nor data say, and what is to be looked at."""
    lines = [
        "assumed   responses this long: raise rollout.max_response_length while rollout/truncated is high"
    ]
    if max(seen.asking.values()) < USUAL:
        line, boxed = f"{seen.asking['answer_line']:.0%}", f"{seen.asking['boxed']:.0%}"
        asked = f'{line} of the prompts ask for a line with "Answer:", {boxed} for \\boxed'
        lines.append(
            f"note      {asked}, which the default reward reads: ask for one, or name a reward.function"
        )
    if seen.summary.skipped:
        lines.append("note      rows that cannot be used are left out: data.on_error")
    lines.append("note      no evaluation: name a file of held-out problems in eval.data")
    return lines


def _common(out: Path, seen: Seen, machine: Machine) -> list[Choice]:
    """Return the choices that do not depend on the layout."""
    lengths, num_prompts = seen.lengths, len(seen.prompts)
    is_boxed = seen.asking["answer_line"] < USUAL <= seen.asking["boxed"]
    longest = min(-(-int(lengths.max()) // 16) * 16, seen.positions // 2 if seen.positions else ANY_LENGTH)
    is_cut = int((lengths > longest).sum())
    wanted, left = (256 if machine.is_cpu else 8192), (seen.positions or ANY_LENGTH) - longest
    response = min(wanted, left)
    groups = min(16 if machine.is_cpu else 512, 1 << (max(num_prompts // 3, 1).bit_length() - 1))
    minibatch = max(groups // (4 if machine.is_cpu else 16), 1)
    budget = max(-(-(longest + response) // 64) * 64, 2048 if machine.is_cpu else 16384)
    chosen = [
        Choice("run.dir", f"runs/{out.stem}", "everything the run writes"),
        Choice("run.steps", 50 if machine.is_cpu else 400),
        Choice("data.train", str(seen.data), f"{num_prompts:,} prompts"),
        Choice("data.max_prompt_length", longest, f"tokens; {is_cut or 'no'} prompts are longer"),
        *(
            [Choice("data.too_long", "drop", "a prompt that is cut may have lost its question")]
            if is_cut
            else []
        ),
        *(
            [Choice("data.on_error", "skip", f"{seen.summary.skipped:,} rows")]
            if seen.summary.skipped
            else []
        ),
        Choice("rollout.prompts_per_step", groups, "groups that a step learns from"),
        Choice("rollout.group_size", 8 if machine.is_cpu else 16, "samples per prompt"),
        Choice("rollout.prompts_per_round", groups * (1 if machine.is_cpu else 3)),
        Choice(
            "rollout.max_response_length",
            response,
            "tokens" if left >= wanted else "all positions that are left",
        ),
        Choice(
            "reward.overlong_cache", max(response // 5, 1), "the last fifth costs reward, as in the paper"
        ),
        Choice("optim.prompts_per_minibatch", minibatch, f"{groups // minibatch} updates a step"),
        *([Choice("reward.answer_format", "boxed", "as the prompts ask")] if is_boxed else []),
        Choice("policy.model", str(seen.model)),
        Choice("policy.tokens_per_microbatch", budget),
    ]
    if num_parameters(seen.shape) < 1e8:
        chosen.append(Choice("optim.lr", 1e-4, "a small model bears more than the paper's 1e-6"))
    if machine.is_cpu:
        chosen.append(Choice("policy.dtype", "float32"))
    return chosen


def _yaml(comments: list[str], choices: list[Choice]) -> str:
    """Return the config's text, which reads back to the choices."""
    order = list(Config.model_fields)
    ordered = sorted(choices, key=lambda choice: order.index(choice.key.split(".")[0]))
    lines = [f"# {line}" for line in ["made by dapo init; every other option: dapo config", *comments]]
    for section, found in groupby(ordered, key=lambda choice: choice.key.split(".")[0]):
        lines.append(f"{section}:")
        for key, value, why in found:
            comment = f"  # {why}" if why else ""
            lines.append(f"  {key.split('.')[1]}: {plain_yaml.inline(value)}{comment}")
    return "\n".join(lines) + "\n"


def machine_of(gpu: str | None, count: int | None) -> Machine:
    """Return the devices that are asked for; by default those of this machine.

    Raises:
        ConfigError: these GPUs are not known, or they are too many for one machine.
    """
    found: tuple[str, int] = ("cpu", min(os.cpu_count() or 1, 2))
    if gpu is None:
        found = _here() or found
    name, number = gpu or found[0], count or (found[1] if gpu in (None, "cpu") else MACHINE)
    if number > MACHINE:
        raise ConfigError(
            f"--gpus {number}: a machine has up to {MACHINE}; examples/qwen2.5_32b_paper has several machines"
        )
    return Machine(name, number)


def _here() -> tuple[str, int] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    for known in sorted(HARDWARE, key=len, reverse=True):  # h200 before h20
        if known in name.lower():
            return known, min(torch.cuda.device_count(), MACHINE)
    raise ConfigError(f"this machine's {name} is not known: name one like it with --gpu {'|'.join(HARDWARE)}")
