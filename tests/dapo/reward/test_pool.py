"""The reward pool: time limits, hostile responses, remote functions, several functions, shadow verifiers."""

import inspect
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from types import SimpleNamespace

import pytest

from dapo import clock
from dapo.config import ConfigError
from dapo.reward import remote, workers
from dapo.reward.worker import Job
from dapo.reward.workers import Workers
from dapo.types import Interrupted, RewardError, StorageError
from dapo.watch.frames import wait
from dapo.watch.worker import descendants
from tests.conftest import make_prompt, make_sample
from tests.dapo.reward import reward_functions
from tests.dapo.reward.test_answer import HOSTILE
from tests.dapo.reward.test_reward import FUNCTIONS

RAISED = inspect.getsourcelines(reward_functions.look_up)[1] + 1  # the line that raises


def score(reward, texts, answer="1"):
    """(is_correct, reward) of every text; the i-th is the i-th sample of the i-th prompt."""
    pairs = [
        (make_prompt(i, answer=answer), make_sample(group=i, index=i, text=text))
        for i, text in enumerate(texts)
    ]
    reward.score(pairs)
    return [(sample.is_correct, sample.reward) for _, sample in pairs]


def within_limit(work):
    """Run `work` in a thread, for at most a minute: nothing takes so long, but nothing may hang either."""
    pool = ThreadPoolExecutor()
    try:
        return pool.submit(work).result(60)
    finally:
        pool.shutdown(wait=False)


RIGHT, WRONG = (True, 1.0), (False, -1.0)


def counts(timeouts, crashes, undecided):
    return {"reward/timeouts": timeouts, "reward/crashes": crashes, "reward/undecided": undecided}


# order


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_verdicts_come_back_in_the_order_of_the_samples(reward, workers):
    texts = [str(i % 7 - 3) for i in range(500)]
    assert score(reward(f"workers={workers}", f"function={FUNCTIONS}:graded"), texts) == [
        (float(t) > 0, float(t)) for t in texts
    ]


def test_verdicts_stay_with_their_samples_when_workers_are_lost_in_between(reward):
    texts = ["1" if i % 3 else "2" for i in range(120)]
    for i in (0, 17, 50, 51, 119):
        texts[i] = "sleep" if i % 2 else "die"
    pool = reward("workers=2", f"function={FUNCTIONS}:obedient", "time_limit=1.0")
    assert score(pool, texts) == [RIGHT if text == "1" else WRONG for text in texts]
    assert pool.take_metrics() == counts(3, 2, 5 / 120)
    assert pool.take_metrics() == counts(0, 0, 0.0)
    assert score(pool, texts[1:17]) == [RIGHT if text == "1" else WRONG for text in texts[1:17]]


def test_work_is_shared_by_as_many_processes_as_asked_for_and_never_done_here(reward):
    pool, ids = reward("workers=3", f"function={FUNCTIONS}:process_id"), set()
    for _ in range(100):  # at first, two may have done all before the third has started
        ids |= {reward for _, reward in score(pool, ["x"] * 200)}
        if len(ids) == 3:
            break
    assert len(ids) == 3 and os.getpid() not in ids


def test_jobs_that_belong_together_are_done_by_one_process():
    pool, seen = Workers([f"{FUNCTIONS}:process_id"], 3, 60.0, 4.0, is_interrupted=lambda: False), set()
    for _ in range(100):
        ids = [reply.verdict for reply in pool.judge([Job(0, "", "")] * 40, together=5)]
        assert all(len({*ids[i : i + 5]}) == 1 for i in range(0, 40, 5))
        seen |= {*ids}
        if len(seen) == 3:
            break
    assert len(seen) == 3
    pool.close()


def test_without_workers_functions_are_called_in_this_process(reward):
    assert score(reward("workers=0", f"function={FUNCTIONS}:process_id"), ["x"]) == [(True, os.getpid())]


def test_nothing_to_score_is_no_work(reward):
    assert score(reward(), []) == []


# the limit


