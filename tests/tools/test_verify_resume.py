"""tools/verify_resume.py: what it says, and its exit status, of a run that goes on in another layout, or
differently.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.tools.test_convert import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import verify_resume

CONFIG = ROOT / "examples/arithmetic/config.yaml"
SMALL = [
    "parallel.tensor=2",
    "rollout.prompts_per_step=4",
    "rollout.prompts_per_round=4",
    "reward.workers=1",
    "run.save_every=1",
]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return {"root": tmp_path_factory.mktemp("trained")}


@pytest.fixture(autouse=True)
def _train_once(trained_once: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two tests train alike, from the same beginning, is trained once and copied."""
    train = verify_resume.train

    def copied(directory: Path, steps: int, nproc: int, options: list[str]) -> None:
        key = (directory.name, steps, nproc, *options)
        kept = trained_once["root"] / str(len(trained_once))
        if key not in trained_once:
            train(directory, steps, nproc, options)
            trained_once[key] = shutil.copytree(directory, kept)
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(trained_once[key], directory)

    monkeypatch.setattr(verify_resume, "train", copied)


def verify(*options: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str], list[str]]:
    """Exit status; what was found in the same layout, and in the other."""
    status = verify_resume.main([str(CONFIG), *SMALL, *options, "--steps", "1", "1", "--nproc", "2"])
    same, other = (part.splitlines() for part in capfd.readouterr().out.split("1 steps, stopped, ")[1:])
    return status, same, other


def test_a_run_of_two_processes_goes_on_in_one(capfd: pytest.CaptureFixture[str]) -> None:
    status, same, other = verify("--then", "parallel.tensor=1", "--then-nproc", "1", capfd=capfd)
    assert status == 0
    assert same[0] == "1 more in 2 processes, the same layout; against 2 in one go:"
    assert other[0] == "1 more in 1 processes, parallel.tensor=1; against 2 in one go:"
    assert len(same) == len(other) == 9
    assert all(line.endswith(" equal") for line in same[1:])
    assert any("differ by" in line for line in other[1:]), (
        "the layouts add in another order: they were not compared"
    )
    assert not [line for line in other if "WRONG" in line]


def test_what_differs_is_named_and_the_exit_status_is_1(capfd: pytest.CaptureFixture[str]) -> None:
    status, same, other = verify("--then", "optim.lr=1e-2", capfd=capfd)
    assert status == 1
    assert all(line.endswith(" equal") for line in same[1:])
    wrong = [line.partition("  ")[2].split("   ")[0].strip() for line in other if line.endswith("WRONG")]
    assert {"learning rate", "parameters"} <= set(wrong)
    assert not [line for line in wrong if line.startswith(("batches", "draws", "tensors"))]


def test_a_run_that_samples_ahead_is_compared_with_a_replay_of_what_it_learnt(
    capfd: pytest.CaptureFixture[str],
) -> None:
    staleness = ["rollout.max_staleness=2", "--then", "parallel.tensor=1", "--then-nproc", "1"]
    status, same, other = verify(*staleness, capfd=capfd)
    assert status == 0
    assert same[0].endswith("the same layout; against 2 in one go, replaying what it samples:")
    assert len(same) == len(other) == 8, "prompts to come are no part of it"
    assert all(line.endswith(" equal") for line in same[1:])
    assert any("differ by" in line for line in other[1:]), "the other layout learnt nothing"


def test_a_config_that_cannot_be_read_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert verify_resume.main([str(CONFIG), "rollout.max_stalenes=2"]) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "max_staleness" in said[0]
