"""Writes a commented config for a model and a data file, after looking at both.

dapo init models/Qwen2.5-7B prompts.jsonl --gpu h100 --gpus 8
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from dapo import files
from dapo.config import Config, ConfigError, Data, plain_yaml
from dapo.model import hub
from dapo.model.families import read_shape
from dapo.model.parameters import num_parameters
from dapo.model.shape import ModelShape, max_tokens
from dapo.model.tokenizer import check_vocabulary, load_tokenizer
from dapo.plan import choose
from dapo.plan.choose import Choice, Machine
from dapo.plan.time import HARDWARE, MACHINE, known_gpu
from dapo.rollout.data_files import Summary
from dapo.rollout.prompts import load_stream
from dapo.types import Prompt

ANY_LENGTH = 2**30  # tokens
SAMPLE = 500  # prompts whose text is looked at
FILES = 5  # of a data set that are listed


def _asks_for_line(text: str) -> bool:
    """Return True if a prompt asks for "Answer:"; where it ends with that, the response holds none."""
    text = text.lower().rstrip()
    return "answer:" in text and not text.endswith("answer:")


# reward.answer_format → does a prompt ask for it?
FORMATS: dict[str, Callable[[str], bool]] = {
    "answer_line": _asks_for_line,
    "boxed": lambda text: "\\boxed" in text,
}
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
    summaries: list[Summary]  # of each file
    asking: dict[str, float]  # answer format → share of prompts that ask for it
    longest: int  # tokens: data.max_prompt_length

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each prompt, int64 [prompts]."""
        return np.array([len(prompt.tokens) for prompt in self.prompts])

    @property
    def num_longer(self) -> int:
        """Prompts that are left out for their length."""
        return int((self.lengths > self.longest).sum())

    @property
    def num_kept(self) -> int:
        return len(self.prompts) - self.num_longer

    @property
    def num_skipped(self) -> int:
        """Rows that cannot be used."""
        return sum(summary.skipped for summary in self.summaries)


