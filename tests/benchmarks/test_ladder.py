"""The settings of the ladder and the statistics of its runs, without a run."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shutil
import subprocess
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
    groups = {"groups/asked": 9, "groups/surplus": 1, "groups/kept": 8, "rollout/no_gradient": 0.75}
    rows += [
        {"step": i, "rollout/tokens": 100, "rollout/tokens_learnt": 50, "rollout/length": length, **groups}
        for i, length in enumerate(lengths)
    ]
    return modules["report"].Run(101, rows, 10.0, 12.0, "abc")


def cells(text: str) -> list[list[str]]:
    """Return a Markdown table's rows."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_compute_is_one_pass_a_sampled_token_and_four_a_learnt_one(modules):
    assert make_run(modules, [0.1], [5, 6]).compute() == [0, 300, 600]


def test_lean_compute_leaves_out_kept_groups_without_a_gradient(modules):
    # of 8 judged groups 2 have one: a quarter of the kept ones
    assert make_run(modules, [0.1], [5, 6]).compute(is_lean=True) == [0, 150, 300]
    step = {"groups/asked": 32, "groups/surplus": 0, "groups/kept": 16, "rollout/no_gradient": 0.5}
    assert modules["report"].taught(step) == 1  # the others were turned away
    assert modules["report"].taught(step | {"groups/kept": 0}) == 0


def test_accuracy_at_equal_compute_is_between_two_evaluations(modules):
    run = make_run(modules, [0.2, 0.6], [5, 6])
    assert [run.accuracy_at(c) for c in (0, 300, 600, 900)] == pytest.approx([0.2, 0.4, 0.6, 0.6])
    assert run.accuracy_at(150, is_lean=True) == pytest.approx(0.4)


def test_the_step_of_take_off_is_the_first_above_the_bound(modules):
    run = make_run(modules, [0.1], [5, 20, 21, 5])
    assert run.first_step_above("rollout/length", 20) == 2
    assert run.first_step_above("rollout/length", 30) is None


def test_differences_are_of_the_same_seed(modules):
    def runs(*accuracies: float) -> list[Any]:
        return [make_run(modules, [0, x], [5 + 10 * x, 6]) for x in accuracies]

    arms = {"a": runs(0.5, 0.7), "b": runs(0.6, 0.8), "c": runs(0.6, 0.9)}
    experiment = modules["settings"].Experiment("?", {}, takes_off_above=5.5)
    header, _, *rows = cells(modules["report"].differences(arms, experiment))
    found = {row[0]: row[header.index("accuracy")] for row in rows}
    assert found == {
        "b − a": "+0.100 ± 0.000 (+0.100 to +0.100)",
        "c − b": "+0.050 ± 0.050 (-0.585 to +0.685)",
        "c − a": "+0.150 ± 0.050 (-0.485 to +0.785)",
    }
    assert {row[header.index("take-off")] for row in rows} == {"+0.0 ± 0.0 (+0.0 to +0.0)"}
    assert {row[header.index("truncated")] for row in rows} == {"–"}  # it was not measured


def test_a_mean_is_written_with_its_error(modules):
    average, difference = modules["record"].average, modules["record"].difference
    assert average([1, 3], 1) == "2.0 ± 1.0" and average([0.5]) == "0.500"
    assert average([1, None]) == average(None) == average([]) == "–"
    assert difference([1], [0.5], 1) == "+0.5" and difference([1, None], [1, 1]) == "–"
    # five values: 2.776 standard errors
    assert difference([1, 2, 3, 4, 5], [0] * 5, 2) == "+3.00 ± 0.71 (+1.04 to +4.96)"


def test_a_run_that_never_learnt_is_drawn_and_tabled(modules, tmp_path):
    arms = {"a": [make_run(modules, [0.1, 0.2], [5, 6])]}
    modules["report"].plot(arms, tmp_path / "plot.png")
    header, _, row = cells(modules["report"].figures(arms))
    assert row[:2] == ["a", "0.200"] and (tmp_path / "plot.png").stat().st_size > 1000
    assert row[header.index("entropy")] == "–"


TRAINER = """
import json, os, pathlib, sys
options = dict(option.split("=") for option in sys.argv[1:] if "=" in option)
directory, seed = pathlib.Path(options["run.dir"]), options.get("run.seed")
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{sys.argv[1]} {seed}\\n")
if sys.argv[1] == "eval":
    if os.environ.get("FAILS") == "eval":
        sys.exit("no evaluation")
    directory.mkdir()
    scores = {"mean": 0.5, "length": 9, "truncated": 0}
    (directory / "eval.json").write_text(json.dumps({"models": {"hf": {"heldout": scores}}}))
elif seed == os.environ.get("FAILS"):
    sys.exit("the trainer's last line")
else:
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/accuracy": 0.5}) + "\\n")
    if seed != os.environ.get("STOPPED"):
        (directory / "hf").mkdir()
"""


