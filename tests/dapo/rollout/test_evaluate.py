"""The statistics of evaluation, against counting by hand, and the eval command against itself."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo.rollout import evaluate
from dapo.types import Group, StorageError
from tests.conftest import make_group

ROOT = Path(__file__).parents[3]
BASE = ROOT / "examples/arithmetic/base"


@pytest.mark.parametrize(("n", "c"), [(4, 0), (4, 1), (4, 4), (6, 2), (7, 5)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_sample(n: int, c: int) -> None:
    for k in range(1, n + 1):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert evaluate.pass_at(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


class Votes:
    """Stands in for the Reward: answers are the last words; two are one if they are the same number."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def answer_of(self, response: str) -> str | None:
        return None if response.endswith("none") else response.split()[-1]

    def same(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        self.asked += pairs
        return [Fraction(a) == Fraction(b) for a, b in pairs]

    def take_metrics(self) -> dict[str, float]:
        return {"reward/timeouts": 3, "reward/undecided": 0.25}


def group(answers: list[str | None], gold: str) -> Group:
    made = make_group([answer is not None and Fraction(answer) == Fraction(gold) for answer in answers])
    for sample, answer in zip(made.samples, answers, strict=True):
        sample.text = f"so {answer or 'none'}"
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
        (["1", "1", "2", "4/2", "6/3"], True),  # written in three ways
        (["3", "1", "2/2", "2"], False),
        (["2", "1", "2/2", "4/2"], True),  # a tie of two and two
    ],
)
def test_majority(answers: list[str | None], is_right: bool) -> None:
    assert evaluate.majorities_of([group(answers, "2")], Votes()) == [is_right]  # type: ignore[arg-type]


def test_only_answers_that_may_be_one_and_decide_who_wins_are_compared() -> None:
    reward = Votes()
    groups = [group(["2", "2", "1"], "2"), group(["1", "2", "3", "4/2", None], "2")]
    evaluate.majorities_of(groups, reward)  # type: ignore[arg-type]
    assert reward.asked == [("1", "3"), ("2", "4/2")], "not across problems, nor right with wrong ones"


def test_without_answers_there_are_no_majorities() -> None:
    reward = Votes()
    reward.answer_of = None  # type: ignore[method-assign,assignment]
    scores = evaluate.score([group(["2", "1"], "2")], reward)  # type: ignore[arg-type]
    assert scores.majority is None and "maj@" not in str(scores)


def scores_of(outcomes: list[list[int]]) -> evaluate.Scores:
    """The scores of problems whose samples are right (1) or wrong (0)."""
    groups = [group([str(2 - (not right)) for right in problem], "2") for problem in outcomes]
    return evaluate.score(groups, Votes())  # type: ignore[arg-type]


def test_the_interval_is_of_problems_not_of_samples() -> None:
    """32 samples that all agree say as much as one: a problem is one draw."""
    few, many = [[1.0, 0.0, 1.0, 0.0] for _ in range(2)]
    scores = scores_of([[right] * 32 for right in (1, 0, 1, 0)])
    assert (scores.mean, scores.samples, scores.problems) == (0.5, 32, 4)
    assert scores.mean_half_width == pytest.approx(1.96 * np.std(few, ddof=1) / 2)
    assert scores.per_problem == many
    assert list(scores.pass_at) == [1, 2, 4, 8, 16, 32]
    assert scores.reward == {"timeouts": 3, "undecided": 0.25}
    assert str(scores).endswith("25.0% without a verdict")


def test_the_half_width_of_two_problems_is_by_hand_and_one_has_none() -> None:
    assert evaluate.half_width([0.25, 0.75]) == pytest.approx(1.96 * 0.25)  # s = 0.5 / √2, over √2
    assert evaluate.half_width([0.5]) is None
    one = scores_of([[1, 0]])
    assert one.mean_half_width is None and "±" not in str(one)
    found = evaluate.compare(one, one)
    assert found.half_width is None and str(found) == "+0.000, p = 1"


