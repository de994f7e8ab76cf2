"""The flight recorder is silent while any rank makes progress, then exact about the ones that do not."""

import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from dapo import clock
from dapo.clock import heartbeat, timed
from dapo.config import ConfigError, Limits
from dapo.engine.control import Server
from dapo.engine.sglang import SGLangEngine
from dapo.recorder import Recorder, machine, may_be_silent, ranges
from tests.distributed.launch import torchrun
from tests.sglang.fake_server import FakeServer


@pytest.fixture
def watch(tmp_path):
    """Recorders with a stall of 0.3 s that share a store, and the heartbeats of this process."""
    store = dist.HashStore()
    made = []

    def start(rank=0, world=1, waiting=lambda: "group 3"):
        made.append(Recorder(tmp_path / "stalls", Limits(0.3), rank, world, store, waiting))

    def close():
        while made:
            made.pop().close()

    start.close = close
    start.store = store
    yield start
    close()


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        clock.waiting()  # else the recorder would end this process after three stalls
        time.sleep(0.02)


def test_phases_and_heartbeats_are_the_clocks_progress():
    @timed("outer")
    def outer():
        return inner()

    @timed("inner")
    def inner():
        return clock.progress()

    before, waits, _ = clock.progress()
    assert outer() == (before + 2, waits, "outer > inner")
    assert clock.progress() == (before + 4, waits, "")


def test_only_a_thread_in_a_phase_waits():
    @timed("rollout")
    def rollout():
        clock.waiting()
        thread = threading.Thread(target=clock.waiting)
        thread.start()
        thread.join()

    clock.waiting()
    _, before, _ = clock.progress()
    rollout()
    assert clock.progress()[1] == before + 1


def test_the_phases_of_two_threads_stand_side_by_side_and_both_are_timed():
    is_inside, may_end = threading.Event(), threading.Event()

    @timed("background")
    def background():
        is_inside.set()
        may_end.wait(10)

    @timed("front")
    def front():
        with_background = clock.progress()[2]
        time.sleep(0.1)
        may_end.set()
        thread.join(10)
        return with_background, clock.progress()[2]

    clock.take()
    thread = threading.Thread(target=background)
    thread.start()
    assert is_inside.wait(10)
    assert front() == ("background | front", "front")
    seconds = clock.take()
    assert set(seconds) == {"time/background", "time/front"} and min(seconds.values()) >= 0.1


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ("", False), ("?", False), ("rollout", False), ("export", True), ("outer > checkpoint > sync", True),
        ("update | checkpoint > sync", True), ("checkpoint | update", True), ("old_checkpoint", False),
    ],
)  # fmt: skip
def test_a_rank_may_be_silent_if_one_of_its_threads_may(phases, expected):
    assert may_be_silent(phases) is expected


def test_a_phase_that_raises_is_over():
    @timed("broken")
    def broken():
        raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert clock.progress()[2] == ""


def test_a_stall_is_reported_once_with_phases_and_what_is_waited_for(watch, tmp_path, capsys):
    printed = ""
    is_over = threading.Event()

    @timed("sync")
    def background():
        is_over.wait(30)

    @timed("rollout")
    def rollout():
        nonlocal printed
        watch()
        stacks = tmp_path / "stalls/rank-0.txt"
        wait_until(lambda: stacks.read_text().endswith("\n\n"))
        end = time.monotonic() + 1.2
        # four stalls: it neither reports again nor, since this thread waits, ends the run
        wait_until(lambda: time.monotonic() > end)
        printed = capsys.readouterr().err
        heartbeat()
        wait_until(lambda: "stalled" in capsys.readouterr().err)  # a second stall is reported too

    thread = threading.Thread(target=background)
    thread.start()
    wait_until(lambda: clock.progress()[2] == "sync")
    rollout()
    is_over.set()
    thread.join()
    assert printed.count("stalled") == 1
    where = "rank 0 in sync | rollout"
    assert f"nothing has progressed for 0 s: {where}; waiting for group 3; Python stacks in " in printed
    stacks = (tmp_path / "stalls/rank-0.txt").read_text()
    assert where in stacks and "in rollout\n" in stacks and "in background\n" in stacks


def test_an_engine_that_waits_for_nothing_is_no_progress(watch, capsys):
    server = FakeServer()
    fakes = SimpleNamespace(workers=[Server(server.url)], generate_urls=[server.url], close=server.stop)
    engine = SGLangEngine(fakes, fakes, 4, Limits(0.3), 1000)

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


