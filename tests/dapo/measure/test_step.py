"""Seconds over ranks, throughput and FLOP/s, on ranks that are not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dapo import clock
from dapo.measure import step
from dapo.measure.step import Meter, learning_flops, peak_flops, spread
from dapo.model.families import read_shape
from dapo.plan.time import forward_flops, known_gpu

MODEL = Path(__file__).parents[3] / "examples/arithmetic/base"


class Ranks(SimpleNamespace):
    """Two ranks, of which this is the second; the first has taken 1 s for each phase."""

    world, rank, device = 2, 1, torch.device("cpu")

    def sum(self, values: np.ndarray) -> np.ndarray:
        assert not values[0].any()
        return values + np.array([[1.0], [0.0]])


@pytest.fixture
def meter() -> Meter:
    clock.timed("setup")(lambda: None)()  # before the first step: no step's time
    return Meter(SimpleNamespace(policy=SimpleNamespace(model=MODEL)), Ranks())  # type: ignore[arg-type]


def test_a_step_has_its_own_seconds_those_of_all_ranks_tokens_and_memory(meter: Meter) -> None:
    meter.last -= 100
    clock.timed("update")(lambda: None)()
    clock.timed("rollout")(lambda: None)()
    first = meter.measured({"rollout/tokens": 120, "policy/loss": 0.5})
    second = meter.measured({})
    assert first["policy/loss"] == 0.5 and first["time/step"] > 100 > second["time/step"]
    assert first["perf/tokens_per_second"] == pytest.approx(120 / first["time/step"])
    assert first["perf/tokens_per_second_per_rank"] == pytest.approx(60 / first["time/step"])
    assert 0 <= first["time/update_min"] < 0.9 < first["time/update_max"] == 1
    assert first["time/update"] == pytest.approx((1 + first["time/update_min"]) / 2)
    assert 0 <= first["time/rollout"] < 0.9, "the main rank's alone"
    assert "time/setup" not in first and "time/rollout" not in second and second["time/update_min"] == 0
    assert 0 < first["perf/peak_memory_gib"] < 1024
    assert "perf/mfu" not in first


def test_a_phase_that_no_rank_was_in_is_left_out_and_one_rank_has_no_spread() -> None:
    none = dict.fromkeys(step.TOGETHER, np.zeros(2))
    assert spread(none) == {}
    assert spread({phase: np.full(1, 2.0) for phase in step.TOGETHER}) == {
        f"time/{phase}": 2.0 for phase in step.TOGETHER
    }
    found = spread(none | {"checkpoint": np.array([1.0, 3.0])})
    assert found == {"time/checkpoint": 2.0, "time/checkpoint_min": 1.0, "time/checkpoint_max": 3.0}


def test_the_slowest_rank_is_the_one_that_waits_least_within_an_update() -> None:
    """Their updates take equally long: where gradients are summed all wait for the slowest."""
    zeros = np.zeros(3)
    seconds = {"old_logprobs": zeros, "checkpoint": zeros, "update": np.full(3, 5.0)}
    found = spread(seconds | {"reduce": np.array([3.0, 1.0, 4.0])})
    assert found["perf/slowest_rank"] == 1 and found["perf/imbalance"] == pytest.approx(4 / (7 / 3))
    assert found["time/update_min"] == found["time/update_max"] == 5


def test_mfu_is_the_models_flops_over_those_that_all_ranks_have(meter: Meter) -> None:
    meter.peak = 1e12
    lengths = [3, 10, 50]
    tokens = sum(lengths)
    values = {"rollout/tokens_learnt": tokens, "rollout/attended": sum(n * n for n in lengths) / 2 / tokens}
    found = meter.measured(values)
    # a sequence at a time, as `dapo plan` has it: a forward pass for the log-probs, three for an update
    shape = read_shape(MODEL)
    flops = sum(4 * n * forward_flops(shape, n) for n in lengths)
    assert learning_flops(shape, *values.values()) == pytest.approx(flops)
    seconds = found["time/update"] + found["time/old_logprobs"]
    assert found["perf/mfu"] == pytest.approx(flops / (seconds * 2 * 1e12))
    assert "perf/mfu" not in meter.measured({}), "nothing was learnt"


@pytest.mark.parametrize(
    ("name", "memory", "known"),
    [
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA H20", 95.1, "h20"),
        ("NVIDIA GH200 480GB", 94.5, None),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, None),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H100 PCIe", 79.1, None),
        ("NVIDIA GeForce RTX 4090", 23.5, None),
    ],
)
def test_a_gpu_is_known_by_its_name_and_memory(name: str, memory: float, known: str | None) -> None:
    assert known_gpu(name, memory) == known


def test_a_gpus_flops_are_its_data_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(name: str) -> Any:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return peak_flops(torch.device("cuda", 0))

    properties = SimpleNamespace(total_memory=140 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert pretend("NVIDIA H200") == 989e12 and pretend("NVIDIA X1") is None
    assert peak_flops(torch.device("cpu")) is None
