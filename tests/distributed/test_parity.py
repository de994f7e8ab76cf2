"""Megatron on every layout against a plain Hugging Face model: the numbers that parity.py measured, case by case."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cases import CASES
from tests.distributed.launch import measured


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def result(request: pytest.FixtureRequest) -> dict[str, Any]:
    return measured("tests.distributed.parity", request.param.world)[request.param.name]


def test_policy_equals_a_plain_model(result: dict[str, Any]) -> None:
    assert result["round_trip"], "Hugging Face → Megatron → Hugging Face is not bit-exact"
    assert result["logprobs"] <= 1e-5
    assert result["ratio"] == 0.0, "the first minibatch's ratio is exactly 1"
    assert result["mismatch"] == pytest.approx(result["expected_mismatch"], rel=1e-5)
    assert result["gradients"] <= 1e-5
    for ours, theirs in result["grad_norms"]:
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert result["params"] <= 2e-5
    assert result["moved"] >= 100 * 2e-5


def test_a_damaged_policy_is_refused_before_an_update(result: dict[str, Any]) -> None:
    update, score = result["refused"]
    assert "the loss is nan" in update
    assert "log-probs of the policy are not finite" in score
