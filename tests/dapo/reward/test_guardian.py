"""No process of a reward function is left behind, however its worker or the main process ends; memory has a
limit.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dapo.watch.worker import descendants, memory
from tests.dapo.reward.test_pool import FUNCTIONS, RIGHT, WRONG, is_running, score

ROOT = Path(__file__).parents[3]

# a main process that scores one response with a function of the tests, then does as its last argument says
MAIN = """
import sys
import numpy as np
from dapo import config
from dapo.reward.pool import Reward
from dapo.types import Prompt, Sample

if __name__ == "__main__":
    function, text, answer, then = sys.argv[1:]
    path = f"tests.dapo.reward.reward_functions:{function}"
    reward = Reward(config.Reward(function=path, workers=1, time_limit=600.0), 32)
    tokens = np.zeros(1, np.int32)
    sample = Sample(0, 0, tokens, np.zeros(1, np.float32), np.ones(1, bool), ((0, 0, 1),), "stop", text)
    reward.score([(Prompt(0, tokens, answer), sample)])
    exec(then)
"""


def start(tmp_path, function, text, then="pass"):
    (tmp_path / "main.py").write_text(MAIN)
    arguments = [function, text, str(tmp_path / "ids"), then]
    command = [sys.executable, str(tmp_path / "main.py"), *arguments]
    # it is ignored if the tests run in the background
    return subprocess.Popen(
        command, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )


def ids_in(path, count, main=None):
    """The process ids in a file, once there are `count` of them."""
    for _ in range(1200):
        found = [int(word) for word in path.read_text().split()] if path.exists() else []
        if len(found) >= count:
            return found
        assert main is None or main.poll() is None, "the main process has ended"
        time.sleep(0.05)
    raise AssertionError(f"{len(found)} of {count} ids")


def survivors(pids):
    """Those of the processes that are still there after a while."""
    for _ in range(200):
        pids = [pid for pid in pids if is_running(pid)]
        if not pids:
            break
        time.sleep(0.05)
    return pids


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_survives_a_main_process_that_is_killed_in_a_call(tmp_path, number):
    main = start(tmp_path, "escaping", "hang")
    pids = ids_in(tmp_path / "ids", 2, main)
    pids += descendants(main.pid)
    assert len(pids) >= 5, "its own two, the guardian, multiprocessing's two"
    assert all(is_running(pid) for pid in pids)
    main.send_signal(number)
    main.wait(60)
    assert survivors(pids) == []


@pytest.mark.parametrize("victim", ["worker", "guardian"])
def test_a_worker_that_is_killed_in_a_call_leaves_nothing_and_is_a_crash(reward, tmp_path, victim):
    pool = reward("workers=1", f"function={FUNCTIONS}:escaping", "time_limit=60.0")

    ids = tmp_path / "ids"

    def kill():
        if ids.exists() and len(pids := ids.read_text().split()) == 2:
            [guardian] = [worker.guardian.pid for worker in pool.workers.workers]
            with contextlib.suppress(ProcessLookupError):  # it is killed already
                os.kill(guardian if victim == "guardian" else int(pids[1]), signal.SIGKILL)
        return False

    pool.workers.is_interrupted = kill
    assert score(pool, ["hang"], str(ids)) == [WRONG]
    assert pool.take_metrics()["reward/crashes"] == 1
    escaped, worker = ids_in(ids, 2)
    if victim == "guardian":  # nobody is left who knows what the worker started
        os.kill(escaped, signal.SIGKILL)
    assert survivors([escaped, worker]) == []


def test_a_worker_that_dies_leaves_nothing_though_it_left_its_session(reward, tmp_path):
    pool = reward("workers=1", f"function={FUNCTIONS}:escaping")
    assert score(pool, ["die"], str(tmp_path / "ids")) == [WRONG]
    assert pool.take_metrics()["reward/crashes"] == 1
    assert survivors(ids_in(tmp_path / "ids", 2)) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_a_function_that_returns_twice_has_one_verdict(reward, workers):
    pool = reward(f"workers={workers}", f"function={FUNCTIONS}:forked")
    texts = [str(i % 2) for i in range(60)]
    for _ in range(3):
        assert score(pool, texts) == [RIGHT if text == "1" else WRONG for text in texts]
    assert pool.take_metrics()["reward/crashes"] == 0


def test_a_function_may_use_multiprocessing(reward):
    pool = reward("workers=2", f"function={FUNCTIONS}:parallel")
    assert score(pool, ["1+2+3", "1+2"], "6") == [RIGHT, WRONG]


@pytest.mark.parametrize("then", ["pass", "raise SystemExit(0)", "reward.close()"])
def test_a_process_that_a_function_forgot_keeps_nobody_from_exiting(tmp_path, then):
    main = start(tmp_path, "forgetful", "1", then)
    assert main.wait(120) == 0
    assert survivors(ids_in(tmp_path / "ids", 2)) == []


def test_a_fork_of_the_main_process_that_exits_ends_no_workers(tmp_path):
    fork = "import os; child = os.fork(); child or sys.exit(); os.waitpid(child, 0)"
    check = "[worker] = reward.workers.workers; sys.exit(not worker.guardian.is_alive())"
    assert start(tmp_path, "forgetful", "1", f"{fork}; {check}").wait(120) == 0


# memory


@pytest.mark.parametrize("where", ["here", "below"])
def test_a_call_that_needs_too_much_memory_is_ended_and_named_once(reward, capfd, where):
    pool = reward("workers=1", f"function={FUNCTIONS}:hoarding", "time_limit=120.0", "memory_limit=0.25")
    texts = [f"{where} {size}" for size in (1, 600, 600, 1)]
    assert score(pool, texts) == [RIGHT, WRONG, WRONG, RIGHT]
    metrics = pool.take_metrics()
    assert (metrics["reward/crashes"], metrics["reward/timeouts"]) == (2, 0)
    [line] = capfd.readouterr().err.splitlines()
    limit = "needed more than reward.memory_limit=0.25 GiB"
    assert line.startswith(f"warning: a call of {FUNCTIONS}:hoarding {limit}")


def test_a_process_that_hides_its_shared_pages_has_no_less_memory(monkeypatch):
    real = open

    def open_what_is_shown(path, *arguments):
        if "smaps" in str(path):
            raise PermissionError(path)
        return real(path, *arguments)

    monkeypatch.setattr("builtins.open", open_what_is_shown)
    assert memory([os.getpid()]) > 2**20


def test_addresses_that_are_only_reserved_are_no_memory(reward):
    pool = reward("workers=1", f"function={FUNCTIONS}:hoarding", "memory_limit=0.25", "time_limit=60.0")
    assert score(pool, ["reserved 4000"]) == [RIGHT]


def test_pages_that_processes_share_are_counted_once():
    block = bytearray(b"x") * (192 << 20)
    ready, done = os.pipe(), os.pipe()
    children = []
    for _ in range(3):
        if not (pid := os.fork()):
            os.write(ready[1], b".")
            os.read(done[0], 1)
            os._exit(len(block) == 0)
        children.append(pid)
    for _ in children:
        os.read(ready[0], 1)
    shared = memory([os.getpid(), *children])
    os.write(done[1], b"...")
    for pid in children:
        os.waitpid(pid, 0)
    alone = memory([os.getpid()])
    assert shared < alone + len(block), "children write some pages, none of the block"
    assert memory([os.getpid()], enough=1 << 60) >= alone


def test_descendants_are_found_at_any_depth():
    shell = subprocess.Popen(["sh", "-c", "sh -c 'echo $$; sleep 600 & wait' & wait"], stdout=subprocess.PIPE)
    inner = int(shell.stdout.readline())
    for _ in range(200):
        if len(found := descendants(shell.pid)) == 2:
            break
        time.sleep(0.05)
    assert inner in found and len(found) == 2 and found == [inner, *descendants(inner)]
    assert shell.pid in descendants(os.getpid())
    for pid in [shell.pid, *found]:
        os.kill(pid, signal.SIGKILL)
    shell.communicate()
    assert descendants(shell.pid) == []
