"""Comparison of two runs, step by step: their samples, updates and checkpoints; and of two models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from dapo.config import ConfigError
from dapo.engine.embedded import as_stored, learnt_and_kept
from dapo.model.shape import ModelShape
from dapo.model.tokenizer import load_tokenizer
from dapo.policy.chunks import MAIN, Reader
from dapo.policy.weight_files import hf_tensors, open_weights
from dapo.report import curves
from dapo.rollout import dump

SAMPLED = {  # seeds are made of run.seed, group and index
    "batches: groups, samples, prompts": ("kind", "group", "index", "prompt_index"),
    "draws: tokens, versions, rewards": ("tokens", "versions", "reward", "advantage"),
}


@dataclass(frozen=True)
class Finding:
    """One comparison of `count` things.

    `gap` is 0 if all are equal; else the fraction that differs, the largest difference, or the norm of the
    difference relative to theirs.
    """

    what: str
    count: int
    gap: float
    is_rounded: bool = False  # another layout adds in another order


def runs(a: Path, b: Path, first: int, end: int, is_replay: bool = False) -> Iterator[Finding]:
    """Compare steps `first` … `end` − 1 of two run directories.

    Both runs dumped all rollouts and have a checkpoint after `end` steps. If `b` is a replay of `a`, which
    asks for nothing, the prompts to come are left out.

    Raises:
        ConfigError: a dump or a checkpoint is missing, or damaged.
    """
    steps = range(first, end)
    dumps = [[dump.path_of(run / "rollouts", step) for step in steps] for run in (a, b)]
    for what, names in SAMPLED.items():
        columns = {name: dump.COLUMNS[name] for name in names}
        x, y = ([dump.read_rows(path, columns) for path in paths] for paths in dumps)
        num_different = sum(p != q for p, q in zip(x, y, strict=True))
        yield Finding(what, sum(map(len, x)), num_different / len(x))
    records = [curves.read(run / "metrics.jsonl") for run in (a, b)]
    for what, key in (("learning rate", "policy/lr"), ("loss", "policy/loss")):
        u, v = ([row.get(key, 0.0) for row in rows if row["step"] in steps] for rows in records)
        gap = max(abs(p - q) for p, q in zip(u, v, strict=True))
        yield Finding(what, len(u), gap, is_rounded=key == "policy/loss")
    here, there = (run / "checkpoints" / f"step-{end:06}" for run in (a, b))
    if not is_replay:
        is_same = (here / "rollouts.json").read_bytes() == (there / "rollouts.json").read_bytes()
        yield Finding("buffer: prompts to come", 1, float(not is_same))
    yield from policies(here / "policy", there / "policy")


def policies(a: Path, b: Path) -> Iterator[Finding]:
    """Compare the tensors of two checkpoints of any layouts, without rows that only pad a vocabulary."""
    x, y = Reader(a), Reader(b)
    here, there = _names(x), _names(y)
    missing = set(here) ^ set(there)
    yield Finding("tensors, by name", len(here), len(missing) / len(here))
    for what in ("parameters", "main parameters", "moments", "buffers"):
        names = [name for name in here if _kind(name) == what and name not in missing]
        if not names and what in ("main parameters", "buffers"):
            continue  # of a float32 model; of one without a router's bias
        squares = torch.zeros(2, dtype=torch.float64)  # of the difference, and of the first run's values
        for name in names:
            num_rows = min(x.sizes[name][0], y.sizes[name][0])
            p, q = (reader.read(name)[:num_rows].double() for reader in (x, y))
            squares += torch.stack([(p - q).norm() ** 2, p.norm() ** 2])
        gap = float((squares[0] / squares[1].clamp(min=1e-300)).sqrt())
        yield Finding(what, len(names), gap, is_rounded=what != "buffers")


def _kind(name: str) -> str:
    if not name.startswith("optimizer."):
        return "buffers" if name.endswith(".expert_bias") else "parameters"
    return "main parameters" if name.startswith(MAIN) else "moments"


def _names(reader: Reader) -> list[str]:
    """Return the names of a checkpoint's tensors, without main parameters that repeat float32 parameters."""
    mains = {name: name.removeprefix(MAIN) for name in reader.sizes if name.startswith(MAIN)}
    copies = {main for main, name in mains.items() if reader.dtype(name) == torch.float32}
    return [name for name in reader.sizes if name not in copies]


def tokens_of(text: Path, models: list[Path], shape: ModelShape) -> torch.Tensor:
    """Tokenize a file: [1, n] ids, which must be the same for both `models`, Hugging Face directories.

    Raises:
        ConfigError: the ids differ, or are too few, or exceed the vocabulary; or a tokenizer or the file
            cannot be read.
    """
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {text} cannot be read: {error}") from error
    a, b = (load_tokenizer(model)(words).input_ids for model in models)
    if a != b:
        place = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905
        counts = f"{len(a)} tokens to one, {len(b)} to the other, unlike from {place} on"
        raise ConfigError(f"the tokenizers differ: --text {text} is {counts}")
    if len(a) < 2:
        reason = "the first has no log-prob, so there must be two"
        raise ConfigError(f"--text {text} has too few tokens, {len(a)}: {reason}")
    if max(a) >= shape.vocab_size:
        both = f"token {max(a)}, the models have a vocabulary of {shape.vocab_size}"
        raise ConfigError(f"--text {text} has {both}: not their tokenizer")
    return torch.tensor([a])


@torch.no_grad()
def logprobs(source: Path, model: Path, shape: ModelShape, tokens: torch.Tensor) -> torch.Tensor:
    """Compute log π(token | those before) of all tokens but the first in float32: [1, n] → [n − 1].

    The weights are those of `source`, in either format; `model` is the Hugging Face directory that describes
    them.
    """
    config = transformers.AutoConfig.from_pretrained(model)
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    params = dict(as_stored(learnt_and_kept(hf)))
    for name, tensor in hf_tensors(open_weights(source, shape), shape, torch.float32):
        params[name].copy_(tensor)
    return hf(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]  # type: ignore[no-any-return]
