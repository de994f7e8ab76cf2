"""The settings of the ladder and the statistics of its runs, without a run."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dapo import config as configs

ROOT = Path(__file__).parents[2]
STACK = ["examples/arithmetic/config.yaml", "benchmarks/ladder/common.yaml"]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Modules of benchmarks/, by name, as its scripts import them."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/ladder"))
    monkeypatch.chdir(ROOT)
    names = ("record", "settings", "report")
    found = {name: importlib.import_module(name) for name in names}
    for name in names:  # so plain a name is left to others
        monkeypatch.delitem(sys.modules, name)
    return found


def options(overrides: list[str]) -> dict[str, Any]:
    """Return a config's options by their dotted names."""
    config = configs.load(STACK[0], [*STACK[1:], *overrides]).model_dump()
    return {
        f"{section}.{name}": value for section, fields in config.items() for name, value in fields.items()
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in after.items() if before[name] != value}


def test_each_row_of_the_ladder_is_one_option_away_from_the_row_before(modules):
    rows = list(modules["settings"].EXPERIMENTS["rows"].arms.values())
    found = [options(list(row)) for row in rows]
    steps = [changed(before, after) for before, after in itertools.pairwise(found)]
    assert steps == [
        {"objective.overlong_filtering": True},
        {"objective.clip_high": 0.28},
        {"reward.soft_overlong_punishment": True},
        {"objective.normaliser": "token_mean"},
        {"rollout.dynamic_sampling": True},
    ]


def test_the_first_row_has_no_technique(modules):
    [first, *_] = modules["settings"].EXPERIMENTS["rows"].arms.values()
    found = options(list(first))
    assert not found["rollout.dynamic_sampling"] and not found["reward.soft_overlong_punishment"]
    assert found["objective.clip_high"] == found["objective.clip_low"] == 0.2
    assert found["objective.normaliser"] == "sample_mean" and not found["objective.overlong_filtering"]


def test_arms_of_a_single_technique_differ_in_one_option(modules):
    for name, experiment in modules["settings"].EXPERIMENTS.items():
        if experiment.is_cumulative:
            continue
        [first, *others] = [options([*experiment.shared, *arm]) for arm in experiment.arms.values()]
        for other in others:
            assert len(changed(first, other)) == 1, (name, changed(first, other))


def make_run(modules: dict[str, ModuleType], accuracies: list[float], lengths: list[float]) -> Any:
    rows: list[dict[str, float]] = [
        {"step": 2.0 * i, "eval/accuracy": value} for i, value in enumerate(accuracies)
    ]
    rows += [
        {"step": i, "rollout/tokens": 100, "rollout/tokens_learnt": 50, "rollout/length": length}
        for i, length in enumerate(lengths)
    ]
    return modules["report"].Run(101, rows, 10.0, 12.0, "abc")


def test_compute_is_one_pass_a_sampled_token_and_four_a_learnt_one(modules):
    assert make_run(modules, [0.1], [5, 6]).compute() == [0, 300, 600]


def test_accuracy_at_equal_compute_is_between_two_evaluations(modules):
    run = make_run(modules, [0.2, 0.6], [5, 6])
    assert [run.accuracy_at(c) for c in (0, 300, 600, 900)] == pytest.approx([0.2, 0.4, 0.6, 0.6])


def test_the_step_of_take_off_is_the_first_above_the_bound(modules):
    run = make_run(modules, [0.1], [5, 20, 21, 5])
    assert run.first_step_above("rollout/length", 20) == 2
    assert run.first_step_above("rollout/length", 30) is None


def test_differences_are_of_the_same_seed(modules):
    arms = {
        "a": [make_run(modules, [0, 0.5], [5]), make_run(modules, [0, 0.7], [5])],
        "b": [make_run(modules, [0, 0.6], [5]), make_run(modules, [0, 0.8], [5])],
    }
    [_, row] = modules["report"].differences(arms)
    assert row == ["b", "0.100 ± 0.000", "0.100 ± 0.000", "0.600 0.800"]


def test_a_run_that_never_learnt_is_drawn_and_tabled(modules, tmp_path):
    arms = {"a": [make_run(modules, [0.1, 0.2], [5, 6])]}
    modules["report"].plot(arms, tmp_path / "plot.png")
    [row] = modules["report"].figures(arms)
    assert row[:2] == ["a", "0.200 ± 0.000"] and (tmp_path / "plot.png").stat().st_size > 1000
