"""Stopping and going on changes nothing, to the bit: what resume.py found."""

from __future__ import annotations

import pytest

from tests.distributed.launch import measured

LAYOUTS = ["data-parallel", "tensor-parallel", "pipeline-parallel", "bfloat16"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resuming_from_the_checkpoint_before_a_damaged_one_equals_going_on(layout: str) -> None:
    result = measured("tests.distributed.resume", 2)[layout]
    assert result["steps"] == [0, 1, 2, 3, 4], "each step once, also the one that was made twice"
    assert result["rows"], "the metrics differ"
    assert result["weights"], "the parameters differ"
    assert result["moved"], "nothing was learnt, so nothing was tested"
    assert result["checkpoints"] == ["step-000003", "step-000004"], "keep_checkpoints=2, and no leftovers"
