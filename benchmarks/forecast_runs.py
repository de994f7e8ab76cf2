"""What a forecast saves in real runs: the arithmetic example with prompts that come again.

python benchmarks/forecast_runs.py [few | many | wide] [seeds, default 5]

Each way of asking trains the same model from the same prompts; held-out accuracy is measured outside the
clock. Runs alternate, seed by seed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers.arithmetic import accuracy, make
from record import RESULTS, average, heading, save, spread, table

ROOT = Path(__file__).parents[1]
EVERY = 5  # steps between evaluations
# prompts of the example, prompts beyond the model's reach (8 to 12 terms), steps, rounds of 32 prompts
TASKS = {"few": (160, 0, 60, 2), "many": (1000, 0, 125, 2), "wide": (500, 500, 100, 4)}
SKIP = ["rollout.forecast=skip", "rollout.forecast_floor=0.2", "rollout.forecast_sharpness=0.35"]
WAVE = ["rollout.first_wave=4", "rollout.stop_below=0.15"]
KINDS: dict[str, list[str]] = {
    "plain": [],
    "skip": SKIP,
    "first wave": WAVE,
    "both": SKIP + WAVE,
    "both, gentle": ["rollout.forecast=skip", "rollout.first_wave=4"],
}
Run = dict[str, list[float]]


def train(kind: str, task: str, seed: int, directory: Path) -> Run:
    """Return by step: generated tokens, kept groups, CPU seconds of sampling and of all, metrics of the
    forecast; by evaluation: CPU seconds until then, and accuracy.
    """
    from dapo.policy.megatron import Policy

    num_prompts, num_hard, steps, rounds = TASKS[task]
    lines = (ROOT / "examples/arithmetic/data/train.jsonl").read_text().splitlines(keepends=True)
    (directory / "some.jsonl").write_text("".join(lines[:num_prompts] + hard(num_hard)))
    options = [
        f"data.train={directory / 'some.jsonl'}", f"rollout.max_rounds={rounds}",
        "rollout.max_empty_steps=1000", *KINDS[kind],
    ]  # fmt: skip
    config, mesh, rollouts, sets = make(seed, options, str(directory / "run"))
    policy = Policy(config, mesh)
    run: Run = {name: [] for name in ("tokens", "kept", "sampling", "all", "edge", "at", "accuracy")}
    for step in range(steps + 1):
        if step % EVERY == 0:
            run["at"].append(sum(run["all"]))
            run["accuracy"].append(accuracy(rollouts, sets, policy.weights()))
        if step == steps:
            break
        rollouts.load_weights(policy.weights(), version=step)
        start = time.process_time()
        [share] = rollouts.next_batch(step)
        run["sampling"].append(time.process_time() - start)
        placed = policy.place(share.batch(config.parallel, 0))
        policy.score(placed)
        for minibatch in placed.minibatches:
            policy.update(minibatch)
        run["all"].append(time.process_time() - start)
        run["tokens"].append(share.metrics["rollout/tokens"])
        run["kept"].append(share.metrics["groups/kept"])
        for name, value in share.metrics.items():
            if name.startswith("forecast/") or name in ("groups/skipped", "groups/stopped"):
                run.setdefault(name, []).append(value)
    return run


def hard(count: int) -> list[str]:
    """Return rows of chain sums with 8 to 12 terms: no worked answer fits into the example's 64 tokens."""
    random = np.random.default_rng(0)
    rows: dict[str, str] = {}
    while len(rows) < count:
        terms = random.integers(1, 10, random.integers(8, 13)).tolist()
        prompt = "+".join(map(str, terms)) + "="
        rows[prompt] = json.dumps({"prompt": prompt, "answer": str(sum(terms))}) + "\n"
    return list(rows.values())


def measured(kind: str, task: str, seed: int) -> Run:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    command = [sys.executable, __file__, "--worker", kind, task, str(seed)]
    out = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    found: Run = json.loads(out.splitlines()[-1])
    return found


