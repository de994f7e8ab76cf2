"""Two runs are compared: each finding sees its own kind of difference, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dapo import verify
from dapo.policy import chunks
from dapo.rollout import dump
from dapo.rollout.buffer import Buffer
from dapo.types import Group, Prompt, Sample

STEP = 3


def make(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    *,
    prompt: int = 7,
    token: int = 5,
    lr: float = 1e-3,
    loss: float = 0.25,
) -> Path:
    """A run of one group, from step 3 to 4."""
    group = Group(STEP << 20, Prompt(prompt, np.array([1, 2], np.int32), "9"))
    for i in range(2):
        tokens, logprobs = np.array([token, 6], np.int32), np.zeros(2, np.float32)
        group.samples.append(
            Sample(group.id, i, tokens, logprobs, np.ones(2, bool), ((STEP, 0, 2),), "stop", reward=float(i))
        )
    buffer = Buffer(1, is_dynamic=True)
    buffer.kept.append(group)
    with dump.Writer() as writer:
        writer.write(dump.path_of(directory / "rollouts", STEP), buffer, fraction=1.0)
    (directory / "metrics.jsonl").write_text(
        json.dumps({"step": STEP, "policy/lr": lr, "policy/loss": loss}) + "\n"
    )
    checkpoint = directory / "checkpoints" / "step-000004"
    (checkpoint / "policy").mkdir(parents=True)
    (checkpoint / "rollouts.json").write_text('{"drawn": [8]}')
    writer = chunks.Writer(checkpoint / "policy", 2**20)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    return directory


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        f"optimizer.state.{name}.norm.weight": torch.randn(8) for name in ("param", "exp_avg", "exp_avg_sq")
    } | {"norm.weight": torch.randn(8).bfloat16()}


def findings(a: Path, b: Path) -> dict[str, float]:
    return {found.what.partition(":")[0]: found.gap for found in verify.runs(a, b, STEP, STEP + 1)}


def test_a_copy_is_the_same(tmp_path: Path) -> None:
    run = make(tmp_path / "a", tensors())
    found = findings(run, shutil.copytree(run, tmp_path / "b"))
    assert len(found) == 9 and set(found.values()) == {0.0}


def test_prompts_to_come_are_no_part_of_a_replay(tmp_path: Path) -> None:
    a, b = (make(tmp_path / name, tensors()) for name in ("a", "b"))
    (b / "checkpoints/step-000004/rollouts.json").write_text('{"drawn": [0]}')
    assert findings(a, b)["buffer"] == 1.0
    found = list(verify.runs(a, b, STEP, STEP + 1, is_replay=True))
    assert len(found) == 8 and {each.gap for each in found} == {0.0}


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("batches", lambda path: make(path, tensors(), prompt=8)),
        ("draws", lambda path: make(path, tensors(), token=4)),
        ("learning rate", lambda path: make(path, tensors(), lr=2e-3)),
        ("loss", lambda path: make(path, tensors(), loss=0.5)),
        (
            "buffer",
            lambda path: (make(path, tensors()) / "checkpoints/step-000004/rollouts.json").write_text(
                '{"drawn": [9]}'
            ),
        ),
        ("parameters", lambda path: make(path, tensors() | {"norm.weight": torch.zeros(8).bfloat16()})),
        (
            "main parameters",
            lambda path: make(path, tensors() | {"optimizer.state.param.norm.weight": torch.zeros(8)}),
        ),
        (
            "moments",
            lambda path: make(path, tensors() | {"optimizer.state.exp_avg_sq.norm.weight": torch.zeros(8)}),
        ),
        ("tensors, by name", lambda path: make(path, tensors() | {"bias": torch.zeros(8)})),
    ],
)
def test_each_difference_is_found_where_it_is(
    tmp_path: Path, what: str, change: Callable[[Path], object]
) -> None:
    run = make(tmp_path / "a", tensors())
    change(tmp_path / "b")
    found = findings(run, tmp_path / "b")
    assert {name for name, gap in found.items() if gap > 0} == {what}


def test_main_parameters_that_an_older_checkpoint_repeats_make_no_difference(tmp_path: Path) -> None:
    """Those of float32 parameters were written twice."""
    once = {name: t.float() for name, t in tensors().items() if not name.startswith(verify.MAIN)}
    twice = once | {verify.MAIN + "norm.weight": once["norm.weight"]}
    found = findings(make(tmp_path / "a", once), make(tmp_path / "b", twice))
    assert "main parameters" not in found and set(found.values()) == {0.0}
