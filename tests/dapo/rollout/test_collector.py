"""The collector in any order of events: what is asked for, what is learnt from, how old that is. Nothing is
lost or taken twice when servers die, disks fail and runs go on.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dapo import clock
from dapo.rollout import collector, pending
from dapo.rollout.buffer import Buffer
from dapo.rollout.rollouts import RolloutError, Rollouts
from dapo.types import EngineError, Group, Interrupted, Request, Sample, Stopped, StorageError, WeightsLost
from tests.batches import next_batches
from tests.dapo.rollout.test_asking import BOTH
from tests.dapo.rollout.test_pending import InterruptAfter, contents, make_rollouts
from tests.dapo.rollout.test_rollouts import NUM_PROMPTS, ScriptedEngine, asking_order

STREAMING = "engine.kind=sglang"
many_systems = settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Servers(ScriptedEngine):
    """Says which weights wrote a token: those of when it was asked for the first, those of now the others."""

    def __init__(self, script: Callable[[int], str], order: int):
        super().__init__(script, order, length=lambda request: 2 + request.seed % 24)
        self.num_streams = 0
        self.asked_at: dict[str, int] = {}
        self.failure: Exception | None = None  # raised once by the next read
        self.history: list[tuple[str, int, int]] = []  # request id, seed, prompt

    def submit(self, requests: Any) -> None:
        requests = list(requests)
        self.history += [(request.id, request.seed, request.prompt.index) for request in requests]
        self.asked_at |= {request.id: self.version for request in requests}
        super().submit(requests)

    def stream(self) -> Any:
        """One for training, and others for probes."""
        self.num_streams += 1
        return self if self.num_streams == 1 else ProbeStream(self)

    def completed(self) -> Iterator[Sample]:
        for sample in super().completed():
            yield sample
            if self.failure:
                error, self.failure = self.failure, None
                raise error

    def answer(self, request: Request) -> Sample:
        sample = super().answer(request)
        begun = self.asked_at[request.id]
        if begun != self.version:
            sample.versions = ((begun, 0, 1), (self.version, 1, sample.length))
        return sample


class ProbeStream:
    def __init__(self, engine: Servers):
        self.engine, self.requests = engine, list[Request]()

    def submit(self, requests: Any) -> None:
        self.requests += requests

    def completed(self) -> Iterator[Sample]:
        while self.requests:
            request = self.requests.pop()
            self.engine.asked_at[request.id] = self.engine.version
            yield Servers.answer(self.engine, request)

    def abort(self, ids: Any = None) -> None: ...


def make_servers(seed: int, mixed: float = 0.5) -> Servers:
    rng = random.Random(seed)
    kinds = ["1000", "0111", "0110"], ["1111", "0000"]
    return Servers([rng.choice(kinds[rng.random() >= mixed]) for _ in range(NUM_PROMPTS)].__getitem__, seed)


class System:
    """A run whose threads are turns, in an order drawn by `seed`."""

    def __init__(self, path: Path, seed: int, *options: str, mixed: float = 0.5, servers: int | None = None):
        self.chance = random.Random(seed)
        engine = make_servers(seed if servers is None else servers, mixed)
        self.rollouts = make_rollouts(
            path, engine, STREAMING, "rollout.group_size=4", "run.steps=99", *options
        )
        self.engine: Any = self.rollouts.engine
        self.step, self.most_turns = 0, 30

    def start(self) -> None:
        rollouts = self.rollouts
        rollouts.load_weights([], self.step)
        rollouts.collector = rollouts._make_collector(self.step)
        carried, rollouts.carried = rollouts.carried, []
        rollouts.collector.start(carried, in_thread=False)

    def turns(self) -> None:
        """Generate while the policy learns."""
        for _ in range(self.chance.randrange(self.most_turns)):
            if not self.collector.sampler.is_idle:
                self.collector.turn()

    def make_step(self) -> Buffer:
        if not self.rollouts.collector:
            self.start()
        self.rollouts.load_weights([], self.step)
        self.turns()
        buffer = self.rollouts.take(self.step)
        self.rollouts._learn(buffer)
        self.turns()
        self.step += 1
        return buffer

    @property
    def collector(self) -> collector.Collector:
        assert self.rollouts.collector
        return self.rollouts.collector


@pytest.fixture(autouse=True)
def no_scoring_call_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "BRIEF", float("inf"))


def ids(groups: list[Group]) -> list[int]:
    return sorted(group.id for group in groups)


@many_systems
@given(
    seed=st.integers(0, 10**6),
    mixed=st.floats(0.05, 1),
    staleness=st.integers(1, 4),
    most_turns=st.integers(1, 80),
    per_round=st.integers(4, 16),
    options=st.sampled_from([[], ["rollout.dynamic_sampling=false"], BOTH]),
)
def test_in_any_system_no_token_is_too_old_and_every_group_has_one_turn(
    tmp_path: Path,
    seed: int,
    mixed: float,
    staleness: int,
    most_turns: int,
    per_round: int,
    options: list[str],
) -> None:
    asked_for = f"rollout.max_staleness={staleness}", f"rollout.prompts_per_round={per_round}"
    system = System(tmp_path, seed, *asked_for, *options, mixed=mixed)
    system.most_turns = most_turns
    turns: list[int] = []
    for step in range(9):
        buffer = system.make_step()
        most = per_round * system.rollouts.config.rollout.max_rounds * 4
        assert len(buffer.kept) == 4 or sum(len(g.samples) for g in buffer.decided) > most - 4
        oldest = [min(v for s in group.samples for v, _, _ in s.versions) for group in buffer.kept]
        assert all(0 <= step - version <= staleness for version in oldest)
        turns += ids(buffer.decided)
        assert all([s.index for s in group.samples] == [*range(len(group.samples))] for group in buffer.kept)
    still_open = ids(system.collector.open_groups())
    asked = {int(id.split(".")[0]) for id, _, _ in system.engine.history}
    assert len(set(turns)) == len(turns) and not {*turns} & {*still_open}
    assert {*turns} | {*still_open} == asked, "none is lost"
    if options != BOTH:
        assert asked == {*range(max(asked) + 1)}
        of_prompts = {int(id.split(".")[0]): prompt for id, _, prompt in system.engine.history}
        assert [of_prompts[id] for id in sorted(asked)] == asking_order(len(asked))


@pytest.mark.parametrize("mixed", [0.15, 0.5, 1.0])
@pytest.mark.parametrize("staleness", [1, 3])
def test_what_is_asked_for_and_learnt_from_does_not_depend_on_how_fast_the_policy_learns(
    tmp_path: Path, staleness: int, mixed: float
) -> None:
    """Where verdicts do not depend on the weights, and until a group was too old."""
    num_compared = 0
    for servers in range(6):
        found = []
        for speed in (1, 8, 200):
            system = System(
                tmp_path, speed, f"rollout.max_staleness={staleness}", mixed=mixed, servers=servers
            )
            system.most_turns = speed
            batches = []
            for _ in range(8):
                buffer = system.make_step()
                if system.collector.num_overflown:
                    break
                batches.append((ids(buffer.kept), ids(buffer.decided)))
            first = {int(id.split(".")[0]): (seed, prompt) for id, seed, prompt in system.engine.history}
            found.append((batches, first))
        for i, (batches, asked) in enumerate(found):
            for other_batches, other_asked in found[:i]:
                num = min(len(batches), len(other_batches))
                num_compared += num
                assert batches[:num] == other_batches[:num]
                assert all(other_asked[id] == asked[id] for id in asked.keys() & other_asked.keys())
    assert num_compared > 30


def test_the_bound_is_kept_by_asking_again_for_what_is_too_old(tmp_path: Path) -> None:
    """More groups are mixed than was expected: the last that were asked for are too old at their turn."""
    system = System(tmp_path, 3, "rollout.max_staleness=1", "rollout.prompts_per_round=12", mixed=1.0)
    system.rollouts.mixed_fraction, system.most_turns = 0.3, 200
    seeds: dict[str, set[int]] = {}
    overflown = 0
    for _ in range(6):
        system.make_step()
        overflown += system.collector.num_overflown
        system.collector.num_overflown = 0
    for id, seed, _ in system.engine.history:
        seeds.setdefault(id, set()).add(seed)
    more = [count - 1 for count in Counter(id for id, *_ in system.engine.history).values()]
    assert overflown > 4 and sum(more) == 4 * overflown
    assert all(len(found) == 1 for found in seeds.values()), "under its own name"


def test_generation_goes_on_between_two_batches(tmp_path: Path) -> None:
    system = System(tmp_path, 0, "rollout.max_staleness=2")
    system.most_turns = 200
    system.make_step()
    for _ in range(6):
        assert sum(group.is_mixed for group in system.collector.turned.groups) >= 2
        begun = len(system.engine.history)
        system.rollouts.load_weights([], system.step)
        before = len(system.engine.history)
        assert before > begun, "new weights: one step more"
        buffer = system.rollouts.take(system.step)
        again, system.collector.num_overflown = 4 * system.collector.num_overflown, 0
        assert len(system.engine.history) == before + again, "the batch was there already"
        system.rollouts._learn(buffer)
        system.turns()
        system.step += 1


# nothing is lost


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("options", [[], BOTH], ids=["plain", "forecast"])
def test_a_resumed_run_goes_on_with_the_groups_that_were_open(
    tmp_path: Path, seed: int, options: list[str]
) -> None:
    more = [*options, "rollout.max_staleness=2"]
    system = System(tmp_path, seed, *more)
    turns = [id for _ in range(3) for id in ids(system.make_step().decided)]
    system.rollouts.save(tmp_path)
    before = [contents(group) for group in system.collector.open_groups()]
    again = System(tmp_path, seed, *more)
    again.step = 3
    again.rollouts.load(tmp_path)
    assert [contents(group) for group in again.rollouts.carried] == before
    assert any(group.samples for group in again.rollouts.carried)
    own = again.rollouts.prompts.prompts
    assert all(group.prompt is own[group.prompt.index] for group in again.rollouts.carried), "with its origin"
    again.start()
    first_asked = [int(id.split(".")[0]) for id, *_ in again.engine.history]
    unfinished = [group[0] for group in before if not group[2]]
    assert list(dict.fromkeys(first_asked))[: len(unfinished)] == unfinished, (
        "under their own names, in order"
    )
    turns += [id for _ in range(4) for id in ids(again.make_step().decided)]
    assert len(set(turns)) == len(turns)
    if not options:
        assert {*range(max(turns))} <= {*turns, *ids(again.collector.open_groups())}


def test_open_groups_without_routes_are_asked_for_again_once_routes_are_replayed(tmp_path: Path) -> None:
    system = System(tmp_path, 0, "rollout.max_staleness=2")
    for _ in range(3):
        system.make_step()
    system.rollouts.save(tmp_path)
    before = [group.id for group in system.collector.open_groups()]
    again = System(tmp_path, 0, "rollout.max_staleness=2")
    again.rollouts.routing = Mock()
    again.rollouts.load(tmp_path)
    assert [group.id for group in again.rollouts.carried] == before and before
    assert not any(group.samples for group in again.rollouts.carried)


@pytest.mark.parametrize("seed", range(4))
def test_a_run_that_goes_on_without_staleness_has_each_group_once(tmp_path: Path, seed: int) -> None:
    system = System(tmp_path, seed, "rollout.max_staleness=3")
    turns = [id for _ in range(3) for id in ids(system.make_step().decided)]
    system.rollouts.save(tmp_path)
    again = System(tmp_path, seed)
    again.rollouts.load(tmp_path)
    assert again.rollouts.carried
    for step in range(3, 7):
        again.rollouts.load_weights([], step)
        turns += ids(again.rollouts.collect(step).decided)
    assert turns[-1] > 20 and sorted(turns) == [*range(len(turns))]


@pytest.mark.parametrize("error", [StorageError("the disk is full"), EngineError("no answer")])
def test_a_batch_whose_step_failed_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Stopped
) -> None:
    system = System(tmp_path, 1, "rollout.max_staleness=2", *BOTH)
    system.make_step()
    system.rollouts.load_weights([], 1)

    def fails(*arguments: object) -> None:
        raise error

    taken: list[Buffer] = []
    take = system.rollouts.take
    monkeypatch.setattr(system.rollouts, "take", lambda step: taken.append(take(step)) or taken[-1])
    with monkeypatch.context() as patched, pytest.raises(type(error)):
        if isinstance(error, StorageError):
            patched.setattr(system.rollouts.dumps, "write", fails)
        else:
            patched.setattr(system.engine, "release_memory", fails)
        system.rollouts.next_batch(1)
    passed = len(system.rollouts.asking.recent)
    system.rollouts.next_batch(1)
    assert [contents(g)[:2] for g in taken[0].kept] == [contents(g)[:2] for g in taken[1].kept]
    assert len(system.rollouts.asking.recent) < passed


@pytest.mark.parametrize("is_before_the_batch", [True, False])
def test_servers_that_lost_their_weights_get_their_requests_again(
    tmp_path: Path, is_before_the_batch: bool
) -> None:
    system = System(tmp_path, 5, "rollout.max_staleness=2", mixed=0.3)
    turns = ids(system.make_step().decided)
    system.rollouts.load_weights([], 1)
    with pytest.raises(WeightsLost):
        for _ in range(100):  # the thread's loop
            system.engine.failure = WeightsLost("all servers died")
            system.collector.turn()
    system.collector.fail(WeightsLost("all servers died"))
    assert not system.engine.outstanding, "what nobody waits for is aborted"
    still_open = ids(system.collector.open_groups())
    if is_before_the_batch:
        while groups := system.collector.turned.groups:
            system.collector._lost.insert(0, groups[-1])
            system.collector.turned.remove(groups[-1])
        with pytest.raises(WeightsLost):
            system.rollouts.take(1)
    system.rollouts.load_weights([], 1)
    assert ids(system.collector.open_groups())[: len(still_open)] == still_open
    system.step = 1
    turns += [id for _ in range(4) for id in ids(system.make_step().decided)]
    assert len(set(turns)) == len(turns)
    assert {*range(max(turns))} <= {*turns, *ids(system.collector.open_groups())}


def test_what_is_ready_is_learnt_from_while_servers_have_no_weights_and_nothing_is_asked_of_them(
    tmp_path: Path,
) -> None:
    system = System(tmp_path, 5, "rollout.max_staleness=2", mixed=0.7)
    system.most_turns = 200
    for _ in range(2):
        system.make_step()
    system.collector.fail(WeightsLost("all servers died"))
    before, num_asked = ids(system.collector.open_groups()), len(system.engine.history)
    order = [group.id for group in system.collector.open_groups()]
    buffer = system.rollouts.take(2)
    system.rollouts._learn(buffer)
    assert len(system.engine.history) == num_asked
    system.rollouts.load_weights([], 3)
    after = [group.id for group in system.collector.open_groups() if group.id in before]
    again = {id for id in after if order.index(id) < max(map(order.index, ids(buffer.decided)))}
    assert [id for id in after if id not in again] == [id for id in order if id in after and id not in again]
    assert ids(buffer.decided) and not {*ids(buffer.decided)} & {*after}


def test_a_batch_that_is_ready_is_learnt_from_though_all_prompts_have_left(tmp_path: Path) -> None:
    system = System(tmp_path, 5, "rollout.max_staleness=1", "rollout.drop_above=0.9", mixed=1.0)
    system.most_turns = 200
    system.make_step()
    system.turns()
    assert sum(group.is_mixed for group in system.collector.turned.groups) >= 3
    system.rollouts.forecast.is_dropped[:] = True
    with pytest.raises(RolloutError, match=f"all {NUM_PROMPTS} prompts have left"):
        for _ in range(4):
            system.make_step()
    assert system.step >= 2 and len(system.collector.open_groups()) < 4


@pytest.mark.parametrize("error", [EngineError("no server"), RolloutError("not finite"), ZeroDivisionError()])
def test_the_threads_error_is_the_next_batchs(tmp_path: Path, error: Exception) -> None:
    system = System(tmp_path, 5, "rollout.max_staleness=1")
    system.rollouts.load_weights([], 0)
    system.engine.failure = error
    with pytest.raises(type(error)):
        system.rollouts.take(0)
    assert len(system.collector.open_groups()) >= 4
    system.rollouts.close()


def test_an_interruption_is_noticed_where_a_batch_is_ready(tmp_path: Path) -> None:
    system = System(tmp_path, 5, "rollout.max_staleness=2")
    system.most_turns = 200
    system.make_step()
    assert sum(group.is_mixed for group in system.collector.turned.groups) >= 4
    interrupt = InterruptAfter(1)
    system.collector.is_interrupted = interrupt
    before = ids(system.collector.open_groups())
    with pytest.raises(Interrupted):
        system.rollouts.take(1)
    assert ids(system.collector.open_groups()) == before


# with its thread


class SlowServers(Servers):
    """Answers from a thread of its own would: a little later, while the policy learns."""

    def completed(self) -> Iterator[Sample]:
        for sample in super().completed():
            time.sleep(self.random.random() * 2e-4)  # type: ignore[union-attr]
            yield sample


@pytest.mark.parametrize("seed", range(6))
def test_a_run_with_its_thread(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    engine = SlowServers(make_servers(seed).script, seed)
    options = [f"rollout.max_staleness={1 + seed % 3}", "rollout.group_size=4", "run.steps=99", STREAMING]
    rollouts = make_rollouts(tmp_path, engine, *options)
    turns = []
    for step in range(20):
        rollouts.load_weights([], step)
        [batch] = next_batches(rollouts, step)
        turns += ids([*rollouts.collector._taken])  # type: ignore[union-attr]
        assert batch.metrics["rollout/staleness_max"] <= 1 + seed % 3
        time.sleep(chance.random() * 4e-3)
        if step % 7 == 3:
            rollouts.save(tmp_path)
            saved = json.loads((tmp_path / "rollouts.json").read_text())
            of_saved = {id for id, *_ in saved["carried"]}
            assert not of_saved & {*turns} and {*range(max(turns))} <= {*turns, *of_saved}
    assert len(set(turns)) == len(turns)
    rollouts.close()
    assert not any(thread.name == "collector" for thread in threading.enumerate())


def test_an_evaluation_beside_the_thread_leaves_its_groups_and_its_counts_alone(tmp_path: Path) -> None:
    """Evaluated responses are all of a crash's kind: without an answer."""
    engine = SlowServers(make_servers(3).script, 3)
    options = "rollout.max_staleness=2", "rollout.group_size=4", "run.steps=99", STREAMING
    rollouts = make_rollouts(tmp_path, engine, *options)
    turns = []
    for step in range(8):
        rollouts.load_weights([], step)
        next_batches(rollouts, step)
        turns += ids([*rollouts.collector._taken])  # type: ignore[union-attr]
        apart = rollouts.reward.apart()
        prompts = rollouts.prompts.prompts[:6]
        found = rollouts.sample(prompts, 4, rollouts.sampling, 1 << 60, "evaluating", apart)
        assert [group.prompt.index for group in found] == [prompt.index for prompt in prompts]
        assert apart.num_scored == 24 and all(len(group.samples) == 4 for group in found)
    assert len(set(turns)) == len(turns) and {*range(max(turns))} <= {
        *turns,
        *ids(rollouts.collector.open_groups()),  # type: ignore[union-attr]
    }
    rollouts.close()


