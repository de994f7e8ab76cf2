"""The traces of dumped tokens reach the main rank's files on every layout, as traces.py read them."""

from __future__ import annotations

import pytest

from tests.distributed.launch import forked, measured


@pytest.mark.parametrize(
    "layout", ["data-parallel", "tensor-parallel", "pipeline-parallel", "context-parallel", "interleaved"]
)
def test_traces_say_of_every_token_what_follows_from_its_log_probs(layout: str) -> None:
    result = measured("tests.distributed.traces", 2, forked)[layout]
    assert result["same_samples"], "a trace for each sample that was learnt from, in the dump's order"
    assert result["mismatch"] < 1e-4, "a token's own π_θold, at its own place"
    assert result["wrong_flags"] == 0
    assert result["fractions"] == pytest.approx(result["logged"], rel=1e-5), "of a whole dump, as logged"
    assert min(result["fractions"]) > 0.001, "both bounds clipped, or nothing was tested"


def test_only_the_groups_in_the_dump_are_traced() -> None:
    result = measured("tests.distributed.traces", 2, forked)["a part"]
    assert result["groups"] == 2 and result["same_samples"] and result["mismatch"] < 1e-4


def test_a_run_that_dumps_nothing_traces_nothing() -> None:
    assert not measured("tests.distributed.traces", 2, forked)["nothing"]["is_dumped"]


def test_a_step_is_recorded_by_the_rank_that_is_named() -> None:
    profile = measured("tests.distributed.traces", 2, forked)["a part"]["profile"]
    assert list(profile) == ["step-000000-rank-1.json.gz"]
    ranges = set(profile["step-000000-rank-1.json.gz"])
    assert {"old_logprobs", "update", "reduce"} <= ranges and "rollout" not in ranges, "the main rank's"


def test_a_step_has_the_seconds_of_both_ranks() -> None:
    took = measured("tests.distributed.traces", 2, forked)["data-parallel"]["took"]
    for phase in ("old_logprobs", "update", "reduce"):
        least, mean, most = (took[f"time/{phase}{end}"] for end in ("_min", "", "_max"))
        assert 0 < least < most and mean == pytest.approx((least + most) / 2)
    assert took["perf/tokens_per_second_per_rank"] == took["perf/tokens_per_second"] / 2
    assert took["perf/slowest_rank"] in (0, 1) and 1 <= took["perf/imbalance"] <= 2


def test_a_rank_receives_its_own_shard_only() -> None:
    """Of the same samples the other tensor rank needs all, the other data-parallel rank half."""
    (all_of_it, total), (shard, of_both) = (
        measured("tests.distributed.traces", 2, forked)[f"{x}-parallel"]["received"]
        for x in ("tensor", "data")
    )
    assert total == all_of_it > 10_000 and of_both == shard, "the main rank was sent something"
    assert shard == pytest.approx(all_of_it / 2, rel=0.15)
