"""The dynamic-sampling buffer (Algorithm 1, lines 6–9) keeps mixed groups and counts what it rejects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dapo.types import Group, Sample


@dataclass
class Buffer:
    """Holds at most `capacity` groups.

    Groups are offered in request order, so that short answers gain nothing by finishing first.
    """

    capacity: int
    is_dynamic: bool  # False: every group is kept
    # False: groups that are not kept give back the memory of their routes, a hundred times their tokens'
    keeps_routes: bool = True
    filters_overlong: bool = False  # True: truncated samples have no gradient (objective.overlong_filtering)
    kept: list[Group] = field(default_factory=list)
    all_correct: list[Group] = field(default_factory=list)
    all_wrong: list[Group] = field(default_factory=list)
    # finished after the buffer was full: their prompts are unused
    surplus: list[Group] = field(default_factory=list)
    lost: list[Group] = field(default_factory=list)  # their environments failed: they count as nothing
    num_aborted: int = 0  # groups requested but not scored when the buffer was full

    def offer(self, group: Group) -> None:
        """Keep the group if there is room and it is mixed (Eq. 11), or nothing is filtered."""
        if group.is_lost:
            self.lost.append(group)
            return
        if not self.is_full and (group.is_mixed or not self.is_dynamic):
            self.kept.append(group)
            return
        if not self.keeps_routes:
            for sample in group.samples:
                sample.routes = None
        if self.is_full:
            self.surplus.append(group)
        elif group.num_correct:
            self.all_correct.append(group)
        else:
            self.all_wrong.append(group)

    def fill(self, groups: Iterable[Group]) -> None:
        """Offer groups until the buffer is full; take no more from the iterable."""
        for group in groups:
            self.offer(group)
            if self.is_full:
                return

    @property
    def is_full(self) -> bool:
        """True if there is no more room."""
        return len(self.kept) >= self.capacity

    @property
    def asked(self) -> list[Group]:
        """Every finished group, surplus included."""
        return self.decided + self.surplus

    @property
    def decided(self) -> list[Group]:
        """The finished groups that had their turn."""
        return self.kept + self.all_correct + self.all_wrong

    @property
    def num_all_correct(self) -> int:
        """Number of decided groups with correct samples only, kept or rejected."""
        return sum(group.num_correct == len(group.samples) for group in self.decided)

    @property
    def num_all_wrong(self) -> int:
        """Number of decided groups without a correct sample, kept or rejected."""
        return sum(not group.num_correct for group in self.decided)

    @property
    def unmasked(self) -> list[Group]:
        """The kept groups of which overlong filtering leaves a sample."""
        filters = self.filters_overlong
        return [g for g in self.kept if not (filters and all(s.is_truncated for s in g.samples))]

    @property
    def num_learnt(self) -> int:
        """Number of kept groups with a gradient: equal rewards give no advantage (Eq. 9)."""
        return sum(len({sample.reward for sample in group.samples}) > 1 for group in self.unmasked)

    def ledger(self) -> dict[str, float]:
        """Return the step's metrics: groups by kind; accuracy, reward and lengths (tokens) of their samples.

        The surplus counts in asked and tokens only: when streaming it is what finished first, and short
        answers do.
        """
        rejected, decided = self.all_correct + self.all_wrong, self.decided
        samples = _samples(decided)
        lengths = [sample.num_written for sample in samples]
        learnt = [len(group.prompt.tokens) + s.length - 1 for group in self.kept for s in group.samples]
        return {
            "groups/asked": len(self.asked),
            "groups/kept": len(self.kept),
            "groups/all_correct": self.num_all_correct,
            "groups/all_wrong": self.num_all_wrong,
            "groups/surplus": len(self.surplus),
            "rollout/no_gradient": 1 - self.num_learnt / len(decided) if decided else 0.0,
            "rollout/accuracy": _mean([sample.is_correct for sample in samples]),
            "rollout/reward": _mean([sample.reward for sample in samples]),
            "rollout/truncated": _mean([sample.is_truncated for sample in samples]),
            "rollout/length": _mean(lengths),
            "rollout/length_max": max(lengths, default=0),
            "rollout/length_kept": _mean([sample.num_written for sample in _samples(self.kept)]),
            "rollout/length_turned_away": _mean([sample.num_written for sample in _samples(rejected)]),
            "rollout/tokens": sum(sample.num_written for sample in _samples(self.asked)),
            "rollout/tokens_learnt": sum(learnt),
            "rollout/attended": sum(n * n for n in learnt) / (2 * sum(learnt) or 1),
            "perf/groups_aborted": self.num_aborted,
        } | self._of_episodes(samples)

    def _of_episodes(self, samples: list[Sample]) -> dict[str, float]:
        """Return the metrics of samples of several turns, if there are any."""
        found = [(sample, sample.episode) for sample in samples if sample.episode]
        if not found and not self.lost:
            return {}
        episodes = [episode for _, episode in found]
        num_calls = sum(episode.num_calls for episode in episodes)
        later = [turn for episode in episodes for turn in episode.cached[1:]]
        return {
            "groups/lost": len(self.lost),
            "episode/turns": _mean([episode.num_turns for episode in episodes]),
            "episode/turns_max": max((episode.num_turns for episode in episodes), default=0),
            "episode/prefix_cached": sum(n for _, n in later) / (sum(n for n, _ in later) or 1),
            "episode/environment_tokens": _mean([sample.length - sample.num_written for sample, _ in found]),
            "episode/calls": _mean([episode.num_calls for episode in episodes]),
            "episode/with_calls": _mean([episode.num_calls > 0 for episode in episodes]),
            "episode/unreadable": sum(episode.num_unreadable for episode in episodes) / (num_calls or 1),
            "episode/failed_calls": sum(episode.num_failed for episode in episodes) / (num_calls or 1),
            "episode/neutralised": sum(episode.num_neutralised for episode in episodes),
            "episode/restarts": sum(episode.num_attempts - 1 for episode in episodes),
        }


def _samples(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def _mean(values: list[bool] | list[int] | list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
