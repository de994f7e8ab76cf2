"""When a run that has failed starts again, and when not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapo import config
from dapo.command.restart import LONGEST_PAUSE, Restarts
from dapo.watch.last_line import Ending

LOST = Ending("error: rank 3 was ended by SIGKILL", 1)
STOOD = Ending("error: no progress for 2 × engine.stall_seconds=60: the last one came 61 s ago", 1)


def restarts_of(run_dir: Path, most: int, resume: int | str = "auto") -> Restarts:
    return Restarts(config.Run(dir=run_dir, resume=resume), most)  # type: ignore[arg-type]


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
    assert restarts_of(tmp_path, 5).after(ending) == (None, ending.line)


def test_without_restarts_the_line_is_as_it_was(tmp_path: Path) -> None:
    assert restarts_of(tmp_path, 0).after(LOST) == (None, LOST.line)


def test_a_failure_waits_longer_each_time_until_there_is_a_new_step(tmp_path: Path) -> None:
    restarts, pauses = restarts_of(tmp_path, 20), []
    for step, ending in [
        (-1, STOOD),
        (4, LOST),
        (4, STOOD),
        (4, LOST),
        (3, LOST),
        (3, STOOD),
        (5, LOST),
        (5, STOOD),
    ]:
        log(tmp_path, step)
        pause, line = restarts.after(ending)
        assert pause is not None and line.startswith(f"{ending.line}; starting again in {pause:.0f} s, ")
        pauses.append(pause)
    assert pauses == [10, 10, 20, 40, 80, 160, 10, 20]
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
    restarts = restarts_of(tmp_path, 5)
    assert restarts.after(LOST)[0] is not None
    other = LOST._replace(line=LOST.line.replace("rank 3", "rank 12"))
    assert restarts.after(other) == (None, f"{other.line}; not started again: it has ended so twice {where}")


def test_the_same_fault_later_is_another(tmp_path: Path) -> None:
    restarts = restarts_of(tmp_path, 5)
    for step in (3, 4, 3):
        log(tmp_path, step)
        assert restarts.after(LOST)[0] is not None


def test_what_is_refused_later_than_at_the_first_start_may_pass_again(tmp_path: Path) -> None:
    """Servers of the user's own that are started anew, for example."""
    down = Ending("error: engine.urls: http://s:1 cannot be reached", 2)
    assert restarts_of(tmp_path, 9).after(down)[0] is None
    restarts = restarts_of(tmp_path, 4)
    pauses = [restarts.after(ending)[0] for ending in (LOST, down, down, down, down)]
    assert pauses == [10, 20, 40, 80, None]


def test_a_step_to_go_back_to_is_for_the_first_start_that_gets_so_far(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (10, 20):
        (checkpoints / f"step-{step:06}").mkdir(parents=True)
    restarts = restarts_of(tmp_path, 5, resume=10)
    assert restarts.overrides() == []
    restarts.after(LOST)
    assert restarts.overrides() == [], "it failed before it went back"
    (checkpoints / "step-000020").rename(checkpoints / "aside-step-000020")
    restarts.after(STOOD)
    assert restarts.overrides() == ["run.resume=auto"]
    (checkpoints / "step-000020").mkdir()
    assert restarts.overrides() == ["run.resume=auto"], "it is one that the run has made since"


@pytest.mark.parametrize(("resume", "overrides"), [("auto", []), ("never", ["run.resume=auto"])])
def test_a_new_run_goes_on_once_it_has_begun(tmp_path: Path, resume: str, overrides: list[str]) -> None:
    restarts = restarts_of(tmp_path, 5, resume)
    assert restarts.overrides() == []
    restarts.after(LOST)
    assert restarts.overrides() == overrides


def test_a_damaged_record_of_steps_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 3}\n7\n{"no": 1}\n\xff\xfe\n{"step": 5')
    assert restarts_of(tmp_path, 5).after(LOST)[0] == 10
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    assert restarts_of(tmp_path, 5).after(LOST)[0] == 10
