"""Groups between the request for their samples and their turn. G = samples of a group.

Pending is the queue, pure bookkeeping. GroupSampler drives it: it requests samples from an engine's stream,
has them scored, and hands out groups in the order in which they were requested.
"""

from __future__ import annotations

import hashlib
import math
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dapo.clock import heartbeat
from dapo.reward.pool import Reward
from dapo.types import EpisodeError, Group, Prompt, Request, Sample, Sampling, Stream

# Safety margin, in standard deviations: a smaller one makes steps wait for one more group, a larger one costs
# tokens
DEVIATIONS = 1.0
MOST_LOST = 8  # groups in a row, in request order
BRIEF = 0.05  # seconds: while scoring takes less than this, every complete group is scored at once


class RolloutError(RuntimeError):
    """Sampling cannot go on: the data is too easy or too hard, the reward is wrong, or the policy is
    damaged.
    """


class FirstWaves(Protocol):
    """Says which groups are asked for a few samples first, and which end with these."""

    def num_at_first(self, group: Group) -> int:
        """Return how many samples of a group to request at first: G, for all."""
        ...

    def is_stopped(self, group: Group) -> bool:
        """Return whether a group ends with its first samples, which are scored."""
        ...


class Pending:
    """A queue of groups. Samples arrive in any order; groups leave whole, or stopped after their first wave,
    scored, and in the order they came.
    """

    def __init__(self, group_size: int):
        self.group_size = group_size
        self.groups: list[Group] = []
        self.unfinished: dict[int, Group] = {}  # by id
        self.requested: dict[int, int] = {}  # group id → samples asked for so far, of the unfinished
        self.first_waves: list[Group] = []  # those of unfinished groups, complete and not scored
        self.complete: list[Group] = []  # and not scored yet
        self.num_scored: dict[int, int] = {}  # group id → its first samples that are scored, if some are
        self.scored: dict[int, bool] = {}  # group id → is it mixed?
        self.num_samples = 0  # of the groups added since the beginning, without those that stopping saved
        self.num_outstanding = 0  # samples that were asked for and that the engine has not returned

    def add(self, groups: Sequence[Group], num_at_first: Callable[[Group], int]) -> list[Group]:
        """Append groups; return those of which samples are to be requested, as many as `num_at_first` says.

        A group that brings its samples, scored in an earlier step, only waits for its turn.
        """
        empty = [group for group in groups if not group.samples]
        self.groups += groups
        self.num_samples += sum(len(group.samples) or self.group_size for group in groups)
        self.unfinished |= {group.id: group for group in empty}
        requested = {group.id: num_at_first(group) for group in empty}
        self.requested |= requested
        self.num_outstanding += sum(requested.values())
        self.scored |= {group.id: group.is_mixed for group in groups if group.samples}
        return empty

    def receive(self, sample: Sample) -> None:
        """Put the sample into its group."""
        group = self.unfinished[sample.group]
        is_new = all(other.index != sample.index for other in group.samples)
        assert is_new, f"sample {sample.group}.{sample.index} came twice"
        group.add(sample)
        self.num_outstanding -= 1
        if len(group.samples) < self.requested[group.id]:
            return
        group.samples.sort(key=lambda sample: sample.index)
        if len(group.samples) < self.group_size:
            self.first_waves.append(group)
        else:
            del self.unfinished[group.id], self.requested[group.id]
            self.complete.append(group)

    @property
    def to_score(self) -> list[tuple[Group, list[Sample]]]:
        """Complete groups and first waves, with their samples that are not scored."""
        return [(g, g.samples[self.num_scored.get(g.id, 0) :]) for g in [*self.complete, *self.first_waves]]

    def mark_scored(self, is_stopped: Callable[[Group], bool]) -> list[Group]:
        """Note that `to_score` has been scored. Return the groups that go on after their first wave: the rest
        of their samples is to be requested. Those that `is_stopped` are rejected.
        """
        for group in self.complete:
            self.scored[group.id] = group.is_mixed
            self.num_scored.pop(group.id, None)
        going_on = []
        for group in self.first_waves:
            if group.is_lost or is_stopped(group):
                self.scored[group.id] = False
                self.num_samples -= self.group_size - len(group.samples)
                del self.unfinished[group.id], self.requested[group.id]
            else:
                self.num_scored[group.id], self.requested[group.id] = len(group.samples), self.group_size
                self.num_outstanding += self.group_size - len(group.samples)
                going_on.append(group)
        self.complete.clear()
        self.first_waves.clear()
        return going_on

    def ready(self) -> Iterator[Group]:
        """Remove and yield the groups whose turn has come. The caller may stop at any of them."""
        while self.groups and self.groups[0].id in self.scored:
            group = self.groups.pop(0)
            del self.scored[group.id]
            yield group

    def clear(self) -> list[Group]:
        """Remove and return all groups, in order; those that are not scored lose their samples."""
        left = [group if group.id in self.scored else Group(group.id, group.prompt) for group in self.groups]
        for queue in (self.groups, self.first_waves, self.complete):
            queue.clear()
        for table in (self.unfinished, self.requested, self.num_scored, self.scored):
            table.clear()
        self.num_outstanding = 0
        return left

    @property
    def num_mixed(self) -> int:
        """Number of groups known to be mixed whose turn has not come."""
        return sum(self.scored.values())

    @property
    def unknown(self) -> list[Group]:
        """Groups that are not complete, or not scored."""
        return [*self.unfinished.values(), *self.complete]

    def __str__(self) -> str:
        """Name the groups that are waited for: "group 7 (3 of 8 samples) and 12 groups after it"."""
        waiting = list(self.groups)  # read by another thread
        if not waiting:
            return "no group"
        first, *rest = waiting
        arrived = f"{len(first.samples)} of {self.group_size} samples"
        return f"group {first.id} ({arrived}) and {len(rest)} groups after it"


