"""Run the paper's ladder and a setting for each technique, at several seeds, and write tables and plots.

python benchmarks/ladder/run.py [seeds, default 3] [experiment …]

Each run is `dapo train` in one process, as many at once as there are cores. What has run is kept in
runs/ladder (DAPO_LADDER: elsewhere), and is not run again: the command goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import report
from record import ROOT, commit, write_whole
from settings import EXPERIMENTS, Experiment

HERE = Path(__file__).parent
KEPT = Path(os.environ.get("DAPO_LADDER", ROOT / "runs/ladder"))
FIRST_SEED = 101  # settings were found with others


def options_of(experiment: Experiment, arm: str) -> list[str]:
    """Return what `dapo train` is called with, but for the seed and the run's directory."""
    options = ["examples/arithmetic/config.yaml", "benchmarks/ladder/common.yaml"]
    if experiment.base:
        options.append(f"policy.model={KEPT / 'bases' / experiment.base}")
    if experiment.num_prompts is not None:
        options.append(f"data.train={KEPT / f'first_{experiment.num_prompts}.jsonl'}")
    return [*options, *experiment.shared, *experiment.arms[arm]]


def prepare(experiments: Sequence[Experiment]) -> None:
    """Make the bases and the finite sets that are not there."""
    for experiment in experiments:
        base = KEPT / "bases" / experiment.base
        if experiment.base and not base.exists():
            partial = base.with_name(f".{experiment.base}")
            shutil.rmtree(partial, ignore_errors=True)
            subprocess.run([sys.executable, HERE / "bases.py", experiment.base, partial], check=True)
            partial.rename(base)
        if experiment.num_prompts is not None:
            rows = (ROOT / "examples/arithmetic/data/train.jsonl").read_text().splitlines(keepends=True)
            KEPT.mkdir(parents=True, exist_ok=True)
            write_whole(
                KEPT / f"first_{experiment.num_prompts}.jsonl", "".join(rows[: experiment.num_prompts])
            )


def run(name: str, arm: str, seed: int) -> report.Run:
    """Train, unless the same options have been trained with; return metrics, CPU and wall seconds."""
    options = options_of(EXPERIMENTS[name], arm)
    directory = KEPT / name / arm.replace(" ", "_") / str(seed)
    done = directory / "done.json"
    files = "".join((ROOT / option).read_text() for option in options if option.endswith(".yaml"))
    asked = {"options": options, "files": files}
    if done.exists():
        kept = json.loads(done.read_text())
        if kept["asked"] == asked:
            return report.Run(**kept["run"])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "dapo", "train", *options, f"run.dir={directory}", f"run.seed={seed}"]
    start = time.perf_counter()
    with (directory / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (directory / "output").read_text().splitlines()[-1:]
        sys.exit(f"{name}, {arm}, seed {seed}: {' '.join(last)}; all of it: {directory / 'output'}")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    seconds = time.perf_counter() - start
    wider = evaluate(options, EXPERIMENTS[name].wider, directory) if EXPERIMENTS[name].wider else {}
    found = report.Run(seed, rows, used.ru_utime + used.ru_stime, seconds, commit(), wider)
    write_whole(done, json.dumps({"asked": asked, "run": vars(found)}))
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    print(f"{name}, {arm}, seed {seed}: {found.seconds:.0f} s", flush=True)
    return found


def evaluate(options: Sequence[str], wider: Sequence[str], directory: Path) -> dict[str, float]:
    """Return accuracy, length and truncation of what was learnt, on held-out problems, with other options."""
    command = [sys.executable, "-m", "dapo", "eval", *options, *wider, f"run.dir={directory / 'wider'}"]
    subprocess.run(
        [*command, "--model", str(directory / "hf")],
        check=True, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    [scores] = json.loads((directory / "wider/eval.json").read_text())["models"].values()
    [found] = scores.values()
    return {"accuracy": found["mean"], "length": found["length"], "truncated": found["truncated"]}


def environment() -> dict[str, str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", HERE)))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def main(num_seeds: int, names: Sequence[str]) -> None:
    prepare([EXPERIMENTS[name] for name in names])
    seeds = range(FIRST_SEED, FIRST_SEED + num_seeds)
    for name in names:
        arms = EXPERIMENTS[name].arms
        keys = [(name, arm, seed) for seed in seeds for arm in arms]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = dict(zip(keys, pool.map(lambda key: run(*key), keys), strict=True))
        runs = {arm: [found[name, arm, seed] for seed in seeds] for arm in arms}
        report.write(name, EXPERIMENTS[name], runs)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    chosen = [argument for argument in sys.argv[1:] if not argument.isdigit()]
    main(numbers[0] if numbers else 3, chosen or list(EXPERIMENTS))
