"""The alarm for a mismatch: what it learns, when it speaks, and when it stays silent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dapo.report.alarm import NUM_STEPS, Alarm, Watch, lines

NAME = "policy/mismatch"
NAN = float("nan")


def alarms(values: Sequence[float | None], name: str = NAME) -> list[int]:
    """Return the steps at which an alarm begins; None: a step without the metric."""
    rows = [{"step": i} | ({} if value is None else {name: value}) for i, value in enumerate(values)]
    return [int(line.split(":")[0].removeprefix("step ")) for line in lines(rows)]


def noisy(middle: float, count: int, seed: int = 0, spread: float = 0.15) -> list[float]:
    return (middle * np.exp(spread * np.random.default_rng(seed).standard_normal(count))).tolist()


@pytest.mark.parametrize("middle", [1e-7, 3e-3, 0.02])
@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_alarm(middle: float, seed: int) -> None:
    assert alarms(noisy(middle, 1000, seed)) == []


def test_float_noise_may_grow_to_ten_times_itself() -> None:
    assert alarms([*noisy(1e-7, 20), *noisy(1e-6, 20)]) == []
    assert alarms([0.0] * 20 + [1e-6] * 20 + [2e-5]) == [40]


@pytest.mark.parametrize("middle", [1e-7, 3e-3, 0.02])
@pytest.mark.parametrize("step", [10, 11, 40])
def test_a_jump_is_said_once_and_again_only_after_its_end(middle: float, step: int) -> None:
    jump = max(8 * middle, 1e-3)
    values = noisy(middle, step) + noisy(jump, 5) + noisy(middle, 3) + noisy(jump, 5)
    assert alarms(values) == [step, step + 8]


@pytest.mark.parametrize("middle", [1e-7, 3e-3])
def test_a_sync_that_missed_shows_while_the_run_still_learns(middle: float) -> None:
    """At step 0 both have the same weights, so one step is enough for what is ten times as far."""
    for first in (1, 2, 5):
        sick = [max(20 * middle, 1e-3) * 1.3**i for i in range(30)]
        assert alarms(noisy(middle, first) + sick) == [first]
    assert alarms([3e-3, 9e-3, 3e-3, 2e-3]) == [], "a step alone says little"


@pytest.mark.parametrize("growth", [1.1, 1.3, 1.5])
def test_what_grows_from_the_first_step_on_is_seen_while_it_is_below_a_hundred_times(growth: float) -> None:
    [step, *_] = alarms([1e-3 * growth**i for i in range(100)])
    assert growth**step < 100


def test_what_is_wrong_from_the_first_step_on_is_seen() -> None:
    assert alarms([0.5] * 12) == [0] and alarms([3.0] * 3, "policy/mismatch_p99") == [0]
    assert alarms([0.05] * 12 + [0.11]) == [12]


def test_a_step_that_was_too_far_teaches_nothing() -> None:
    alarm = Alarm([{"step": i, NAME: value} for i, value in enumerate([1e-3, 0.5, NAN, 1e-3])])
    assert alarm.watches[0].learnt == [1e-3, 1e-3]


def test_slow_growth_is_an_alarm_once_it_is_three_times_the_first_steps() -> None:
    values = [0.004 * 1.02**i for i in range(200)]
    [step] = alarms(values)
    assert 50 < step < 70 and values[step - 1] <= 3 * np.median(values[:NUM_STEPS]) < values[step]


def test_a_run_whose_first_steps_differ_much_has_a_higher_threshold() -> None:
    first = [1e-3, 4e-3, 1.5e-3, 6e-3, 1e-3, 8e-3, 2e-3, 7e-3, 1e-3, 5e-3]
    assert alarms([*first, 0.02]) == [] and alarms([*sorted(first)[:3] * 4, 0.02]) == [12]


def test_steps_without_the_metric_neither_teach_nor_end_an_alarm() -> None:
    values: list[float | None] = [None, *noisy(3e-3, 10), None, 0.1, None, 0.1, *noisy(3e-3, 2), None, 0.1]
    assert alarms(values) == [12, 18]
    assert alarms([None] * 30) == []


def test_no_number_is_an_alarm_at_any_step() -> None:
    assert alarms([NAN]) == [0] and alarms([3e-3] * 20 + [NAN]) == [20]
    assert alarms([3e-3] * 20 + [float("inf"), 3e-3]) == [20]


def test_a_short_run_has_no_alarm() -> None:
    assert alarms([]) == alarms([0.05]) == alarms(noisy(3e-3, NUM_STEPS - 1)) == []


@pytest.mark.parametrize("name", ["policy/mismatch_p99", "policy/mismatch_probe"])
def test_the_tail_and_the_probe_are_watched_too(name: str) -> None:
    assert alarms([*noisy(0.05, 20), 0.5], name) == [20]


def test_what_begins_in_one_step_is_one_line() -> None:
    rows = [{"step": i, NAME: 3e-3, "policy/mismatch_p99": 0.04} for i in range(12)]
    rows.append({"step": 12, NAME: 0.031, "policy/mismatch_p99": 0.9})
    assert lines(rows) == [
        "step 12: |old − behavior| is 0.031, 10 times what the first 10 steps had (0.003): "
        "run `dapo mismatch CONFIG` to see why"
    ]
    rows[-1][NAME] = 3e-3
    [line] = lines(rows)
    assert line.startswith("step 12: the 99th percentile of |old − behavior| is 0.9, 22 times what the first")
    assert "is nan, not what the first 10 steps had" in lines([*rows[:12], {"step": 12, NAME: NAN}])[0]
    assert lines([{"step": 0, NAME: NAN}]) == [
        "step 0: |old − behavior| is nan: run `dapo mismatch CONFIG` to see why"
    ]


@pytest.mark.parametrize("stop", [0, 1, 5, 10, 14, 17, 20])
def test_a_run_that_resumes_goes_on_as_if_it_had_not_stopped(stop: int) -> None:
    """In the middle of learning, in the middle of an alarm, or sent back to an earlier step."""
    values = noisy(3e-3, 3) + [0.2] + noisy(3e-3, 9) + [0.1] * 3 + noisy(3e-3, 2) + [0.3] * 4
    rows = [{"step": i, NAME: value} for i, value in enumerate(values)]
    whole, said = Alarm(), []
    for row in rows:
        said.append((whole.thresholds(row), whole(int(row["step"]), row)))
    resumed = Alarm(json.loads(json.dumps(rows[:stop])))
    assert [(resumed.thresholds(row), resumed(int(row["step"]), row)) for row in rows[stop:]] == said[stop:]
    assert resumed.watches == whole.watches
    assert [i for i, (_, line) in enumerate(said) if line] == [3, 13, 18]


def test_the_threshold_is_a_metric_from_the_second_step_on() -> None:
    alarm, seen = Alarm(), []
    for step in range(14):
        row: dict[str, Any] = {NAME: 2e-3} if step != 12 else {}
        seen.append(alarm.thresholds(row).get("policy/mismatch_threshold"))
        alarm(step, row)
    expected = [None, *[pytest.approx(2e-2)] * 9, *[pytest.approx(6e-3)] * 2, None, pytest.approx(6e-3)]
    assert seen == expected


def test_a_threshold_is_no_lower_than_its_floor() -> None:
    watch = Watch(NAME, "it", floor=1e-5, ceiling=0.1)
    assert watch.threshold is None and not watch.take(0.0) and watch.threshold is None, "0 teaches nothing"
    assert not watch.take(1e-9) and watch.threshold == 1e-5
