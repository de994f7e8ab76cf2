"""The stream of episodes: aborts and errors in every state, threads, rounds."""

import itertools
import queue
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from dapo.episodes.environment import Turn
from dapo.episodes.player import Answer, Began, Begin, Fault, Step
from dapo.episodes.stream import EpisodeEngine
from dapo.types import EngineError, WeightsLost
from tests.dapo.episodes.stage import (
    FAMILY,
    Policy,
    Stage,
    assert_is_exact,
    assert_nothing_is_left,
    request_of,
    setup_of,
)

CHAT = FAMILY.chat()
SAID = {"role": "user", "content": "go on"}


class Actors:
    """Stands for Workers: a thread of this process answers, as a script says, and when it says so."""

    def __init__(self, act, has_environment=True):
        self.act = act  # act(message) → a Fault's text, None: an answer, or a number of seconds to wait
        environment, name = (
            ("actors", "rollout.environment=actors") if has_environment else (None, "rollout.tools")
        )
        self.setup = SimpleNamespace(environment=environment, name=name)
        self.failure = None
        self.numbers = itertools.count()
        self.asked: queue.SimpleQueue = queue.SimpleQueue()
        self.alive: set[int] = set()
        self.warnings: list[str] = []
        self.listener = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def listen(self, listener):
        self.listener = listener

    def ask(self, call):
        if isinstance(call.message, Begin):
            self.alive.add(call.message.episode)
        self.asked.put(call)

    def end(self, number):
        self.alive.discard(number)

    def warn(self, text, place=""):
        self.warnings.append(text)

    def close(self):
        self.asked.put(None)
        self.thread.join()

    def _run(self):
        while call := self.asked.get():
            try:
                self._answer(call)
            except BaseException as error:  # noqa: BLE001
                self.failure = error

    def _answer(self, call):
        message, has_environment = call.message, self.setup.environment
        if has_environment and message.episode not in self.alive:
            return
        said = self.act(message)
        if said == "died":
            self.alive.discard(message.episode)
            self.listener(message.episode, "its process ended", random.random() < 0.3)
        elif isinstance(said, str):
            call.done(Fault(message.episode, said))
        elif isinstance(message, Begin):
            tokens = np.array(CHAT.start([SAID], []), np.int32).tobytes()
            call.done(Began(message.episode, tokens, [SAID]))
        else:
            call.done(self._step(message, said))

    def _step(self, message: Step, said):
        raw = np.frombuffer(message.tokens, np.int32).tolist()
        turn = said or Turn([{"role": "user", "content": f"attempt {message.episode}"}], reward=0.25)
        tokens = None
        if not (turn.is_done or message.is_truncated):
            tokens = CHAT.after(raw[-1], turn.messages, [], message.room).tokens
        encoded = None if tokens is None else np.array(tokens, np.int32).tobytes()
        return Answer(message.episode, CHAT.text(raw), turn, encoded, 0, 0, 0, 0)


def make_engine(act, in_rounds=False, policy=None, max_turns=4, has_environment=True):
    actors = Actors(act, has_environment)
    row_of = (lambda prompt: {}) if has_environment else None
    said = [{"role": "user", "content": "begin"}]
    return EpisodeEngine(
        policy or Policy(), actors, max_turns, 5, in_rounds, 0.9, row_of, lambda prompt: list(said)
    )


def requests(num_groups, group_size, has_environment=True):
    row = {} if has_environment else None
    return [request_of(g, i, row) for g in range(num_groups) for i in range(group_size)]


def done_after(count):
    """An act: episodes are done after so many turns."""
    turns: dict[int, int] = {}

    def act(message):
        if isinstance(message, Begin):
            return None
        turns[message.episode] = turns.get(message.episode, 0) + 1
        return Turn(is_done=True, reward=1.0) if turns[message.episode] == count else None

    return act


class Gate:
    """An act that waits at the first call of a kind."""

    def __init__(self, kind, act):
        self.kind, self.act = kind, act
        self.is_there, self.goes_on = threading.Event(), threading.Event()

    def __call__(self, message):
        if isinstance(message, self.kind) and not self.is_there.is_set():
            self.is_there.set()
            assert self.goes_on.wait(20)
        return self.act(message)


class GatedPolicy(Policy):
    """Waits within its first turn."""

    def __init__(self):
        super().__init__()
        self.is_there, self.goes_on = threading.Event(), threading.Event()

    def answer(self, request):
        if not self.is_there.is_set():
            self.is_there.set()
            assert self.goes_on.wait(20)
        return super().answer(request)


