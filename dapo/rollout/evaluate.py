"""Accuracy on held-out problems: k samples each, with the statistics that few problems need.

In training every `eval.every` steps, and by itself: python -m dapo eval CONFIG [--model DIR …]. P = problems,
k = samples of each.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dapo.clock import timed
from dapo.config import ConfigError
from dapo.files import write_text, writing
from dapo.reward.pool import Reward
from dapo.rollout.rollouts import Rollouts
from dapo.types import EpisodeError, Group, Prompt, Sampling

# Group ids of evaluation, far from training's: every evaluation has the same seeds
FIRST_GROUP = 1 << 60
PER_SET = 1 << 24


@dataclass(frozen=True)
class Scores:
    """Statistics of k samples of each of P problems. Half-widths are of 95 % intervals, clustered by
    problem; None: of one problem there is none.
    """

    problems: int
    samples: int  # k
    mean: float  # mean@k: the paper's avg@k
    mean_half_width: float | None
    majority: float | None  # maj@k; None: the reward function's module does not say what an answer is
    pass_at: dict[int, float]  # pass@1, 2, 4 … k, the unbiased estimator
    length: float  # tokens
    truncated: float
    reward: dict[str, float]  # of the reward's calls: timeouts, crashes, …; lost: problems that are left out
    # accuracy of each problem, in the file's order; None: its environment failed
    per_problem: list[float | None]

    def __str__(self) -> str:
        interval = "" if self.mean_half_width is None else f" ± {self.mean_half_width:.3f}"
        majority = "" if self.majority is None else f", maj@{self.samples} {self.majority:.3f}"
        passes = "".join(f", pass@{k} {value:.3f}" for k, value in self.pass_at.items() if k > 1)
        undecided = self.reward.get("undecided", 0.0)
        lost = f" ({self.reward['lost']:.0f} lost)" if "lost" in self.reward else ""
        return (
            f"mean@{self.samples} {self.mean:.3f}{interval}{majority}{passes}; {self.problems} problems{lost}"
            f", {self.length:.0f} tokens, {self.truncated:.1%} truncated"
            f"{f', {undecided:.1%} without a verdict' if undecided else ''}"
        )


@timed("eval")
def metrics_at(step: int, rollouts: Rollouts, sets: dict[str, list[Prompt]]) -> dict[str, float]:
    """Evaluate the engine's weights every `eval.every` steps and after the last step; return {} at other
    steps.

    `eval/accuracy` is the mean of the sets' mean@k; each set's own numbers are under `eval/<set>/`.
    """
    config = rollouts.config
    if not sets or (step % config.eval.every and step != config.run.steps):
        return {}
    results = run(rollouts, sets, f"evaluating step {step}")
    metrics = {"eval/accuracy": float(np.mean([scores.mean for scores in results.values()]))}
    for name, scores in results.items():
        found = {
            f"eval/{name}/mean": scores.mean,
            f"eval/{name}/mean_half_width": scores.mean_half_width,
            f"eval/{name}/majority": scores.majority,
            f"eval/{name}/pass": scores.pass_at[scores.samples],
            f"eval/{name}/length": scores.length,
            f"eval/{name}/truncated": scores.truncated,
            **{f"eval/{name}/{what}": value for what, value in scores.reward.items()},
        }
        metrics |= {key: value for key, value in found.items() if value is not None}
    return metrics


def check_best(metric: str | None, sets: Iterable[str], reward: Reward) -> None:
    """Check run.keep_best.

    Raises:
        ConfigError: `metrics_at` returns no such metric, or less of it is better.
    """
    kinds = ("mean", "pass") if reward.answer_of is None else ("mean", "majority", "pass")
    known = [f"eval/{name}/{kind}" for name in sets for kind in kinds]
    if metric is not None and not known:
        raise ConfigError(f"run.keep_best={metric}, but nothing is evaluated: set eval.data")
    if metric not in (None, "eval/accuracy", *known):
        raise ConfigError(f"run.keep_best={metric}: expected one of eval/accuracy, {', '.join(known)}")


def run(rollouts: Rollouts, sets: dict[str, list[Prompt]], title: str) -> dict[str, Scores]:
    """Sample and score every set. `title` begins the progress line."""
    config = rollouts.config
    max_tokens = config.rollout.max_response_length
    sampling = Sampling(config.eval.temperature, max_tokens, rollouts.stop_ids, config.eval.top_p)
    results = {}
    for i, (name, problems) in enumerate(sets.items()):
        first_group = FIRST_GROUP + i * PER_SET
        reward = rollouts.reward.apart()
        asked = problems, config.eval.samples, sampling, first_group
        groups = rollouts.sample(*asked, f"{title}, {name}", reward)
        if all(group.is_lost for group in groups):
            raise EpisodeError(f"all problems of {name} are lost, the last because {groups[-1].why_lost}")
        results[name] = score(groups, reward)
    return results


def score(all_groups: list[Group], reward: Reward) -> Scores:
    """Return the statistics of groups whose samples `reward` has marked correct or wrong. Those that are lost
    are counted, and left out.
    """
    groups = [group for group in all_groups if not group.is_lost]
    samples = [sample for group in groups for sample in group.samples]
    k = len(groups[0].samples)
    accuracies = [group.num_correct / k for group in groups]
    passes = {
        n: float(np.mean([pass_at(k, group.num_correct, n) for group in groups])) for n in powers_of_two(k)
    }
    majorities = majorities_of(groups, reward)
    counts = {name.removeprefix("reward/"): value for name, value in reward.take_metrics().items()}
    counts |= {"lost": len(all_groups) - len(groups)} if len(groups) < len(all_groups) else {}
    return Scores(
        problems=len(groups),
        samples=k,
        mean=float(np.mean(accuracies)),
        mean_half_width=half_width(accuracies),
        majority=None if majorities is None else float(np.mean(majorities)),
        pass_at=passes,
        length=float(np.mean([sample.num_written for sample in samples])),
        truncated=float(np.mean([sample.is_truncated for sample in samples])),
        reward=counts,
        per_problem=[None if group.is_lost else group.num_correct / k for group in all_groups],
    )


def pass_at(samples: int, correct: int, k: int) -> float:
    """Return the chance that k of `samples` drawn without replacement include a correct one.

    1 − C(n − c, k) / C(n, k): `pass_at(4, 1, 2)` → 0.5.
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


