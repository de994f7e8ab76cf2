"""Memory that only updates need is given back in between, and no number changes: release.py measured it."""

from __future__ import annotations

import pytest

from tests.distributed.launch import forked, measured
from tests.distributed.release import CASES, STEPS


@pytest.mark.parametrize("case", CASES)
def test_updates_and_checkpoints_are_the_same_to_the_bit(case: str) -> None:
    result = measured("tests.distributed.release", 2, forked)[case]
    for seen in ("norms", "weights"):
        assert result["kept"][seen] == result["released"][seen]
    assert result["kept"]["weights"][0] != result["kept"]["weights"][1], "nothing was learnt"
    assert result["differ"] == [] and result["tensors"] >= 30, "a save reads what was released"


@pytest.mark.parametrize("case", CASES)
def test_nothing_but_parameters_is_held_while_servers_generate(case: str) -> None:
    result = measured("tests.distributed.release", 2, forked)[case]
    assert len(result["released"]["held"]) == STEPS + 1
    for step, held in enumerate(result["released"]["held"]):
        assert held["gradients before"] > 0 and held["gradients"] == 0
        if case != "offloaded":  # it is in main memory already
            assert held["state"] == 0
            assert held["state before"] > 0 or step == 0, "before the first update there is none yet"
    if case == "float32":  # moments of half of the parameters; main parameters are views, and stay so
        later = result["released"]["held"][1:]
        assert all(held["state before"] == held["gradients before"] for held in later)
