"""Do the examples of several turns learn every time? Accuracy, calls, turns and time, seed by seed.

python benchmarks/episodes.py [seeds] [processes] [engine.kind=sglang engine.python=… …]
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from record import RESULTS, ROOT, heading, save, table

# example → metric of training steps that is drawn beside accuracy, and what it is
EXAMPLES = {
    "calculator": ("episode/with_calls", "fraction of episodes with a call"),
    "game": ("episode/turns", "turns of the policy"),
}
FIRST_SEED = 1  # the examples were tuned with others


@dataclass(frozen=True)
class Run:
    seed: int
    rows: list[dict[str, float]]  # metrics.jsonl
    seconds: float  # from launch to end

    def curve(self, metric: str) -> dict[int, float]:
        """Return a metric by step."""
        return {int(row["step"]): row[metric] for row in self.rows if metric in row}


def run(example: str, seed: int, processes: int, overrides: list[str]) -> Run:
    command = [sys.executable, "-m", "dapo", "train", f"examples/{example}/config.yaml"]
    with tempfile.TemporaryDirectory() as directory:
        options = [f"run.seed={seed}", f"run.dir={directory}", f"parallel.tensor={processes}", *overrides]
        start = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--nproc", str(processes), *options], check=True, cwd=ROOT, env=environment)
        seconds = time.perf_counter() - start
        lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return Run(seed, [json.loads(line) for line in lines], seconds)


def rows_of(found: Run, metric: str) -> list[object]:
    accuracy, beside = found.curve("eval/accuracy"), found.curve(metric)
    mismatch = max(found.curve("policy/mismatch").values())
    rest = f"{beside[0]:.2f}", f"{beside[max(beside)]:.2f}", f"{mismatch:.1e}", f"{found.seconds:.0f}"
    return [found.seed, *(f"{accuracy[step]:.3f}" for step in sorted(accuracy)), *rest]


def guessing_among_what_is_left() -> float:
    """Return the accuracy on held-out games of a player who guesses any number that is still possible."""
    sys.path.insert(0, str(ROOT))
    from examples.game.game import GUESSES
    from examples.game.task import Flaws, demonstrate

    rng, num_won, num_games = random.Random(0), 0, 0
    for line in (ROOT / "examples/game/data/heldout.jsonl").read_text().splitlines():
        row = json.loads(line)
        for _ in range(100):
            guesses = [m["content"] for m in demonstrate(row, rng, Flaws(random=1.0)) if m["role"] != "user"]
            num_won += len(guesses) <= GUESSES and guesses[-1] == str(row["secret"])
            num_games += 1
    return num_won / num_games


def plot(runs: list[Run], metric: str, label: str, path: Path) -> None:
    """Draw held-out accuracy, and the other metric of each training step; a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    both = [("eval/accuracy", "accuracy on held-out rows"), (metric, label)]
    for axis, (name, title) in zip(axes, both, strict=True):
        for each in runs:
            curve = each.curve(name)
            axis.plot(list(curve), list(curve.values()), label=f"seed {each.seed}")
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1)
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(num_seeds: int, processes: int, overrides: list[str]) -> None:
    name = "episodes_sglang" if "engine.kind=sglang" in overrides else "episodes"
    text = heading("The examples of several turns, seed by seed")
    text += f"""
mean@k on held-out rows (`eval/accuracy`) after so many steps, tensor parallel over {processes}; the
largest mismatch of any step, mean |old − behavior log-prob|; wall seconds from launch to end, evaluation and
export included. Configs and bases were tuned with other seeds, and committed before these ran.
"""
    for example, (metric, label) in EXAMPLES.items():
        runs = [
            run(example, seed, processes, overrides) for seed in range(FIRST_SEED, FIRST_SEED + num_seeds)
        ]
        steps = sorted(runs[0].curve("eval/accuracy"))
        header = ["seed", *(f"step {step}" for step in steps)]
        header += [f"{label}: first step", "last step", "mismatch", "seconds"]
        text += f"\n## {example}\n\n" + table(header, [rows_of(each, metric) for each in runs])
        if example == "game":
            text += "\nA player who always guesses any number that is still possible: "
            text += f"{guessing_among_what_is_left():.3f}. Who halves what is left: 1.\n"
        text += f"\n![Accuracy; {label}]({name}_{example}.png)\n"
        plot(runs, metric, label, RESULTS / f"{name}_{example}.png")
    save(f"{name}.md", text)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:] if "=" not in argument]
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    main(*[*numbers, *[3, 2][len(numbers) :]], overrides=overrides)
