"""When a run that has failed starts again, and when not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapo.command.restart import LONGEST_PAUSE, Restarts
from dapo.watch.last_line import Ending

LOST = Ending("error: rank 3 was ended by SIGKILL", 1)
STOOD = Ending("error: no progress for 2 × engine.stall_seconds=60: the last one came 61 s ago", 1)


def log(directory: Path, step: int) -> None:
    rows = [{"step": done} for done in range(step + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "ending",
    [
        Ending("error: optim.lr=-1", 2),
        Ending("interrupted; saved in r", 143),
        Ending("error: 2 of 16 mixed groups", 1, is_final=True),
    ],
)
def test_what_the_user_wanted_or_has_to_mend_is_not_started_again(tmp_path: Path, ending: Ending) -> None:
    assert Restarts(tmp_path, 5).after(ending) == (None, ending.line)


def test_without_restarts_the_line_is_as_it_was(tmp_path: Path) -> None:
    assert Restarts(tmp_path, 0).after(LOST) == (None, LOST.line)


def test_a_failure_waits_longer_each_time_until_there_is_a_new_step(tmp_path: Path) -> None:
    restarts, pauses = Restarts(tmp_path, 20), []
    for step, ending in [(4, LOST), (4, STOOD), (4, LOST), (3, LOST), (3, STOOD), (5, LOST), (5, STOOD)]:
        log(tmp_path, step)
        pause, line = restarts.after(ending)
        assert pause is not None and line.startswith(f"{ending.line}; starting again in {pause:.0f} s, ")
        pauses.append(pause)
    assert pauses == [10, 20, 40, 80, 160, 10, 20]
    for _ in range(10):
        restarts.after(LOST)
        last, line = restarts.after(STOOD)
        assert last is None or last <= LONGEST_PAUSE
    assert last is None and line == f"{STOOD.line}; not started again: --restarts 20 are used up"


@pytest.mark.parametrize(("step", "where"), [(None, "before the first step"), (7, "after step 7")])
def test_the_same_fault_at_the_same_step_twice_is_the_end(
    tmp_path: Path, step: int | None, where: str
) -> None:
    if step:
        log(tmp_path, step)
    restarts = Restarts(tmp_path, 5)
    assert restarts.after(LOST)[0] is not None
    other = LOST._replace(line=LOST.line.replace("rank 3", "rank 12"))
    assert restarts.after(other) == (None, f"{other.line}; not started again: it has ended so twice {where}")


def test_the_same_fault_later_is_another(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path, 5)
    for step in (3, 4, 3):
        log(tmp_path, step)
        assert restarts.after(LOST)[0] is not None