@pytest.mark.parametrize("text", ["sleep", "deaf", "die"])
def test_a_call_that_never_returns_is_wrong_within_the_limit_and_the_others_keep_their_verdicts(reward, text):
    pool = reward("workers=1", f"function={FUNCTIONS}:obedient", "time_limit=1.0")
    score(pool, ["1"])
    start = time.perf_counter()
    assert score(pool, ["1", text, "1", "2"]) == [RIGHT, WRONG, RIGHT, WRONG]
    assert time.perf_counter() - start < 60, "the call would never have returned"
    metrics = pool.take_metrics()
    assert (metrics["reward/timeouts"], metrics["reward/crashes"]) == ((0, 1) if text == "die" else (1, 0))


def test_a_worker_that_stands_still_in_the_middle_of_a_reply_is_late(reward):
    pool = reward("workers=1", f"function={FUNCTIONS}:cut_off", "time_limit=1.0")
    assert within_limit(lambda: score(pool, ["1", "hang", "1", "2"])) == [RIGHT, WRONG, RIGHT, WRONG]
    assert pool.take_metrics() == counts(1, 0, 1 / 4)


def test_a_part_of_a_reply_keeps_no_interruption_off(reward):
    calls = iter([False] * 20)
    pool = reward("workers=1", f"function={FUNCTIONS}:cut_off", is_interrupted=lambda: next(calls, True))
    with pytest.raises(Interrupted):
        within_limit(lambda: score(pool, ["hang"]))


def test_a_worker_that_takes_no_jobs_is_late(reward):
    pool = reward("workers=1", f"function={FUNCTIONS}:obedient", "time_limit=1.0")
    assert score(pool, ["1"]) == [RIGHT]
    for pid in descendants(pool.workers.workers[0].guardian.pid):
        os.kill(pid, signal.SIGSTOP)
    large = "1" + " " * 2**23  # more than a socket holds
    assert within_limit(lambda: score(pool, [large, large], large)) == [WRONG, RIGHT]


def test_a_worker_that_has_not_imported_yet_has_time_while_somebody_waits(reward):
    pool = reward("workers=1", f"function={FUNCTIONS}:graded")
    begun = []
    pool.workers.workers = [SimpleNamespace(is_ready=False, todo=[], begin=lambda: begun.append(True))]
    pool.workers.judge([])
    pool.workers.workers = []
    assert begun == [True]


def test_with_each_message_the_time_for_the_next_one_begins():
    pool = Workers([f"{FUNCTIONS}:graded"], 1, 60.0, 4.0, is_interrupted=lambda: False)
    late = SimpleNamespace(channel=SimpleNamespace(receive=lambda: [None]), is_ready=True, deadline=0.0)
    start = time.monotonic()
    pool._receive(late, [])
    assert late.deadline >= start + 60.0, "decoding takes none of a call's time"


def test_a_worker_that_was_killed_from_outside_between_two_steps_is_replaced(reward):
    pool = reward("workers=1", f"function={FUNCTIONS}:obedient")
    score(pool, ["1"])
    pool.workers.workers[0].guardian.kill()
    pool.workers.workers[0].guardian.join()
    assert score(pool, ["1"] * 40) == [RIGHT] * 40
    assert pool.take_metrics()["reward/crashes"] == 0


def test_of_two_workers_the_one_that_was_killed_is_replaced(reward):
    pool = reward("workers=2", f"function={FUNCTIONS}:process_id")
    while len({value for _, value in score(pool, ["x"] * 64)}) < 2:
        pass  # until both are ready
    living, dead = pool.workers.workers
    [pid] = descendants(dead.guardian.pid)
    os.kill(pid, signal.SIGKILL)
    dead.guardian.join()
    found = {value for _, value in score(pool, ["x"] * 64)}
    assert found and pid not in found
    assert living in pool.workers.workers and dead not in pool.workers.workers
    assert pool.take_metrics() == counts(0, 0, 0)


def test_a_fork_server_that_is_killed_is_started_again(reward):
    pool = reward("workers=2", f"function={FUNCTIONS}:obedient")
    assert score(pool, ["1"] * 8) == [RIGHT] * 8
    pids = [worker.guardian.pid for worker in pool.workers.workers]
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    for worker in pool.workers.workers:
        worker.guardian.join()
    assert score(pool, ["1", "2"]) == [RIGHT, WRONG]
    assert not [pid for pid in pids if is_running(pid)]


