"""Processes of a run that are stopped, killed or signalled, in a few of the cases that benchmarks/faults.py
measures: nothing survives, and the end has one line that says why.
"""

from __future__ import annotations

import signal
import sys

import pytest

from tests.distributed.launch import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from faults import WHOLE_JOB, Fault, Outcome, launch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guardians are for Linux")


def after(*faults: str, with_servers: bool = False) -> Outcome:
    """Launch a run with faults, "SIGKILL launcher update", each of which must happen; nothing may survive."""
    wanted = [Fault(name, *rest.rsplit(maxsplit=1)) for name, rest in (f.split(maxsplit=1) for f in faults)]
    outcome = launch(wanted, with_servers=with_servers)
    assert outcome.fired == list(map(str, wanted)), outcome.printed[-3000:]
    assert outcome.survivors == [] and outcome.status is not None, outcome.printed[-3000:]
    return outcome


def test_a_run_goes_on_without_reward_workers_and_guardians_and_after_a_suspension() -> None:
    outcome = after(
        "SIGSTOP reward worker scoring",
        "SIGKILL reward worker scoring",
        "SIGKILL rank's guardian update",
        f"SIGSTOP {WHOLE_JOB} update",
        "SIGSTOP rank's guardian rollout",
    )
    assert outcome.is_finished and outcome.statuses == {0: 0, 1: 0}, outcome.printed[-3000:]
    assert not [line for line in outcome.lines if line.startswith("error")]


def test_a_run_goes_on_without_a_server_or_its_guardian() -> None:
    faults = "SIGKILL server rollout", "SIGKILL server sync", "SIGKILL server's guardian eval"
    outcome = after(*faults, with_servers=True)
    assert outcome.is_finished and outcome.statuses == {0: 0, 1: 0}, outcome.printed[-3000:]


def test_a_frozen_rank_ends_the_run_in_time_and_is_named_once() -> None:
    """The other rank waits for it in a phase that may be silent."""
    outcome = after("SIGSTOP main rank checkpoint")
    [line] = [line for line in outcome.lines if line.startswith("error: ")]
    names = "rank 0 frozen, last seen", "rank 1 in checkpoint", "the same command goes on from it"
    assert all(name in line for name in names)
    assert sum(line.startswith("stalled: ") for line in outcome.lines) == 1
    assert not outcome.is_finished


def test_a_killed_rank_ends_the_run_with_one_line() -> None:
    outcome = after("SIGKILL main rank sync")
    [line] = outcome.lines
    assert line.startswith("error: rank 0 was ended by SIGKILL") and outcome.statuses in ({}, {1: 1})
    assert outcome.printed.splitlines()[-1] == line and "Traceback" not in outcome.printed


def test_the_ranks_save_when_their_launcher_is_killed() -> None:
    outcome = after("SIGKILL launcher update")
    assert outcome.is_saved and outcome.statuses == dict.fromkeys((0, 1), 128 + signal.SIGTERM)
    assert [line.split()[0] for line in outcome.lines] == ["dapo:", "interrupted;"]


def test_a_signal_to_any_rank_saves_the_run_once() -> None:
    outcome = after("SIGHUP other rank rollout")
    assert outcome.is_saved and outcome.statuses == dict.fromkeys((0, 1), 128 + signal.SIGHUP)
    [line] = outcome.lines
    assert line.startswith("interrupted; saved in ")
