"""`dapo mismatch` names what was planted, each as the largest share: one rank, the embedded engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from dapo import config as configs
from dapo import mesh as meshes
from dapo.command.mismatch import mismatch
from dapo.engine import decoding
from dapo.engine.embedded import EmbeddedEngine
from dapo.measure.attribution import Attribution, Change
from tests.dapo.policy.test_megatron import ROOT, one_rank
from tests.sglang.conftest import make_model

Plant = Callable[[pytest.MonkeyPatch], None]


def nothing(patch: pytest.MonkeyPatch) -> None: ...


def top_p(patch: pytest.MonkeyPatch) -> None:
    draw = decoding.draw

    def narrower(logits: Any, uniform: Any, sampling: Any) -> Any:
        return draw(logits, uniform, replace(sampling, top_p=0.7))

    patch.setattr(decoding, "draw", narrower)


def stale_weights(patch: pytest.MonkeyPatch) -> None:
    """The engine samples with other weights, and gets the right ones at the next sync."""
    load, calls = EmbeddedEngine.load_weights, []

    def first_wrong(engine: EmbeddedEngine, weights: Any, version: int) -> None:
        calls.append(version)
        noise = torch.Generator().manual_seed(0)
        if len(calls) == 1:
            weights = ((n, w + 0.02 * torch.randn(w.shape, generator=noise)) for n, w in weights)
        load(engine, weights, version)

    patch.setattr(EmbeddedEngine, "load_weights", first_wrong)


def temperature(patch: pytest.MonkeyPatch) -> None:
    draw = decoding.draw
    patch.setattr(
        decoding, "draw", lambda logits, uniform, s: draw(logits, uniform, replace(s, temperature=0.8))
    )


def head(patch: pytest.MonkeyPatch) -> None:
    load = EmbeddedEngine.load_weights

    def with_bfloat16_head(engine: EmbeddedEngine, weights: Any, version: int) -> None:
        load(engine, weights, version)
        head = engine.model.lm_head
        head.forward = lambda x: (x.bfloat16() @ head.weight.bfloat16().t()).float()

    patch.setattr(EmbeddedEngine, "load_weights", with_bfloat16_head)


def routing(patch: pytest.MonkeyPatch) -> None:
    """The engine's routers are noisy."""
    load, noise = EmbeddedEngine.load_weights, torch.Generator().manual_seed(0)

    def noisy(router: Any, inputs: Any, out: Any) -> Any:
        logits, weights, _ = out
        chosen = (logits + 0.3 * torch.randn(logits.shape, generator=noise)).topk(weights.shape[-1]).indices
        weights = logits.softmax(-1).gather(1, chosen)
        return logits, weights / weights.sum(-1, keepdim=True), chosen

    def with_noise(engine: EmbeddedEngine, weights: Any, version: int) -> None:
        load(engine, weights, version)
        for module in engine.model.modules():
            if type(module).__name__ == "Qwen3MoeTopKRouter" and not module._forward_hooks:
                module.register_forward_hook(noisy)

    patch.setattr(EmbeddedEngine, "load_weights", with_noise)


PLANTS: dict[str, Plant] = {
    "": nothing, "top_p": top_p, "stale weights": stale_weights, "temperature": temperature,
    "head": head, "routing": routing,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """What the command wrote, by what was planted; a Qwen3-MoE."""
    folder, results = tmp_path_factory.mktemp("mismatch"), {}
    model = make_model(folder / "model", num_experts=8)
    for name, plant in PLANTS.items():
        run = folder / (name or "nothing")
        options = [f"run.dir={run}", f"policy.model={model}", "rollout.max_response_length=32"]
        options += ["reward.workers=0", "reward.overlong_cache=8"]
        with one_rank(), pytest.MonkeyPatch.context() as patch:
            plant(patch)
            config = configs.load(ROOT / "examples/arithmetic/config.yaml", options)
            mismatch(config, meshes.Mesh(config.parallel), num_responses=24)
        results[name] = json.loads((run / "mismatch.json").read_text())
    yield results


def attribution(result: dict[str, Any]) -> Attribution:
    return Attribution(**result | {"changes": [Change(**change) for change in result["changes"]]})


@pytest.mark.parametrize("planted", [name for name in PLANTS if name not in ("", "top_p")])
def test_what_was_planted_is_the_largest_cause(found: dict[str, Any], planted: str) -> None:
    result = attribution(found[planted])
    assert result.main_cause and result.main_cause.cause == planted
    assert (result.main_cause.share(result.mean) or 0) > 0.8
    assert f"largest: {planted}" in result.describe()[-1]
    assert result.mean > 1e-4 and result.num_responses == 24


def test_where_nothing_is_wrong_nothing_is_named(found: dict[str, Any]) -> None:
    result = attribution(found[""])
    assert result.mean < 1e-6 and result.main_cause is None
    assert "nothing to explain" in result.describe()[-1]
    assert result.support > 0.9 and result.num_missing < 10


def test_a_sampler_that_leaves_out_unlikely_tokens_is_noticed(found: dict[str, Any]) -> None:
    """Its log-probs are right: of the whole distribution."""
    result = attribution(found["top_p"])
    assert result.mean < 1e-6 and 0.6 < result.support < 0.7 and result.num_missing > 100
    assert any("with top_p or top_k" in line for line in result.describe())
    assert not any("with top_p or top_k" in line for line in attribution(found[""]).describe())


def test_a_temperature_is_found_to_a_percent(found: dict[str, Any]) -> None:
    [change] = [c for c in found["temperature"]["changes"] if c["cause"] == "temperature"]
    assert "at 0.8," in change["what"]
    [kernels] = [c for c in found["temperature"]["changes"] if c["cause"] == "kernels and batches"]
    assert kernels["mean"] is None, "prefill has no temperature: it would explain all"
