"""The flight recorder: silent while anybody gets on, then exact about who does not."""

import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from dapo import clock
from dapo.clock import heartbeat, timed
from dapo.config import Limits
from dapo.engine.control import Server
from dapo.engine.sglang import SGLangEngine
from dapo.recorder import Recorder, spell
from tests.distributed.launch import torchrun
from tests.sglang.fake_server import FakeServer


@pytest.fixture
def watch(tmp_path):
    """Recorders with a stall of 0.3 s, sharing a store; all of this process, so that they share its beats
    too.
    """
    store, made = dist.HashStore(), []

    def start(rank=0, world=1, waiting=lambda: "group 3"):
        made.append(Recorder(tmp_path / "stalls", 0.3, rank, world, store, waiting))

    def close():
        while made:
            made.pop().close()

    start.close = close
    yield start
    close()


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def test_phases_and_beats_are_the_clocks_pulse():
    @timed("outer")
    def outer():
        return inner()

    @timed("inner")
    def inner():
        return clock.progress()

    before, _ = clock.progress()
    beats, phase = outer()
    assert phase == "outer > inner" and beats == before + 2
    assert clock.progress() == (before + 4, "")


def test_a_phase_that_raises_is_over():
    @timed("broken")
    def broken():
        raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert clock.progress()[1] == ""


def test_a_stall_is_told_once_with_phase_and_who_is_waited_for(watch, tmp_path, capsys):
    told = ""

    @timed("rollout")
    def rollout():
        nonlocal told
        watch()
        stacks = tmp_path / "stalls/rank-0.txt"
        wait_until(lambda: stacks.read_text().endswith("\n\n"))
        time.sleep(1.2)  # four stalls: it neither tells again nor, in this phase, ends the run
        told = capsys.readouterr().err
        heartbeat()
        wait_until(lambda: "stalled" in capsys.readouterr().err)  # a second stall is told too

    rollout()
    assert told.count("stalled") == 1
    assert "nothing has progressed for 0 s: rank 0 in rollout; waiting for group 3; Python stacks in " in told
    stacks = (tmp_path / "stalls/rank-0.txt").read_text()
    assert "rank 0 in rollout" in stacks and "in rollout\n" in stacks and "test_recorder.py" in stacks


def test_an_engine_that_waits_for_nothing_is_no_progress(watch, capsys):
    server = FakeServer()
    fakes = SimpleNamespace(workers=[Server(server.url)], generate_urls=[server.url], close=server.stop)
    engine = SGLangEngine(fakes, fakes, 4, Limits(0.3))

    @timed("checkpoint")
    def hang():
        for is_loading in (False, True):
            engine.client.is_loading = is_loading
            heartbeat()
            wait_until(lambda: "stalled" in capsys.readouterr().err)

    try:
        watch()
        hang()
    finally:
        watch.close()
        engine.close()


def test_while_something_progresses_nothing_is_told_and_no_file_stays(watch, tmp_path, capsys):
    watch()
    for _ in range(40):
        heartbeat()
        time.sleep(0.03)
    assert capsys.readouterr().err == ""
    watch.close()
    assert not (tmp_path / "stalls").exists()


def test_a_rank_that_has_not_begun_is_named_and_only_the_main_rank_speaks(watch, tmp_path, capsys):
    @timed("rollout")
    def rollout():
        watch(rank=1, world=4)
        wait_until(lambda: (tmp_path / "stalls/rank-1.txt").read_text())
        assert capsys.readouterr().err == ""
        heartbeat()
        watch(rank=0, world=4)
        seen = []
        wait_until(lambda: seen.append(capsys.readouterr().err) or "stalled" in "".join(seen))
        assert "ranks 0–1 in rollout, ranks 2–3 not begun" in "".join(seen)

    rollout()


@pytest.mark.parametrize(
    ("ranks", "expected"), [([0], "rank 0"), ([1, 2, 3], "ranks 1–3"), ([7, 0, 1, 5], "ranks 0–1, 5, 7")]
)
def test_ranks_are_spelt_in_runs(ranks, expected):
    assert spell(ranks) == expected


def test_a_rank_that_hangs_while_others_wait_in_a_collective_ends_the_run_with_its_name(tmp_path):
    done = torchrun(2, "-m", "tests.distributed.stalled", str(tmp_path), timeout=200)
    assert done.returncode != 0
    before, after = done.stdout.split("worked", 1)
    assert "stalled" not in before, "the other rank got on all the time"
    assert (
        after.count("stalled: nothing has progressed") == 1
        and after.count("error: nothing has progressed") == 1
    )
    assert "ranks 0–1 in update; waiting for nobody" in after
    assert "in never_return" in (tmp_path / "rank-1.txt").read_text()
    assert "in barrier" in (tmp_path / "rank-0.txt").read_text()
