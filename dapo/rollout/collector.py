"""Generation that goes on while the policy learns (rollout.max_staleness = η > 0).

ASK → GENERATE → SCORE → QUEUE, in request order, while the trainer TAKEs a batch, learns and sends weights.
N = mixed groups that a step learns from. A group is open from its request until it is in a batch. Its turn
comes when it and all groups that were requested before it are scored.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dapo import config
from dapo.clock import timed
from dapo.rollout.asking import Asking
from dapo.rollout.buffer import Buffer
from dapo.rollout.pending import Chances, GroupSampler
from dapo.types import Group, Interrupted, WeightsLost

# standard deviations above the mean number of mixed groups for which there is room: with fewer, more groups
# are too old at their turn; with more, servers stand still
MARGIN = 1.5
CLOSE_TIMEOUT = 10.0  # seconds
CHECK_EVERY = 0.5  # seconds of waiting between two checks for an interruption


@dataclass(frozen=True)
class Limits:
    """Says how much is asked for ahead, and what a batch is."""

    max_staleness: int  # η, in steps
    capacity: int  # N: mixed groups of a batch
    is_dynamic: bool  # False: every group counts as mixed
    most_samples: int  # of the groups that a batch is chosen from
    steps: int  # of the run
    keeps_routes: bool = True  # of the groups that are not kept

    @classmethod
    def of(cls, rollout: config.Rollout, steps: int) -> Limits:
        most = rollout.prompts_per_round * rollout.max_rounds * rollout.group_size
        of_batch = rollout.prompts_per_step, rollout.dynamic_sampling
        return cls(rollout.max_staleness, *of_batch, most, steps, rollout.only or rollout.dump_share > 0)

    def is_kept(self, group: Group) -> bool:
        """Return whether a batch keeps the group (Eq. 11)."""
        return group.is_mixed or not (self.is_dynamic or group.is_lost)


class Turned:
    """Groups whose turn has come, in request order; and how many are kept, and their samples."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.groups: deque[Group] = deque()
        self.num_kept = self.num_samples = 0

    def append(self, group: Group) -> None:
        self.groups.append(group)
        self._count(group, 1)

    def put_back(self, groups: Sequence[Group]) -> None:
        """Put groups before the others."""
        self.groups.extendleft(reversed(groups))
        for group in groups:
            self._count(group, 1)

    def take(self, count: int) -> list[Group]:
        """Remove and return the first ones."""
        groups = [self.groups.popleft() for _ in range(count)]
        for group in groups:
            self._count(group, -1)
        return groups

    def remove(self, group: Group) -> None:
        self.groups.remove(group)
        self._count(group, -1)

    def _count(self, group: Group, sign: int) -> None:
        self.num_kept += sign * self.limits.is_kept(group)
        self.num_samples += sign * len(group.samples)


