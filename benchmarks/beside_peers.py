"""The arithmetic example by dapo, by TRL's GRPOTrainer and by ms-swift's GRPO trainer, all with DAPO's loss.

All start from the same model, with 16 prompts of 8 samples a step, four updates, the same reward, one
thread, and the recipe's optimizer. Each run is a process of its own, of its trainer's environment, which is
made where it is absent. Runs alternate, seed by seed. Weights are saved outside the clock; later one and the
same code, ours, measures their held-out accuracy.

python benchmarks/beside_peers.py [seeds, default 5] [steps, default 40]
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, average, difference, heading, keep, mean_and_error, save, spread, table

ROOT = Path(__file__).parents[1]
EVERY, GOAL, WARM_UP = 5, 0.85, 3  # steps between evaluations; accuracy to reach; steps that do not count
OURS = "dapo, equal work"
KINDS: dict[str, tuple[str, list[str]]] = {  # name → environment ("": ours) and options
    OURS: ("", ["rollout.dynamic_sampling=false"]),
    "TRL": ("trl", []),
    "ms-swift": ("ms-swift", []),
    "dapo, as configured": ("", []),
    "ms-swift, dynamic": ("ms-swift", ["dynamic"]),
}
FILES = {"": "by_dapo", "trl": "by_trl", "ms-swift": "by_swift"}
Run = dict[str, Any]  # by step: cpu, wall, tokens; by evaluation: at, accuracy; before, peak, versions


def python_of(environment: str) -> str:
    sys.path.insert(0, str(ROOT))
    from peers import environments

    return environments.python_of(environment) if environment else sys.executable


def call(python: str, *arguments: str) -> str:
    """Run a module of `peers` in a process and return what it prints."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "benchmarks")))
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | threads | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", *arguments]
    return subprocess.run(
        command, check=True, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ).stdout


def measured(kind: str, seed: int, steps: int) -> Run:
    environment, options = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        numbers = str(seed), str(steps), str(EVERY)
        asked = call(sys.executable, "peers.arithmetic", "task", *numbers, folder, *options)
        path = Path(folder) / "task.json"
        path.write_text(asked.splitlines()[-1])
        call(python_of(environment), f"peers.{FILES[environment]}", str(path))
        run: Run = json.loads((Path(folder) / "measured.json").read_text())
        found = call(sys.executable, "peers.arithmetic", "accuracy", str(seed), folder)
    run["accuracy"] = json.loads(found.splitlines()[-1])
    spent = np.cumsum([0.0, *run["cpu"]])
    run["at"] = spent[::EVERY].tolist()
    return run


def until(run: Run) -> float:
    """Return CPU seconds until the held-out accuracy is GOAL, by a straight line between two evaluations."""
    pairs = list(zip(run["at"], run["accuracy"], strict=True))
    for (start, low), (end, high) in itertools.pairwise(pairs):
        if high >= GOAL:
            return float(start + (end - start) * max(0.0, GOAL - low) / max(high - low, 1e-9))
    return float("inf")


def figures(run: Run) -> dict[str, tuple[float, int]]:
    """Return a run's figures by name, each with the number of digits to write."""
    cpu, wall, tokens = (run[name][WARM_UP:] for name in ("cpu", "wall", "tokens"))
    return {
        "wall s a step": (statistics.median(wall), 3),
        "CPU s a step": (statistics.median(cpu), 3),
        "generated tokens a step": (statistics.mean(tokens), 0),
        "CPU µs per generated token": (1e6 * sum(cpu) / sum(tokens), 1),
        "peak memory, MB": (run["peak"], 0),
        "of this, before the first step": (run["before"], 0),
        f"CPU s until accuracy {GOAL}": (until(run), 2),
        "accuracy at the end": (run["accuracy"][-1], 3),
    }


def accuracies(runs: Sequence[Run], evaluation: int) -> list[float]:
    return [run["accuracy"][evaluation] for run in runs]


def accuracies_at(runs: Sequence[Run], seconds: float) -> list[float] | None:
    """Return each run's accuracy after so many CPU seconds, by a straight line between two evaluations; None
    if a run was over by then.
    """
    if any(seconds > run["at"][-1] for run in runs):
        return None
    return [float(np.interp(seconds, run["at"], run["accuracy"])) for run in runs]