def look(model: Path, data: Path) -> Seen:
    """Read both.

    Raises:
        ConfigError: one of them cannot be used.
    """
    directory, paths = hub.model(model, has_weights=False), hub.data_files(data, "data.train")
    shape, tokenizer = read_shape(directory), load_tokenizer(directory)
    check_vocabulary(directory, tokenizer)
    tokenizer.model_max_length = ANY_LENGTH  # it would warn of long prompts
    options = Data.model_construct(
        train=paths, max_prompt_length=ANY_LENGTH, too_long="drop", on_error="skip"
    )
    stream, summaries = load_stream(options, tokenizer, seed=0)
    prompts = stream.prompts
    texts = [tokenizer.decode(prompts[i].tokens) for i in range(0, len(prompts), -(-len(prompts) // SAMPLE))]
    asking = {name: sum(map(asks, texts)) / len(texts) for name, asks in FORMATS.items()}
    positions = max_tokens(directory)
    longest = _longest(np.array([len(prompt.tokens) for prompt in prompts]), positions)
    return Seen(model, directory, data, shape, positions, prompts, summaries, asking, longest)


def _longest(lengths: np.ndarray, positions: int | None) -> int:
    """Return the length, in tokens, above which prompts are left out.

    That is at half of the model's positions, and where a few are far longer than 99 % of all.

    Raises:
        ConfigError: most prompts are longer than half of the positions.
    """
    room = positions // 2 if positions else ANY_LENGTH
    if (num_longer := int((lengths > room).sum())) * 2 > len(lengths):
        longer = (
            f"{num_longer:,} of {len(lengths):,} prompts are longer than half of the model's {positions:,}"
        )
        raise ConfigError(f"{longer} positions: use shorter prompts, or a model with more positions")
    most = int(lengths.max())
    usual = int(np.quantile(lengths, 0.99, method="higher"))
    return min(-(-(usual if most > 4 * usual else most) // 16) * 16, room)


def write(out: Path, seen: Seen, machine: Machine) -> list[str]:
    """Write a config. Return what was looked at, what was chosen and assumed, and the next commands.

    Raises:
        ConfigError: the file is there or cannot be written, or the model does not fit on the machine.
    """
    check_new(out)
    common = _common(out, seen, machine)
    layout = choose.layout(common, seen.directory, seen.shape, machine)
    about = [*_facts(seen, machine), *_chosen(common, layout), *_notes(seen)]
    try:
        files.write_text(out, _yaml(about, [*common, *layout.choices]))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error
    launch = f"dapo train {out}" + (f" --nproc {layout.ranks}" if layout.ranks > 1 else "")
    plan = f"dapo plan {out} --gpu {machine.gpu} --world-size {layout.ranks}"
    return [*about, f"written   {out}", f"next      {plan}", f"          {launch}"]


def check_new(out: Path) -> None:
    """Raise ConfigError if there is such a file, or no folder for it."""
    if out.exists():
        raise ConfigError(f"--out {out} is there: choose another name, or remove it")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}: make it first")


def _facts(seen: Seen, machine: Machine) -> list[str]:
    shape, lengths = seen.shape, seen.lengths
    room = f", {seen.positions:,} positions" if seen.positions else ""
    middle, most = int(np.median(lengths)), int(lengths.max())
    return [
        f"model     {seen.model}: {shape.model_type}, {num_parameters(shape):,} parameters{room}",
        *(f"data      {line}" for line in _files(seen.data, seen.summaries)),
        f"prompts   half have at most {middle:,} tokens, the longest has {most:,}",
        f"machine   {machine}",
    ]


def _files(data: Path, summaries: list[Summary]) -> list[str]:
    """Return what is in a file, or in each of a data set's."""
    texts = [str(summary).removeprefix(str(summary.path)) for summary in summaries]
    if len(texts) == 1:
        return [f"{data}{texts[0]}"]
    names = [summary.path.name for summary in summaries]
    lines = [f"  {name}{text}" for name, text in zip(names, texts, strict=True)]
    more = [f"  and {len(lines) - FILES:,} more"] if len(lines) > FILES else []
    return [f"{data}: {len(lines)} files", *lines[:FILES], *more]


def _chosen(common: list[Choice], layout: choose.Layout) -> list[str]:
    """Return the lengths, of which the responses' is assumed, and the layout."""
    values = {choice.key: choice.value for choice in common}
    prompt, response = values["data.max_prompt_length"], values["rollout.max_response_length"]
    ranks = [f"{key}={value}" for key, value, _ in layout.choices if isinstance(value, int)]
    return [
        f"lengths   prompts of up to {prompt:,} tokens; responses of up to {response:,}: assumed, raise it "
        "while rollout/truncated is high",
        f"layout    {layout.ranks} rank{'s' * (layout.ranks > 1)}, {', '.join(ranks)}",
    ]


def _notes(seen: Seen) -> list[str]:
    """Return what is to be looked at."""
    lines = []
    if seen.num_longer:
        longer = f"{seen.num_longer:,} prompts of more than {seen.longest:,} tokens"
        lines.append(f"{longer} are left out: data.max_prompt_length, data.too_long")
    if seen.num_skipped:
        lines.append(f"{seen.num_skipped:,} rows cannot be used and are left out: data.on_error")
    if max(seen.asking.values()) < USUAL:
        line, boxed = (f"{seen.asking[name]:.0%}" for name in ("answer_line", "boxed"))
        lines.append(
            f'{line} of the prompts ask for a line with "Answer:", which the default reward reads, {boxed} '
            "for \\boxed (reward.answer_format): ask for one, unless the model does it anyway, or name a "
            "reward.function"
        )
    lines.append("no evaluation: name a file of held-out problems in eval.data")
    return [f"note      {line}" for line in lines]


def _common(out: Path, seen: Seen, machine: Machine) -> list[Choice]:
    """Return the choices that do not depend on the layout."""
    is_boxed = seen.asking["answer_line"] < USUAL <= seen.asking["boxed"]
    wanted, left = (256 if machine.is_cpu else 8192), (seen.positions or ANY_LENGTH) - seen.longest
    response = min(wanted, left)
    groups = min(16 if machine.is_cpu else 512, 1 << (max(seen.num_kept // 3, 1).bit_length() - 1))
    minibatch = max(groups // (4 if machine.is_cpu else 16), 1)
    budget = max(-(-(seen.longest + response) // 64) * 64, 2048 if machine.is_cpu else 16384)
    room = "tokens" if left >= wanted else "all positions that are left"
    chosen = [
        Choice("run.dir", f"runs/{out.stem}", "everything the run writes"),
        Choice("run.steps", 50 if machine.is_cpu else 400),
        Choice("data.train", str(seen.data), f"prompts: {seen.num_kept:,}"),
        Choice("data.max_prompt_length", seen.longest, f"tokens; longer: {seen.num_longer:,} prompts"),
        Choice("data.too_long", "drop", "a prompt that is cut may have lost its question"),
        Choice("data.on_error", "skip", f"rows: {seen.num_skipped:,}"),
        Choice("rollout.prompts_per_step", groups, "groups that a step learns from"),
        Choice("rollout.group_size", 8 if machine.is_cpu else 16, "samples per prompt"),
        Choice("rollout.prompts_per_round", groups * (1 if machine.is_cpu else 3)),
        Choice("rollout.max_response_length", response, room),
        Choice("reward.answer_format", "boxed", "as the prompts ask"),
        Choice(
            "reward.overlong_cache", max(response // 5, 1), "the last fifth costs reward, as in the paper"
        ),
        Choice("optim.prompts_per_minibatch", minibatch, f"updates a step: {groups // minibatch}"),
        Choice("optim.lr", 1e-4, "small models bear more than 1e-6"),
        Choice("policy.model", str(seen.model)),
        Choice("policy.dtype", "float32"),
        Choice("policy.tokens_per_microbatch", budget),
    ]
    is_wanted = {
        "data.too_long": seen.num_longer > 0,
        "data.on_error": seen.num_skipped > 0,
        "reward.answer_format": is_boxed,
        "optim.lr": num_parameters(seen.shape) < 1e8,
        "policy.dtype": machine.is_cpu,
    }
    return [choice for choice in chosen if is_wanted.get(choice.key, True)]


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
        if count and found[0] == "cpu":
            raise ConfigError(f"--gpus {count}: there is none on this machine: name one with --gpu")
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
    name, size = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30
    if known := known_gpu(name, size):
        return known, min(torch.cuda.device_count(), MACHINE)
    here = f"this machine's {name} with {size:.1f} GiB"
    raise ConfigError(f"{here} is not known: name one like it with --gpu {'|'.join(HARDWARE)}")
