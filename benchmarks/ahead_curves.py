"""What staleness costs in learning: the quickstart's accuracy by step, at rollout.max_staleness 0, 1 and 2.

python benchmarks/ahead_curves.py [seeds, default 6]

The embedded engine generates in a thread; seconds are not measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from record import ROOT, average, heading, save, table

BOUNDS = (0, 1, 2)


def run(staleness: int, seed: int) -> tuple[dict[int, float], float]:
    """Train; return accuracy by step, and the mean age of what was learnt from."""
    with tempfile.TemporaryDirectory() as directory:
        options = [f"run.dir={directory}", f"run.seed={seed}", "run.save_every=1000", "run.steps=70"]
        options.append(f"rollout.max_staleness={staleness}")
        command = [sys.executable, "-m", "dapo", "train", "examples/arithmetic/config.yaml", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    accuracy = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    return accuracy, statistics.fmean(row.get("rollout/staleness", 0.0) for row in rows)


def main(seeds: str = "6") -> None:
    keys = [(staleness, seed) for seed in range(int(seeds)) for staleness in BOUNDS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(keys, pool.map(lambda key: run(*key), keys), strict=True))
    save("ahead_curves.md", report(found))


def report(found: dict[tuple[int, int], tuple[dict[int, float], float]]) -> str:
    steps, seeds = sorted(found[0, 0][0]), len(found) // len(BOUNDS)
    rows = []
    for staleness in BOUNDS:
        of = [found[staleness, seed] for seed in range(seeds)]
        cells = [average([accuracy[step] for accuracy, _ in of]) for step in steps]
        rows.append([staleness, f"{statistics.fmean(age for _, age in of):.2f}", *cells])
    text = heading("What staleness costs in learning")
    text += f"""
The quickstart with 70 steps, {seeds} seeds, sampled in the process: accuracy on held-out problems after so
many steps, mean ± standard error over seeds. age: of the tokens that were learnt from, in steps.

"""
    return text + table(["η", "age", *(f"step {step}" for step in steps)], rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