@pytest.fixture
def trainer(modules, tmp_path, monkeypatch) -> tuple[ModuleType, Path]:
    """Module `run` with a trainer of a few lines in place of dapo; and the file of its calls."""
    (tmp_path / "dapo").mkdir()
    (tmp_path / "dapo/__main__.py").write_text(TRAINER)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    run = importlib.import_module("run")
    for name in {"run", "bases", "make_base", "task"} - before:
        monkeypatch.delitem(sys.modules, name)
    calls = tmp_path / "calls"
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "CALLS": str(calls)}
    monkeypatch.setattr(run, "environment", lambda: os.environ | environment)
    monkeypatch.setattr(run, "KEPT", tmp_path / "kept")
    return run, calls


def read_calls(calls: Path) -> list[str]:
    found = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return found


def test_what_has_run_is_not_run_again(trainer):
    run, calls = trainer
    [first, *_] = run.EXPERIMENTS["rows"].arms
    found = run.run(run.Ladder(), "rows", first, 101)
    assert found.rows == [{"step": 0, "eval/accuracy": 0.5}] and read_calls(calls) == ["train 101"]
    for steps in (2, 2, 3):
        run.run(run.Ladder(overrides=[f"run.steps={steps}"]), "rows", first, 101)
    assert read_calls(calls) == ["train 101"] * 2, "it was asked otherwise"
    assert run.run(run.Ladder(), "rows", first, 101) == found
    assert read_calls(calls) == [], "a trial with other options leaves the others alone"


def test_a_run_with_another_base_data_or_reward_is_another(trainer, tmp_path, monkeypatch):
    run, calls = trainer
    [first, *_] = run.EXPERIMENTS["rows"].arms
    shutil.copytree(ROOT / "examples/arithmetic", tmp_path / "example")
    shutil.copy(ROOT / "benchmarks/ladder/rewards.py", tmp_path)
    monkeypatch.setattr(run, "EXAMPLE", tmp_path / "example")
    monkeypatch.setattr(run, "HERE", tmp_path)
    run.run(run.Ladder(), "rows", first, 101)
    changed = ["example/base/model.safetensors", "example/base/config.json", "example/data/train.jsonl"]
    for name in [*changed, "rewards.py"]:
        read_calls(calls)
        with (tmp_path / name).open("a") as file:
            file.write(" ")
        for _ in range(2):
            run.run(run.Ladder(), "rows", first, 101)
        assert read_calls(calls) == ["train 101"], name


def test_a_base_is_made_once_and_again_of_other_code(trainer, tmp_path, monkeypatch):
    run, calls = trainer
    bases = tmp_path / "bases.py"
    bases.write_text(
        "import os, sys\nname, directory, size = sys.argv[1:]\nos.makedirs(directory)\n"
        f"open({str(calls)!r}, 'a').write(name + ' ' + size)\n"
    )
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "RECIPE", [bases])
    experiments = [run.EXPERIMENTS[name] for name in ("rare16", "finite", "rows")]
    for expected in (["rare example"], []):
        run.prepare(run.Ladder(), experiments)
        assert read_calls(calls) == expected
    assert len((tmp_path / "kept/first_160.jsonl").read_text().splitlines()) == 160
    with bases.open("a") as file:
        file.write("# changed")
    run.prepare(run.Ladder(), experiments)
    assert read_calls(calls) == ["rare example"]
    bases.write_text("import sys; sys.exit(1)")
    with pytest.raises(subprocess.CalledProcessError):
        run.prepare(run.Ladder(), experiments)
    assert not (tmp_path / "kept/bases/rare").exists(), "an old base is not used"


def test_a_run_that_failed_or_was_stopped_is_no_result(trainer, monkeypatch):
    run, calls = trainer
    [first, *_] = run.EXPERIMENTS["rows"].arms
    for name in ("FAILS", "STOPPED"):
        monkeypatch.setenv(name, "101")
        with pytest.raises(SystemExit, match=f"rows, {re.escape(first)}, seed 101"):
            run.run(run.Ladder(), "rows", first, 101)
        monkeypatch.delenv(name)
    read_calls(calls)
    run.run(run.Ladder(), "rows", first, 101)
    assert read_calls(calls) == ["train 101"]


def test_an_evaluation_that_failed_costs_no_training(trainer, monkeypatch):
    run, calls = trainer
    monkeypatch.setenv("FAILS", "eval")
    with pytest.raises(subprocess.CalledProcessError):
        run.run(run.Ladder(), "cut", "without", 101)
    monkeypatch.delenv("FAILS")
    assert read_calls(calls) == ["train 101", "eval None"]
    assert run.run(run.Ladder(), "cut", "without", 101).wider["accuracy"] == 0.5
    assert read_calls(calls) == ["eval None"]


def test_a_short_form_leaves_the_published_tables_alone(trainer, tmp_path, monkeypatch):
    run, _ = trainer
    written: list[Path] = []
    monkeypatch.setattr(run.report, "write", lambda *arguments: written.append(arguments[-1]))
    run.main(run.Ladder(), 3, ["rows"])
    run.main(run.Ladder(overrides=["run.steps=2"]), 5, ["rows"])
    run.main(run.Ladder(), 5, ["rows"])
    assert written == [tmp_path / "kept/short", tmp_path / "kept/short", run.report.RESULTS]