# --- abort ---


@pytest.mark.parametrize("in_rounds", [False, True])
@pytest.mark.parametrize("state", ["beginning", "answering", "generating", "finished"])
@pytest.mark.parametrize("what", ["one", "all"])
def test_what_is_aborted_in_any_state_does_not_come_and_can_be_asked_for_again(state, what, in_rounds):
    gate = {"beginning": Gate(Begin, done_after(2)), "answering": Gate(Step, done_after(2))}.get(state)
    policy = GatedPolicy() if state == "generating" else Policy()
    engine = make_engine(gate or done_after(2), in_rounds, policy)
    stream, asked = engine.stream(), requests(2, 2)
    stream.submit(asked)
    waits = gate or policy
    if state == "finished":
        while stream.num_playing:
            time.sleep(0.001)
    else:
        assert waits.is_there.wait(20)
    dropped = asked[:1] if what == "one" else asked
    stream.abort([request.id for request in dropped] if what == "one" else None)
    if state != "finished":
        waits.goes_on.set()
    if what == "one":
        found = [*stream.completed()]
        assert sorted(sample.index + 2 * sample.group for sample in found) == [1, 2, 3]
    else:
        assert [*stream.completed()] == []
    assert_nothing_is_left(SimpleNamespace(engine=engine), stream)
    stream.submit(dropped)
    found = [*stream.completed()]
    assert len(found) == len(dropped)
    for sample in found:
        assert_is_exact(sample)
        assert sample.reward == 1.25 and sample.episode.num_turns == 2
    assert_nothing_is_left(SimpleNamespace(engine=engine), stream)
    assert engine.workers.failure is None and not engine.workers.alive
    engine.close()


def test_a_turn_of_an_aborted_request_is_not_taken_for_the_new_ones():
    """The embedded engine cannot abort a turn that it generates: it comes when its id is asked for anew."""
    policy = GatedPolicy()
    engine = make_engine(done_after(2), policy=policy, has_environment=False)
    stream, [request] = engine.stream(), requests(1, 1, has_environment=False)
    stream.submit([request])
    assert policy.is_there.wait(20)
    stream.abort()
    stream.submit([request])
    policy.goes_on.set()
    [sample] = stream.completed()
    assert_is_exact(sample)
    assert len(policy.rounds) == 3, "its own first turn was asked for, and the second"
    ids = [id for asked in policy.rounds for id, _ in asked]
    assert ids[0] != ids[1]
    engine.close()


def test_an_id_that_is_not_known_is_not_aborted():
    engine = make_engine(done_after(1))
    stream = engine.stream()
    stream.abort(["7.7"])
    stream.submit(requests(1, 1))
    stream.abort(["0.1", "0.1", "7.7"])
    assert len([*stream.completed()]) == 1
    engine.close()


# --- errors of the engine ---


@pytest.mark.parametrize(
    "error", [WeightsLost("no server has the weights"), EngineError("no server is left")]
)
@pytest.mark.parametrize("in_rounds", [False, True])
def test_the_engines_error_is_raised_and_the_same_can_be_asked_for_again(error, in_rounds):
    gate = Gate(Step, done_after(3))
    engine = make_engine(gate, in_rounds)
    stream, asked = engine.stream(), requests(3, 2)
    stream.submit(asked)
    assert gate.is_there.wait(20)
    with stream.inner.lock:
        stream.inner.failure = error
    gate.goes_on.set()
    with pytest.raises(type(error), match=str(error)):
        list(stream.completed())
    stream.abort()
    assert_nothing_is_left(SimpleNamespace(engine=engine), stream)
    stream.submit(asked)
    found = [*stream.completed()]
    assert len(found) == 6 and all(sample.reward == 1.5 for sample in found)
    for sample in found:
        assert_is_exact(sample)
    engine.close()


def test_an_engine_that_loses_a_turn_is_an_error_and_no_hang():
    policy = Policy()
    engine = make_engine(done_after(2), policy=policy)
    stream = engine.stream()
    stream.inner.submit = lambda turns: None
    stream.submit(requests(1, 1))
    with pytest.raises(AssertionError, match=r"returned everything, but not the turns \['0.0'\]"):
        list(stream.completed())
    engine.close()


def test_what_ends_the_workers_is_raised():
    def act(message):
        raise OSError("no file descriptors are left")

    engine = make_engine(act)
    stream = engine.stream()
    stream.submit(requests(1, 1))
    with pytest.raises(OSError, match="no file descriptors"):
        list(stream.completed())
    engine.close()


