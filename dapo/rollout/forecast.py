"""Forecasts which prompts are worth asking: the chance of a mixed group, from how a prompt's earlier groups
came out.

p = a prompt's chance of a correct answer, of which is known Beta(α, β); G = samples of a group. The evidence
of earlier steps fades; a common shift in logit follows the policy's learning; the chances that the
formulas give are corrected by what became of earlier ones. Figures and limits: docs/forecast.md.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dapo import config

KEPT = 0.98  # of a prompt's evidence, each step
FADE = 0.9  # of the calibration's counts, each step
BELIEF = 32  # groups: how much the calibration trusts the formulas
STEP_OF_SHIFT, MOST_SHIFT = 0.5, 0.5  # part of a Newton step, and its bound in logits
LEAST_KNOWN = 20  # prompts asked before, without which the shift stays
PROOF = 0.1  # share of the groups that could be stopped which are finished, to learn what stopping costs
PARTS = np.linspace(0.05, 0.95, 10)  # middles of the calibration's tenths
FLAT = 0.5, 0.5  # (α, β) before any group
BOUNDS = 0.02, 20.0  # of the prior's α and β

Array = np.ndarray


def all_correct(alpha: Array, beta: Array, count: int) -> Array:
    """Return E[p^count] for p ~ Beta(α, β): Π_{j<count} (α + j) / (α + β + j)."""
    chance = np.ones(np.broadcast(alpha, beta).shape)
    for j in range(count):
        chance *= (alpha + j) / (alpha + beta + j)
    return chance


def mixed(alpha: Array, beta: Array, count: int) -> Array:
    """Return the chance that some of `count` samples are correct and some not: 1 − E[p^n] − E[(1 − p)^n]."""
    chance: Array = 1 - all_correct(alpha, beta, count) - all_correct(beta, alpha, count)
    return chance


def shifted(alpha: Array, beta: Array, logits: Array | float) -> tuple[Array, Array]:
    """Return (α, β) of the same sum, whose mean is moved by so many logits."""
    odds = alpha / beta * np.exp(logits)
    return (alpha + beta) * odds / (1 + odds), (alpha + beta) / (1 + odds)


def fit_prior(visits: Mapping[tuple[int, int], int]) -> tuple[float, float]:
    """Return the (α, β) under which counts of correct samples are likeliest (beta-binomial).

    With a weak belief in FLAT: log α and log β are normal around it with variance 1.

    `visits`: (correct, samples) → number of prompts. A grid of 5 × 5 around the best so far, always finer.
    """
    keys = np.array(list(visits), int).reshape(-1, 2)
    weights = np.array(list(visits.values()), float)
    correct, samples = keys[:, 0], keys[:, 1]
    offsets = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 2, indexing="ij"), -1).reshape(-1, 2)

    def logs(of: Array) -> Array:
        """[points, n]: Σ_{j<n} log(x + j)."""
        terms = np.log(of[:, None] + np.arange(samples.max()))
        return np.concatenate([np.zeros((len(of), 1)), terms.cumsum(1)], 1)

    best = np.log(FLAT)
    for halving in range(8):
        points = best + 1.25 / 2**halving * offsets
        alpha, beta = np.exp(points).T
        likelihood = (
            logs(alpha)[:, correct] + logs(beta)[:, samples - correct] - logs(alpha + beta)[:, samples]
        )
        belief = -(((points - np.log(FLAT)) ** 2).sum(1)) / 2
        best = points[np.argmax(likelihood @ weights + belief)]
    alpha, beta = np.clip(np.exp(best), *BOUNDS)
    return float(alpha), float(beta)


@dataclass(frozen=True)
class Rules:
    """The rules by which a forecast is used: `rollout.forecast` and the options beside it."""

    group_size: int
    is_skipping: bool = False
    floor: float = 0.3
    sharpness: float = 0.2
    first_wave: int = 0
    stop_below: float = 0.1
    drop_above: float = 1.0

    @classmethod
    def of(cls, rollout: config.Rollout) -> Rules:
        return cls(
            rollout.group_size,
            rollout.forecast == "skip",
            rollout.forecast_floor,
            rollout.forecast_sharpness,
            rollout.first_wave,
            rollout.stop_below,
            1.0 if rollout.drop_above is None else rollout.drop_above,
        )

    @property
    def is_used(self) -> bool:
        """True if what is asked for depends on the forecast."""
        return self.is_skipping or self.first_wave > 0 or self.drop_above < 1

    @property
    def wave(self) -> int:
        """Samples of a group that are asked for at first, where it may be stopped."""
        return self.first_wave or self.group_size


class Odds(NamedTuple):
    """The expectation of one prompt's group, before it is asked for."""

    alpha: float
    beta: float
    formula: float  # chance of a mixed group, as the formulas give it
    mixed: float  # the same, calibrated
    ask: float  # chance that the prompt is asked for
    after_wrong: float  # chance of a mixed group once the first wave is all wrong, calibrated
    after_right: float  # … all right


