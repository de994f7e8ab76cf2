"""Generating while the policy learns, with a real SGLang server on this machine: the quickstart with
rollout.max_staleness 0, 1 and 2, by turns.

python benchmarks/ahead_real.py PYTHON [seeds, default 5]

PYTHON has SGLang (`make sglang-cpu` prints one).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import ROOT, average, heading, save, spread, table

BOUNDS = (0, 1, 2)
WARM_UP = 3  # steps


def run(python: str, staleness: int, seed: int, directory: Path) -> dict[str, float]:
    """Train; return means over the steps without evaluation, and the final accuracy."""
    options = [
        f"run.dir={directory}", f"run.seed={seed}", "run.save_every=1000", "engine.kind=sglang",
        f"engine.python={python}", f"rollout.max_staleness={staleness}",
    ]  # fmt: skip
    command = [sys.executable, "-m", "dapo", "train", "examples/arithmetic/config.yaml", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"] >= WARM_UP and "eval/accuracy" not in row]
    names = {
        "seconds": "time/step", "waited": "time/rollout", "update": "time/update", "sync": "time/sync",
        "overlap": "perf/overlap", "idle": "perf/server_idle", "age": "rollout/staleness",
        "ess": "policy/ess",
        "overflow": "groups/overflow", "kept": "groups/kept", "probe": "policy/mismatch_probe",
    }  # fmt: skip
    found = {name: statistics.fmean(row.get(metric, 0.0) for row in steps) for name, metric in names.items()}
    oldest = max(row.get("rollout/staleness_max", 0.0) for row in steps)
    return found | {"accuracy": rows[-1]["eval/accuracy"], "oldest": oldest}


def main(python: str, seeds: str = "5") -> None:
    found: dict[int, list[dict[str, float]]] = {staleness: [] for staleness in BOUNDS}
    for seed in range(int(seeds)):
        for staleness in BOUNDS if seed % 2 else BOUNDS[::-1]:
            with tempfile.TemporaryDirectory() as directory:
                found[staleness].append(run(python, staleness, seed, Path(directory)))
            print(seed, staleness, found[staleness][-1], flush=True)
    save("ahead_real.md", report(found))


def report(found: dict[int, list[dict[str, float]]]) -> str:
    text = heading("Generating while the policy learns, with a real server")
    text += f"""
The quickstart, {len(found[0])} seeds, with one SGLang server on the CPU, one rank; the server and the trainer
have a core each. Runs alternate. Seconds are means over a run's steps without evaluation; median (range) over
seeds. Accuracy on held-out problems after the last step: mean ± standard error.

"""
    names = ["η", "seconds a step", "η = 0 / this", "waited for groups, s", "updates, s", "weights, s"]
    names += ["overlap", "server idle, s", "age", "oldest", "ESS", "overflow", "mismatch, probe", "accuracy"]
    rows = []
    for staleness, runs in found.items():
        ratios = [p["seconds"] / r["seconds"] for p, r in zip(found[0], runs, strict=True)]
        columns = [[r[name] for r in runs] for name in ("seconds", "waited", "update", "sync")]
        rest = [statistics.median(r[name] for r in runs) for name in ("overlap", "idle", "age")]
        rows.append([
            staleness, spread(columns[0], 2), spread(ratios, 2), *(spread(c, 2) for c in columns[1:]),
            *(f"{value:.2f}" for value in rest), int(max(r["oldest"] for r in runs)),
            f"{statistics.median(r['ess'] for r in runs):.4f}",
            f"{sum(r['overflow'] for r in runs) / sum(r['kept'] for r in runs):.1%}",
            f"{statistics.median(r['probe'] for r in runs):.0e}",
            average([r["accuracy"] for r in runs]),
        ])  # fmt: skip
    return text + table(names, rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