class Votes:
    """The answers to one problem, as they are written, with the number of responses that give each.

    A response without an answer has no vote.
    """

    def __init__(self, group: Group, answer_of: Callable[[str], str | None]):
        answers = [(answer_of(sample.text), sample.is_correct) for sample in group.samples]
        self.counts = Counter(answer for answer, _ in answers if answer is not None)  # the first given first
        self.correct = {answer for answer, is_correct in answers if is_correct}

    def doubtful(self) -> list[tuple[str, str]]:
        """Return the pairs that may be one answer, the first given first, if that can change who wins."""
        if max(self.counts.values(), default=0) * 2 > self.counts.total():
            return []
        pairs = combinations(self.counts, 2)
        return [(a, b) for a, b in pairs if (a in self.correct) == (b in self.correct)]

    def is_won_by_a_correct_one(self, same: set[tuple[str, str]]) -> bool:
        """True if the most frequent answer is correct; of equally frequent ones the first given counts."""
        together: Counter[str] = Counter()
        for answer, count in self.counts.items():
            together[next((first for first in together if (first, answer) in same), answer)] += count
        return bool(together) and together.most_common(1)[0][0] in self.correct


def majorities_of(groups: list[Group], reward: Reward) -> list[bool] | None:
    """Return whether each problem's most frequent answer is correct; None if `reward` finds no answers."""
    if reward.answer_of is None:
        return None
    votes = [Votes(group, reward.answer_of) for group in groups]
    doubtful = [(i, pair) for i, vote in enumerate(votes) for pair in vote.doubtful()]
    same: list[set[tuple[str, str]]] = [set() for _ in votes]
    for (i, pair), is_same in zip(doubtful, reward.same([pair for _, pair in doubtful]), strict=True):
        if is_same:
            same[i].add(pair)
    return [vote.is_won_by_a_correct_one(pairs) for vote, pairs in zip(votes, same, strict=True)]


def half_width(per_problem: list[float]) -> float | None:
    """Return 1.96 · s / √P, half of the mean's 95 % confidence interval; None for one problem.

    Problems are drawn independently; the samples of one problem are not.
    """
    if len(per_problem) < 2:
        return None
    return 1.96 * float(np.std(per_problem, ddof=1)) / math.sqrt(len(per_problem))


@dataclass(frozen=True)
class Comparison:
    """The difference of two policies on the same problems, later − first."""

    difference: float
    half_width: float | None
    p_value: float

    def __str__(self) -> str:
        interval = "" if self.half_width is None else f" ± {self.half_width:.3f}"
        return f"{self.difference:+.3f}{interval}, p = {self.p_value:.2g}"


def compare(before: Scores, after: Scores) -> Comparison:
    """Compare two policies on the same problems, with the exact p-value of a sign-flip test over problems.

    The p-value is the fraction of all 2^P ways to swap the two policies at some of the problems in which
    their means differ at least as much.
    """
    k = before.samples
    counted = k, len(before.per_problem)
    assert counted == (after.samples, len(after.per_problem)), "other problems or numbers of samples"
    pairs = zip(before.per_problem, after.per_problem, strict=True)
    differences = np.array([b - a for a, b in pairs if a is not None and b is not None])
    if not len(differences):
        raise EpisodeError("no problem has a score of both models: their environments failed")
    counts = np.rint(k * differences).astype(int)  # of correct samples
    largest = int(np.abs(counts).sum())
    chances = np.zeros(2 * largest + 1)  # of each sum, from −largest to largest
    chances[largest] = 1.0
    for count in np.abs(counts[counts != 0]):
        chances = (np.roll(chances, count) + np.roll(chances, -count)) / 2
    sums = np.arange(-largest, largest + 1)
    p_value = float(chances[np.abs(sums) >= abs(counts.sum())].sum())
    return Comparison(float(differences.mean()), half_width(differences.tolist()), min(p_value, 1.0))


def powers_of_two(k: int) -> list[int]:
    """Return the powers of two up to k, and k itself: `powers_of_two(6)` → [1, 2, 4, 6]."""
    return sorted({1 << i for i in range(k.bit_length())} | {k})


def write(results: dict[str, dict[str, Scores]], path: Path) -> dict[str, dict[str, Comparison]]:
    """Write results[model][set] as JSON. Compare every later model with the first:
    comparisons[model][set].

    Raises:
        StorageError: the file cannot be written.
    """
    first, *later = results
    comparisons = {
        model: {name: compare(results[first][name], scores) for name, scores in results[model].items()}
        for model in later
    }
    record = {"models": _plain(results), "against": first, "comparisons": _plain(comparisons)}
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=1, allow_nan=False))
    return comparisons


def _plain(found: dict[str, dict[str, Scores]] | dict[str, dict[str, Comparison]]) -> dict[str, Any]:
    return {model: {name: asdict(each) for name, each in sets.items()} for model, sets in found.items()}
