"""Groups between the request for their samples and their turn. G = samples of a group.

Pending is the queue, pure bookkeeping. GroupSampler drives it: it requests samples from an engine's stream,
has them scored, and hands out groups in the order in which they were requested.
"""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dapo.clock import heartbeat
from dapo.reward.pool import Reward
from dapo.types import Group, Prompt, Request, Sample, Sampling, Stream

# Safety margin, in standard deviations: a smaller one makes steps wait for one more group, a larger one costs
# tokens
DEVIATIONS = 1.0
BRIEF = 0.05  # seconds: while scoring takes less than this, every complete group is scored at once


class RolloutError(RuntimeError):
    """Sampling cannot go on: the data is too easy or too hard, the reward is wrong, or the policy is
    damaged.
    """


class Pending:
    """A queue of groups. Samples arrive in any order; groups leave whole, scored, and in the order they
    came.
    """

    def __init__(self, group_size: int):
        self.group_size = group_size
        self.groups: list[Group] = []
        self.unfinished: dict[int, Group] = {}  # by id
        self.complete: list[Group] = []  # and not scored yet
        self.scored: dict[int, bool] = {}  # group id → is it mixed?
        self.num_added = 0  # groups, since the beginning

    def add(self, groups: Sequence[Group]) -> list[Group]:
        """Append groups; return those whose samples are to be requested.

        A group that brings its samples, scored in an earlier step, only waits for its turn.
        """
        empty = [group for group in groups if not group.samples]
        self.groups += groups
        self.num_added += len(groups)
        self.unfinished |= {group.id: group for group in empty}
        self.scored |= {group.id: group.is_mixed for group in groups if group.samples}
        return empty

    def receive(self, sample: Sample) -> None:
        """Put the sample into its group."""
        group = self.unfinished[sample.group]
        is_new = all(other.index != sample.index for other in group.samples)
        assert is_new, f"sample {sample.group}.{sample.index} came twice"
        group.samples.append(sample)
        if len(group.samples) == self.group_size:
            group.samples.sort(key=lambda sample: sample.index)
            self.complete.append(self.unfinished.pop(group.id))

    def mark_scored(self) -> None:
        """Note that every complete group has been scored."""
        self.scored |= {group.id: group.is_mixed for group in self.complete}
        self.complete.clear()

    def ready(self) -> Iterator[Group]:
        """Remove and yield the groups whose turn has come. The caller may stop at any of them."""
        while self.groups and self.groups[0].id in self.scored:
            group = self.groups.pop(0)
            del self.scored[group.id]
            yield group

    def clear(self) -> list[Group]:
        """Remove and return all groups, in order; those that are not scored lose their samples."""
        left = [group if group.id in self.scored else Group(group.id, group.prompt) for group in self.groups]
        self.groups, self.unfinished = [], {}
        self.complete, self.scored = [], {}
        return left

    @property
    def num_mixed(self) -> int:
        """Number of groups known to be mixed whose turn has not come."""
        return sum(self.scored.values())

    @property
    def num_unknown(self) -> int:
        """Number of groups that are not complete, or not scored."""
        return len(self.unfinished) + len(self.complete)

    @property
    def num_outstanding(self) -> int:
        """Number of samples that the engine has not returned."""
        return sum(self.group_size - len(group.samples) for group in self.unfinished.values())

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
    """Samples groups: request them, `wait` until some are scored, take those that are `ready`, `cancel`."""

    stream: Stream  # where samples are requested; no one else uses it
    reward: Reward
    run_seed: int
    group_size: int
    sampling: Sampling
    # score groups as they become complete; otherwise all together, when no sample is outstanding
    is_streaming: bool
    on_sample: Callable[[int], None]  # called after each sample with the number outstanding; it may raise

    def __post_init__(self) -> None:
        self.pending = Pending(self.group_size)
        self._score_from = 0.0  # time.monotonic()

    def request(self, groups: Sequence[Group]) -> None:
        """Append groups to the queue and request the samples they lack."""
        self.stream.submit(
            Request(group.id, index, group.prompt, sample_seed(self.run_seed, group.id, index), self.sampling)
            for group in self.pending.add(groups)
            for index in range(self.pending.group_size)
        )

    @property
    def is_empty(self) -> bool:
        """True if no group is in the queue."""
        return not self.pending.groups

    def wait(self) -> None:
        """Wait until more groups are scored; not at all if none can be."""
        for sample in self.stream.completed():
            self._receive(sample)
            if self.is_streaming and self.pending.complete and time.monotonic() >= self._score_from:
                break
        else:
            unfinished = sorted(self.pending.unfinished)
            assert not unfinished, (
                f"the engine has returned everything, but groups {unfinished} are not complete"
            )
        self.score()

    def ready(self) -> Iterator[Group]:
        """Remove and yield the groups whose turn has come. The caller may stop at any of them."""
        return self.pending.ready()

    def score(self) -> None:
        """Score every complete group.

        At most about half of the time goes into scoring: groups that complete during a slow call are scored
        together by the next one.
        """
        if not self.pending.complete:
            return
        start = time.monotonic()
        self.reward.score(
            [(group.prompt, sample) for group in self.pending.complete for sample in group.samples]
        )
        self.pending.mark_scored()
        end = time.monotonic()
        self._score_from = 2 * end - start if end - start > BRIEF else end

    def cancel(self) -> list[Group]:
        """Abort outstanding requests. Return the groups left in the queue, in order, without samples unless
        scored.
        """
        self.stream.abort()
        return self.pending.clear()

    def _receive(self, sample: Sample) -> None:
        prompt = self.pending.unfinished[sample.group].prompt
        self._check(sample, prompt)
        self.pending.receive(sample)
        heartbeat()
        self.on_sample(self.pending.num_outstanding)

    def _check(self, sample: Sample, prompt: Prompt) -> None:
        if not np.isfinite(sample.behavior_logprobs).all():
            raise RolloutError(
                f"prompt {prompt.index}: the engine's log-probs are not finite: the policy is damaged; "
                "resume from a checkpoint"
            )


def num_to_request(mixed: int, fraction: float) -> int:
    """Return how many groups to request for `mixed` mixed ones, if this fraction is mixed, at a margin of
    DEVIATIONS.

    The smallest n with n·f − z·√(n·f·(1 − f)) ≥ mixed: `num_to_request(100, 1.0)` → 100, `num_to_request(100,
    0.5)` → 215.
    """
    if mixed <= 0:
        return 0
    spread = DEVIATIONS * math.sqrt(fraction * (1 - fraction))
    root = (spread + math.sqrt(spread**2 + 4 * fraction * mixed)) / (2 * fraction)
    return math.ceil(root**2 - 1e-9)


def sample_seed(run_seed: int, group: int, index: int) -> int:
    """Return the 63-bit seed of one sample: a hash of its names, so neither order nor resuming changes what
    is drawn.
    """
    digest = hashlib.blake2b(struct.pack("<qqq", run_seed, group, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
