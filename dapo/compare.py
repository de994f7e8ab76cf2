"""Are two runs the same from one step to another? What was sampled, what was learnt, what they would go on from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dapo import dump, metrics
from dapo.policy.torch_dist import Reader

SAMPLED = {  # seeds are made of run.seed, group and index
    "batches: groups, samples, prompts": ("kind", "group", "index", "prompt_index"),
    "draws: tokens, versions, rewards": ("tokens", "versions", "reward", "advantage"),
}


@dataclass(frozen=True)
class Finding:
    """`gap`: 0 where all `count` are equal; else the share that differs, the largest difference, or its norm relative to theirs."""

    what: str
    count: int
    gap: float
    is_rounded: bool = False  # another layout adds in another order


def runs(a: Path, b: Path, first: int, end: int) -> Iterator[Finding]:
    """Steps `first` … `end` − 1 of two run directories that dumped all rollouts and have a checkpoint after `end` steps.

    Raises:
        ConfigError: a dump or a checkpoint is missing, or damaged.
    """
    steps = range(first, end)
    for what, names in SAMPLED.items():
        columns = {name: dump.COLUMNS[name] for name in names}
        x, y = ([dump.read_rows(dump.path_of(run / "rollouts", step), columns) for step in steps] for run in (a, b))
        yield Finding(what, sum(map(len, x)), sum(p != q for p, q in zip(x, y, strict=True)) / len(x))
    for what, key in (("learning rate", "policy/lr"), ("loss", "policy/loss")):
        mine, its = ([row.get(key, 0.0) for row in metrics.read(run / "metrics.jsonl") if row["step"] in steps] for run in (a, b))
        yield Finding(what, len(mine), max(abs(p - q) for p, q in zip(mine, its, strict=True)), is_rounded=key == "policy/loss")
    here, there = (run / "checkpoints" / f"step-{end:06}" for run in (a, b))
    is_same = (here / "rollouts.json").read_bytes() == (there / "rollouts.json").read_bytes()
    yield Finding("buffer: prompts to come, groups carried over", 1, float(not is_same))
    yield from policies(here / "policy", there / "policy")


def policies(a: Path, b: Path) -> Iterator[Finding]:
    """The tensors of two checkpoints, of whichever layouts. Rows that only pad a vocabulary are left out."""
    x, y = Reader(a), Reader(b)
    missing = x.sizes.keys() ^ y.sizes.keys()
    yield Finding("tensors, by name", len(x.sizes), len(missing) / len(x.sizes))
    for what in ("parameters", "main parameters", "moments"):
        names = [name for name in x.sizes if _kind(name) == what and name not in missing]
        norms = torch.zeros(2, dtype=torch.float64)
        for name in names:
            p, q = (reader.read(name)[: min(x.sizes[name][0], y.sizes[name][0])].double() for reader in (x, y))
            norms += torch.stack([(p - q).norm() ** 2, p.norm() ** 2])
        yield Finding(what, len(names), float((norms[0] / norms[1].clamp(min=1e-300)).sqrt()), is_rounded=True)


def _kind(name: str) -> str:
    if not name.startswith("optimizer."):
        return "parameters"
    return "main parameters" if name.startswith("optimizer.state.param.") else "moments"
