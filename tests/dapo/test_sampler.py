"""What is made anew when servers are lost, without a server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo import assemble
from dapo.learn.traces import Trace
from dapo.rollout import dump
from dapo.sampler import RETRIES, Sampler, with_retries
from dapo.types import EngineError, StorageError, WeightsLost
from tests.conftest import make_config

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


def test_traces_that_cannot_be_written_are_named_and_the_step_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, traces: list[Trace]) -> None:
        raise StorageError(f"{path.name} cannot be written, 0.0 GiB free there")

    monkeypatch.setattr(dump, "write_traces", full)
    mesh = SimpleNamespace(gather=lambda value: [value])
    sampler = Sampler(make_config(tmp_path, "rollout.dump_share=1.0"), mesh, None, {})  # type: ignore[arg-type]
    sampler.write_traces(3, [])
    said = "warning: step-000003.traces.parquet cannot be written, 0.0 GiB free there\n"
    assert capsys.readouterr().err == said