def figures(run: Run, used: float) -> dict[str, float]:
    """Return what a run spent until it had used so many groups, and in the second half of these."""

    def spent(name: str, first: float = 0.0) -> float:
        groups = np.cumsum([0, *run["kept"]])
        total = np.cumsum([0, *run[name]])
        return float(np.interp(used, groups, total) - np.interp(first, groups, total))

    half = used / 2
    return {
        "tokens per used group": spent("tokens") / used,
        "tokens per used group, second half": spent("tokens", half) / half,
        "CPU s of sampling": spent("sampling"),
        "CPU s of sampling, second half": spent("sampling", half),
        "CPU s in all": spent("all"),
        "accuracy, last four evaluations": statistics.mean(run["accuracy"][-4:]),
    }


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw held-out accuracy by CPU seconds, the mean of seeds and its standard error, for each way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, some in runs.items():
        grid = np.linspace(0, min(run["at"][-1] for run in some), 80)
        curves = np.stack([np.interp(grid, run["at"], run["accuracy"]) for run in some])
        error = curves.std(0, ddof=1) / len(some) ** 0.5 if len(some) > 1 else 0 * grid
        [line] = axis.plot(grid, curves.mean(0), label=kind)
        axis.fill_between(
            grid, curves.mean(0) - error, curves.mean(0) + error, color=line.get_color(), alpha=0.15
        )
    axis.set(
        xlabel="CPU seconds of sampling and training", ylabel="held-out accuracy (mean ± standard error)"
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(runs: dict[str, list[Run]]) -> str:
    """Write a table: a row a figure, a column a way of asking, and below each plain ÷ this, seed by seed."""
    least = [min(sum(run["kept"]) for run in of_seed) for of_seed in zip(*runs.values(), strict=True)]
    found = {kind: [figures(*each) for each in zip(some, least, strict=True)] for kind, some in runs.items()}
    rows: list[list[object]] = [
        ["used groups in all", *(spread([sum(run["kept"]) for run in some], 0) for some in runs.values())]
    ]
    for name in found["plain"][0]:
        values = {kind: [each[name] for each in of_kind] for kind, of_kind in found.items()}
        if "accuracy" in name:
            rows.append([name, *map(average, values.values())])
            continue
        rows.append([name, *(spread(of_kind, 0 if "tokens" in name else 1) for of_kind in values.values())])
        pairs = (zip(values["plain"], of_kind, strict=True) for of_kind in values.values())
        rows.append(["plain ÷ this", *(spread([a / b for a, b in each], 2) for each in pairs)])
    return table(["", *runs], rows)


def main(task: str = "few", seeds: str = "5") -> None:
    num_prompts, num_hard, steps, rounds = TASKS[task]
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    for seed in range(1, int(seeds) + 1):
        for kind in KINDS:
            runs[kind].append(measured(kind, task, seed))
            print(task, seed, kind, flush=True)
    name = f"forecast_runs_{task}"
    what = f"{num_prompts} of the example's prompts" + (
        f" and {num_hard} beyond the model's reach" if num_hard else ""
    )
    text = heading(f"Forecasts in real runs: {what}")
    text += f"""
{seeds} seeds, {steps} steps of 16 mixed groups of 8 samples, at most the samples of {32 * rounds} groups a
step; embedded engine, one thread. Median (min–max) over seeds, each up to the number of used groups that all
its runs reached; "second half" is of these groups; ratios are of the same seed. Sampling is everything
between weights and batch: generation, rewards, the forecast. Accuracy, mean@4 on 200 held-out problems, is at
equal steps: mean and standard error. skip: {" ".join(SKIP)}. first wave: {" ".join(WAVE)}. gentle: the
defaults of these options.

"""
    text += report(runs) + f"\n![Accuracy by CPU seconds]({name}.png)\n"
    plot(runs, RESULTS / f"{name}.png")
    save(f"{name}.md", text)


def worker(kind: str, task: str, seed: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        found: Any = train(kind, task, int(seed), Path(directory))
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
