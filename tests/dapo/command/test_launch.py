"""Which of several accounts of a run's end is told, and who launches ranks. Real ranks: test_failures.py."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo.__main__ import main
from dapo.command import launch, run
from dapo.command.parse import GPUS, parse
from dapo.config import ConfigError, load
from dapo.plan import time
from dapo.watch import last_line
from dapo.watch.last_line import Ending

CONFIG = Path(__file__).parents[3] / "examples/arithmetic/config.yaml"
BUG, ECHO = Ending("error: a bug", 1), Ending("error: another rank's process has ended", 1, is_echo=True)
REFUSED, SAVED = Ending("error: x=1: no", 2), Ending("interrupted; saved in r", 143)
KILLED = "error: rank 1 was ended by SIGKILL, as the kernel does when memory is short; "


def failed(*codes: int) -> dict[int, Any]:
    """Ranks that have ended one second after the other with these exit codes."""
    ranks = enumerate(codes)
    return {i: SimpleNamespace(exitcode=code, timestamp=100 + i) for i, code in ranks if code}


def test_a_rank_that_the_launcher_has_killed_half_a_minute_later_is_not_named() -> None:
    late = failed(7, -9) | {1: SimpleNamespace(exitcode=-9, timestamp=131)}
    assert launch._ending([], late, []).line.startswith("error: rank 0 ended with status 7")


@pytest.mark.parametrize(
    ("endings", "codes", "signals", "line", "status"),
    [
        ([BUG], [-9, 1], [], BUG.line, 1),  # a rank in a kernel is killed 30 s after another failed
        ([ECHO, REFUSED], [1, 2], [], REFUSED.line, 2),
        ([SAVED], [143, 143], [15], SAVED.line, 143),
        ([Ending("error: no space left", 1)], [1, 1], [15], "error: no space left", 1),
        ([], [-15, -15], [15], "interrupted; not saved", 143),
        ([], [130, -2], [2], "interrupted; not saved", 130),
        ([ECHO], [1, -9], [], KILLED, 1),
        ([ECHO], [-15, -9], [], KILLED, 1),
        ([], [-15, 0], [], "error: rank 0 was ended by SIGTERM; ", 1),
        ([], [-40, 0], [], "error: rank 0 was ended by signal 40; ", 1),
        ([ECHO], [1, 0], [], ECHO.line, 1),
        ([], [0, 7], [], "error: rank 1 ended with status 7 and did not say why; ", 1),
    ],
)
def test_the_line_that_tells_most_is_said(
    endings: list[Ending], codes: list[int], signals: list[int], line: str, status: int
) -> None:
    found = launch._ending(endings, failed(*codes), signals)
    assert found.status == status
    assert found.line == line or (line.endswith("; ") and found.line == line + launch.LOST)


def test_what_a_rank_leaves_its_launcher_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv(last_line.KEPT, "restored afterwards")
    kept = last_line.keep_in(str(tmp_path))
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert last_line.say(*REFUSED) == 2 and last_line.say(*ECHO) == 1
    with kept.open("a") as file:
        file.write('["cut sh')
    assert last_line.said(kept) == [REFUSED, ECHO]
    assert capsys.readouterr().err == ""
    kept.unlink()
    assert last_line.said(kept) == []
    tmp_path.rmdir()
    assert last_line.say(*BUG) == 1
    assert capsys.readouterr().err == BUG.line + "\n", "there is no folder to leave it in"
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert last_line.say(*BUG) == 1
    assert capsys.readouterr().err == BUG.line + "\n", "the launcher has ended"
    assert not last_line.is_orphan(), "it is no rank"
    monkeypatch.setenv("RANK", "0")
    assert last_line.is_orphan()
    monkeypatch.delenv(last_line.KEPT)
    assert not last_line.is_orphan(), "torchrun has launched it"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WORLD_SIZE", "MASTER_PORT"):  # of a job script
        monkeypatch.setenv(name, "8")


@pytest.mark.parametrize(("asked", "option", "expected"), [(None, 1, 1), (None, 2, 2), (4, 2, 4), (1, 1, 1)])
def test_ranks_are_as_many_as_asked_for_or_as_few_as_the_layout_takes(
    asked: int | None, option: int, expected: int, alone: None
) -> None:
    assert run._num_ranks(load(CONFIG, [f"parallel.tensor={option}"]), asked) == expected
    assert "WORLD_SIZE" not in os.environ and "MASTER_PORT" not in os.environ


@pytest.mark.parametrize(
    ("environment", "asked", "words"),
    [
        ({}, 3, "world size 3 is not a multiple of parallel.tensor=2"),
        ({"RANK": "0", "LOCAL_WORLD_SIZE": "2"}, 8, "--nproc 8: RANK=0 says .* one of a launcher's 2 ranks"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, None, "SLURM_STEP_NUM_TASKS=8: 8 launchers of the same run"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2, "OMPI_COMM_WORLD_SIZE=2: 2 launchers"),
    ],
)
def test_a_number_of_ranks_that_cannot_be_meant_is_refused(
    environment: dict[str, str], asked: int | None, words: str, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        run._num_ranks(load(CONFIG, ["parallel.tensor=2"]), asked)


def test_a_rank_of_torchrun_launches_none(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = load(CONFIG, ["parallel.tensor=2"])
    assert run._num_ranks(config, None) == run._num_ranks(config, 4) == 1


def test_a_signal_before_there_are_ranks_ends_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in launch.SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        received = launch._forward_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        monkeypatch.setattr(launch.psutil.Process, "children", lambda self: [])
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        sent = list[int]()
        rank = SimpleNamespace(send_signal=sent.append)
        monkeypatch.setattr(launch.psutil.Process, "children", lambda self: [rank, rank])
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT] and sent == [signal.SIGINT] * 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_command_line_knows_the_devices_that_are_planned_for() -> None:
    assert tuple(time.HARDWARE) == GPUS


@pytest.mark.parametrize("argument", ["two", "0", "-1", "1.5"])
def test_a_number_of_ranks_is_a_whole_one(
    argument: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["train", str(CONFIG), f"--nproc={argument}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"'{argument}' is no whole number above 0" in line


def test_the_version_and_the_help_need_nothing_heavy(capsys: Any) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()
    assert parse(["train", "c.yaml", "--nproc", "2", "a.b=1"]).overrides == ["a.b=1"]
    code = (
        "import sys, dapo.__main__; sys.exit(any(m in sys.modules for m in ('pydantic', 'numpy', 'torch')))"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