@dataclass(eq=False)
class Collector:
    """Keeps so many groups open, requested and not taken yet, that their mixed ones will do for the steps up
    to v + η, where v is the version of the weights.

    A step takes the N mixed groups that were asked for first. So what is asked for under weights v is taken
    by step v + η, and no token is older than η, unless more groups were mixed than was expected: then the
    last that were asked for under v are too old at their turn, and are asked for again under their names,
    whatever they hold (`num_overflown`).

    A thread of its own waits, scores and asks from `start` on; without it, `take` does. Its error is raised
    by the next `take`.
    """

    sampler: GroupSampler
    asking: Asking
    limits: Limits
    # fraction of groups that are kept, if so many were of so many since the last batch
    estimate: Callable[[int, int], float]
    take_idle: Callable[[], list[float]]  # the engine's
    is_streaming: bool  # False: asks when nothing is outstanding, for the engine generates all at once
    version: int  # of the weights
    is_interrupted: Callable[[], bool] = lambda: False
    # called while `take` waits, with its step and the number of mixed groups in the queue
    on_progress: Callable[[int, int], None] = lambda step, num_kept: None
    num_overflown: int = 0  # since the last batch

    def __post_init__(self) -> None:
        self.turned = Turned(self.limits)
        self.changed = threading.Condition(self.sampler.lock)
        self.failure: BaseException | None = None
        self.next_step = self.version  # that has no batch yet
        self.is_closed = False
        self._lost: list[Group] = []  # what was in the sampler's queue when its servers had died
        self._taken: list[Group] = []  # by the last `take`, in request order
        self._thread: threading.Thread | None = None
        self._lap_at = 0.0  # time.monotonic()
        self._metrics: dict[str, float] = {}

    def start(self, groups: Sequence[Group] = (), in_thread: bool = True) -> None:
        """Begin to ask, and with these groups, which an earlier process asked for."""
        with self.changed:
            self.sampler.request(groups)
            self._queue_and_ask()
        if in_thread:
            self._thread = threading.Thread(target=self._run, name="collector", daemon=True)
            self._thread.start()

    def take(self, step: int) -> Buffer:
        """Wait for a batch of N mixed groups, or as many as the cap allows; remove and return it.

        Raises:
            Stopped, RolloutError: the collector has failed; the groups it has are kept.
        """
        learning, idle = self._lap()
        with self.changed:
            self._raise_failure()
            while not (batch := self._batch(step)):
                self._raise_failure()
                if self.failure:
                    raise self.failure
                if self.asking.is_exhausted and not self.sampler.pending.groups:
                    self.asking.next()  # raises
                self.on_progress(step, self.turned.num_kept)
                if self._thread:
                    self.changed.wait(CHECK_EVERY)
                else:
                    self.turn()
            self._taken = self.turned.take(batch)
            buffer = Buffer(self.limits.capacity, self.limits.is_dynamic, self.limits.keeps_routes)
            buffer.fill(self._taken)
            oldest = max((age(group, step) for group in buffer.kept), default=0)
            assert oldest <= self.limits.max_staleness, f"a group is {oldest} steps old at step {step}"
            self.asking.step, self.next_step = step, step + 1
            self.asking.finish_batch(buffer.decided + buffer.lost)
        _, idle_meanwhile = self._lap()
        if learning:
            seconds = [a + b for a, b in zip(idle, idle_meanwhile, strict=False)]
            self._metrics = {
                "perf/overlap": 1 - sum(idle) / (len(idle) * learning) if idle else 0.0,
                "perf/server_idle": sum(seconds) / len(seconds) if seconds else 0.0,
                "perf/server_idle_max": max(seconds, default=0.0),
            }
        return buffer

    def take_metrics(self) -> dict[str, float]:
        """Return what `take` found: groups that were too old, and how busy the engine was since the batch
        before; without that batch the first only.
        """
        metrics, self._metrics = self._metrics | {"groups/overflow": self.num_overflown}, {}
        self.num_overflown = 0
        return metrics

    def _lap(self) -> tuple[float, list[float]]:
        """Return the seconds since the last call, 0 at the first; and those that servers were idle then."""
        now = time.monotonic()
        seconds = now - self._lap_at if self._lap_at else 0.0
        self._lap_at = now
        return seconds, self.take_idle()

    def ask(self) -> None:
        """Ask for as many groups as the last batch has left room for."""
        with self.changed:
            self._queue_and_ask()

    def note_weights(self, version: int) -> None:
        """Note new weights: ask for one step more, or go on where servers had lost theirs."""
        self.version = version
        if isinstance(self.failure, WeightsLost):
            self._resume()
        else:
            self.ask()

    def put_back_batch(self) -> None:
        """Put the last batch back into the queue: the step failed."""
        with self.changed:
            self.turned.put_back(self._taken)
            self.next_step -= 1
            self.asking.reopen_batch()

    def open_groups(self) -> list[Group]:
        """Return all open groups in request order, without samples if unfinished. The caller has the lock."""
        scored = self.sampler.pending.scored
        waiting = [
            group if group.id in scored else Group(group.id, group.prompt)
            for group in self.sampler.pending.groups
        ]
        return [*self.turned.groups, *waiting, *self._lost]

    def _resume(self) -> None:
        if self._thread:
            self._thread.join()
        lost, self._lost, self.failure = self._lost, [], None
        self.start(lost, in_thread=self._thread is not None)

    def close(self) -> None:
        """Abort what is outstanding, and end the thread."""
        with self.changed:
            self.is_closed = True
            self.sampler.stream.abort()
            self.changed.notify_all()
        if self._thread:
            self._thread.join(CLOSE_TIMEOUT)  # a call of the reward may never return; the process ends anyway
        self.sampler.cancel()

    @timed("collect")
    def turn(self) -> None:
        """Wait until more groups are scored; queue those whose turn has come; ask for more."""
        self.sampler.wait()
        with self.changed:
            self._queue_and_ask()

    def _run(self) -> None:
        try:
            while self._has_work():
                self.turn()
        except BaseException as error:  # noqa: BLE001  # `take` raises it
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Stop with an error, which the next `take` raises unless new weights mend it before."""
        with self.changed:
            if isinstance(error, WeightsLost):
                self._lost = self.sampler.cancel()
            self.failure = error
            self.changed.notify_all()

    def _has_work(self) -> bool:
        """Wait until something is outstanding. Return False when the collector is closed."""
        with self.changed:
            while not self.is_closed and self.sampler.is_idle:
                self.changed.wait()
            return not self.is_closed

    def _queue_and_ask(self) -> None:
        for group in self.sampler.ready():
            self.turned.append(group)
        self.changed.notify_all()
        is_time = self.is_streaming or not self.sampler.pending.num_outstanding
        if is_time and not self.failure and not self.is_closed:
            self.sampler.request(list(self._lacking()))

    def _lacking(self) -> Iterator[Group]:
        """Yield new groups until there will be enough mixed ones, or as many samples as the cap allows."""
        pending, limits = self.sampler.pending, self.limits
        num_kept = self.turned.num_kept + (pending.num_mixed if limits.is_dynamic else len(pending.scored))
        chance, chances = self._chances()
        num_samples = self.turned.num_samples + len(pending.groups) * pending.group_size
        num_steps = min(self.version + limits.max_staleness + 1, limits.steps) - self.next_step
        while not self.asking.is_exhausted and num_kept + chances.most(MARGIN) < num_steps * limits.capacity:
            if num_samples + pending.group_size > num_steps * limits.most_samples:
                return
            group = self.asking.next()
            chances.add(chance(group))
            num_samples += pending.group_size
            yield group

    def _chances(self) -> tuple[Callable[[Group], float], Chances]:
        """Return the chance that a group without a verdict is kept, and the chances of all of those."""
        unknown = self.sampler.pending.unknown
        if self.asking.has_forecast:
            return self.asking.chance, Chances(map(self.asking.chance, unknown))
        again = self.num_overflown  # they were mixed: else the fraction would fall, and more would be too old
        fraction = self.estimate(self.turned.num_kept + again, len(self.turned.groups) + again)
        return lambda group: fraction, Chances.alike(len(unknown), fraction)

    def _raise_failure(self) -> None:
        """Raise what new weights do not mend."""
        if self.is_interrupted():
            raise Interrupted
        if self.failure and not isinstance(self.failure, WeightsLost):
            raise self.failure

    def _batch(self, step: int) -> int:
        """Return how many groups of the queue make a batch; 0: not enough have had their turn."""
        limits, turned = self.limits, self.turned
        room = limits.most_samples - self.sampler.group_size  # for samples, so that another group has room
        if turned.num_kept < limits.capacity and turned.num_samples <= room:
            return 0
        self._ask_again([group for group in turned.groups if self._is_too_old(group, step)])
        num_kept = num_samples = 0
        for i, group in enumerate(turned.groups, start=1):
            num_kept += limits.is_kept(group)
            num_samples += len(group.samples)
            if num_kept == limits.capacity or num_samples > room:
                return i
        return 0

    def _is_too_old(self, group: Group, step: int) -> bool:
        return self.limits.is_kept(group) and age(group, step) > self.limits.max_staleness

    def _ask_again(self, groups: list[Group]) -> None:
        for group in groups:
            self.turned.remove(group)
            self.num_overflown += 1
            anew = Group(group.id, group.prompt)
            if self.failure:
                self._lost.append(anew)
            else:
                self.sampler.request([anew])
        self.changed.notify_all()


def age(group: Group, step: int) -> int:
    """Return the steps since the oldest weights that wrote a token of the group."""
    versions = [version for sample in group.samples for version, _, _ in sample.versions]
    return step - min(versions, default=step)  # a lost sample has none