def grid(runs: dict[str, list[Run]], count: int = 8) -> list[float]:
    """Return round CPU seconds, about so many, up to the end of the longest way."""
    last = max(min(run["at"][-1] for run in some) for some in runs.values())
    step = next(
        step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if last / step <= count + 1
    )
    return [step * i for i in range(1, int(last / step + 1e-9) + 1)]


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw held-out accuracy by step and by CPU seconds: the mean of seeds and its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for kind, some in runs.items():
        steps = [float(EVERY * i) for i in range(len(some[0]["accuracy"]))]
        draw(axes[0], kind, steps, list(zip(*(run["accuracy"] for run in some), strict=True)))
        seconds = np.linspace(0, min(run["at"][-1] for run in some), 80).tolist()
        draw(axes[1], kind, seconds, [accuracies_at(some, each) or [] for each in seconds])
    axes[0].set(xlabel="step", ylabel="held-out accuracy (mean ± standard error)")
    axes[1].set(xlabel="CPU seconds of sampling and training")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw(axis: Any, kind: str, places: list[float], values: Sequence[Sequence[float]]) -> None:
    means, errors = np.nan_to_num([mean_and_error(each) for each in values]).T
    dashes = "--" if (KINDS[kind][1] == [] and not KINDS[kind][0]) or "dynamic" in KINDS[kind][1] else "-"
    colour = f"C{list(FILES).index(KINDS[kind][0])}"
    axis.plot(places, means, dashes, color=colour, label=kind)
    axis.fill_between(places, means - errors, means + errors, color=colour, alpha=0.15, linewidth=0)


def report(runs: dict[str, list[Run]], seeds: int, steps: int, planned: tuple[int, int]) -> str:
    """Write the tables: figures, ratios of the same seed, accuracy by step, accuracy by CPU seconds."""
    found = {kind: [figures(run) for run in some] for kind, some in runs.items()}
    rows = []
    for name, (_, digits) in next(iter(found.values()))[0].items():
        rows.append([name, *(spread([each[name][0] for each in some], digits) for some in found.values())])
    text = heading("The arithmetic example beside TRL and ms-swift")
    if (seeds, steps) < (5, 40):
        text += f"\n**A rehearsal, {seeds} seed(s) and {steps} steps: no result.**\n"
    elif (seeds, steps) != planned:
        text += f"\n**Not finished: {seeds} of {planned[0]} seeds.**\n"
    text += about(runs, seeds, steps) + table(["", *runs], rows)
    text += "\nOurs ÷ theirs, seed by seed: median (min–max).\n\n" + ratios(found)
    text += "\nHeld-out accuracy by step, mean ± standard error.\n\n"
    by_step = [
        [EVERY * i, *(average(accuracies(some, i)) for some in runs.values())]
        for i in range(len(next(iter(runs.values()))[0]["accuracy"]))
    ]
    text += table(["step", *runs], by_step)
    text += "\nThe same, ours less theirs, seed by seed; in brackets the 95 % interval, by Student's t.\n\n"
    names = ("TRL", "ms-swift")
    less = [
        [EVERY * i, *(difference(*(accuracies(runs[kind], i) for kind in (OURS, name))) for name in names)]
        for i in range(1, len(next(iter(runs.values()))[0]["accuracy"]))
    ]
    text += table(["step", *(f"{OURS} − {name}" for name in names)], less)
    text += "\nHeld-out accuracy by CPU seconds, mean ± standard error; –: some run was over by then.\n\n"
    by_second = [
        [f"{each:g}", *(average(accuracies_at(some, each)) for some in runs.values())] for each in grid(runs)
    ]
    text += table(["CPU s", *runs], by_second)
    return text + "\n![Accuracy by step and by CPU seconds](beside_peers.png)\n"


