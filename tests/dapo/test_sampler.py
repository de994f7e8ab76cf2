"""One rank's side of sampling, and what is made anew when servers are lost, without a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dapo import assemble
from dapo.config import Config, load
from dapo.learn.batch import shares
from dapo.learn.traces import Trace
from dapo.rollout import dump
from dapo.sampler import RETRIES, Sampler, with_retries
from dapo.types import EngineError, WeightsLost

CONFIG = Path(__file__).parents[2] / "examples/arithmetic/config.yaml"


class Losing:
    """Counts calls of `load` and `ask`, of which those with these numbers lose the weights."""

    def __init__(self, loads: set[int], asks: set[int]):
        self.losses = {"load": loads, "ask": asks}
        self.calls: list[str] = []

    def _call(self, name: str) -> int:
        number = self.calls.count(name)
        self.calls.append(name)
        if number in self.losses[name]:
            raise WeightsLost(f"{name} {number}")
        return number

    def load(self) -> None:
        self._call("load")

    def ask(self) -> int:
        return self._call("ask")


@pytest.mark.parametrize(
    ("loads", "asks", "is_loaded", "calls", "answer"),
    [
        (set(), set(), True, ["ask"], 0),
        (set(), set(), False, ["load", "ask"], 0),
        (set(), {0}, True, ["ask", "load", "ask"], 1),
        ({0}, set(), False, ["load", "load", "ask"], 0),
        ({0, 1}, {0}, True, ["ask", "load", "load", "load", "ask"], 1),
        ({1}, {0}, False, ["load", "ask", "load", "load", "ask"], 1),
    ],
)
def test_after_a_loss_in_either_weights_are_sent_and_the_same_is_asked(
    loads: set[int], asks: set[int], is_loaded: bool, calls: list[str], answer: int
) -> None:
    losing = Losing(loads, asks)
    assert with_retries(losing.ask, losing.load, is_loaded) == answer
    assert losing.calls == calls


@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_loss_every_time_is_raised_in_the_end(is_loaded: bool) -> None:
    losing = Losing(set(), set(range(99)))
    with pytest.raises(WeightsLost, match=f"ask {RETRIES}"):
        with_retries(losing.ask, losing.load, is_loaded)
    assert losing.calls.count("load") == RETRIES + (not is_loaded)


def test_another_failure_is_raised_at_once() -> None:
    calls = []

    def ask() -> None:
        calls.append(1)
        raise EngineError("no server is left")

    with pytest.raises(EngineError, match="no server is left"):
        with_retries(ask, lambda: None)
    assert len(calls) == 1


def test_an_evaluation_that_loses_its_servers_sends_its_model_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def sample(*arguments: Any) -> dict[str, Any]:
        calls.append("sample")
        if calls.count("sample") == 1:
            raise WeightsLost("no server has the policy's weights")
        return {"set": 7}

    rollouts: Any = SimpleNamespace(
        config=SimpleNamespace(policy=SimpleNamespace(model=Path("models/a"))),
        load_weights=lambda weights, version: calls.append(f"load {weights}, {version}"),
    )
    monkeypatch.setattr(assemble, "_weights", lambda model: model.name)
    monkeypatch.setattr(assemble.evaluate, "run", sample)
    assert assemble._evaluate(rollouts, {}) == {"set": 7}
    assert calls == ["load a, 0", "sample", "load a, 0", "sample"]


class OneRank:
    """The mesh of a rank that is alone; `is_main` says whether it samples."""

    context_rank = 0

    def __init__(self, is_main: bool = True):
        self.is_main = is_main

    def scatter(self, function: Callable[..., Any], *arguments: Any, by_stage: bool = False) -> Any:
        return next(iter(function(*arguments)))

    def on_main(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments) if self.is_main else None

    def together(self, function: Callable[[], None]) -> None:
        function()

    def gather(self, value: Any) -> list[Any]:
        return [value, value[:0]]

    def received(self) -> dict[str, float]:
        return {"perf/bytes_received": 7.0}


class Main:
    """The main rank's Rollouts: writes down what it is asked; `losses` says which call loses the weights."""

    config: Config

    def __init__(self, losses: Sequence[str] = (), is_colocated: bool = False):
        self.losses = list(losses)
        self.engine = SimpleNamespace(is_colocated=is_colocated)
        self.calls: list[Any] = []
        self.dumps = dump.Writer()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *(a for a in arguments if not isinstance(a, Iterator))))
            if name == "load_weights":
                next(arguments[0])  # the engine fails after the first tensor
            if name in self.losses:
                self.losses.remove(name)
                raise WeightsLost(name)
            if name == "next_batch":
                return shares([], self.config, 1, {"rollout/reward": 0.5})
            return f"{name} was called"

        return call


