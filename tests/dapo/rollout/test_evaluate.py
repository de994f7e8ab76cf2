"""The statistics of evaluation, against counting by hand, and the eval command against itself."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo.rollout import evaluate
from tests.conftest import make_group

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("n", "c"), [(4, 0), (4, 1), (4, 4), (6, 2), (7, 5)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_sample(n: int, c: int) -> None:
    for k in range(1, n + 1):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert evaluate.pass_at(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def group(answers: list[str | None], gold: str):  # type: ignore[no-untyped-def]
    made = make_group([answer == gold for answer in answers])
    for sample, answer in zip(made.samples, answers, strict=True):
        sample.text = "no answer here" if answer is None else f"so\nAnswer: {answer}"
    return made


@pytest.mark.parametrize(
    ("answers", "is_right"),
    [
        (["1", "2", "2"], True),
        (["2", "1", "1"], False),
        (["2", "1"], True),  # a tie: the first given
        (["1", "2"], False),
        ([None, None, "2"], True),  # no answer, no vote
        ([None, None], False),
    ],
)
def test_majority(answers: list[str | None], is_right: bool) -> None:
    assert evaluate.majority_is_correct(group(answers, "2")) == is_right


def test_the_interval_is_of_problems_not_of_samples() -> None:
    """32 samples that all agree say as much as one: a problem is one draw."""
    few, many = [[1.0, 0.0, 1.0, 0.0] for _ in range(2)]
    groups = [group(["2"] * 32 if right else ["1"] * 32, "2") for right in (True, False, True, False)]
    scores = evaluate.score(groups)
    assert (scores.mean, scores.samples, scores.problems) == (0.5, 32, 4)
    assert scores.mean_half_width == pytest.approx(1.96 * np.std(few, ddof=1) / 2)
    assert scores.per_problem == many
    assert list(scores.pass_at) == [1, 2, 4, 8, 16, 32]


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        accuracies = rng.binomial(8, rng.beta(2, 2, size=60)) / 8
        hits += abs(accuracies.mean() - 0.5) <= evaluate.half_width(accuracies.tolist())
    assert 0.91 <= hits / 400 <= 0.98


def test_comparison_finds_a_difference_that_pairs_show_and_no_other() -> None:
    rng = np.random.default_rng(0)
    hardness = rng.random(100)

    def scores(shift: float) -> evaluate.Scores:
        accuracies = np.clip(hardness + shift + 0.02 * rng.normal(size=100), 0, 1).tolist()
        return evaluate.Scores(100, 8, float(np.mean(accuracies)), 0, 0, {8: 0}, 0, 0, accuracies)

    assert evaluate.compare(scores(0), scores(0.03))["p_value"] < 0.001
    assert evaluate.compare(scores(0), scores(0))["p_value"] > 0.01
    difference = evaluate.compare(scores(0), scores(0.03))
    assert abs(difference["difference"] - 0.03) < difference["half_width"] + 0.01


def test_the_eval_command_compares_models_on_several_sets(tmp_path: Path) -> None:
    base = ROOT / "examples/arithmetic/base"
    worse = tmp_path / "worse"
    worse.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (worse / name).write_bytes((base / name).read_bytes())
    weights = load_file(base / "model.safetensors")
    save_file(
        {**{k: v * 0.5 for k, v in weights.items()}, "lm_head.weight": torch.ones(25, 64)},
        worse / "model.safetensors",
    )
    rows = (ROOT / "examples/arithmetic/data/heldout.jsonl").read_text().splitlines()[:12]
    (tmp_path / "repeated.jsonl").write_text("\n".join(rows * 3))
    command = [
        sys.executable,
        "-m",
        "dapo",
        "eval",
        "examples/arithmetic/config.yaml",
        f"run.dir={tmp_path / 'run'}",
        "eval.samples=4",
    ]
    sets = f"eval.data={{one: {tmp_path / 'repeated.jsonl'}, two: {tmp_path / 'repeated.jsonl'}}}"
    done = subprocess.run(
        [*command, sets, "--model", base, "--model", worse], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "36 rows, 12 prompts; left out: 24 copies" in done.stdout
    record = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert list(record["models"]) == [str(base), str(worse)]
    assert record["comparisons"][str(worse)]["one"]["difference"] < 0
    assert f"{worse} against {base}  two:" in done.stdout
