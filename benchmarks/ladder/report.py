"""Tables and plots of the ladder's runs: means over seeds and their standard errors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, heading, save, table
from settings import Experiment

LAST = 5  # steps of which a figure of training is the mean
GRID = 60  # points of a drawn curve
Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Run:
    seed: int
    rows: list[dict[str, float]]  # metrics.jsonl
    cpu_seconds: float  # of the whole process: start and evaluation included
    seconds: float  # from launch to end
    commit: str
    wider: dict[str, float] = field(default_factory=dict)  # accuracy, length, truncated of another evaluation

    @property
    def steps(self) -> list[dict[str, float]]:
        """Metrics of each training step."""
        return [row for row in self.rows if "rollout/tokens" in row]

    def curve(self, metric: str) -> Curve:
        """Return steps and a metric's values, where it was measured."""
        some = [(row["step"], row[metric]) for row in self.rows if metric in row]
        return [step for step, _ in some], [value for _, value in some]

    def last(self, metric: str) -> float:
        """Return the mean of a metric in the last steps; 0 if it was in none of them."""
        values = [row[metric] for row in self.steps[-LAST:] if metric in row]
        return statistics.fmean(values) if values else 0.0

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over the steps that have it; 0 if none has."""
        values = self.curve(metric)[1]
        return statistics.fmean(values) if values else 0.0

    def compute(self) -> list[float]:
        """Return compute spent after 0, 1, … steps, in forward passes of a token: each sampled token 1, each
        learnt token 1 for its old log-prob and 3 for its update.
        """
        spent = [row["rollout/tokens"] + 4 * row.get("rollout/tokens_learnt", 0) for row in self.steps]
        return [0.0, *np.cumsum(spent).tolist()]

    def accuracy_at(self, compute: float) -> float:
        """Return held-out accuracy after so much compute, between two evaluations by a straight line."""
        steps, values = self.curve("eval/accuracy")
        spent = self.compute()
        return float(np.interp(compute, [spent[int(step)] for step in steps], values))

    def first_step_above(self, metric: str, bound: float) -> int | None:
        """Return the first step whose metric is above the bound; None if there is none."""
        steps, values = self.curve(metric)
        return next((int(step) for step, value in zip(steps, values, strict=True) if value > bound), None)


def mean_and_error(values: Sequence[float], digits: int = 3) -> str:
    """Write mean ± standard error of the mean: `mean_and_error([1, 2])` → "1.500 ± 0.500"."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {error:.{digits}f}"


def figures(arms: dict[str, list[Run]]) -> list[list[object]]:
    """Return a row an arm."""
    least = min(run.compute()[-1] for runs in arms.values() for run in runs)
    columns: list[tuple[Callable[[Run], float], int]] = [
        (lambda run: run.curve("eval/accuracy")[1][-1], 3),
        (lambda run: run.accuracy_at(least), 3),
        (lambda run: run.last("policy/entropy"), 3),
        (lambda run: run.last("rollout/length"), 1),
        (lambda run: run.last("rollout/truncated"), 3),
        (lambda run: 100 * run.mean("policy/clip_high"), 2),
        (lambda run: run.mean("policy/clip_high_probability"), 3),
        (lambda run: run.compute()[-1] / 1e6, 2),
        (lambda run: run.cpu_seconds, 0),
    ]
    return [
        [arm, *(mean_and_error([of(run) for run in runs], digits) for of, digits in columns)]
        for arm, runs in arms.items()
    ]


def differences(arms: dict[str, list[Run]]) -> list[list[object]]:
    """Return a row an arm: by how much its accuracy differs, of the same seed, from the arm before it and
    from the first; and each seed's accuracy.
    """
    found = {arm: [run.curve("eval/accuracy")[1][-1] for run in runs] for arm, runs in arms.items()}
    names = list(found)
    rows: list[list[object]] = []
    for place, arm in enumerate(names):
        before, first = found[names[max(place - 1, 0)]], found[names[0]]
        rows.append([
            arm,
            mean_and_error([a - b for a, b in zip(found[arm], before, strict=True)]) if place else "",
            mean_and_error([a - b for a, b in zip(found[arm], first, strict=True)]) if place else "",
            " ".join(f"{value:.3f}" for value in found[arm]),
        ])  # fmt: skip
    return rows


def take_offs(arms: dict[str, list[Run]], bound: float) -> list[list[object]]:
    """Return a row an arm: the step at which each seed's responses became long; – if they did not."""
    rows: list[list[object]] = []
    for arm, runs in arms.items():
        steps = [run.first_step_above("rollout/length", bound) for run in runs]
        found = [step for step in steps if step is not None]
        mean = mean_and_error(found, 1) if found else "–"
        rows.append(
            [
                arm,
                f"{len(found)} of {len(runs)}",
                mean,
                " ".join(str(s if s is not None else "–") for s in steps),
            ]
        )
    return rows


