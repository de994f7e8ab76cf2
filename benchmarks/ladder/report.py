"""Tables and plots of the ladder's runs: means over seeds and their standard errors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, average, difference, heading, table, write_whole
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

    def last(self, metric: str) -> float | None:
        """Return the mean of a metric in the last steps; None if it was in none of them."""
        values = [row[metric] for row in self.steps[-LAST:] if metric in row]
        return statistics.fmean(values) if values else None

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric over the steps that have it; None if none has."""
        values = self.curve(metric)[1]
        return statistics.fmean(values) if values else None

    def compute(self, is_lean: bool = False) -> list[float]:
        """Return compute spent after 0, 1, … steps, in forward passes of a token: each sampled token 1, each
        token of a kept group 1 for its old log-prob and 3 for its update; with `is_lean` only of those kept
        groups that have a gradient.
        """
        spent = [
            row["rollout/tokens"] + 4 * row.get("rollout/tokens_learnt", 0) * (taught(row) if is_lean else 1)
            for row in self.steps
        ]
        return [0.0, *np.cumsum(spent).tolist()]

    def accuracy(self) -> float:
        """Return held-out accuracy at the end."""
        return self.curve("eval/accuracy")[1][-1]

    def accuracy_at(self, compute: float, is_lean: bool = False) -> float:
        """Return held-out accuracy after so much compute, between two evaluations by a straight line."""
        steps, values = self.curve("eval/accuracy")
        spent = self.compute(is_lean)
        return float(np.interp(compute, [spent[int(step)] for step in steps], values))

    def first_step_above(self, metric: str, bound: float) -> int | None:
        """Return the first step whose metric is above the bound; None if there is none."""
        steps, values = self.curve(metric)
        return next((int(step) for step, value in zip(steps, values, strict=True) if value > bound), None)


Arms = dict[str, list[Run]]
Figure = Callable[[Run], float | None]


def taught(row: dict[str, float]) -> float:
    """Return the fraction of a step's kept groups that have a gradient."""
    if not row["groups/kept"]:
        return 0.0
    judged = row["groups/asked"] - row["groups/surplus"]
    return min(1.0, judged * (1 - row["rollout/no_gradient"]) / row["groups/kept"])


def accuracies(arms: Arms) -> list[tuple[str, Figure, int]]:
    """Return (name, figure of a run, digits) of accuracy at the end and where as much compute was spent as by
    the run that spent least.
    """
    least, lean = (min(run.compute(x)[-1] for runs in arms.values() for run in runs) for x in (False, True))
    return [
        ("accuracy", Run.accuracy, 3),
        ("at equal compute", lambda run: run.accuracy_at(least), 3),
        ("at equal lean compute", lambda run: run.accuracy_at(lean, is_lean=True), 3),
    ]


def figures(arms: Arms) -> str:
    """Write a row an arm."""
    columns: list[tuple[str, Figure, int]] = [
        *accuracies(arms),
        ("entropy", lambda run: run.last("policy/entropy"), 3),
        ("length", lambda run: run.last("rollout/length"), 1),
        ("truncated", lambda run: run.last("rollout/truncated"), 3),
        ("no gradient", lambda run: run.mean("rollout/no_gradient"), 2),
        ("clipped high, %", lambda run: 100 * (run.mean("policy/clip_high") or 0), 2),
        ("their probability", lambda run: run.mean("policy/clip_high_probability"), 3),
        ("compute, 10⁶", lambda run: run.compute()[-1] / 1e6, 2),
        ("lean", lambda run: run.compute(is_lean=True)[-1] / 1e6, 2),
        ("CPU s", lambda run: run.cpu_seconds, 0),
    ]
    rows = [
        [arm, *(average([of(run) for run in runs], digits) for _, of, digits in columns)]
        for arm, runs in arms.items()
    ]
    return table(["", *(name for name, _, _ in columns)], rows)


