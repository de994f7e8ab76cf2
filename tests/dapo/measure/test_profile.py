"""A trace of a step: whose, what it holds, and that a run goes on without it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dapo import clock
from dapo.config import ConfigError
from dapo.measure.profile import Profiler
from tests.conftest import make_config

STEPS, NAME = "run.profile.steps=[1]", "step-000001-rank-0"


@clock.timed("update")
def learn() -> None:
    torch.ones(8).cumsum(0)


def make_profiler(tmp_path: Path, *options: str, rank: int = 0, warned: list[str] | None = None) -> Profiler:
    mesh: Any = SimpleNamespace(rank=rank, world=2, device=torch.device("cpu"))
    said = [] if warned is None else warned
    return Profiler(make_config(tmp_path, STEPS, *options).run, mesh, said.append)


def record(profiler: Profiler) -> None:
    """Three steps, as the log has them."""
    for step in range(3):
        profiler.begin(step)
        learn()
        profiler.end()


def names_in(trace: Path) -> list[str]:
    return [event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]


def test_a_trace_has_the_steps_operations_and_its_phases_as_ranges(tmp_path: Path) -> None:
    record(make_profiler(tmp_path))
    [trace] = (tmp_path / "run/profile").iterdir()
    assert trace.name == f"{NAME}.json.gz"
    assert names_in(trace).count("update") == names_in(trace).count("aten::cumsum") == 1


def test_phases_are_ranges_only_while_a_step_is_recorded(tmp_path: Path) -> None:
    record(make_profiler(tmp_path))
    with torch.profiler.profile() as profile:
        learn()
    found = {event.key for event in profile.key_averages()}
    assert "aten::cumsum" in found and "update" not in found


@pytest.mark.parametrize(("rank", "ranks"), [(1, "[0]"), (0, "[]"), (0, "[1]")])
def test_other_ranks_record_nothing(tmp_path: Path, rank: int, ranks: str) -> None:
    record(make_profiler(tmp_path, f"run.profile.ranks={ranks}", rank=rank))
    assert not (tmp_path / "run").exists()


def test_a_rank_that_the_run_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.profile.ranks=\[2\]: this run's last rank is 1"):
        make_profiler(tmp_path, "run.profile.ranks=[0, 2]")


def test_a_step_that_the_run_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.profile.steps=\[2\]: run.steps=2 ends before"):
        make_config(tmp_path, "run.profile.steps=[1, 2]")


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in its place")
    warned: list[str] = []
    profiler = make_profiler(tmp_path, warned=warned)
    record(profiler)
    assert warned and all(text.startswith("run.profile failed: ") for text in warned)
    (tmp_path / "run").unlink()
    record(profiler)
    assert (tmp_path / f"run/profile/{NAME}.json.gz").is_file(), "the next one is recorded again"


def test_a_run_that_ends_within_the_step_writes_no_trace(tmp_path: Path) -> None:
    profiler = make_profiler(tmp_path)
    profiler.begin(1)
    profiler.close()
    profiler.end()
    assert not (tmp_path / "run").exists()
    record(profiler)
    assert (tmp_path / f"run/profile/{NAME}.json.gz").is_file(), "the profiler is free for others"


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_a_gpu_the_memorys_history_of_the_step_is_kept_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def switch(enabled: str | None = "all", **_: Any) -> None:
        calls.append(enabled)

    def dump(path: str) -> None:
        calls.append("dump")
        Path(path).write_bytes(b"history")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", switch)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    profiler = make_profiler(tmp_path)
    profiler.has_gpu = True
    record(profiler)
    assert calls == ["all", "dump", None]
    files = sorted(path.name for path in (tmp_path / "run/profile").iterdir())
    assert files == [f"{NAME}-memory.pickle", f"{NAME}.json.gz"]
