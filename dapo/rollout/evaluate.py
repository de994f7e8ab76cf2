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
from typing import Any

import numpy as np

from dapo import config
from dapo.clock import timed
from dapo.reward.answer import last_answer
from dapo.rollout.rollouts import Rollouts
from dapo.types import Group, Prompt, Sampling

# the ids of evaluation's groups: the same seeds at every evaluation, apart from training's
FIRST_GROUP = 1 << 60
PER_SET = 1 << 24


@dataclass(frozen=True)
class Scores:
    """What k samples of each of P problems say of a policy. Half-widths are of 95 % confidence intervals,
    clustered by problem.
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
            f"{self.majority:.3f}"
            f"{', ' + passes if passes else ''}; {self.problems} problems, {self.length:.0f} tokens, "
            f"{self.truncated:.1%} truncated"
        )


@timed("eval")
def maybe(
    step: int, rollouts: Rollouts, sets: dict[str, list[Prompt]], options: config.Config
) -> dict[str, float]:
    """Evaluate the weights the engine holds, if it is time to (every `eval.every` steps, and after the last);
    main rank only.

    Returns `eval/accuracy`, the mean of the sets' mean@k, and each set's own numbers under `eval/<set>/`.
    """
    if not sets or (step % options.eval.every and step != options.run.steps):
        return {}
    results = run(rollouts, sets, options, f"evaluating step {step}")
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


def run(
    rollouts: Rollouts, sets: dict[str, list[Prompt]], options: config.Config, told: str
) -> dict[str, Scores]:
    """Sample and score every set. `told` introduces the progress line."""
    sampling = Sampling(
        options.eval.temperature, options.rollout.max_response_length, rollouts.stop_ids, options.eval.top_p
    )
    results = {}
    for i, (name, problems) in enumerate(sets.items()):
        groups = rollouts.sample(
            problems, options.eval.samples, sampling, FIRST_GROUP + i * PER_SET, f"{told}, {name}"
        )
        results[name] = score(groups)
    return results


def score(groups: list[Group]) -> Scores:
    """The statistics of samples that are already marked right or wrong."""
    samples = [sample for group in groups for sample in group.samples]
    k = len(groups[0].samples)
    accuracies = [group.num_correct / k for group in groups]
    return Scores(
        problems=len(groups),
        samples=k,
        mean=float(np.mean(accuracies)),
        mean_half_width=half_width(accuracies),
        majority=float(np.mean([majority_is_correct(group) for group in groups])),
        pass_at={
            n: float(np.mean([pass_at(k, group.num_correct, n) for group in groups]))
            for n in powers_of_two(k)
        },
        length=float(np.mean([sample.length for sample in samples])),
        truncated=float(np.mean([sample.is_truncated for sample in samples])),
        per_problem=accuracies,
    )


def pass_at(samples: int, correct: int, k: int) -> float:
    """The chance that k of `samples` drawn without replacement hold a correct one: 1 − C(n − c, k) / C(n, k).
    `pass_at(4, 1, 2)` → 0.5.
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_is_correct(group: Group) -> bool:
    """Is the most frequent answer right? Of equally frequent ones the first counts; a response without an
    answer has no vote.
    """
    answers = [last_answer(sample.text) for sample in group.samples]
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    chosen = votes.most_common(1)[0][0]
    return next(
        sample.is_correct for sample, answer in zip(group.samples, answers, strict=True) if answer == chosen
    )


def half_width(per_problem: list[float]) -> float:
    """Of the mean's 95 % confidence interval, 1.96 · s / √P: problems are the draw, the samples of one are
    not independent.
    """
    return (
        1.96 * float(np.std(per_problem, ddof=1)) / math.sqrt(len(per_problem))
        if len(per_problem) > 1
        else math.inf
    )


def compare(before: Scores, after: Scores, flips: int = 10_000) -> dict[str, float]:
    """`after` against `before` on the same problems: mean difference, its half-width, and the p-value of a
    sign-flip test over problems.
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
    """`powers_of_two(6)` → [1, 2, 4, 6]: up to k, and k itself."""
    return sorted({1 << i for i in range(k.bit_length()) if 1 << i <= k} | {k})


def write(results: dict[str, dict[str, Scores]], path: Path) -> dict[str, Any]:
    """results[model][set] as JSON, with every later model compared to the first."""
    first, *later = results
    record: dict[str, Any] = {
        model: {name: asdict(scores) for name, scores in sets.items()} for model, sets in results.items()
    }
    comparisons = {
        model: {name: compare(results[first][name], scores) for name, scores in results[model].items()}
        for model in later
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"models": record, "against": first, "comparisons": comparisons}, indent=1))
    return comparisons
