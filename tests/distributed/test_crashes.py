"""kill -9, at moments that a seed draws: what crashes.py went through. What a resumed run must be,
benchmarks/crash_test.py asserts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import ROOT


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("crashes") / "out.json"
    command = [sys.executable, "-m", "tests.distributed.crashes", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def test_a_run_that_is_killed_ten_times_is_the_run_that_nobody_killed(found: dict[str, Any]) -> None:
    exact, kills = found["exact"], found["exact"]["kills"]
    assert len(kills) == 10
    assert [kill["started"] for kill in kills[1:]] == [kill["newest"] for kill in kills[:-1]], (
        "each went on from where the one before was"
    )
    assert any(kill["left"] for kill in kills), "a save was hit in the middle"
    assert any(not kill["left"] for kill in kills), "and what lies between two saves"
    assert exact["compared"] >= 10 and exact["steps"] > kills[-1]["newest"]


def test_a_run_that_samples_ahead_and_is_killed_learns_from_each_group_once(found: dict[str, Any]) -> None:
    ahead, kills = found["ahead"], found["ahead"]["kills"]
    assert len(kills) == 5 and [kill["started"] for kill in kills[1:]] == [
        kill["newest"] for kill in kills[:-1]
    ]
    assert ahead["looks"] >= 5 and ahead["steps"] > kills[-1]["newest"]
    assert max(ahead["ages"]) > 0, "nothing was sampled ahead, so nothing was tested"


def test_a_run_that_loses_a_rank_starts_again_by_itself_and_is_the_run_that_nobody_killed(
    tmp_path: Path,
) -> None:
    """benchmarks/unattended.py in small: `dapo train --restarts`."""
    call = "import sys, pathlib, unattended; print(unattended.unattended(1, 1, 0, pathlib.Path(sys.argv[1])))"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    done = subprocess.run(
        [sys.executable, "-c", call, str(tmp_path)],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    log = (tmp_path / "log").read_text()
    assert "was ended by SIGKILL" in log and "; starting again in 0 s, 1 of 100" in log
