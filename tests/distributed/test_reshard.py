"""A run saved in one layout continues in another, as reshard.py found for every move."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launch import forked, measured
from tests.distributed.moves import MOVES, is_bfloat16


@pytest.fixture(params=MOVES, ids=" → ".join)
def result(request: pytest.FixtureRequest) -> dict[str, Any]:
    return measured("tests.distributed.reshard", 4, forked)[" → ".join(request.param)]


def test_every_tensor_lies_where_megatron_writes_it(result: dict[str, Any]) -> None:
    assert all(finding["gap"] == 0 for finding in result["as megatron"]), result["as megatron"]


def test_another_layout_restores_every_tensor_to_the_bit(result: dict[str, Any]) -> None:
    found = {finding["what"]: finding for finding in result["restored"]}
    assert all(finding["gap"] == 0 for finding in found.values()), found
    assert found["parameters"]["count"] == found["moments"]["count"] / 2 > 8
    if is_bfloat16(result["name"].split(" → ")[0]):
        assert found["main parameters"]["count"] == found["parameters"]["count"]
    else:
        assert "main parameters" not in found
    assert result["padding"] == 0.0, "rows that pad the vocabulary hold something"
    assert result["settings"], "updates, steps, learning rates or weight decays differ"


TOLERANCE = {  # of the loss; of the norms of the rest
    "float32": {"loss": 1e-6, "parameters": 1e-6, "main parameters": 1e-6, "moments": 1e-5},
    "bfloat16": {"loss": 1e-2, "parameters": 2e-3, "main parameters": 1e-3, "moments": 0.3},
}


def test_what_follows_is_the_run_that_did_not_move(result: dict[str, Any]) -> None:
    source, target = result["name"].split(" → ")
    tolerance = TOLERANCE["bfloat16" if is_bfloat16(source) else "float32"]
    for finding in result["went on"]:
        allowed = tolerance[finding["what"]] if finding["is_rounded"] and source != target else 0.0
        assert finding["gap"] <= allowed, finding
    assert result["moved"] > 1e-4, "nothing was learnt, so nothing was tested"


def test_nan_on_one_rank_is_refused_before_a_save_and_when_a_checkpoint_holds_it() -> None:
    before, after = measured("tests.distributed.reshard", 4, forked)["poisoned"]["said"].split("; loaded: ")
    found = "1 parameters hold NaN or infinite values, first model.layers.0.mlp.down_proj.weight"
    assert before.startswith(found)
    assert f"poisoned/policy: {found}" in after


def test_the_optimizer_goes_on_with_what_the_config_says_now() -> None:
    groups = measured("tests.distributed.reshard", 4, forked)["poisoned"]["groups"]
    assert len(groups) == 2
    assert {(group["max_lr"], *group["betas"]) for group in groups} == {(7e-5, 0.8, 0.9)}
    assert all(0 < group["lr"] <= 7e-5 for group in groups)