class Policy:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def release_memory(self) -> None:
        self.calls.append("release_memory")

    def weights(self) -> Iterator[tuple[str, int]]:
        for i in range(3):
            yield f"w{i}", i
        self.calls.append("drained")


def make_sampler(folder: Path, rollouts: Main | None, dump_share: float = 0.0) -> tuple[Sampler, Any]:
    config = load(str(CONFIG), [f"run.dir={folder}", f"rollout.dump_share={dump_share}"])
    mesh: Any = OneRank(rollouts is not None)
    main: Any = rollouts
    if rollouts:
        rollouts.config = config
    policy: Any = Policy()
    return Sampler(config, mesh, main, {}), policy


def test_weights_that_are_lost_are_prepared_and_sent_again_and_every_rank_drains_them(tmp_path: Path) -> None:
    rollouts = Main(["load_weights"])
    sampler, policy = make_sampler(tmp_path, rollouts)
    sampler.load_weights(policy, 5)
    assert rollouts.calls == [("prepare_weights", 5), ("load_weights", 5)] * 2
    assert policy.calls == ["drained"] * 2

    elsewhere, policy = make_sampler(tmp_path, None)
    elsewhere.load_weights(policy, 5)
    assert policy.calls == ["drained"]


def test_memory_for_updates_is_released_before_colocated_servers_prepare(tmp_path: Path) -> None:
    rollouts = Main(["load_weights"], is_colocated=True)
    sampler, policy = make_sampler(tmp_path, rollouts)
    order = policy.calls = rollouts.calls
    sampler.load_weights(policy, 5)
    assert order == ["release_memory", ("prepare_weights", 5), ("load_weights", 5), "drained"] * 2


def test_a_failure_of_the_engine_is_raised_after_the_weights_are_drained(tmp_path: Path) -> None:
    rollouts = Main(["load_weights"] * 99)
    sampler, policy = make_sampler(tmp_path, rollouts)
    with pytest.raises(WeightsLost, match="load_weights"):
        sampler.load_weights(policy, 5)
    assert policy.calls == ["drained"] * (RETRIES + 1)


def test_a_batch_whose_weights_are_lost_is_asked_for_again_after_the_same_weights(tmp_path: Path) -> None:
    rollouts = Main()
    sampler, policy = make_sampler(tmp_path, rollouts)
    sampler.load_weights(policy, 5)
    rollouts.calls.clear()
    rollouts.losses = ["next_batch"]
    batch = sampler.next_batch(6)
    assert batch.metrics == {"rollout/reward": 0.5, "perf/bytes_received": 7.0}
    ask = ("next_batch", 6)
    assert rollouts.calls == [ask, ("prepare_weights", 5), ("load_weights", 5), ask]


def test_an_evaluation_is_of_the_sets_at_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = Main()
    sampler, _ = make_sampler(tmp_path, rollouts)
    monkeypatch.setattr(assemble.evaluate, "metrics_at", lambda *arguments: {"of": arguments})
    assert sampler.evaluate(3) == {"of": (3, rollouts, {})}


def test_the_main_rank_saves_loads_and_closes_its_rollouts_and_the_others_have_none(tmp_path: Path) -> None:
    rollouts = Main()
    sampler, _ = make_sampler(tmp_path, rollouts)
    sampler.save(tmp_path)
    sampler.load(tmp_path)
    assert sampler.waiting() == "waiting was called"
    sampler.close()
    assert rollouts.calls == [("save", tmp_path), ("load", tmp_path), ("waiting",), ("close",)]

    elsewhere, _ = make_sampler(tmp_path, None)
    elsewhere.load(tmp_path)
    elsewhere.close()
    assert elsewhere.waiting() == "the main rank"


def make_trace(group: int, index: int) -> Trace:
    logprobs = np.array([-0.5 - group, -1.0 - index], np.float32)
    return Trace(group, index, logprobs, 2 * logprobs, np.array([True, False]), np.array([False, index == 1]))


def test_traces_are_written_beside_the_dump_if_there_is_one(tmp_path: Path) -> None:
    traces = [make_trace(2, 0), make_trace(1, 1)]
    make_sampler(tmp_path, Main(), dump_share=0.0)[0].write_traces(4, traces)
    assert list(tmp_path.iterdir()) == []

    rollouts = Main()
    make_sampler(tmp_path, rollouts, dump_share=0.5)[0].write_traces(4, traces)
    rollouts.dumps.close()
    [path] = (tmp_path / "rollouts").iterdir()
    assert path == dump.traces_path_of(tmp_path / "rollouts", 4)
    rows = dump.read_rows(path, dump.TRACE_COLUMNS)
    assert [(row["group"], row["index"]) for row in rows] == [(1, 1), (2, 0)]
    assert [list(row["old_logprobs"]) for row in rows] == [[-1.5, -2.0], [-2.5, -1.0]]