@dataclass(eq=False)
class GroupSampler:
    """Samples groups: request them, `wait` until some are scored, take those that are `ready`, `cancel`.

    One thread waits and scores; any may call the rest, or read `pending`, while it holds `lock`.
    """

    stream: Stream  # where samples are requested; no one else uses it
    reward: Reward
    run_seed: int
    group_size: int
    sampling: Sampling
    # score groups as they become complete; otherwise all together, when no sample is outstanding
    is_streaming: bool
    on_sample: Callable[[int], None]  # called after each sample with the number outstanding; it may raise
    first_waves: FirstWaves | None = None  # None: groups are requested whole
    priority: int = 0  # of requests; first waves have at least 1

    def __post_init__(self) -> None:
        self.pending = Pending(self.group_size)
        self.lock = threading.RLock()
        self._num_submitted = 0  # calls of submit
        self._num_lost = 0  # groups in a row
        self._score_from = 0.0  # time.monotonic()

    def request(self, groups: Sequence[Group]) -> None:
        """Append groups to the queue and request the samples they lack."""
        at_first = self.first_waves.num_at_first if self.first_waves else lambda group: self.group_size
        with self.lock:
            self._submit((group, 0) for group in self.pending.add(groups, at_first))

    def _submit(self, groups: Iterable[tuple[Group, int]]) -> None:
        """Request samples of groups, each from its first index up to what the queue now waits for."""
        self._num_submitted += 1
        self.stream.submit(
            Request(
                group.id,
                index,
                group.prompt,
                sample_seed(self.run_seed, group.id, index),
                self.sampling,
                priority=max(self.priority, self.pending.requested[group.id] < self.group_size),
            )
            for group, first in groups
            for index in range(first, self.pending.requested[group.id])
        )

    @property
    def is_empty(self) -> bool:
        """True if no group is in the queue."""
        return not self.pending.groups

    @property
    def is_idle(self) -> bool:
        """True if nothing is outstanding or to be scored: `wait` would return at once."""
        return not (self.pending.num_outstanding or self.pending.to_score)

    def wait(self) -> None:
        """Wait until more groups are scored; not at all if none can be."""
        before = self._num_submitted
        for sample in self.stream.completed():
            self._receive(sample)
            can_score = self.pending.complete or self.pending.first_waves
            if self.is_streaming and can_score and time.monotonic() >= self._score_from:
                break
        else:
            with self.lock:
                is_waiting = self.pending.num_outstanding and self._num_submitted == before
                unfinished = sorted(self.pending.unfinished)
            assert not is_waiting, (
                f"the engine has returned everything, but groups {unfinished} are not complete"
            )
        self.score()

    def ready(self) -> Iterator[Group]:
        """Remove and yield the groups whose turn has come. The caller may stop at any of them.

        Raises:
            EpisodeError: so many groups in a row are lost that the environment is wrong, not an episode.
        """
        for group in self.pending.ready():
            self._num_lost = self._num_lost + 1 if group.is_lost else 0
            yield group
            if self._num_lost == MOST_LOST:
                raise EpisodeError(f"{MOST_LOST} groups in a row are lost, the last because {group.why_lost}")

    def score(self) -> None:
        """Score every complete group and first wave, and request the rest of those that go on.

        At most about half of the time goes into scoring: groups that complete during a slow call are scored
        together by the next one.
        """
        if not (work := self.pending.to_score):
            return
        start = time.monotonic()
        whole = [(group, samples) for group, samples in work if not group.is_lost]
        self.reward.score([(group.prompt, sample) for group, samples in whole for sample in samples])
        is_stopped = self.first_waves.is_stopped if self.first_waves else lambda group: False
        with self.lock:
            if going_on := self.pending.mark_scored(is_stopped):
                self._submit((group, len(group.samples)) for group in going_on)
        end = time.monotonic()
        self._score_from = 2 * end - start if end - start > BRIEF else end

    def cancel(self) -> list[Group]:
        """Abort outstanding requests. Return the groups left in the queue, in order, without samples unless
        scored.
        """
        with self.lock:
            self.stream.abort()
            return self.pending.clear()

    def _receive(self, sample: Sample) -> None:
        with self.lock:
            prompt = self.pending.unfinished[sample.group].prompt
            self._check(sample, prompt)
            self.pending.receive(sample)
        heartbeat()
        self.on_sample(self.pending.num_outstanding)

    def _check(self, sample: Sample, prompt: Prompt) -> None:
        if not np.isfinite(sample.behavior_logprobs[sample.loss_mask]).all():
            raise RolloutError(
                f"prompt {prompt.index}: the engine's log-probs are not finite: the policy is damaged; "
                "resume from a checkpoint"
            )


