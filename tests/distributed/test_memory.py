"""Activations that `dapo plan` counts, against those that autograd keeps in a real forward pass."""

import pytest

from tests.distributed.activations import CASES
from tests.distributed.launch import forked, measured


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_plan_counts_what_autograd_keeps(case):
    """To 3 %: the plan takes typical padding in attention, the sequences here have their own.

    Experts are planned to get equally many tokens, so ranks that split them are right only together.
    """
    ranks = measured("tests.distributed.activations", case.tensor * case.pipeline * case.context, forked)[
        case.name
    ]["ranks"]
    if case.expert > 1:
        assert sum(rank["planned"] for rank in ranks) == pytest.approx(
            sum(rank["measured"] for rank in ranks), rel=0.03
        )
    for rank in ranks:
        assert case.expert > 1 or rank["planned"] == pytest.approx(rank["measured"], rel=0.03)
        assert rank["planned_parameters"] == rank["parameters"]
        assert rank["kept by scoring"] == 0


def test_nothing_is_kept_where_all_is_recomputed():
    """A check of the measure itself: one row of the residual stream a layer, a fifteenth of everything."""
    results = measured("tests.distributed.activations", 1, forked)
    assert (
        results["all layers recomputed"]["ranks"][0]["measured"]
        < results["float32"]["ranks"][0]["measured"] / 10
    )