def test_a_call_of_the_reward_that_never_returns_is_no_progress_and_the_run_can_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector, "CLOSE_TIMEOUT", 0.1)
    rollouts = make_rollouts(tmp_path, make_servers(0), "rollout.max_staleness=1", STREAMING)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(pairs: object) -> None:
        hangs.set()
        goes_on.wait(20)

    monkeypatch.setattr(rollouts.reward, "score", hang)
    interrupt = InterruptAfter(10**9)
    rollouts.is_interrupted = interrupt
    failed: list[BaseException] = []

    def take() -> None:
        try:
            rollouts.take(0)
        except Interrupted as error:
            failed.append(error)

    main = threading.Thread(target=take)
    main.start()
    assert hangs.wait(20)
    before = clock.progress()[:2]
    time.sleep(3 * collector.CHECK_EVERY)
    assert clock.progress()[:2] == before
    interrupt.after = 0
    main.join(20)
    assert failed
    rollouts.close()
    goes_on.set()


def test_a_bug_in_the_thread_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = make_rollouts(tmp_path, make_servers(0), "rollout.max_staleness=1", STREAMING)

    def broken(pairs: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(rollouts.reward, "score", broken)
    with pytest.raises(KeyError, match="a bug"):
        rollouts.take(0)
    rollouts.close()


def test_groups_that_are_all_rejected_do_not_pile_up(tmp_path: Path) -> None:
    engine = Servers(lambda prompt: "0000", 0)
    options = "rollout.max_staleness=2", "rollout.group_size=4", "run.steps=99", STREAMING
    rollouts: Rollouts = make_rollouts(tmp_path, engine, *options, "rollout.max_empty_steps=9")
    for step in range(3):
        rollouts.load_weights([], step)
        next_batches(rollouts, step)
        time.sleep(0.2)
        assert len(rollouts.collector.open_groups()) <= 2 * 12  # type: ignore[union-attr]
    rollouts.close()
