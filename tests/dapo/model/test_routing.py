"""Routes as servers answer them, and as they are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dapo.config import ConfigError
from dapo.model.families import read_shape
from dapo.model.layout import check_layout
from dapo.model.routing import Routing, sampled_routing
from tests.conftest import make_config
from tests.distributed.reference import make_hf

TOKENS = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3: the first of four layers has no experts, the others have 4 of 8 for a token."""
    folder = tmp_path_factory.mktemp("routes") / "hf"
    make_hf("deepseek_v3", False, folder)
    return folder


@pytest.fixture(scope="module")
def routing(model: Path) -> Routing:
    return Routing(read_shape(model))


def answered(rows: int = TOKENS) -> np.ndarray:
    """What a server answers: int32, zeros for the layer without experts."""
    routes = np.random.default_rng(0).random((rows, 4, 8)).argsort(-1)[..., :4].astype(np.int32)
    routes[:, 0] = 0
    return routes


def test_what_is_kept_are_the_layers_with_experts_in_a_byte_each(routing: Routing) -> None:
    found = routing.read(answered().tobytes(), TOKENS)
    assert found.dtype == np.uint8 and np.array_equal(found, answered()[:, 1:].reshape(TOKENS, 12))
    assert routing.layers == [1, 2, 3] and routing.num_columns == 12
    wide = Routing(replace(routing.shape, num_experts=512))
    assert wide.read(answered().tobytes(), TOKENS).dtype == np.int16


def test_a_stage_has_the_columns_of_its_layers_in_its_order(routing: Routing) -> None:
    assert routing.columns([0, 1]).tolist() == [0, 1, 2, 3]
    assert routing.columns([1, 3]).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert routing.columns([0]).tolist() == []


def broken(how: str) -> np.ndarray:
    routes = answered()
    if how == "a row too few":
        return routes[:-1]
    if how == "a row too many":
        return answered(TOKENS + 1)
    if how == "never written":
        routes[3] = 0
    elif how == "twice":
        routes[5, 2, 3] = routes[5, 2, 0]
    elif how == "too large":
        routes[0, 1, 0] = 8
    elif how == "negative":
        routes[0, 1, 0] = -1
    return routes


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a row too few", "routes of 6 rows of 4 layers and 4 experts for 7 tokens"),
        ("a row too many", "routes of 8 rows"),
        ("never written", "token 3 goes twice to expert 0 of layer 1: nothing was recorded for it"),
        ("twice", "token 5 goes twice to expert "),
        ("too large", "a token goes to expert 8, where a layer has 8"),
        ("negative", "a token goes to expert -1"),
    ],
)
def test_what_cannot_be_a_route_is_named(routing: Routing, how: str, said: str) -> None:
    with pytest.raises(ValueError) as raised:
        routing.read(broken(how).tobytes(), TOKENS)
    assert said in str(raised.value)


def test_padding_goes_to_all_experts_alike(routing: Routing) -> None:
    filler = routing.filler(8, 8)
    assert filler.shape == (8, 8) and not Routing.fault(routing, np.tile(filler, (1, 2))[:, :12])
    assert np.bincount(filler[:, :4].ravel(), minlength=8).tolist() == [4] * 8


REFUSED = {
    "policy.megatron.moe_router_fusion=true": "the fused router takes no routes",
    "engine.sglang.enable-hierarchical-cache=true": "has another prompt's routes",
    "engine.sglang.enable_lmcache=true": "has another prompt's routes",
    "engine.sglang.speculative-algorithm=EAGLE": "SGLang does not record its routes",
    "engine.sglang.enable-return-routed-experts=false": "the run sets it",
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_replay_cannot_go_with_is_refused_by_name(tmp_path: Path, model: Path, option: str) -> None:
    replay = "policy.routing_replay=rollout"
    kind = ["engine.kind=sglang"] if option.startswith("engine") else []
    config = make_config(tmp_path, f"policy.model={model}", *kind, replay, option)
    with pytest.raises(ConfigError, match=REFUSED[option]):
        check_layout(read_shape(model), config)
    without = make_config(tmp_path, f"policy.model={model}", *kind, replay)
    check_layout(read_shape(model), without)
    assert sampled_routing(without) == Routing(read_shape(model))
    assert sampled_routing(make_config(tmp_path, "policy.routing_replay=old")) is None


def test_a_model_without_experts_has_nothing_to_replay(tmp_path: Path) -> None:
    config = make_config(tmp_path, "policy.routing_replay=old", "policy.model=examples/arithmetic/base")
    with pytest.raises(ConfigError, match="has no experts: leave it off"):
        check_layout(read_shape(config.policy.model), config)
