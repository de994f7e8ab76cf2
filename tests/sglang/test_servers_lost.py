"""Servers that die, or hang, under a run: what it makes of that, and how it ends when they do not come back."""

from __future__ import annotations

from tests.distributed.launch import measured


def test_a_step_whose_servers_were_lost_is_made_anew_and_is_the_same() -> None:
    """Lost in mid-evaluation once, in mid-rollout twice."""
    results = measured("tests.sglang.servers_lost", 2)
    never, lost = results["never"], results["now_and_then"]
    assert [rank["status"] for rank in never["ranks"] + lost["ranks"]] == [0] * 4
    assert never["synced"] == [0, 1] and lost["synced"] == [0, 0, 0, 0, 1]
    assert lost["numbers"] == never["numbers"]


def test_servers_that_are_lost_for_ever_end_a_run_on_two_ranks_with_one_line_and_a_checkpoint() -> None:
    result = measured("tests.sglang.servers_lost", 2)["for_ever"]
    assert [rank["status"] for rank in result["ranks"]] == [1, 1]
    [line] = "".join(rank["printed"] for rank in result["ranks"]).splitlines()
    assert line.startswith("error: no server has the policy's weights; saved in ")
    assert result["saved"] == ["step-000000"] and result["synced"] == [0, 0, 0, 0]
