"""Runs whose engine sends tokens to other experts than the policy: what replay mends, and what is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from dapo import config as configs
from dapo import mesh as meshes
from dapo.config import ConfigError
from dapo.mesh import FailedElsewhere
from dapo.model.families import read_shape
from dapo.model.routing import Routing
from dapo.rollout import dump
from dapo.train import train
from tests.dapo.command.test_mismatch import routing as make_noisy
from tests.dapo.policy.test_megatron import ROOT, one_rank
from tests.sglang.conftest import make_model

STEPS = 2


def run(folder: Path, model: Path, *options: str) -> SimpleNamespace:
    """Learn from two steps; return the metrics by step, and the weights in the end."""
    options = (
        f"run.dir={folder}", f"policy.model={model}", f"run.steps={STEPS}",
        "eval.data=null", "rollout.dynamic_sampling=false", "rollout.max_response_length=24",
        "reward.overlong_cache=8", "reward.workers=0", "reward.function=tests.pretend_cuda.cases:is_odd",
        "rollout.prompts_per_step=4", "optim.prompts_per_minibatch=2", "policy.tokens_per_microbatch=512",
        "optim.lr=0.001", *options,
    )  # fmt: skip
    with one_rank(), pytest.MonkeyPatch.context() as patch:
        make_noisy(patch)
        config = configs.load(ROOT / "examples/arithmetic/config.yaml", list(options))
        train(config, meshes.Mesh(config.parallel))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(folder / "hf/model.safetensors")
    return SimpleNamespace(rows=rows[:STEPS], weights=weights, folder=folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("experts") / "model", num_experts=8)


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """A run with each kind of replay, whose samples are dumped."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        replay: run(folder / replay, model, f"policy.routing_replay={replay}", "rollout.dump_share=1.0")
        for replay in ("off", "rollout", "old")
    }


def test_with_the_engines_routes_only_rounding_is_left(runs: dict[str, SimpleNamespace]) -> None:
    for row in runs["rollout"].rows:
        assert row["policy/mismatch"] < 1e-6 and row["policy/mismatch_max"] < 1e-5
        assert row["policy/mismatch_own_routes"] > 1e-2
        layers = [row[f"policy/layer_{layer}/routes_differ"] for layer in (0, 1)]
        assert row["policy/routes_differ"] == pytest.approx(np.mean(layers)) and min(layers) > 0.05
    for replay in ("off", "old"):
        assert all(row["policy/mismatch"] > 1e-2 for row in runs[replay].rows)
        assert not any("routes" in name for row in runs[replay].rows for name in row)


def test_a_dump_replays_the_routes_too(runs: dict[str, SimpleNamespace], model: Path, tmp_path: Path) -> None:
    """A run that learns from the dump of another ends with the same weights, to the bit."""
    buffer = dump.read(dump.path_of(runs["rollout"].folder / "rollouts", 0), 4)
    assert all(sample.routes is not None for group in buffer.kept for sample in group.samples)
    again = run(
        tmp_path / "again", model, "policy.routing_replay=rollout",
        f"rollout.replay={runs['rollout'].folder / 'rollouts'}",
    )  # fmt: skip
    for name, weight in runs["rollout"].weights.items():
        assert weight.equal(again.weights[name]), name


def test_a_dump_whose_routes_cannot_be_the_models_is_refused(
    runs: dict[str, SimpleNamespace], model: Path
) -> None:
    path = dump.path_of(runs["rollout"].folder / "rollouts", 0)
    shape = read_shape(model)
    dump.read(path, 4, routing=Routing(shape))
    with pytest.raises(ConfigError, match=r"sample \d of group \d: a token goes to expert [567], where"):
        dump.read(path, 4, routing=Routing(replace(shape, num_experts=5)))


def test_a_dump_without_routes_is_refused_by_name(
    runs: dict[str, SimpleNamespace], model: Path, tmp_path: Path
) -> None:
    options: Any = "policy.routing_replay=rollout", f"rollout.replay={runs['off'].folder / 'rollouts'}"
    with pytest.raises((ConfigError, FailedElsewhere), match="has no routes: it was sampled without"):
        run(tmp_path / "refused", model, *options)
