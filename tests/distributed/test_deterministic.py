"""Two runs of the same command with run.deterministic are the same, to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dapo import verify
from tests.distributed.launch import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from verify_resume import train

SMALL = [
    str(ROOT / "examples/arithmetic/config.yaml"),
    "run.deterministic=true",
    "rollout.prompts_per_step=4",
    "rollout.prompts_per_round=4",
    "reward.workers=1",
]


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, without what a clock says."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    clocks = ("time/", "perf/")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(clocks)} for line in lines]


def test_two_runs_of_two_ranks_are_equal_to_the_bit(tmp_path: Path) -> None:
    runs = tmp_path / "first", tmp_path / "second"
    for run in runs:
        train(run, 2, 2, SMALL)
    found = list(verify.runs(*runs, 0, 2))
    assert {"parameters", "moments"} <= {finding.what for finding in found}
    assert [finding for finding in found if finding.gap] == []
    first, second = map(rows, runs)
    assert first == second
    assert all(row["policy/grad_norm"] > 0 for row in first[:2]), "nothing is learnt, so nothing was tested"
    weights = [(run / "hf/model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