def test_a_catastrophic_pattern_is_cut_off(reward):
    pool = reward("workers=2", f"function={FUNCTIONS}:catastrophic", "time_limit=1.0")
    assert score(pool, ["aab", "a" * 60 + "!", "b"]) == [RIGHT, WRONG, WRONG]
    assert pool.take_metrics()["reward/timeouts"] == 1


def test_a_wait_for_verdicts_is_no_hang_of_the_run(reward):
    pool = reward("workers=1", f"function={FUNCTIONS}:slow")
    _, before, _ = clock.progress()
    clock.timed("rollout")(score)(pool, ["1"] * 30)
    assert clock.progress()[1] > before


def test_time_in_which_the_whole_job_was_stopped_counts_for_no_call(reward, monkeypatch):
    pool = reward("workers=1", f"function={FUNCTIONS}:slow", "time_limit=5.0")
    ahead, missing = [0.0], [600.0]
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + sum(ahead)))

    def stopped_once(connections, seconds):
        if any(worker.todo for worker in pool.workers.workers) and missing:
            ahead.append(missing.pop())
            return []
        return wait(connections, seconds)

    monkeypatch.setattr(workers, "wait", stopped_once)
    assert score(pool, ["Answer: 1"] * 3) == [RIGHT] * 3
    assert missing == [] and pool.take_metrics()["reward/timeouts"] == 0


def test_what_a_function_started_ends_with_it(reward, tmp_path):
    score(
        reward("workers=1", f"function={FUNCTIONS}:obedient", "time_limit=1.0"), [f"spawn {tmp_path / 'pid'}"]
    )
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not is_running(pid):
            return
        time.sleep(0.05)
    raise AssertionError("the child is still running after its worker")


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("gold", ["34", r"\frac{1}{2}"])
def test_hostile_responses_are_wrong_and_the_step_goes_on(reward, gold):
    texts = [f"Answer: {text}" for text in HOSTILE.values()]
    assert score(reward("workers=2"), [*texts, f"Answer: {gold}"], gold) == [WRONG] * len(texts) + [RIGHT]


def test_closing_ends_the_workers(reward):
    pool = reward("workers=2", f"function={FUNCTIONS}:process_id")
    ids = {int(reward) for _, reward in score(pool, ["x"] * 64)}
    pool.close()
    assert not [pid for pid in ids if is_running(pid)]


def test_a_worker_imports_no_torch(reward):
    assert score(reward("workers=1", f"function={FUNCTIONS}:is_free_of_torch"), ["x"]) == [RIGHT]
    both = {"dapo.reward:is_correct": 1.0, f"{FUNCTIONS}:is_free_of_torch": 1.0}
    assert score(reward("workers=1", f"function={json.dumps(both)}"), ["Answer: 0.5"], "1/2") == [(True, 2.0)]


# interruption


class Clock:
    """An interruption that comes `seconds` after `start`."""

    def __init__(self, seconds):
        self.seconds, self.end = seconds, float("inf")

    def start(self):
        self.end = time.monotonic() + self.seconds

    def __call__(self):
        return time.monotonic() > self.end


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_an_interruption_ends_the_wait_for_workers_and_leaves_none_in_the_middle(reward, seconds):
    clock = Clock(seconds)
    pool = reward("workers=2", f"function={FUNCTIONS}:obedient", "time_limit=60.0", is_interrupted=clock)
    texts = ["1"] * 40 + ["2"] * 40
    score(pool, texts)
    pids = [pid for worker in pool.workers.workers for pid in descendants(worker.guardian.pid)]
    assert pids
    clock.start()
    start = time.monotonic()
    pairs = [(make_prompt(i, answer="1"), make_sample(i, text=text)) for i, text in enumerate(["sleep"] * 40)]
    for _, sample in pairs:
        sample.reward = 7.0
    with pytest.raises(Interrupted):
        pool.score(pairs)
    assert time.monotonic() - start < seconds + 5, "a call would have taken 60 s"
    assert all(sample.reward == 7.0 for _, sample in pairs), "no sample is marked"
    if seconds:
        assert not [pid for pid in pids if is_running(pid)], "the calls would have gone on"
    clock.end = float("inf")
    assert score(pool, texts) == [RIGHT] * 40 + [WRONG] * 40