class Chances:
    """Groups' chances of coming out mixed: Chances([0.5] * 215).is_enough(100) is true, of 214 it is not."""

    def __init__(self, chances: Iterable[float] = ()):
        self.mean = self.variance = 0.0  # of the number that will be mixed
        for chance in chances:
            self.add(chance)

    @classmethod
    def alike(cls, count: int, chance: float) -> Chances:
        """Return the chances of so many groups with the same chance."""
        chances = cls()
        chances.mean, chances.variance = count * chance, count * chance * (1 - chance)
        return chances

    def add(self, chance: float) -> None:
        """Add a group with this chance."""
        self.mean += chance
        self.variance += chance * (1 - chance)

    def is_enough(self, mixed: int) -> bool:
        """Return whether `mixed` of the groups will probably be mixed, at a margin of DEVIATIONS."""
        return mixed <= 0 or self.mean - DEVIATIONS * math.sqrt(self.variance) >= mixed - 1e-9

    def most(self, deviations: float) -> float:
        """Return how many will probably be mixed at most, at a margin of so many deviations."""
        return self.mean + deviations * math.sqrt(self.variance)


def sample_seed(run_seed: int, group: int, index: int) -> int:
    """Return the 63-bit seed of one sample: a hash of its names, so neither order nor resuming changes what
    is drawn.
    """
    digest = hashlib.blake2b(struct.pack("<qqq", run_seed, group, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
