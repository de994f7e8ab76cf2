"""Does `dapo bench` measure what a run takes? The quickstart on one process, and `dapo bench` of its lengths.

python benchmarks/bench_accuracy.py [steps]: three seeds, run and bench in turn, medians of all steps but the
first. It takes two minutes on two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import heading, save, spread, table

CONFIG = Path(__file__).parents[1] / "examples/arithmetic/config.yaml"
PHASES = ("old_logprobs", "update")
SEEDS = (1, 2, 3)


def main(steps: int) -> None:
    rows = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as directory:
            rows += compared(seed, steps, Path(directory))
    worst = max(abs(float(row[-1].rstrip("%"))) for row in rows)
    text = heading("Bench accuracy: the quickstart's phases, and `dapo bench`")
    text += (
        f"\nWall seconds, median (min–max) of {steps - 1} steps after the first; one process, OMP threads 1. "
        f"`dapo bench` was given the run's mean length. Largest deviation of medians: {worst:.0f} %.\n\n"
    )
    header = ["seed", "mean length", "phase", "run", "bench", "off"]
    save("bench_accuracy.md", text + table(header, rows))


def compared(seed: int, steps: int, directory: Path) -> list[list[str]]:
    """Run the quickstart, then the same number of steps of bench; return a row for each phase."""
    options = [f"run.seed={seed}", "eval.data=null", f"run.steps={steps}", f"run.save_every={steps}"]
    dapo("train", f"run.dir={directory / 'run'}", *options)
    lines = (directory / "run/metrics.jsonl").read_text().splitlines()
    run = [row for row in map(json.loads, lines[1:]) if "time/update" in row]
    samples = sum(row["groups/kept"] for row in run) * 8
    length = round(sum(row["rollout/tokens_learnt"] for row in run) / samples) + 1
    given = f"--steps={steps}", f"--mean-length={length}"
    dapo("bench", f"run.dir={directory / 'bench'}", *options, *given)
    phases = json.loads((directory / "bench/bench.json").read_text())["phases"]
    rows = []
    for phase in PHASES:
        taken = [row[f"time/{phase}"] for row in run]
        measured = phases[phase]["seconds"][0][1:]
        off = statistics.median(measured) / statistics.median(taken) - 1
        rows.append([str(seed), str(length), phase, spread(taken), spread(measured), f"{off:+.1%}"])
    return rows


def dapo(command: str, *arguments: str) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "dapo", command, str(CONFIG), *arguments],
        cwd=CONFIG.parents[2],
        env=env,
        check=True,
        stdout=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 31)