def ratios(found: dict[str, list[dict[str, tuple[float, int]]]]) -> str:
    pairs = [
        (OURS, "TRL"),
        (OURS, "ms-swift"),
        ("dapo, as configured", "TRL"),
        ("dapo, as configured", "ms-swift, dynamic"),
    ]
    rows = []
    for name in ("wall s a step", "CPU s a step", "CPU µs per generated token", "peak memory, MB"):
        rows.append(
            [
                name,
                *(
                    ratio(found[ours], found[theirs], lambda each, n=name: each[n][0])
                    for ours, theirs in pairs
                ),
            ]
        )
    return table(["", *(f"{ours} ÷ {theirs}" for ours, theirs in pairs)], rows)


def ratio(ours: Sequence[Any], theirs: Sequence[Any], figure: Callable[[Any], float]) -> str:
    return spread([figure(a) / figure(b) for a, b in zip(ours, theirs, strict=True)], 2)


def about(runs: dict[str, list[Run]], seeds: int, steps: int) -> str:
    versions = "; ".join(
        f"{kind}: " + ", ".join(f"{name} {version}" for name, version in some[0]["versions"].items())
        for kind, some in runs.items()
        if kind in (OURS, "TRL", "ms-swift")
    )
    return f"""
{seeds} seeds, {steps} steps of 16 prompts × 8 samples and four updates; AdamW, learning rate 2e-4,
temperature 1, at most 64 new tokens, clipping 0.2 and 0.28, no KL term, one thread, float32. {versions};
all with the same torch. Median (min–max) over seeds, without the first {WARM_UP} steps for times and tokens.

- Equal work: 16 groups a step, as TRL and ms-swift take; these three ask the same prompts in the same order.
- As configured: dapo samples until 16 groups are mixed, of at most 64. ms-swift, dynamic: it, too, has up to
  64 prompts for 16 groups whose rewards differ; if they do not suffice it samples 16 prompts more, without
  use, and trains on the first 16 as they are. Its further prompts come from a second pass over the prompts,
  in another order, so it shuffles both passes itself; and with four updates a step this second pass hands
  out the same 16 prompts four times in a row. Only this trainer's prompts differ from the others'.
- dapo's sampler, scoring and policy are called as `train()` calls them, in one process; its metrics' files,
  logs and checkpoints are not written, and neither are the others'. Its CPU time is a little more than the
  wall clock's: threads that wait for rewards and samples work beside the main one.
- TRL and ms-swift as fast as they were found to be: sdpa, static cache, fused AdamW, no gradient
  checkpointing, no progress bar. ms-swift decodes samples at each token to look for stop words; no option
  turns this off. Beforehand, in two runs each of 8 steps on a machine that did other work, ms-swift was no
  faster with another cache or AdamW beyond noise, and 5 % and 0 % faster without that decoding.
- ms-swift's second Adam beta is set to 0.999, as of the others; its default is 0.95. It divides an update's
  loss by the tokens of all four updates of the step, so its gradients are about a quarter of TRL's; AdamW
  undoes this, and the bound of the norm is a quarter, too.
- A step's seconds are all of sampling, rewards and updates, by `process_time` (all threads of the process)
  and by the wall clock. Saving weights for the evaluation is outside.
- Memory is the process's resident memory: its maximum since its start (VmHWM), so with Python, torch and all
  that the trainer imports, and what of it was there before the first step. Evaluation happens in another
  process.
- Generated tokens count all samples, also those that are not trained on. inf: not reached.
- Accuracy is mean@4 on 200 problems, measured by dapo's code for all.

"""


def main(seeds: int, steps: int) -> None:
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    for environment in FILES:
        python_of(environment)
    for seed in range(1, seeds + 1):
        shift = seed % len(KINDS)  # none is always the first
        for kind in [*list(KINDS)[shift:], *list(KINDS)[:shift]]:
            runs[kind].append(measured(kind, seed, steps))
            print(f"seed {seed}: {kind}, {runs[kind][-1]['accuracy'][-1]:.3f}", file=sys.stderr, flush=True)
        keep("beside_peers.md", report(runs, seed, steps, (seeds, steps)))
        plot(runs, RESULTS / "beside_peers.png")
    save("beside_peers.md", report(runs, seeds, steps, (seeds, steps)))


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    main(*[*numbers, *[5, 40][len(numbers) :]])