def test_while_something_progresses_nothing_is_reported_and_no_file_stays(watch, tmp_path, capsys):
    watch()
    for _ in range(40):
        heartbeat()
        time.sleep(0.03)
    assert capsys.readouterr().err == ""
    watch.close()
    assert not (tmp_path / "stalls").exists()


def test_a_full_disk_does_not_end_the_watch(watch, tmp_path, capsys):
    @timed("update")
    def update():
        (tmp_path / "stalls").mkdir()
        (tmp_path / "stalls/rank-0.txt").symlink_to("/dev/full")
        watch()
        printed_until("stalled: ", capsys)
        heartbeat()
        printed_until("stalled: ", capsys)

    update()
    watch.close()


def test_a_directory_that_cannot_be_written_is_refused_in_one_line(watch, tmp_path):
    (tmp_path / "stalls").write_text("a file")
    with pytest.raises(ConfigError, match=r"run.dir: .*stalls cannot be written: File exists"):
        watch()


LOST_STORE = """
import signal, sys, time
from pathlib import Path
from dapo.config import Limits
from dapo.recorder import Recorder

class Lost:
    def set(self, key, value):
        raise RuntimeError("Broken pipe")

signal.signal(signal.SIGTERM, lambda *_: print("it is to save", flush=True))
recorder = Recorder(Path(sys.argv[1]), Limits(0.2), 3, 4, Lost(), lambda: "nobody")
time.sleep(float(sys.argv[2]))
recorder.close()
"""


@pytest.mark.parametrize(("seconds", "status"), [(0.2, 0), (600, 1)])
def test_a_rank_whose_store_is_lost_is_asked_to_save_and_ended_if_it_hangs(tmp_path, seconds, status):
    command = [sys.executable, "-c", LOST_STORE, str(tmp_path / "stalls"), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (status, "it is to save\n")
    asked, *ended = done.stderr.splitlines()
    lost = "the ranks' store is lost, its launcher or machine has ended"
    assert asked == f"dapo: {lost}: the ranks save and stop"
    assert len(ended) == status
    assert all(f"error: {lost}, and rank 3 has not ended in 1 s: stopped, and" in line for line in ended)


def test_a_process_of_another_container_has_another_machine(monkeypatch):
    ours = machine()
    monkeypatch.setattr("os.readlink", lambda path: "pid:[1]")
    assert machine() != ours


def printed_until(text, capsys):
    seen = []
    wait_until(lambda: seen.append(capsys.readouterr().err) or text in "".join(seen))
    return "".join(seen)


def test_the_lowest_rank_that_is_awake_reports_and_names_the_frozen_and_those_that_have_not_begun(
    watch, tmp_path, capsys
):
    @timed("rollout")
    def rollout():
        watch.store.set(
            "states/0", json.dumps([7, "update", "elsewhere", 0])
        )  # it has checked, and checks no more
        watch(rank=1, world=5)
        watch(rank=2, world=5)
        printed = printed_until("stalled", capsys)
        where = "rank 0 frozen, last seen in update, ranks 1–2 in rollout, ranks 3–4 not begun; waiting for"
        assert where in printed
        wait_until(lambda: (tmp_path / "stalls/rank-2.txt").read_text())
        assert (printed + capsys.readouterr().err).count("stalled") == 1
        heartbeat()
        watch(rank=0, world=5)
        assert "ranks 0–2 in rollout, ranks 3–4 not begun" in printed_until("stalled", capsys)

    rollout()


@pytest.mark.parametrize(
    ("ranks", "expected"), [([0], "rank 0"), ([1, 2, 3], "ranks 1–3"), ([7, 0, 1, 5], "ranks 0–1, 5, 7")]
)
def test_ranks_are_named_in_ranges(ranks, expected):
    assert ranges(ranks) == expected


def test_a_rank_that_hangs_while_others_wait_in_a_collective_ends_the_run_with_its_name(tmp_path):
    done = torchrun(2, "-m", "tests.distributed.stalled", str(tmp_path), timeout=200)
    assert done.returncode != 0
    before, after = done.stdout.split("worked", 1)
    assert "stalled" not in before, "the other rank made progress all the time"
    assert after.count("stalled: nothing has progressed") == 1
    assert after.count("error: nothing has progressed") == 1
    assert "ranks 0–1 in update; waiting for nobody" in after
    assert "in never_return" in (tmp_path / "rank-1.txt").read_text()
    assert "in barrier" in (tmp_path / "rank-0.txt").read_text()
