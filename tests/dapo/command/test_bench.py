"""`dapo bench`: its table, its file, and what it leaves, on real ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dapo.command.bench import Row, _out_of_memory_explained
from dapo.config import ConfigError
from dapo.model.families import read_shape
from dapo.model.names import table
from dapo.policy.weights import RandomWeights

ROOT = Path(__file__).parents[3]
PHASES = ["sync", "old_logprobs", "update", "save", "load"]


def bench(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Measure the quickstart, of whose model only config.json is there, and of whose data nothing."""
    (tmp_path / "model").mkdir()
    shutil.copy(ROOT / "examples/arithmetic/base/config.json", tmp_path / "model")
    overrides = [f"run.dir={tmp_path / 'run'}", f"policy.model={tmp_path / 'model'}", "data.train=none"]
    command = [sys.executable, "-m", "dapo", "bench", "examples/arithmetic/config.yaml", *overrides, *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_phases_of_a_step_are_measured_without_weights_data_and_engine(
    tmp_path: Path, ranks: int
) -> None:
    done = bench(tmp_path, "--nproc", str(ranks), "--mean-length", "40")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+) +([\d.e-]+) +([\d.e-]+|–) +([\d.e-]+) +([\d.e-]+|–)$", done.stdout, re.M)
    assert [row[0] for row in rows] == PHASES
    assert [row[0] for row in rows if row[2] != "–"] == ["old_logprobs", "update"]
    assert f"data {ranks}\n" in done.stdout and "128 samples of 40 tokens, 4 updates" in done.stdout
    found = json.loads((tmp_path / "run/bench.json").read_text())
    assert (found["world"], found["mean_length"], found["mfu"]) == (ranks, 40, None)
    assert found["tokens"] == pytest.approx(128 * 39, rel=0.03), "a sample's last token is not fed"
    for phase, row in found["phases"].items():
        steps = 1 if phase in ("save", "load") else 3
        assert [len(seconds) for seconds in row["seconds"]] == [steps] * ranks
        assert len(row["gib"]) == ranks and min(min(row["seconds"])) > 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["bench.json", "lock"]


def test_what_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    done = bench(tmp_path, "--mean-length", "100")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: a mean length of 100 tokens; the config allows 1 to 80"]
    assert not (tmp_path / "run").exists()


def test_memory_that_does_not_do_is_one_line_with_the_plans() -> None:
    plan: Any = SimpleNamespace(worst=SimpleNamespace(peak=5 * 2**29, peak_moment="the loss"))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    expected = r"^rank 3: CUDA out of memory; the plan has 2.5 GiB, during the loss: `dapo plan` names"
    with pytest.raises(ConfigError, match=expected), _out_of_memory_explained(plan, SimpleNamespace(rank=3)):  # type: ignore[arg-type]
        raise error


def test_the_slowest_rank_counts_and_the_first_step_does_not() -> None:
    row = Row("update", [[9.0, 1.0, 4.0, 2.0], [8.0, 3.0, 1.0, 1.0]], [0.25, 0.5], 2.5, None)
    assert row.usual == 3.0
    assert str(row).split() == ["update", "3", "2.5", "0.5", "–"]
    assert Row("save", [[2.0]], [0.5], None, None).usual == 2.0


def test_random_weights_have_the_models_shapes_and_are_the_same_on_every_rank() -> None:
    entries = table(read_shape(ROOT / "examples/arithmetic/base"), is_fused=True)
    first, other = (RandomWeights(torch.bfloat16) for _ in range(2))
    for entry in entries:
        tensors = first.read(entry)
        assert [tuple(tensor.shape) for tensor in tensors] == list(entry.shapes)
        assert all(map(torch.equal, tensors, other.read(entry)))
        for tensor in tensors:
            rows = tensor if tensor.dim() > 1 else tensor[None]
            assert tensor.dtype == torch.bfloat16 and len(rows.unique(dim=0)) == len(rows)