def draw(axis: Any, curves: Sequence[Curve], label: str) -> None:
    """Draw the mean of seeds, and its standard error as a band, over what all of them reached; nothing if a
    run has no point, as one that never learnt has none of the policy.
    """
    if not all(x for x, _ in curves):
        return
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(low, high, GRID)
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    error = values.std(0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else 0 * grid
    [line] = axis.plot(grid, values.mean(0), label=label)
    axis.fill_between(
        grid, values.mean(0) - error, values.mean(0) + error, color=line.get_color(), alpha=0.15
    )


def plot(arms: dict[str, list[Run]], path: Path) -> None:
    """Draw accuracy by step and by compute, entropy by step and by accuracy, length, truncation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    titles = [
        ("step", "held-out accuracy"), ("10⁶ token passes", "held-out accuracy"),
        ("step", "response length, tokens"),
        ("step", "entropy, nats"), ("accuracy in training", "entropy, nats"), ("step", "truncated"),
    ]  # fmt: skip
    for axis, (x, title) in zip(axes.flat, titles, strict=True):
        axis.set(xlabel=x, title=title)
        axis.grid(alpha=0.3)
    for arm, runs in arms.items():
        draw(axes[0, 0], [run.curve("eval/accuracy") for run in runs], arm)
        spent = [run.compute() for run in runs]
        evaluated = [run.curve("eval/accuracy") for run in runs]
        by_compute = [
            ([each[int(step)] / 1e6 for step in steps], values)
            for each, (steps, values) in zip(spent, evaluated, strict=True)
        ]
        draw(axes[0, 1], by_compute, arm)
        draw(axes[0, 2], [run.curve("rollout/length") for run in runs], arm)
        draw(axes[1, 0], [run.curve("policy/entropy") for run in runs], arm)
        points = [
            (row["rollout/accuracy"], row["policy/entropy"])
            for run in runs
            for row in run.steps
            if "policy/entropy" in row
        ]
        axes[1, 1].scatter(*np.reshape(points, (-1, 2)).T, s=4, alpha=0.5)
        draw(axes[1, 2], [run.curve("rollout/truncated") for run in runs], arm)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write(
    name: str, experiment: Experiment, arms: dict[str, list[Run]], overrides: Sequence[str] = ()
) -> None:
    """Write results/ladder_NAME.md and .png. `overrides`: options of all runs."""
    runs = [run for some in arms.values() for run in some]
    num_seeds = len(next(iter(arms.values())))
    text = heading(experiment.question)
    text += f"\nWith {' '.join(overrides)}.\n" if overrides else ""
    text += f"""
{num_seeds} seeds; the settings (benchmarks/ladder/settings.py) were found with others, and written before
these ran, at commit {", ".join(sorted({run.commit for run in runs}))}.
Mean ± standard error over seeds. Accuracy is
mean@4 on 200 held-out problems: at the end, and where the run had spent as much compute as the cheapest.
Entropy, length and truncation are of training, mean of the last {LAST} steps; clipped tokens of all steps.
Compute is in forward passes of a token: 1 for each sampled token, 4 for each that is learnt from. CPU seconds
are of whole processes, start and evaluation included. All runs together took
{sum(run.seconds for run in runs) / 60:.0f} minutes of a core.

"""
    header = [
        "", "accuracy", "at equal compute", "entropy", "length", "truncated", "clipped high, %",
        "their probability", "compute, 10⁶", "CPU s",
    ]  # fmt: skip
    text += table(header, figures(arms))
    if experiment.takes_off_above is not None:
        text += (
            f"\nThe first step with a mean response of more than {experiment.takes_off_above:.0f} tokens:\n\n"
        )
        text += table(["", "found", "step", "each seed"], take_offs(arms, experiment.takes_off_above))
    if experiment.wider:
        text += f"\nWhat was learnt, evaluated with {' '.join(experiment.wider)}:\n\n"
        names = ("accuracy", "length", "truncated")
        text += table(
            ["", *names],
            [
                [arm, *(mean_and_error([run.wider[n] for run in some]) for n in names)]
                for arm, some in arms.items()
            ],
        )
    text += "\nDifferences of accuracy at the end, seed by seed:\n\n"
    header, rows = ["", "to the one before", "to the first", "accuracy of each seed"], differences(arms)
    if not experiment.is_cumulative:
        header, rows = [header[0], *header[2:]], [[row[0], *row[2:]] for row in rows]
    text += table(header, rows)
    text += f"\n![Accuracy, entropy, length, truncation](ladder_{name}.png)\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    plot(arms, RESULTS / f"ladder_{name}.png")
    save(f"ladder_{name}.md", text)
