"""Groups between being asked for and having their turn. G = samples of a group."""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections.abc import Callable, Iterator, Sequence

from dapo.reward.pool import Reward
from dapo.types import Engine, Group, Request, Sample, Sampling

# standard deviations of margin: fewer cost steps that wait for one more group, more cost tokens
DEVIATIONS = 1.0
BRIEF = 0.05  # seconds: a scoring call that takes less is made for every group that is complete


class Pending:
    """Groups in asking order. Their samples come in any order; out of here they come whole, scored, and in
    asking order.

    Args:
        read: called with every sample that comes in and its prompt; it may raise, and then the whole is to be
            given up.
        is_streaming: groups are scored as they become complete; else all together, when nothing is
            outstanding.
    """

    def __init__(self, engine: Engine, reward: Reward, read: Callable[[Group, Sample], None], run_seed: int, group_size: int,
                 sampling: Sampling, is_streaming: bool):  # fmt: skip
        self.engine, self.reward, self.read, self.run_seed = engine, reward, read, run_seed
        self.group_size, self.sampling, self.is_streaming = group_size, sampling, is_streaming
        self.groups: list[Group] = []
        self.unfinished: dict[int, Group] = {}  # by id
        self.unscored: list[Group] = []  # complete
        self.scored: dict[int, bool] = {}  # group id → is it mixed?
        self.num_asked = 0  # groups, since the beginning
        self.num_outstanding = 0  # samples that the engine owes
        self._score_from, self._scoring_took = 0.0, 0.0  # seconds

    def ask(self, groups: Sequence[Group]) -> None:
        """Ask for the samples of these groups. A group that has them, from an earlier step, only waits for
        its turn.
        """
        asked = [group for group in groups if not group.samples]
        self.groups += groups
        self.num_asked += len(groups)
        self.unfinished |= {group.id: group for group in asked}
        self.scored |= {group.id: group.is_mixed for group in groups if group.samples}
        self.num_outstanding += len(asked) * self.group_size
        self.engine.submit(
            Request(
                group.id,
                index,
                group.prompt.tokens,
                sample_seed(self.run_seed, group.id, index),
                self.sampling,
            )
            for group in asked
            for index in range(self.group_size)
        )

    def out(self, wanted: Callable[[], Sequence[Group]]) -> Iterator[Group]:
        """Groups whose turn has come, until none is left and none is wanted. `wanted()`, called whenever some
        have been scored, says which to ask for next. Whoever stops reading before the end calls `give_up`."""
        self.ask(wanted())
        while self.groups:
            yield from self._ready()
            for sample in self.engine.completed():
                self._receive(sample)
                if self.is_streaming and self.unscored and time.monotonic() >= self._score_from:
                    self.score()
                    yield from self._ready()
                    self.ask(wanted())
            assert not self.unfinished, (
                f"the engine is done, and these groups are not: {sorted(self.unfinished)}"
            )
            self.score()
            yield from self._ready()
            self.ask(wanted())

    def score(self) -> None:
        """Score every complete group. At most about half of the time goes into scoring: what a slow call
        keeps waiting, the next one takes together."""
        if not self.unscored:
            return
        start = time.monotonic()
        self.reward.score([(group.prompt, sample) for group in self.unscored for sample in group.samples])
        self.scored |= {group.id: group.is_mixed for group in self.unscored}
        self.unscored.clear()
        end = time.monotonic()
        self._score_from = 2 * end - start if end - start > BRIEF else end

    def give_up(self) -> list[Group]:
        """Abort what is outstanding. Returns the groups that never had their turn, in asking order, without
        samples unless scored.
        """
        self.engine.abort(
            f"{group.id}.{index}"
            for group in self.unfinished.values()
            for index in set(range(self.group_size)) - {sample.index for sample in group.samples}
        )
        left = [group if group.id in self.scored else Group(group.id, group.prompt) for group in self.groups]
        self.groups, self.unfinished, self.unscored, self.scored, self.num_outstanding = [], {}, [], {}, 0
        return left

    @property
    def num_mixed(self) -> int:
        """Groups known to be mixed, whose turn has not come."""
        return sum(self.scored.values())

    @property
    def num_unknown(self) -> int:
        """Groups that are not complete, or not scored."""
        return len(self.unfinished) + len(self.unscored)

    def __str__(self) -> str:
        """Who is waited for: "group 7 (3 of 8 samples) and 12 groups after it"."""
        waiting = list(self.groups)  # read by another thread
        if not waiting:
            return "no group"
        first, *rest = waiting
        return f"group {first.id} ({len(first.samples)} of {self.group_size} samples) and {len(rest)} groups after it"

    def _receive(self, sample: Sample) -> None:
        group = self.unfinished[sample.group]
        assert all(other.index != sample.index for other in group.samples), (
            f"sample {sample.group}.{sample.index} came twice"
        )
        self.num_outstanding -= 1
        self.read(group, sample)
        group.samples.append(sample)
        if len(group.samples) == self.group_size:
            group.samples.sort(key=lambda sample: sample.index)
            self.unscored.append(self.unfinished.pop(group.id))

    def _ready(self) -> Iterator[Group]:
        while self.groups and self.groups[0].id in self.scored:
            group = self.groups.pop(0)
            del self.scored[group.id]
            yield group


def enough(mixed: int, share: float) -> int:
    """How many groups to ask for, if a `share` of them is mixed, to have `mixed` such ones even with bad luck
    of DEVIATIONS.

    The smallest n with n·s − z·√(n·s·(1 − s)) ≥ mixed: `enough(100, 1.0)` → 100, `enough(100, 0.5)` → 215.
    """
    if mixed <= 0:
        return 0
    spread = DEVIATIONS * math.sqrt(share * (1 - share))
    return math.ceil(((spread + math.sqrt(spread**2 + 4 * share * mixed)) / (2 * share)) ** 2 - 1e-9)


def sample_seed(run_seed: int, group: int, index: int) -> int:
    """The seed of one sample, 63 bits: a function of its names alone, so that neither order nor resuming
    changes what is drawn.
    """
    digest = hashlib.blake2b(struct.pack("<qqq", run_seed, group, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
