"""A stop and a resume change nothing, to the bit, as resume.py found."""

from __future__ import annotations

import signal

import pytest

from tests.distributed.launch import forked, measured


def test_learning_from_dumped_rollouts_equals_the_run_that_dumped_them() -> None:
    result = measured("tests.distributed.resume", 2, forked)["replay"]
    assert result["rows"] and result["weights"]
    assert result["dumped_only"] and result["same_batch"], "rollout.only samples the same and learns nothing"
    assert result["checkpoints"] == ["step-000001"], "a run that has not learnt yet can be saved"


def test_two_ranks_export_the_model_of_each_step_and_the_best() -> None:
    result = measured("tests.distributed.resume", 2, forked)["replay"]
    assert result["last"] and result["first"] == [False, False]
    assert len(set(result["values"])) > 1, "no model is better than another, so nothing was tested"
    assert result["best"]


def test_a_run_that_samples_ahead_stops_at_a_signal_and_goes_on_with_the_groups_that_are_open() -> None:
    result = measured("tests.distributed.resume", 2, forked)["ahead"]
    assert [(number, is_saved) for number, is_saved, _ in result["stops"]] == [(signal.SIGTERM, True)] * 2
    first, second = (step for *_, step in result["stops"])
    assert first >= 2 and first + 2 <= second
    assert result["steps"] == [*range(second + 4)], "each step once"
    assert not result["left"], "a collector's thread, or a process, outlived the run"
    assert 0 < max(result["ages"]) <= 2, "nothing was sampled ahead, so nothing was tested"
    assert min(result["open"]) > 0, "no group was open when it stopped"


LAYOUTS = {  # how its newest checkpoint was damaged → what the warning says
    "data-parallel": "rollouts.json has ",
    "tensor-parallel": "policy/__1_0.distcp is not what was written",
    "pipeline-parallel": "policy/__1_0.distcp is missing",
    "surplus": "rollouts.json has ",
    "bfloat16": "manifest.json",
    "context-parallel": "rollouts.json has ",
    "interleaved": "policy/__1_0.distcp is missing",
    "expert-parallel": "policy/__1_0.distcp is not what was written",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resuming_from_the_checkpoint_before_a_damaged_one_equals_going_on(layout: str) -> None:
    result = measured("tests.distributed.resume", 2, forked)[layout]
    assert len(result["warnings"]) == 1 and LAYOUTS[layout] in result["warnings"][0], result["warnings"]
    assert "step-000002 is damaged" in result["warnings"][0]
    assert result["steps"] == [0, 1, 2, 3, 4], "each step once, also the one that was made twice"
    assert result["rows"], "the metrics differ"
    assert result["weights"], "the parameters differ"
    if layout == "surplus":
        assert result["surplus"] > 0, "no prompt went back to the stream"
    assert result["moved"], "nothing was learnt, so nothing was tested"
    assert result["checkpoints"] == ["step-000003", "step-000004"], (
        "keep_checkpoints=2, or 1 and every third; no leftovers"
    )


@pytest.mark.parametrize("layout", ["data-parallel", "context-parallel", "expert-parallel"])
def test_ranks_that_have_the_same_share_the_writing(layout: str) -> None:
    least, most = measured("tests.distributed.resume", 2, forked)[layout]["written"]
    assert most < 1.5 * least


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_of_the_optimizer_is_written_once_by_the_rank_that_owns_it(layout: str) -> None:
    found = measured("tests.distributed.resume", 2, forked)[layout]["optimizer"]
    assert found["times"] == [1], "each number once: by one rank, and by no other"
    assert sum(found["bytes"]) == found["wanted"], "two moments of each, and a float32 parameter"
    assert found["main"], "main parameters are others than the parameters, or stored twice"
    if layout in ("data-parallel", "context-parallel", "expert-parallel"):
        assert found["bytes"] == pytest.approx([found["wanted"] / 2] * 2, rel=0.01), "half each"