class Asked(NamedTuple):
    """A group's fate, as the forecast learns from it."""

    prompt: int
    epoch: int
    odds: Odds
    num_correct: int
    num_samples: int  # fewer than G: it was stopped after its first wave
    num_correct_at_first: int  # of the first wave's samples
    weight: float  # 1 / the chance that it was finished: 0 of a stopped group


def dice(kind: bytes, *names: int) -> float:
    """Return a number from [0, 1) that is a hash of names: neither order nor resuming changes it."""
    packed = struct.pack(f"<{len(names)}q", *names)
    digest = hashlib.blake2b(packed, digest_size=8, person=kind).digest()
    return int.from_bytes(digest, "little") / 2**64


class Forecast:
    """Knowledge of a run's prompts, and the forecast that follows from it. It changes between steps only.

    Arrays have a row a prompt of the run; where `asked` is 0 nothing is known but the prior.
    """

    def __init__(self, num_prompts: int, rules: Rules):
        self.rules = rules
        self.asked = np.zeros(num_prompts, np.int32)  # groups
        self.samples = np.zeros(num_prompts, np.int32)
        self.correct = np.zeros(num_prompts, np.int32)
        self.alpha = np.ones(num_prompts)
        self.beta = np.ones(num_prompts)
        self.step = np.zeros(num_prompts, np.int32)  # of the last group
        self.epoch = np.zeros(num_prompts, np.int32)  # of the stream, at the last group
        self.shift_then = np.zeros(num_prompts)  # `shift` at the last group
        self.is_dropped = np.zeros(num_prompts, bool)
        self.num_steps = 0  # that it knows of
        self.prior, self.prior_shift = FLAT, 0.0
        self.shift = 0.0  # logits that the policy has moved by
        self.visits: dict[tuple[int, int], int] = {}  # (correct, samples) of first visits → prompts
        # groups, expected mixed, mixed; by tenths of the formulas' chance, and of the calibrated one
        self.of_formula, self.of_mixed = np.zeros((10, 3)), np.zeros((10, 3))
        self.spared = np.zeros(2)  # groups that a first wave condemned and that were finished, mixed of them

    def posterior(self, prompts: Array, step: int) -> tuple[Array, Array]:
        """Return (α, β) of prompts [n] at a step: their evidence, faded towards the prior and moved by the
        common shift.
        """
        prior = np.array(self.prior)[:, None]
        prior = np.stack(shifted(prior[0], prior[1], self.shift - self.prior_shift))
        moved = self.shift - self.shift_then[prompts]
        own = np.stack(shifted(self.alpha[prompts], self.beta[prompts], moved))
        kept = np.where(self.asked[prompts] > 0, KEPT ** (step - self.step[prompts]), 0.0)
        alpha, beta = prior + (own - prior) * kept
        return alpha, beta

    def calibrated(self, chance: Array) -> Array:
        """Return chances of a mixed group, corrected by what became of groups with about the same."""
        expected, found = self.of_formula[:, 1], self.of_formula[:, 2]
        ratio = (found + BELIEF * PARTS) / (expected + BELIEF * PARTS)
        corrected = chance * np.interp(chance, PARTS, np.minimum(ratio, 1 / PARTS))
        return np.asarray(np.clip(corrected, 0, 1))

    def odds(self, prompts: Array, step: int) -> list[Odds]:
        """Return what is expected of prompts [n] in a step."""
        return [Odds(*row) for row in self.table(prompts, step).tolist()]

    def table(self, prompts: Array, step: int) -> Array:
        """Return the odds of prompts [n] as an array [n, 7], a column a field of Odds."""
        alpha, beta = self.posterior(prompts, step)
        formula = mixed(alpha, beta, self.rules.group_size)
        chance = self.calibrated(formula)
        ask = np.ones(len(prompts))
        if self.rules.is_skipping:
            ask = np.clip(chance / self.rules.sharpness, self.rules.floor, 1)
        wave = self.rules.wave
        rest = self.rules.group_size - wave
        correction = chance / np.maximum(formula, 1e-9)
        after_wrong = np.minimum(1, (1 - all_correct(beta + wave, alpha, rest)) * correction)
        after_right = np.minimum(1, (1 - all_correct(alpha + wave, beta, rest)) * correction)
        return np.stack([alpha, beta, formula, chance, ask, after_wrong, after_right], 1)

    def num_at_first(self, odds: Odds) -> int:
        """Return how many samples of a group are asked for at first: all, where no verdict could stop it."""
        may_stop = self.rules.first_wave and min(odds.after_wrong, odds.after_right) < self.rules.stop_below
        return self.rules.first_wave if may_stop else self.rules.group_size

    def is_doomed(self, odds: Odds, num_correct_at_first: int) -> bool:
        """True if the first wave's verdict leaves too little chance of a mixed group."""
        wave = self.rules.first_wave
        return bool(wave) and self.after_wave(odds, num_correct_at_first) < self.rules.stop_below

    def after_wave(self, odds: Odds, num_correct: int) -> float:
        """Return the chance of a mixed group once so many samples of its first wave were correct."""
        if num_correct == 0:
            return odds.after_wrong
        return odds.after_right if num_correct == self.rules.first_wave else 1.0

    @property
    def ece(self) -> float:
        """Expected calibration error of late: the mean gap of tenths between expected and found chances."""
        return float(abs(self.of_mixed[:, 1] - self.of_mixed[:, 2]).sum() / max(self.of_mixed[:, 0].sum(), 1))

    @property
    def stopped_mixed(self) -> float:
        """Share of stopped groups that would have been mixed, of late, as the spared ones say."""
        return float(self.spared[1] / max(self.spared[0], 1e-9)) if self.spared[0] else 0.0

    def learn(self, step: int, groups: list[Asked]) -> None:
        """Take in a step's groups, in asking order up to the last that had its turn."""
        self.num_steps = step + 1
        if not groups:
            return
        self._calibrate(groups)
        prompts, rows = np.unique([group.prompt for group in groups], return_inverse=True)

        def sums(values: list[int]) -> Array:
            return np.bincount(rows, values, len(prompts))

        (alpha, beta), before = self.posterior(prompts, step), self.shift  # as the step began
        is_known = self.asked[prompts] > 0
        size = np.bincount(rows, minlength=len(prompts)) * self.rules.wave
        self._follow(alpha, beta, is_known, sums([group.num_correct_at_first for group in groups]), size)
        alpha, beta = shifted(alpha, beta, self.shift - before)
        correct = sums([group.num_correct for group in groups])
        samples = sums([group.num_samples for group in groups])
        self._meet(correct[~is_known].astype(int).tolist(), samples[~is_known].astype(int).tolist())
        self.alpha[prompts] = np.where(is_known, alpha, self.prior[0]) + correct
        self.beta[prompts] = np.where(is_known, beta, self.prior[1]) + samples - correct
        self.asked[prompts] += np.bincount(rows).astype(np.int32)
        self.samples[prompts] += samples.astype(np.int32)
        self.correct[prompts] += correct.astype(np.int32)
        self.step[prompts], self.shift_then[prompts] = step, self.shift
        self.epoch[[group.prompt for group in groups]] = [group.epoch for group in groups]
        solved = self.alpha[prompts] / (self.alpha[prompts] + self.beta[prompts])
        self.is_dropped[prompts] |= solved > self.rules.drop_above

    def _calibrate(self, groups: list[Asked]) -> None:
        weights = np.array([group.weight for group in groups])
        is_mixed = [0 < group.num_correct < group.num_samples for group in groups]
        is_spared = weights > 1
        self.spared = KEPT * self.spared + [is_spared.sum(), np.sum(is_mixed, where=is_spared)]
        for cells, chances in (
            (self.of_formula, np.array([group.odds.formula for group in groups])),
            (self.of_mixed, np.array([group.odds.mixed for group in groups])),
        ):
            cells *= FADE
            found = np.stack([np.ones(len(groups)), chances, is_mixed], 1) * weights[:, None]
            np.add.at(cells, np.minimum((chances * 10).astype(int), 9), found)

    def _follow(self, alpha: Array, beta: Array, is_known: Array, correct: Array, size: Array) -> None:
        """Move the shift by half a Newton step towards where as many are expected as were found. First waves
        only: of these none is left out because of how it came out.
        """
        if is_known.sum() <= LEAST_KNOWN:
            return
        total = alpha + beta
        slope = (size * alpha * beta / total / (total + 1))[is_known].sum()  # Σ k·E[p(1 − p)]
        missing = (correct - size * alpha / total)[is_known].sum()
        # 1: of a normal belief in no shift. Where all are correct no shift is the likeliest
        self.shift += STEP_OF_SHIFT * float(np.clip(missing / (slope + 1), -MOST_SHIFT, MOST_SHIFT))

    def _meet(self, correct: list[int], samples: list[int]) -> None:
        """Fit the prior again, with the first visits of these prompts."""
        for visit in zip(correct, samples, strict=True):
            self.visits[visit] = self.visits.get(visit, 0) + 1
        if correct:
            self.prior, self.prior_shift = fit_prior(self.visits), self.shift
