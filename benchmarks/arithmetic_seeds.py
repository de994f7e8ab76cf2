"""Does it learn every time? The quickstart's run for several seeds: accuracy on held-out problems, and time.

python benchmarks/arithmetic_seeds.py [seeds] [processes] [engine.kind=sglang engine.python=… …]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import heading, save, table

ROOT = Path(__file__).parents[1]


def run(
    seed: int, processes: int, directory: Path, overrides: list[str]
) -> tuple[dict[int, float], float, dict[str, float]]:
    """Train; return accuracy by step, wall seconds from launch to end, and the last step's metrics."""
    dapo = f"-m dapo train examples/arithmetic/config.yaml --nproc {processes}"
    command = [sys.executable, *dapo.split()]
    options = [f"run.seed={seed}", f"run.dir={directory}", f"parallel.tensor={processes}", *overrides]
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *options], check=True, cwd=ROOT, env=environment)
    seconds = time.perf_counter() - start
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    accuracy = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    steps = [row for row in rows if "policy/entropy" in row]
    return accuracy, seconds, steps[-1] | {"worst mismatch": max(row["policy/mismatch"] for row in steps)}


def main(num_seeds: int, processes: int, overrides: list[str]) -> None:
    rows = []
    for seed in range(num_seeds):
        with tempfile.TemporaryDirectory() as directory:
            accuracy, seconds, last = run(seed, processes, Path(directory), overrides)
        steps = sorted(accuracy)
        rest = f"{last['policy/entropy']:.3f}", f"{last['worst mismatch']:.1e}", f"{seconds:.0f}"
        rows.append([seed, *(f"{accuracy[step]:.3f}" for step in steps), *rest])
    text = heading("The arithmetic example, seed by seed")
    text += "\nmean@k on held-out problems (`eval/accuracy`) after so many steps; "
    text += f"{processes} processes, tensor parallel; "
    text += "entropy of the last step; the largest mismatch of any step, mean |old − behavior log-prob|; "
    text += "wall seconds from launch to end, evaluation and export included.\n\n"
    name = "arithmetic_seeds_sglang.md" if "engine.kind=sglang" in overrides else "arithmetic_seeds.md"
    header = ["seed", *(f"step {step}" for step in steps), "entropy", "mismatch", "seconds"]
    save(name, text + table(header, rows))


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:] if "=" not in argument]
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    main(*[*numbers, *[3, 2][len(numbers) :]], overrides=overrides)
