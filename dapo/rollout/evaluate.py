"""Accuracy on held-out problems: k samples each, with the statistics that few problems need.

In training every `eval.every` steps, and by itself: python -m dapo eval CONFIG [--model DIR …]. P = problems,
k = samples of each.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dapo.clock import timed
from dapo.reward.answer import last_answer
from dapo.rollout.rollouts import Rollouts
from dapo.types import Group, Prompt, Sampling

# Group ids of evaluation, far from training's: every evaluation has the same seeds
FIRST_GROUP = 1 << 60
PER_SET = 1 << 24


@dataclass(frozen=True)
class Scores:
    """Statistics of k samples of each of P problems. Half-widths are of 95 % intervals, clustered by
    problem.
    """

    problems: int
    samples: int  # k
    mean: float  # mean@k: the paper's avg@k
    mean_half_width: float
    majority: float  # maj@k
    pass_at: dict[int, float]  # pass@1, 2, 4 … k, the unbiased estimator
    length: float  # tokens
    truncated: float
    per_problem: list[float]  # accuracy of each problem, in the file's order

    def __str__(self) -> str:
        passes = ", ".join(f"pass@{k} {value:.3f}" for k, value in self.pass_at.items() if k > 1)
        return (
            f"mean@{self.samples} {self.mean:.3f} ± {self.mean_half_width:.3f}, maj@{self.samples} "
            f"{self.majority:.3f}{', ' + passes if passes else ''}; {self.problems} problems, "
            f"{self.length:.0f} tokens, {self.truncated:.1%} truncated"
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
        metrics |= {
            f"eval/{name}/mean": scores.mean,
            f"eval/{name}/mean_half_width": scores.mean_half_width,
            f"eval/{name}/majority": scores.majority,
            f"eval/{name}/pass": scores.pass_at[scores.samples],
            f"eval/{name}/length": scores.length,
            f"eval/{name}/truncated": scores.truncated,
        }
    return metrics


def run(rollouts: Rollouts, sets: dict[str, list[Prompt]], title: str) -> dict[str, Scores]:
    """Sample and score every set. `title` begins the progress line."""
    config = rollouts.config
    max_tokens = config.rollout.max_response_length
    sampling = Sampling(config.eval.temperature, max_tokens, rollouts.stop_ids, config.eval.top_p)
    results = {}
    for i, (name, problems) in enumerate(sets.items()):
        first_group = FIRST_GROUP + i * PER_SET
        groups = rollouts.sample(problems, config.eval.samples, sampling, first_group, f"{title}, {name}")
        results[name] = score(groups)
    return results


def score(groups: list[Group]) -> Scores:
    """Return the statistics of groups whose samples are already marked correct or wrong."""
    samples = [sample for group in groups for sample in group.samples]
    k = len(groups[0].samples)
    accuracies = [group.num_correct / k for group in groups]
    passes = {
        n: float(np.mean([pass_at(k, group.num_correct, n) for group in groups])) for n in powers_of_two(k)
    }
    return Scores(
        problems=len(groups),
        samples=k,
        mean=float(np.mean(accuracies)),
        mean_half_width=half_width(accuracies),
        majority=float(np.mean([majority_is_correct(group) for group in groups])),
        pass_at=passes,
        length=float(np.mean([sample.length for sample in samples])),
        truncated=float(np.mean([sample.is_truncated for sample in samples])),
        per_problem=accuracies,
    )


def pass_at(samples: int, correct: int, k: int) -> float:
    """Return the chance that k of `samples` drawn without replacement include a correct one.

    1 − C(n − c, k) / C(n, k): `pass_at(4, 1, 2)` → 0.5.
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_is_correct(group: Group) -> bool:
    """True if the most frequent answer is correct.

    Of equally frequent answers the first counts; a response without an answer has no vote.
    """
    answers = [last_answer(sample.text) for sample in group.samples]
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]
    return group.samples[answers.index(winner)].is_correct


def half_width(per_problem: list[float]) -> float:
    """Return 1.96 · s / √P, half of the mean's 95 % confidence interval; infinite for one problem.

    Problems are drawn independently; the samples of one problem are not.
    """
    if len(per_problem) < 2:
        return math.inf
    return 1.96 * float(np.std(per_problem, ddof=1)) / math.sqrt(len(per_problem))


def compare(before: Scores, after: Scores, flips: int = 10_000) -> dict[str, float]:
    """Compare two policies on the same problems.

    Returns the mean difference, its half-width, and the p-value of a sign-flip test over problems.
    """
    differences = np.array(after.per_problem) - np.array(before.per_problem)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(flips, len(differences)))
    as_large = np.abs((signs * differences).mean(1)) >= abs(differences.mean()) - 1e-12
    return {
        "difference": float(differences.mean()),
        "half_width": half_width(differences.tolist()),
        "p_value": float((as_large.sum() + 1) / (flips + 1)),
    }


def powers_of_two(k: int) -> list[int]:
    """Return the powers of two up to k, and k itself: `powers_of_two(6)` → [1, 2, 4, 6]."""
    return sorted({1 << i for i in range(k.bit_length())} | {k})


def write(results: dict[str, dict[str, Scores]], path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Write results[model][set] as JSON. Compare every later model with the first:
    comparisons[model][set].
    """
    first, *later = results
    record = {
        model: {name: asdict(scores) for name, scores in sets.items()} for model, sets in results.items()
    }
    comparisons = {
        model: {name: compare(results[first][name], scores) for name, scores in results[model].items()}
        for model in later
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"models": record, "against": first, "comparisons": comparisons}, indent=1))
    return comparisons
