"""Stopping and going on changes nothing, to the bit: what resume.py found."""

from __future__ import annotations

import pytest

from tests.distributed.launch import measured


def test_learning_from_dumped_rollouts_equals_the_run_that_dumped_them() -> None:
    result = measured("tests.distributed.resume", 2)["replay"]
    assert result["rows"] and result["weights"]
    assert result["dumped_only"] and result["same_batch"], "rollout.only samples the same and learns nothing"
    assert result["checkpoints"] == ["step-000001"], "a run that has not learnt yet can be saved"


LAYOUTS = ["data-parallel", "tensor-parallel", "pipeline-parallel", "carried-over", "bfloat16"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resuming_from_the_checkpoint_before_a_damaged_one_equals_going_on(layout: str) -> None:
    result = measured("tests.distributed.resume", 2)[layout]
    assert result["steps"] == [0, 1, 2, 3, 4], "each step once, also the one that was made twice"
    assert result["rows"], "the metrics differ"
    assert result["weights"], "the parameters differ"
    assert (result["stale"] > 0) is (layout == "carried-over")
    assert result["moved"], "nothing was learnt, so nothing was tested"
    assert result["checkpoints"] == ["step-000003", "step-000004"], "keep_checkpoints=2, and no leftovers"