def differences(arms: Arms, experiment: Experiment) -> str:
    """Write by how much each arm differs, of the same seed, from the arm before it and from the first."""
    columns = [*accuracies(arms), ("truncated", lambda run: run.last("rollout/truncated"), 3)]
    if experiment.wider:
        columns.append(("accuracy in the other evaluation", lambda run: run.wider["accuracy"], 3))
    if bound := experiment.takes_off_above:
        columns.append(("take-off", lambda run: run.first_step_above("rollout/length", bound), 1))
    names, rows = list(arms), []
    for place, arm in enumerate(names):
        for other in dict.fromkeys(names[:place][-1:] + names[:1]) if place else ():
            cells = [
                difference([of(run) for run in arms[arm]], [of(run) for run in arms[other]], digits)
                for _, of, digits in columns
            ]
            rows.append([f"{arm} − {other}", *cells])
    return table(["", *(name for name, _, _ in columns)], rows)


def take_offs(arms: Arms, bound: float) -> str:
    """Write a row an arm: the step at which each seed's responses became long; – if they did not."""
    rows: list[list[object]] = []
    for arm, runs in arms.items():
        steps = [run.first_step_above("rollout/length", bound) for run in runs]
        found = [step for step in steps if step is not None]
        each = " ".join("–" if step is None else str(step) for step in steps)
        rows.append([arm, f"{len(found)} of {len(runs)}", average(found or None, 1), each])
    return table(["", "found", "step", "each seed"], rows)


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


def plot(arms: Arms, path: Path) -> None:
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
    name: str, experiment: Experiment, arms: Arms, overrides: Sequence[str] = (), directory: Path = RESULTS
) -> None:
    """Write ladder_NAME.md and .png. `overrides`: options of all runs."""
    runs = [run for some in arms.values() for run in some]
    num_seeds = len(next(iter(arms.values())))
    text = heading(experiment.question)
    text += f"\nWith {' '.join(overrides)}.\n" if overrides else ""
    text += f"""
{num_seeds} seeds, one base, 200 held-out problems. The setting is in benchmarks/ladder/settings.py:
{experiment.origin}
Run at commit {", ".join(sorted({run.commit for run in runs}))}.

Mean ± standard error over seeds, which covers the chance in training, not that of another base or of other
problems. Accuracy is mean@4: at the end, and where a run had spent as much compute as the one that spent
least. Entropy, length and truncation are of training, mean of the last {LAST} steps; clipped tokens, and
groups without a gradient, of all steps. Compute is in forward passes of a token: 1 for each sampled token, 4
for each token of a kept group, prompts included. Lean compute leaves out kept groups that have no gradient,
as a trainer could, and counts them as of mean length. In fact they are shorter, so it is a little too low
where they are kept. CPU seconds are of whole processes, start and evaluation included. All runs together
took {sum(run.cpu_seconds for run in runs) / 60:.0f} minutes of a core.

"""
    text += figures(arms)
    if experiment.takes_off_above is not None:
        bound = experiment.takes_off_above
        text += f"\nThe first step with a mean response of more than {bound:.0f} tokens:\n\n"
        text += take_offs(arms, bound)
    if experiment.wider:
        text += f"\nWhat was learnt, evaluated with {' '.join(experiment.wider)}:\n\n"
        names = ("accuracy", "length", "truncated")
        rows = [
            [arm, *(average([run.wider[n] for run in some]) for n in names)] for arm, some in arms.items()
        ]
        text += table(["", *names], rows)
    text += "\nDifferences, seed by seed; in brackets the 95 % interval, by Student's t:\n\n"
    text += differences(arms, experiment)
    text += "\nAccuracy of each seed at the end:\n\n"
    text += table(
        ["", *(run.seed for run in next(iter(arms.values())))],  # type: ignore[list-item]
        [[arm, *(f"{run.accuracy():.3f}" for run in some)] for arm, some in arms.items()],
    )
    text += f"\n![Accuracy, entropy, length, truncation](ladder_{name}.png)\n"
    directory.mkdir(parents=True, exist_ok=True)
    plot(arms, directory / f"ladder_{name}.png")
    write_whole(directory / f"ladder_{name}.md", text)
    print(f"{text}\nkept in {directory / f'ladder_{name}.md'}")
