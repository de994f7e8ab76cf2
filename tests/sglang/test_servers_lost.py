"""Servers that die, or hang, under a run: what it makes of that, and how it ends when they do not come
back.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import measured, torchrun
from tests.sglang.weight_server import WeightServer


def test_a_step_whose_servers_were_lost_is_made_anew_and_is_the_same() -> None:
    """Lost in mid-evaluation once, in mid-rollout twice; and the memory for updates is released meanwhile."""
    results = measured("tests.sglang.servers_lost", 2)
    never, lost = results["never"], results["now_and_then"]
    assert [rank["status"] for rank in never["ranks"] + lost["ranks"]] == [0] * 4
    assert never["synced"] == [0, 1] and lost["synced"] == [0, 0, 0, 0, 1]
    assert lost["numbers"] == never["numbers"]


def test_weights_whose_sync_a_server_did_not_survive_are_sent_again_by_all_ranks() -> None:
    """Under two first syncs, and under that which follows a loss in mid-rollout."""
    results = measured("tests.sglang.servers_lost", 2)
    never, lost = results["never"], results["under_syncs"]
    assert [rank["status"] for rank in lost["ranks"]] == [0, 0]
    assert lost["synced"] == [0, 0, 0, 0, 1, 1]
    assert lost["numbers"] == never["numbers"]


def test_a_run_that_samples_ahead_loses_no_group_with_its_servers() -> None:
    """In the collector's thread, under syncs, and twice in a row."""
    result = measured("tests.sglang.servers_lost", 2)["ahead"]
    assert [rank["status"] for rank in result["ranks"]] == [0, 0]
    assert len(result["synced"]) > 6 + 3 and sorted(set(result["synced"])) == [0, 1, 2, 3, 4, 5]
    assert len(result["groups"]) == 5
    learnt = [id for ids in result["groups"] for id in ids]
    assert len(set(learnt)) == len(learnt)
    missing = {*range(max(learnt))} - {*learnt}  # those that were too old, and are asked for again
    assert len(missing) <= len(learnt) / 5, missing


def test_syncs_that_no_server_survives_end_a_run_on_two_ranks_with_one_line_and_a_checkpoint() -> None:
    result = measured("tests.sglang.servers_lost", 2)["under_every_sync"]
    assert [rank["status"] for rank in result["ranks"]] == [1, 1]
    [line] = "".join(rank["printed"] for rank in result["ranks"]).splitlines()
    assert line.startswith("error: http://a died under a weight sync: connection refused; saved in ")
    assert result["saved"] == ["step-000000"] and result["synced"] == [0, 0, 0, 0]


def test_servers_that_are_lost_for_ever_end_a_run_on_two_ranks_with_one_line_and_a_checkpoint() -> None:
    result = measured("tests.sglang.servers_lost", 2)["for_ever"]
    assert [rank["status"] for rank in result["ranks"]] == [1, 1]
    [line] = "".join(rank["printed"] for rank in result["ranks"]).splitlines()
    assert line.startswith("error: no server has the policy's weights; saved in ")
    assert result["saved"] == ["step-000000"] and result["synced"] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("silent", "says"),
    [
        (["/generate"], "no progress for 2 × engine.stall_seconds=3: waiting for 32 responses"),
        (["/begin_weight_update", "/end_weight_update"], "/begin_weight_update: timed out"),
    ],
    ids=["rollout", "sync"],
)
def test_a_server_that_falls_silent_ends_a_run_on_two_ranks_with_one_line_and_a_checkpoint(
    tmp_path: Path, silent: list[str], says: str
) -> None:
    """The sync waits for two answers, twice stall_seconds each, and the flight recorder, which would save
    nothing, does not end it.
    """
    run = tmp_path / "run"
    options = [
        "engine.kind=sglang", "engine.weight_sync=tensor", "engine.stall_seconds=3",
        "rollout.prompts_per_step=4", "rollout.prompts_per_round=4", "eval.data=null", "reward.workers=0",
        "parallel.tensor=2", f"run.dir={run}",
    ]  # fmt: skip
    with WeightServer() as server:
        server.faults = {path: ["silence"] * 99 for path in silent}
        done = torchrun(
            2,
            "-m",
            "dapo",
            "train",
            "examples/arithmetic/config.yaml",
            *options,
            f"engine.urls=[{server.url}]",
        )
    assert done.returncode != 0
    [line] = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert (
        says in line
        and server.url in line
        and line.endswith(f"saved in {run}, the same command goes on from there")
    )
    assert done.stdout.count("stalled: nothing has progressed") >= 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000"]