def test_an_interruption_is_noticed_between_two_calls_without_workers(reward):
    calls = iter([False, False, True])
    pool = reward("workers=0", f"function={FUNCTIONS}:graded", is_interrupted=lambda: next(calls))
    with pytest.raises(Interrupted):
        score(pool, ["1"] * 5)
    assert list(calls) == []


def test_a_remote_function_is_given_the_check_for_interruptions(reward, monkeypatch):
    given = {}
    monkeypatch.setattr(
        remote, "judge", lambda name, url, jobs, *limits, **named: given.update(named) or [True]
    )
    pool = reward("function=http://127.0.0.1:9/score", is_interrupted=lambda: True)
    assert score(pool, ["1"]) == [RIGHT] and given["is_interrupted"] is pool.is_interrupted


# bad functions


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("silent", "returned None"), ("wordy", "returned 'yes'"), ("listed", r"returned \[True\]"),
        ("arrayed", r"returned array\(\[1., 2.\]\)"), ("huge_integer", "returned 1000"),
        ("raising", rf"raised KeyError: .*no such.*rule.*reward_functions.py:{RAISED}\)"),
        ("leaving", "raised SystemExit: 3"),
        ("graded", "raised ValueError: could not convert string to float: 'x'"),
    ],
)  # fmt: skip
def test_a_function_that_gives_no_verdict_is_named_with_the_prompt_in_one_line(reward, workers, name, what):
    with pytest.raises(
        RewardError,
        match=rf"reward\.function={FUNCTIONS}:{name} {what}.* for prompt 0; expected bool or finite float, ",
    ) as caught:
        score(reward(f"workers={workers}", f"function={FUNCTIONS}:{name}"), ["x"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_function_that_gives_no_verdict_is_named(reward, workers):
    weights = json.dumps({f"{FUNCTIONS}:long_bool": 1.0, f"{FUNCTIONS}:silent": 0.5})
    with pytest.raises(
        RewardError, match=rf"^reward\.function={FUNCTIONS}:silent returned None for prompt 0"
    ):
        score(reward(f"workers={workers}", f"function={weights}"), ["x", "y"])


def test_the_prompt_that_is_named_is_the_one_whose_verdict_it_was(reward):
    with pytest.raises(RewardError, match="returned nan for prompt 33;"):
        score(reward("workers=2", f"function={FUNCTIONS}:graded"), [*["1"] * 33, "nan", *["1"] * 10])


@pytest.mark.parametrize("workers", [0, 1])
def test_numpy_scalars_are_verdicts(reward, workers):
    pool = reward(f"workers={workers}", f"function={FUNCTIONS}:numpy_scalar")
    assert score(pool, ["1", "2"]) == [RIGHT, WRONG]
    assert score(pool, ["x"], "half") == [(True, 0.5)]


def test_a_function_that_workers_cannot_import_is_an_error_and_no_hang():
    for path, what in (
        ("nowhere:f", "No module named 'nowhere'"),
        (f"{FUNCTIONS}:nothing", "no attribute 'nothing'"),
    ):
        pool = Workers([path], 2, 1.0, 4.0, is_interrupted=lambda: False)
        with pytest.raises(ConfigError, match=f"reward.function={path}.*{what}"):
            pool.judge([Job(0, "", "")] * 3)
        pool.close()


@pytest.mark.parametrize(
    ("code", "memory", "what"),
    [
        ("os._exit(0)", "4.0", "end the process that imports them"),
        ("block = bytearray(b'x') * (600 << 20); time.sleep(60)", "0.25",
         r"need more than reward.memory_limit=0.25 GiB while they are imported"),
    ],
)  # fmt: skip
def test_a_module_that_ends_the_worker_that_imports_it_is_named(
    reward, tmp_path, monkeypatch, code, memory, what
):
    name = f"deadly_{len(code)}"
    text = f"import os, time\nif os.getpid() != {os.getpid()}:\n    {code}\ndef f(response, answer): ..."
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=f"^reward.function: {name}:f {what}$"):
        score(reward("workers=2", f"function={name}:f", f"memory_limit={memory}"), ["1"])


def test_a_worker_that_is_killed_while_it_imports_is_replaced(reward, tmp_path, monkeypatch):
    text = "import os, pathlib, time\nhere = pathlib.Path(__file__).with_suffix('.started')\n"
    text += f"if os.getpid() != {os.getpid()} and not here.exists():\n    here.touch(); os._exit(9)\n"
    (tmp_path / "dies_once.py").write_text(text + "def f(response, answer): return True")
    monkeypatch.syspath_prepend(tmp_path)
    assert score(reward("workers=1", "function=dies_once:f"), ["1", "2"]) == [RIGHT] * 2
    assert (tmp_path / "dies_once.started").exists()


def test_a_shadow_that_cannot_be_imported_is_named_as_such(reward):
    with pytest.raises(ConfigError, match=r"reward\.shadow=nowhere:f"):
        reward("shadow=[nowhere:f]")


# several functions, and shadows


@pytest.mark.parametrize("workers", [0, 2])
def test_several_functions_add_up_by_weight_and_the_first_decides_what_is_correct(reward, workers):
    weights = json.dumps({f"{FUNCTIONS}:long_bool": 2.0, f"{FUNCTIONS}:graded": 0.5})
    pool = reward(f"workers={workers}", f"function={weights}")
    assert score(pool, ["1", "4", "-4"]) == [(True, 2.5), (False, 0.0), (False, -4.0)]


def test_a_truncated_response_is_wrong_by_the_first_function_only(tmp_path, reward):
    weights = json.dumps({f"{FUNCTIONS}:long_bool": 1.0, f"{FUNCTIONS}:graded": 0.5})
    pool = reward("workers=0", f"function={weights}", "truncated_is_wrong=true")
    sample = make_sample(text="1", is_truncated=True)
    pool.score([(make_prompt(), sample)])
    assert (sample.is_correct, sample.reward) == (False, -1.0 + 0.5)
    weights = json.dumps({f"{FUNCTIONS}:graded": 1.0, f"{FUNCTIONS}:long_bool": 0.5})
    pool = reward("workers=0", f"function={weights}", "truncated_is_wrong=true")
    for text, of_first in (("1", -1.0), ("-3", -3.0)):
        sample = make_sample(text=text, is_truncated=True)
        pool.score([(make_prompt(), sample)])
        assert (sample.is_correct, sample.reward) == (False, of_first + (0.5 if text == "1" else -0.5))


@pytest.mark.parametrize("workers", [0, 2])
def test_shadows_change_no_reward_and_their_disagreement_is_counted_and_kept(reward, workers, tmp_path):
    pool = reward(
        f"workers={workers}",
        f"function={FUNCTIONS}:long_bool",
        f"shadow=[{FUNCTIONS}:one_or_two, {FUNCTIONS}:graded]",
    )
    assert score(pool, ["1", "2", "-3", "-4"]) == [RIGHT, WRONG, WRONG, WRONG]
    assert pool.take_metrics()["reward/disagreement"] == 0.25
    [row] = [json.loads(line) for line in (tmp_path / "disputes.jsonl").read_text().splitlines()]
    verdicts = {f"{FUNCTIONS}:long_bool": False, f"{FUNCTIONS}:one_or_two": True, f"{FUNCTIONS}:graded": 2.0}
    assert row == {"prompt": 1, "group": 1, "sample": 1, "answer": "1", "verdicts": verdicts, "response": "2"}
    score(pool, ["1"])
    assert pool.take_metrics()["reward/disagreement"] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_one_of_several_shadows_is_enough_for_a_dispute(reward, workers, tmp_path):
    shadows = f"shadow=[{FUNCTIONS}:one_or_two, {FUNCTIONS}:graded]"
    pool = reward(f"workers={workers}", f"function={FUNCTIONS}:long_bool", shadows)
    texts = ["1", "-1", "2", "3", "1"]  # graded alone takes 3 for right; both do so with 2
    assert score(pool, texts) == [RIGHT, WRONG, WRONG, WRONG, RIGHT]
    assert pool.take_metrics()["reward/disagreement"] == 2 / 5
    rows = [json.loads(line) for line in (tmp_path / "disputes.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == ["2", "3"]


def test_text_that_is_no_unicode_is_scored_and_kept(reward, tmp_path):
    pool = reward("workers=1", f"function={FUNCTIONS}:long_bool", f"shadow=[{FUNCTIONS}:one_or_two]")
    assert score(pool, ["\ud800", "2"], "\ud800") == [RIGHT, WRONG]
    rows = [json.loads(line) for line in (tmp_path / "disputes.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == ["\ud800", "2"]


def test_disputes_that_cannot_be_written_stop_the_run_in_good_order(reward, tmp_path):
    pool = reward("workers=0", f"function={FUNCTIONS}:long_bool", f"shadow=[{FUNCTIONS}:one_or_two]")
    (tmp_path / "disputes.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"disputes.jsonl cannot be written: Is a directory"):
        score(pool, ["2"])


# fractions


@pytest.mark.parametrize("workers", [0, 2])
def test_responses_in_which_no_answer_is_found_are_counted(reward, workers):
    pool = reward(f"workers={workers}")
    assert score(pool, ["Answer: 1", "Answer: 2", "1", "Answer:", "so Answer: 1"], "1")[2:4] == [WRONG] * 2
    assert pool.take_metrics()["reward/no_answer"] == 2 / 5
    score(pool, ["Answer: 1"] * 3)
    assert pool.take_metrics()["reward/no_answer"] == 0


def test_a_module_that_finds_no_answers_has_no_fraction_of_them(reward):
    pool = reward("workers=1", f"function={FUNCTIONS}:long_bool", "shadow=['dapo.reward:is_correct']")
    score(pool, ["1", "2"])
    assert "reward/no_answer" not in pool.take_metrics()


def test_only_the_first_function_decides_what_is_undecided_or_without_answer(reward):
    weights = json.dumps({"dapo.reward:is_correct": 1.0, f"{FUNCTIONS}:obedient": 0.5})
    pool = reward("workers=1", f"function={weights}", "time_limit=1.0")
    assert score(pool, ["die", "Answer: 1"]) == [(False, -1.5), (True, 0.5)]
    metrics = pool.take_metrics()
    assert (metrics["reward/crashes"], metrics["reward/undecided"], metrics["reward/no_answer"]) == (
        1,
        0,
        0.5,
    )


def test_a_call_without_verdict_is_undecided_and_the_fraction_is_of_all_that_were_scored(reward):
    pool = reward("workers=2", f"function={FUNCTIONS}:obedient", "time_limit=1.0")
    score(pool, ["die", "1", "1"])
    score(pool, ["sleep", "1", "1", "1", "1"])
    assert pool.take_metrics() == counts(1, 1, 2 / 8)


def test_nothing_scored_is_nothing_counted(reward):
    metrics = reward("workers=1", f"shadow=[{FUNCTIONS}:one_or_two]").take_metrics()
    assert set(metrics.values()) == {0} and len(metrics) == 5


def test_without_shadows_there_is_no_disagreement_to_log(reward):
    assert "reward/disagreement" not in reward("workers=1").take_metrics()


@pytest.mark.parametrize(
    "option",
    ["function={}", "function=3", "shadow=x:y", "workers=-1", "time_limit=0", "function={a:b: heavy}"],
)
def test_options_that_make_no_sense_are_refused(reward, option):
    with pytest.raises(ConfigError, match=r"reward\." + option.partition("=")[0]):
        reward(option)


# answers


@pytest.mark.parametrize("workers", [0, 2])
def test_two_answers_are_one_if_the_first_functions_module_says_so(reward, workers):
    first = {"tests.dapo.reward.roman:is_right": 1.0, f"{FUNCTIONS}:obedient": 1.0}
    made = reward(f"function={json.dumps(first)}", f"workers={workers}")
    assert made.finds_answers and made.answer_of("so II") == "II" and made.answer_of("so.") is None
    assert made.same([("II", "2"), ("2", "III"), ("1", "1")]) == [True, False, True]
    assert made.same([]) == []
    ours = reward(f"workers={workers}")
    assert ours.same([("0.5", "\\frac12"), ("34", "35")]) == [True, False]


def test_two_answers_are_two_if_nothing_says_otherwise_in_time(reward):
    made = reward("function=tests.dapo.reward.roman:is_right", "workers=1", "time_limit=0.5")
    assert made.same([("I", "sleep"), ("raise", "2"), ("I", "1")]) == [False, False, True]
    assert made.take_metrics()["reward/timeouts"] == 1


def test_without_is_same_answers_are_compared_as_text(reward):
    made = reward(f"function={FUNCTIONS}:long_bool", "workers=0")
    assert not made.finds_answers
    assert made.same([("I", "1"), ("I", "I")]) == [False, True]
