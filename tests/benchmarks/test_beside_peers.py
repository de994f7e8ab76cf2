"""The comparison of trainers: its reward is ours, its times and accuracies are those of the runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dapo import config as configs
from dapo.reward.pool import Reward
from tests.conftest import make_prompt, make_sample

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


@pytest.fixture(scope="module")
def beside() -> ModuleType:
    import beside_peers

    return beside_peers


@pytest.fixture
def task(tmp_path: Path) -> Any:
    from peers import work

    return work.Task(
        seed=1, steps=2, every=1, folder=str(tmp_path), model="", prompts=["a", "b", "c"],
        answers=["1", "2", "3"], prompts_per_step=1, prompts_per_minibatch=1, group_size=8, max_tokens=64,
        overlong_cache=16, stop_ids=[1], learning_rate=2e-4, weight_decay=0.0, clip_grad=1.0, options=[],
    )  # fmt: skip


@pytest.mark.parametrize("text", ["Answer: 7", "Answer: 8", "7"])
@pytest.mark.parametrize("length", [5, 48, 49, 60, 64])
@pytest.mark.parametrize("is_truncated", [False, True])
def test_peers_have_the_reward_of_the_example(
    task: Any, tmp_path: Path, text: str, length: int, is_truncated: bool
) -> None:
    from peers import work

    config = configs.load(ROOT / "examples/arithmetic/config.yaml", ["reward.workers=0"])
    ours = Reward(config.reward, config.rollout.max_response_length, tmp_path / "disputes", lambda: False)
    sample = make_sample(length, text=text, is_truncated=is_truncated)
    ours.score([(make_prompt(answer="7"), sample)])
    ours.close()
    ids = [2] * (length - 1) + [2 if is_truncated else 1]
    assert work.rewards(task, [text], [ids], ["7"]) == [pytest.approx(sample.reward)]


def test_a_task_asks_as_many_prompts_as_its_steps_need(task: Any) -> None:
    assert task.rows() == [("a", "1"), ("b", "2")]
    assert replace(task, steps=3).rows()[-1] == ("c", "3")


def test_a_clock_keeps_tokens_by_step_and_weights_before_and_after(task: Any, tmp_path: Path) -> None:
    import torch
    from peers import work

    def weights() -> Any:
        return [("w", torch.zeros(1))]

    clock = work.Clock(task)
    clock.start(weights())
    clock.generated(3)
    clock.generated(4)
    clock.end_step(weights)
    clock.generated(5)
    clock.end_step(weights)
    assert clock.run["tokens"] == [7, 5]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"{i:04}.safetensors" for i in range(3)
    ]


def test_saving_is_outside_the_clock(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from peers import work

    now = [0.0]
    monkeypatch.setattr(work.time, "perf_counter", lambda: now[0])
    clock = work.Clock(task)
    monkeypatch.setattr(clock, "_save", lambda weights: now.__setitem__(0, now[0] + 100))
    clock.start([])
    now[0] += 2
    clock.end_step(lambda: [])
    now[0] += 3
    clock.end_step(lambda: [])
    assert clock.run["wall"] == [2, 3]


def test_accuracy_between_two_evaluations_is_on_a_straight_line(beside: ModuleType) -> None:
    run = {"at": [0.0, 2.0, 4.0], "accuracy": [0.4, 0.8, 0.9]}
    assert beside.until(run) == pytest.approx(3.0)
    assert beside.until({"at": [0.0, 2.0], "accuracy": [0.4, 0.8]}) == float("inf")
    assert beside.accuracies_at([run], 1.0) == [pytest.approx(0.6)]


def test_no_accuracy_is_stated_for_seconds_that_a_run_has_not(beside: ModuleType) -> None:
    short, long = ({"at": [0.0, end], "accuracy": [0.4, 0.8]} for end in (2.0, 4.0))
    assert beside.accuracies_at([short, long], 2.0) == [pytest.approx(0.8), pytest.approx(0.6)]
    assert beside.accuracies_at([short, long], 2.1) is None


@pytest.mark.parametrize("name", ["trl", "ms-swift"])
def test_an_environment_is_named_by_the_version_that_is_pinned(name: str) -> None:
    from peers.environments import pinned

    pins = (ROOT / f"constraints/peers-{name}.txt").read_text()
    assert pinned(name, pins).count(".") == 2
    # one torch for all: only then are times of trainers compared
    ours = (ROOT / "constraints/python3.11.txt").read_text()
    assert pinned("torch", pins) == pinned("torch", ours)
