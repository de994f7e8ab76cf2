"""Megatron on every layout equals a plain Hugging Face model, by the numbers that parity.py measured."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.distributed.cases import CASES, FAULTS, LAYER_FAULTS, ROUTE_FAULTS, Bounds, Case
from tests.distributed.launch import forked, measured


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_policy_equals_a_plain_model(case: Case) -> None:
    result, bounds = measured_of(case), case.bounds
    assert result["round_trip"], "Hugging Face → Megatron → Hugging Face is not bit-exact"
    assert result["logprobs"] <= bounds.logprobs
    assert result["ratio"] == 0.0, "the first minibatch's ratio is exactly 1"
    assert result["weights kept"], "score changes no token weight"
    assert result["toy"] == 2.0, "a metric needs a sum and a value"
    (found, parts), (expected, expected_parts) = map(
        parts_apart, (result["mismatch"], result["expected_mismatch"])
    )
    assert found == pytest.approx(expected, rel=bounds.mismatch)
    assert set(parts) == set(expected_parts) > {"policy/mismatch_at_0", "policy/mismatch_at_16"}
    for name, value in expected_parts.items():  # some are of a few tokens; a tail is within a bin
        rel = bounds.mismatch + 0.1 * ("_p99" in name)
        assert parts[name] == pytest.approx(value, rel=rel, abs=bounds.logprobs), name
    assert result["gradients"] <= bounds.gradients
    assert result["worst gradient"][0] <= bounds.largest, result["worst gradient"]
    assert grad_norm_gap(result) <= bounds.grad_norm
    assert result["params"] <= bounds.params
    assert result["direction"] >= bounds.direction
    assert result["moved"] >= 2e-3, "nothing was learnt, so nothing was tested"


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.name)
def test_a_wrong_gradient_scale_is_beyond_every_bound_on_gradients(case: Case) -> None:
    """Parameters do not show it: clipping and Adam remove a scale, so gradients are compared before both."""
    result = measured_of(case)
    assert result["logprobs"] <= Bounds().logprobs, "something else is wrong too"
    assert result["gradients"] > 1000 * Bounds().gradients
    assert grad_norm_gap(result) > 50 * Bounds().grad_norm


@pytest.mark.parametrize("case", LAYER_FAULTS, ids=lambda case: case.name)
def test_a_mistake_in_a_layer_is_beyond_the_bounds(case: Case) -> None:
    result, bounds = measured_of(case), case.bounds
    if case.fault == "swapped gate":
        assert result["logprobs"] > 1000 * bounds.logprobs
        return
    assert result["logprobs"] <= bounds.logprobs, "something else is wrong too"
    of = "self_attn.kv_a_proj_with_mqa" if case.fault == "heads not summed" else "linear_attn.norm"
    gap, name = result["worst gradient"]
    assert gap > 1000 * bounds.largest
    assert of in name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_damaged_policy_is_refused_before_an_update(case: Case) -> None:
    update, score = measured_of(case)["refused"]
    assert "the loss is nan" in update
    assert "log-probs of the policy are not finite" in score


def parts_apart(metrics: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return what is of all tokens; tails, and what is of a bucket's tokens."""
    parts = {n: value for n, value in metrics.items() if re.search("_p99|_at_|mismatch_logprob_", n)}
    return {n: value for n, value in metrics.items() if n not in parts}, parts


def measured_of(case: Case) -> dict[str, Any]:
    return measured("tests.distributed.parity", case.world, forked)[case.name]  # type: ignore[no-any-return]


def grad_norm_gap(result: dict[str, Any]) -> float:
    """Largest of the three updates, relative."""
    return max(abs(ours - theirs) / theirs for ours, theirs in result["grad_norms"])


@pytest.mark.parametrize("case", ROUTE_FAULTS, ids=lambda case: case.name)
def test_wrong_routes_are_beyond_the_bounds(case: Case) -> None:
    """Where routers are left at a forward pass's routes the log-probs are right, and an update stops."""
    result, bounds = measured_of(case), case.bounds
    if case.fault == "left at forward":
        assert result["logprobs"] <= bounds.logprobs
        assert result["gradients"] > 1000 * bounds.gradients
        assert "routes were not asked for" in result["noticed"]
    else:
        assert result["logprobs"] > 1000 * bounds.logprobs
        assert result["worst gradient"][0] > 1000 * bounds.largest
