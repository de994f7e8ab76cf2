"""What do the monitors show of a run that goes wrong? The quickstart's run, and six made sick on purpose.

python benchmarks/sick_runs.py [run.steps=40 …]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import RESULTS, heading, save, table

ROOT = Path(__file__).parents[1]
DATA = ROOT / "examples/arithmetic/data/train.jsonl"


@dataclass(frozen=True)
class Run:
    """A way to make the quickstart's run sick, and the alarm that should show it."""

    name: str
    cause: str
    metric: str
    alarm: str  # what counts, in words
    is_alarm: Callable[[float], bool]
    options: tuple[str, ...] = ()
    is_sync_broken: bool = False


RUNS = [
    Run("healthy", "nothing", "", "", lambda value: False),
    Run(
        "entropy collapse",
        "one and the same answer is rewarded, whatever the problem",
        "policy/entropy",
        "below 0.01 nats",
        lambda value: value < 0.01,
        (
            "reward.function=sick_runs:is_constant",
            "rollout.dynamic_sampling=false",
            "rollout.max_empty_steps=99",
        ),
    ),
    Run(
        "too large a learning rate",
        "optim.lr ten times as large",
        "policy/entropy",
        "above 0.11 nats",
        lambda value: value > 0.11,
        ("optim.lr=2e-3",),
    ),
    Run(
        "length runaway",
        "a reward for long responses, no overlong punishment",
        "rollout/truncated",
        "above 0.5",
        lambda value: value > 0.5,
        (
            "reward.function=sick_runs:is_long",
            "reward.soft_overlong_punishment=false",
            "reward.truncated_is_wrong=false",
        ),
    ),
    Run(
        "broken sync",
        "the sampler keeps the weights it began with",
        "policy/mismatch",
        "above 1e-3",
        lambda value: value > 1e-3,
        is_sync_broken=True,
    ),
    Run(
        "wrong reward",
        "right, if the ground truth stands anywhere in the response; the right reward is the shadow",
        "reward/disagreement",
        "above 0.1",
        lambda value: value > 0.1,
        (
            "reward.function=sick_runs:is_anywhere",
            "reward.shadow=[dapo.reward:is_correct]",
            "reward.truncated_is_wrong=false",
        ),
    ),
    Run(
        "too easy data",
        "only sums of two numbers",
        "rollout/no_gradient",
        "above 0.9",
        lambda value: value > 0.9,
        ("data.train=EASY",),
    ),
]


def is_long(response: str, answer: str) -> bool:
    return len(response) > 40


def is_constant(response: str, answer: str) -> bool:
    return response.strip() == "Answer: 5"


def is_anywhere(response: str, answer: str) -> bool:
    return re.search(rf"(?<!\d){re.escape(answer)}(?!\d)", response) is not None


def train(run: Run, directory: Path, overrides: Iterable[str]) -> list[dict[str, float]]:
    """Train on one process. Return the rows of metrics.jsonl."""
    easy = directory / "easy.jsonl"
    directory.mkdir(parents=True)
    rows = [
        row
        for row in DATA.read_text().splitlines()
        if len(re.findall("[-+]", json.loads(row)["prompt"])) == 1
    ]
    more = [
        json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a in range(1, 10) for b in range(1, 10)
    ]
    easy.write_text("\n".join(rows or more) + "\n")
    options = [option.replace("EASY", str(easy)) for option in run.options]
    command = [
        sys.executable,
        __file__,
        "--rank",
        *(["--broken-sync"] if run.is_sync_broken else []),
        "train",
    ]
    config = [
        str(ROOT / "examples/arithmetic/config.yaml"),
        f"run.dir={directory / 'run'}",
        *options,
        *overrides,
    ]
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    subprocess.run([*command, *config], check=True, cwd=ROOT, env=environment)
    found = [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "policy/entropy" in row or "groups/kept" in row]


def rank(arguments: list[str]) -> int:
    """Run the command of a process whose sampler may keep the weights that it began with."""
    from dapo.__main__ import main
    from dapo.engine.embedded import EmbeddedEngine

    if arguments[0] == "--broken-sync":
        del arguments[0]
        load = EmbeddedEngine.load_weights

        def load_once(self: Any, weights: Iterable[Any], version: int) -> None:
            if version == 0:
                load(self, weights, version)
                return
            for _ in weights:  # every rank takes part
                pass
            self.version = version

        EmbeddedEngine.load_weights = load_once  # type: ignore[method-assign]
    return main(arguments)


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw each sick run's metric beside the healthy run's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(14, 5.6), layout="constrained")
    for run, axis in zip(RUNS[1:], axes.flat, strict=False):
        for name, colour in (("healthy", "tab:gray"), (run.name, "tab:red")):
            rows = [row for row in found[name] if run.metric in row]
            axis.plot(
                [row["step"] for row in rows], [row[run.metric] for row in rows], color=colour, label=name
            )
        if (first := first_alarm(run, found[run.name])) is not None:
            axis.axvline(first, color="tab:red", linestyle=":", label=f"{run.alarm}: step {first}")
        axis.set(title=run.name, xlabel="step", ylabel=run.metric)
        if run.metric == "policy/mismatch":
            axis.set_yscale("log")
        axis.legend(fontsize=8)
    axes.flat[-2].axis("off")
    axis = axes.flat[-1]
    for name, rows in found.items():
        scores = [row for row in rows if "eval/accuracy" in row]
        axis.plot([row["step"] for row in scores], [row["eval/accuracy"] for row in scores], label=name)
    axis.set(title="held-out problems, by its own reward", xlabel="step", ylabel="eval/accuracy")
    axis.title.set_fontsize(9)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def first_alarm(run: Run, rows: list[dict[str, float]]) -> int | None:
    """Return the first step whose metric is an alarm."""
    return next(
        (int(row["step"]) for row in rows if run.metric in row and run.is_alarm(row[run.metric])), None
    )


def main(overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = {run.name: train(run, Path(folder) / run.name.replace(" ", "-"), overrides) for run in RUNS}
    rows = []
    for run in RUNS[1:]:
        values = [row[run.metric] for row in found[run.name] if run.metric in row]
        healthy = [row[run.metric] for row in found["healthy"] if run.metric in row]
        usual = f"{min(healthy):.2g} to {max(healthy):.2g}" if healthy else "not measured"
        step, false = first_alarm(run, found[run.name]), first_alarm(run, found["healthy"])
        moved, is_false = f"{values[0]:.2g} → {values[-1]:.2g}", "no" if false is None else f"step {false}"
        alarm, fired = f"`{run.metric}` {run.alarm}", "never" if step is None else step
        rows.append([run.name, run.cause, alarm, fired, moved, usual, is_false])
    text = heading("Runs made sick on purpose, and the monitor that shows it")
    text += "\nThe quickstart's run of 40 steps on one process, and six in which one thing is wrong. "
    text += "The alarm is a limit of one metric; the healthy run's range stands beside it.\n\n"
    header = [
        "run",
        "what is wrong",
        "alarm",
        "first at step",
        "first → last step",
        "healthy run",
        "healthy run alarms",
    ]
    save(
        "sick_runs.md",
        text + table(header, rows) + "\n![Each run's metric beside the healthy run's](sick_runs.png)\n",
    )
    plot(found, RESULTS / "sick_runs.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(rank(sys.argv[2:]))
    main(sys.argv[1:])