# --- two streams, rounds ---


def test_two_streams_side_by_side_do_not_see_each_other():
    with Stage(workers=2) as stage:
        rows = [{"steps": ["wait 0.01", "ok", "done"]}] * 4
        train, held_out = stage.engine.stream(), stage.engine.stream()
        train.submit(stage.requests(rows, 2))
        held_out.submit(stage.requests(rows, 1))
        found = [*held_out.completed()]
        assert len(found) == 4 and all(sample.reward == 1.5 for sample in found)
        held_out.submit(stage.requests(rows, 1))
        held_out.abort()
        found = [*train.completed()]
        assert len(found) == 8 and all(sample.reward == 1.5 for sample in found)


def test_in_rounds_what_is_asked_for_together_depends_on_no_timing():
    def rounds(seed):
        rng, turns = random.Random(seed), {}

        def act(message):
            time.sleep(rng.random() / 500)
            if isinstance(message, Begin):
                turns[message.episode] = 0
                return None
            turns[message.episode] += 1
            # by the order of requests: how long the episode is
            return Turn(is_done=True) if turns[message.episode] > message.episode % 3 else None

        engine = make_engine(act, in_rounds=True)
        stream = engine.stream()
        stream.submit(requests(5, 3))
        samples = sorted(stream.completed(), key=lambda sample: (sample.group, sample.index))
        engine.close()
        return engine.engine.rounds, [sample.tokens.tolist() for sample in samples]

    first = rounds(0)
    assert [len(each) for each in first[0]] == [15, 10, 5]
    assert all(rounds(seed) == first for seed in range(1, 4))


# --- everything at once ---


@pytest.mark.parametrize("in_rounds", [False, True])
@pytest.mark.parametrize("has_environment", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_lost_or_comes_twice_whatever_happens_when(in_rounds, has_environment, seed):
    """Episodes fail, processes die, requests are aborted from another thread and asked for again."""
    rng = random.Random(seed)

    def act(message):
        if rng.random() < 0.2:
            time.sleep(rng.random() / 500)
        chance = rng.random()
        if chance < 0.06:
            return "step raised ValueError"
        if chance < 0.12 and has_environment:
            return "died"
        return Turn(is_done=True, reward=1.0) if chance > 0.7 and isinstance(message, Step) else None

    engine = make_engine(act, in_rounds, has_environment=has_environment)
    stream, asked = engine.stream(), requests(60, 4, has_environment)
    by_id = {request.id: request for request in asked}
    ends = threading.Event()

    def disturb():
        while not ends.wait(0.003):
            with stream.changed:
                outstanding = list(stream.episodes)
                ids = rng.sample(outstanding, min(len(outstanding), rng.choice([1, 5, 30])))
                if rng.random() < 0.1:
                    ids = outstanding
                    stream.abort()
                else:
                    stream.abort(ids)
                stream.submit([by_id[id] for id in ids])

    disturber = threading.Thread(target=disturb)
    stream.submit(asked)
    disturber.start()
    threading.Timer(1.0, ends.set).start()
    found = []
    while len(found) < len(asked):
        found += stream.completed()
        assert not (ends.is_set() and not stream.episodes and len(found) < len(asked)), "some were lost"
    disturber.join()
    assert sorted(f"{s.group}.{s.index}" for s in found) == sorted(by_id)
    for sample in found:
        assert_is_exact(sample)
    lost = {sample.group for sample in found if sample.is_lost}
    whole = [sample for sample in found if not sample.is_lost]
    again = [sample for sample in whole if sample.episode.num_attempts > 1]
    assert len(whole) > 100 and (lost or again or not has_environment)
    assert_nothing_is_left(SimpleNamespace(engine=engine), stream)
    assert engine.workers.failure is None and not engine.workers.alive
    engine.close()


def test_real_workers_under_random_faults_lose_nothing(tmp_path):
    rng = random.Random(7)
    kinds = [
        "ok",
        "ok",
        "ok",
        "wait 0.002",
        "print",
        "done",
        "done",
        f"once {tmp_path / 'flag'} exit",
        "raise",
    ]
    rows = [{"steps": [rng.choice(kinds) for _ in range(6)]} for _ in range(40)]
    rows[3]["steps"][1] = f"once {tmp_path / 'other'} kill"
    with Stage(setup_of(seconds=20.0), workers=2) as stage:
        found = stage.play(rows, group_size=2)
    assert sum(not sample.is_lost for sample in found.values()) > 10
