"""Chooses the prompts that are asked for, in the order of the stream; keeps what is expected of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from operator import not_
from typing import NamedTuple

import numpy as np

from dapo.rollout.buffer import Buffer
from dapo.rollout.forecast import PROOF, Asked, Forecast, Odds, dice
from dapo.rollout.pending import RolloutError
from dapo.rollout.prompts import PromptStream, Visit
from dapo.types import Group

AT_ONCE = 64  # visits whose odds are computed together


class Question(NamedTuple):
    """A group that was asked for: where its prompt came by, and what was expected of it."""

    visit: Visit
    odds: Odds


class Passage(NamedTuple):
    """A visit that was considered."""

    visit: Visit
    odds: Odds
    is_asked: bool  # False: passed over


NONE: Mapping[int, Question] = {}


class Asking:
    """Asks for groups, whose ids are the numbers of their visits.

    A step has one of its own: what it asks for follows from the stream and the forecast as the step began.
    With `rollout.max_staleness` there is one for all steps: `finish_batch` after each.
    """

    def __init__(
        self,
        stream: PromptStream,
        forecast: Forecast,
        run_seed: int,
        step: int,
        questions: Mapping[int, Question] = NONE,
    ):
        """`questions`: those that are open, by group id."""
        self.stream, self.forecast, self.run_seed, self.step = stream, forecast, run_seed, step
        self.questions = dict(questions)
        # since the last batch, and what is open of before
        self.recent = [Passage(visit, odds, True) for visit, odds in questions.values()]
        self.passed: list[Passage] = []  # those of the last batch
        self._ahead: deque[tuple[Visit, Odds]] = deque()
        self._after_wave: dict[int, float] = {}  # group id → chance that it comes out mixed
        self._now = {question.visit.index for question in questions.values()}  # prompts not to ask for again

    @property
    def has_forecast(self) -> bool:
        """True if prompts are distinguished: otherwise all groups are as likely mixed."""
        return self.forecast.rules.is_skipping or bool(self.forecast.rules.first_wave)

    def next(self) -> Group:
        """Return the next group to ask for.

        Raises:
            RolloutError: every prompt has left the run.
        """
        if self.is_exhausted:
            raise RolloutError(
                f"rollout.drop_above={self.forecast.rules.drop_above}: all {len(self.stream.prompts)} "
                "prompts have left, solved more often than that: raise it, or use harder data"
            )
        while True:
            visit, odds = self._draw()
            if self._is_passed_over(visit, odds):
                self.recent.append(Passage(visit, odds, False))
                continue
            self._now.add(visit.index)
            self.recent.append(Passage(visit, odds, True))
            self.questions[visit.number] = Question(visit, odds)
            return Group(visit.number, self.stream.prompts[visit.index])

    def _draw(self) -> tuple[Visit, Odds]:
        if not self._ahead:
            visits = self.stream.take(AT_ONCE)
            odds = self.forecast.odds(np.array([visit.index for visit in visits]), self.step)
            self._ahead.extend(zip(visits, odds, strict=True))
        return self._ahead.popleft()

    def _is_passed_over(self, visit: Visit, odds: Odds) -> bool:
        """True if the forecast is against it, or if it was asked for since the last batch: unless all prompts
        have come by since then, or twice.
        """
        if self.forecast.is_dropped[visit.index]:
            return True
        if not self.forecast.rules.is_skipping:
            return False
        num_prompts, num_passed = len(self.stream.prompts), len(self.recent)
        if visit.index in self._now:
            return num_passed < 2 * num_prompts
        drawn = dice(b"ask", self.run_seed, visit.epoch, visit.index)
        return num_passed < num_prompts and drawn >= odds.ask

    def num_at_first(self, group: Group) -> int:
        """Return how many of a group's samples are asked for at first."""
        return self.forecast.num_at_first(self.questions[group.id].odds)

    def is_stopped(self, group: Group) -> bool:
        """True if a group's first wave rejects it. A share of PROOF is spared, by a hash."""
        odds, is_spared = self.questions[group.id].odds, dice(b"proof", self.run_seed, group.id) < PROOF
        self._after_wave[group.id] = self.forecast.after_wave(odds, group.num_correct)
        return not is_spared and self.forecast.is_doomed(odds, group.num_correct)

    def chance(self, group: Group) -> float:
        """Return the chance that the group comes out mixed, as far as its first wave was seen."""
        return self._after_wave.get(group.id, self.questions[group.id].odds.mixed)

    def finish_batch(self, decided: Iterable[Group]) -> None:
        """Note that a batch is made of these groups, and of what was passed over before the last of them."""
        for each in self.passed:
            self.questions.pop(each.visit.number, None)
            self._after_wave.pop(each.visit.number, None)
        ids = {group.id for group in decided}
        end = max((i + 1 for i, each in enumerate(self.recent) if each.visit.number in ids), default=0)
        is_of_batch = [not each.is_asked or each.visit.number in ids for each in self.recent[:end]]
        self.passed = list(compress(self.recent, is_of_batch))
        self.recent = [*compress(self.recent, map(not_, is_of_batch)), *self.recent[end:]]
        self._now = {each.visit.index for each in self.recent if each.is_asked}

    def reopen_batch(self) -> None:
        """Undo `finish_batch`."""
        self.recent[:0] = self.passed
        self._now |= {each.visit.index for each in self.passed if each.is_asked}
        self.passed = []

    @property
    def is_exhausted(self) -> bool:
        """True if every prompt has left the run: `next` raises RolloutError."""
        return bool(self.forecast.is_dropped.all())

    def learn(self, decided: Iterable[Group]) -> None:
        """Teach the forecast what became of the last batch's groups."""
        self.forecast.learn(self.step, self.outcomes(decided))
        self.put_back_ahead()

    def put_back_recent(self) -> None:
        """Return to the stream what came by since the last batch."""
        self.put_back_ahead()
        self.stream.put_back(each.visit for each in self.recent)
        self.recent.clear()

    def put_back_batch(self) -> None:
        """Return to the stream what the last batch was made of: the step failed."""
        self.stream.put_back(each.visit for each in self.passed)
        self.passed.clear()

    def put_back_ahead(self) -> None:
        """Return to the stream what was drawn and is not considered yet: by the next time the forecast may
        have changed.
        """
        self.stream.put_back(visit for visit, _ in self._ahead)
        self._ahead.clear()

    def outcomes(self, decided: Iterable[Group]) -> list[Asked]:
        """Return what became of the groups that had their turn, in asking order."""
        wave, size = self.forecast.rules.wave, self.forecast.rules.group_size
        found = []
        for group in sorted(decided, key=lambda group: group.id):
            visit, odds = self.questions[group.id]
            at_first = sum(sample.is_correct for sample in group.samples[:wave])
            is_whole = len(group.samples) == size
            weight = 1 / PROOF if self.forecast.is_doomed(odds, at_first) else 1.0
            counts = group.num_correct, len(group.samples), at_first
            found.append(Asked(visit.index, visit.epoch, odds, *counts, weight if is_whole else 0.0))
        return found

    def _chance_asked(self, asked: Asked) -> float:
        """Return the chance that the step asked for the prompt: in a second pass it does so for certain."""
        second = min(1.0, max(0.0, len(self.passed) / len(self.stream.prompts) - 1))  # part that came by
        return asked.odds.ask + (1 - asked.odds.ask) * second

    def ledger(self, buffer: Buffer) -> dict[str, float]:
        """Return the metrics that say what the forecast saved, and how it departs from plain sampling."""
        rules = self.forecast.rules
        dropped: dict[str, float] = (
            {} if rules.drop_above == 1 else {"groups/dropped": int(self.forecast.is_dropped.sum())}
        )
        if not self.has_forecast:
            return dropped
        outcomes, kept = self.outcomes(buffer.decided), self.outcomes(buffer.kept)
        skipped = [each.odds for each in self.passed if not each.is_asked]
        stopped = [asked for asked in outcomes if asked.num_samples < rules.group_size]
        lost = sum(odds.mixed for odds in skipped) + sum(  # mixed groups
            asked.odds.after_right if asked.num_correct else asked.odds.after_wrong for asked in stopped
        )
        spent = sum(asked.num_samples for asked in outcomes)
        # whole groups of all that came by hold so many mixed ones more: as many are needed for those kept
        whole = rules.group_size * (len(outcomes) + len(skipped))
        plain = whole * len(kept) / (len(kept) + lost or 1)
        edges = [
            min(asked.num_correct, rules.group_size - asked.num_correct) / rules.group_size for asked in kept
        ]
        brier = [(asked.odds.mixed - (0 < asked.num_correct < asked.num_samples)) ** 2 for asked in outcomes]
        accuracy = [asked.num_correct_at_first / rules.wave for asked in outcomes]
        epochs, is_in = self.stream.epochs, ~self.forecast.is_dropped
        passes = (epochs - np.where(self.forecast.asked > 0, self.forecast.epoch, 0))[is_in]
        return dropped | {
            "groups/skipped": len(skipped),
            "groups/stopped": len(stopped),
            "forecast/samples_saved": plain - spent if kept else 0.0,
            "forecast/brier": _mean(brier, [asked.weight for asked in outcomes]),
            "forecast/ece": self.forecast.ece,
            "forecast/stopped_mixed": self.forecast.stopped_mixed,
            "forecast/edge": _mean(edges, [1.0] * len(edges)),
            "forecast/edge_plain": _mean(edges, [asked.weight / self._chance_asked(asked) for asked in kept]),
            "forecast/accuracy_plain": _mean(accuracy, [1 / self._chance_asked(asked) for asked in outcomes]),
            "forecast/unasked_1": float(np.mean(passes > 1)) if len(passes) else 0.0,
            "forecast/unasked_4": float(np.mean(passes > 4)) if len(passes) else 0.0,
        }


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0