def brute_force(before: evaluate.Scores, after: evaluate.Scores) -> Fraction:
    """Swap the two at every subset of problems, in whole numbers."""
    counts = [
        round(before.samples * (y - x)) for x, y in zip(before.per_problem, after.per_problem, strict=True)
    ]
    sums = [
        abs(sum(s * c for s, c in zip(signs, counts, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(counts))
    ]
    return Fraction(sum(total >= abs(sum(counts)) for total in sums), len(sums))


@pytest.mark.parametrize("seed", range(6))
def test_the_p_value_with_ties_is_that_of_all_swaps(seed: int) -> None:
    """Three samples a problem: most sums occur in many ways, and rounding would lose some."""
    rng = np.random.default_rng(seed)
    before, after = (scores_of(rng.integers(0, 2, (11, 3)).tolist()) for _ in range(2))
    expected = brute_force(before, after)
    assert evaluate.compare(before, after).p_value == pytest.approx(float(expected), rel=1e-12)


def test_the_p_value_by_hand() -> None:
    """Five problems that only the later policy solves: 2 of the 32 ways to swap are as far apart."""
    worse, better = scores_of([[0, 0]] * 6), scores_of([[1, 1]] * 5 + [[0, 0]])
    found = evaluate.compare(worse, better)
    assert (found.p_value, found.difference) == (2 / 32, pytest.approx(5 / 6))
    assert evaluate.compare(better, worse).difference == pytest.approx(-5 / 6)
    assert evaluate.compare(worse, worse).p_value == 1.0


def test_scores_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "eval.json").mkdir()
    with pytest.raises(StorageError, match=r"^.*eval.json cannot be written, .* free there: Is a directory$"):
        evaluate.write({"a": {}}, tmp_path / "eval.json")


def test_what_is_written_is_strict_json(tmp_path: Path) -> None:
    """Of one problem there is no interval: not an infinite one, which JSON has no word for."""
    results = {name: {"set": scores_of([[1, 0]])} for name in ("a", "b")}
    evaluate.write(results, tmp_path / "above" / "run" / "eval.json")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    record = json.loads((tmp_path / "above/run/eval.json").read_text(), parse_constant=refuse)
    assert record["models"]["a"]["set"]["mean_half_width"] is None
    assert record["comparisons"]["b"]["set"] == {"difference": 0.0, "half_width": None, "p_value": 1.0}


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        accuracies = rng.binomial(8, rng.beta(2, 2, size=60)) / 8
        hits += abs(accuracies.mean() - 0.5) <= (evaluate.half_width(accuracies.tolist()) or 0)
    assert 0.91 <= hits / 400 <= 0.98


def test_comparison_finds_a_difference_that_pairs_show_and_no_other() -> None:
    rng = np.random.default_rng(0)
    easiness = 0.1 + 0.7 * rng.random(100)

    def scores(shift: float) -> evaluate.Scores:
        return scores_of((rng.random((100, 32)) < easiness[:, None] + shift).astype(int).tolist())

    assert evaluate.compare(scores(0), scores(0.1)).p_value < 0.001
    assert evaluate.compare(scores(0), scores(0)).p_value > 0.01
    found = evaluate.compare(scores(0), scores(0.1))
    assert found.half_width is not None and abs(found.difference - 0.1) < found.half_width


def worse(directory: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The base policy with smaller weights."""
    shutil.copytree(BASE, directory)
    save_file({name: tensor * 0.5 for name, tensor in weights.items()}, directory / "model.safetensors")
    return directory


def reversed_ids(directory: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The base policy with other token ids, a larger vocabulary, and one more layer, which does nothing."""
    shutil.copytree(BASE, directory)
    size, last = 28, 27
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: last - id for token, id in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = last - token["id"]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    ids = {"eos_token_id": last - 1, "pad_token_id": last}
    config = json.loads((directory / "config.json").read_text()) | ids
    config |= {"vocab_size": size, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(ids))
    layer = {name: tensor for name, tensor in weights.items() if ".layers.1." in name}
    for name, tensor in layer.items():
        is_output = "o_proj" in name or "down_proj" in name
        weights[name.replace(".layers.1.", ".layers.2.")] = tensor * (not is_output)
    embedding = torch.zeros(size, 64)
    embedding[3:] = weights["model.embed_tokens.weight"].flip(0)
    embedding[:3] = -embedding[3:].mean(0)  # no token: nothing is like it
    save_file(weights | {"model.embed_tokens.weight": embedding}, directory / "model.safetensors")
    return directory


def swapped_ids(directory: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The base policy in which 1 and 2 have each other's token id: nothing in its config shows it."""
    shutil.copytree(BASE, directory)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["1"], ids["2"] = ids["2"], ids["1"]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    embedding = weights["model.embed_tokens.weight"].clone()
    embedding[[ids["1"], ids["2"]]] = embedding[[ids["2"], ids["1"]]]
    save_file(weights | {"model.embed_tokens.weight": embedding}, directory / "model.safetensors")
    return directory


def test_the_eval_command_compares_models_on_several_sets(tmp_path: Path) -> None:
    """Each with its own tokenizer, stop tokens and sizes: the last two are the first in other clothes."""
    weights = load_file(BASE / "model.safetensors")
    second = worse(tmp_path / "worse", weights)
    others = swapped_ids(tmp_path / "swapped", weights), reversed_ids(tmp_path / "reversed", weights)
    rows = (ROOT / "examples/arithmetic/data/heldout.jsonl").read_text().splitlines()[:12]
    (tmp_path / "repeated.jsonl").write_text("\n".join(rows * 3))
    command = [
        *[sys.executable, "-m", "dapo", "eval", "examples/arithmetic/config.yaml"],
        *[f"run.dir={tmp_path / 'run'}", "eval.samples=4", "eval.temperature=1e-4"],
        "reward.shadow=[tests.dapo.reward.reward_functions:looking]",
        f"eval.data={{one: {tmp_path / 'repeated.jsonl'}, two: {tmp_path / 'repeated.jsonl'}}}",
        *["--model", str(BASE), "--model", str(second)],
        *[word for other in others for word in ("--model", str(other))],
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "36 rows, 12 prompts; left out: 24 copies" in done.stdout
    assert done.stdout.count('reads the last line with "Answer:" of a response') == 1
    record = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert list(record["models"]) == [str(BASE), str(second), *map(str, others)]
    assert record["comparisons"][str(second)]["one"]["difference"] < 0
    assert f"{second} against {BASE}  two:" in done.stdout
    for other in others:
        assert record["models"][str(other)] == record["models"][str(BASE)]
    scores = record["models"][str(BASE)]["one"]
    assert 0 < scores["mean"] == scores["majority"] and scores["length"] < 64 and scores["truncated"] < 1
