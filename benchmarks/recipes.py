"""What the recipes do on the arithmetic example: accuracy, entropy, clips and lengths, over seeds.

python benchmarks/recipes.py [seeds, default 3]
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

CONFIG = "examples/arithmetic/config.yaml"
RECIPES = ("paper", "grpo", "dr_grpo", "scalerl", "gspo")
OWN = {"scalerl": ["rollout.max_staleness=8"]}


def run(recipe: str, seed: int) -> dict[str, float]:
    """Train; return the last accuracy and means over the steps."""
    with tempfile.TemporaryDirectory() as directory:
        files = [f"examples/recipes/{recipe}.yaml", *OWN.get(recipe, [])] if recipe else []
        options = [*files, f"run.dir={directory}", f"run.seed={seed}", "run.save_every=1000"]
        command = [sys.executable, "-m", "dapo", "train", CONFIG, *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "policy/loss" in row]
    accuracies = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    names = ("policy/clip_low", "policy/clip_high", "policy/grad_norm")
    found = {name: statistics.fmean(row[name] for row in steps) for name in names}
    found |= {name: steps[-1][name] for name in ("policy/entropy", "rollout/length")}
    found["asked"] = sum(row["groups/asked"] for row in rows if "groups/asked" in row)
    return found | {"accuracy": accuracies[max(accuracies)], "half": accuracies[20]}


def main(seeds: str = "3") -> None:
    recipes = ("", *RECIPES)
    runs = [(recipe, seed) for seed in range(int(seeds)) for recipe in recipes]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(runs, pool.map(lambda key: run(*key), runs), strict=True))
    rows = []
    for recipe in recipes:
        of = [found[recipe, seed] for seed in range(int(seeds))]
        mean = {name: statistics.fmean(row[name] for row in of) for name in of[0]}
        rows.append([
            recipe or "(the config as it is)", f"{mean['half']:.3f}",
            average([row["accuracy"] for row in of]),
            f"{mean['policy/entropy']:.3f}", f"{mean['rollout/length']:.1f}",
            f"{mean['policy/clip_low']:.2%}", f"{mean['policy/clip_high']:.2%}",
            f"{mean['policy/grad_norm']:.2f}", f"{mean['asked']:.0f}",
        ])  # fmt: skip
    text = heading("Recipes on the arithmetic example")
    text += f"""
The quickstart with a file of examples/recipes/ on top, {seeds} seeds: 40 steps of four updates. Accuracy on
held-out problems after 20 and after 40 steps (mean ± standard error); entropy and response length of the last
step; fractions of clipped tokens and gradient norm, means over all steps; groups asked in all. The learning
rate and everything else are the example's, which were chosen with DAPO: the table shows that each method runs
and learns, not which is best. scalerl runs eight steps ahead.

"""
    header = ["recipe", "after 20", "after 40", "entropy", "tokens", "clipped low", "clipped high"]
    save("recipes.md", text + table([*header, "gradient norm", "groups asked"], rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
