"""Run the paper's ladder and a setting for each technique, at several seeds, and write tables and plots.

python benchmarks/ladder/run.py [seeds, default 5] [experiment …] [60m] [section.key=value …]

Each run is `dapo train` in one process, as many at once as there are cores, on a GPU one. What has run is
kept in runs/ladder (DAPO_LADDER: elsewhere), and is not run again: the command goes on where it was stopped.
60m: with models of 59 million parameters instead of the example's 75,904. Options are for all runs. With
options, or fewer seeds than five, tables and plots go to runs/ladder/short, else to benchmarks/results.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import bases
import report
from record import ROOT, commit, write_whole
from settings import EXPERIMENTS, Experiment

HERE = Path(__file__).parent
KEPT = Path(os.environ.get("DAPO_LADDER", ROOT / "runs/ladder")).absolute()
FIRST_SEED, SEEDS = 101, 5  # settings were looked for with other seeds; as many are published
EXAMPLE = ROOT / "examples/arithmetic"
# a base is made of these
RECIPE = [
    HERE / "bases.py", EXAMPLE / "make_base.py", EXAMPLE / "task.py", EXAMPLE / "base/model.safetensors"
]  # fmt: skip


@dataclass(frozen=True)
class Ladder:
    """The same for all runs."""

    size: str = bases.EXAMPLE
    overrides: Sequence[str] = ()

    @property
    def home(self) -> Path:
        return KEPT if self.size == bases.EXAMPLE else KEPT / self.size

    @property
    def directory(self) -> Path:
        """Where runs are kept; a trial with other options leaves the others alone."""
        return self.home / "short" if self.overrides else self.home

    def base_of(self, experiment: Experiment) -> Path:
        """Return the directory of an experiment's base; without one of its own that of the example's kind."""
        if not experiment.base and self.size == bases.EXAMPLE:
            return EXAMPLE / "base"
        return self.home / "bases" / (experiment.base or bases.EXAMPLE)


def options_of(ladder: Ladder, experiment: Experiment, arm: str) -> list[str]:
    """Return what `dapo train` is called with, but for the seed and the run's directory."""
    options = ["examples/arithmetic/config.yaml", "benchmarks/ladder/common.yaml"]
    if ladder.size != bases.EXAMPLE:
        options.append("benchmarks/ladder/larger.yaml")
    if experiment.base or ladder.size != bases.EXAMPLE:
        options.append(f"policy.model={ladder.base_of(experiment)}")
    if experiment.num_prompts is not None:
        options.append(f"data.train={KEPT / f'first_{experiment.num_prompts}.jsonl'}")
    return [*options, *experiment.shared, *experiment.arms[arm], *ladder.overrides]


def prepare(ladder: Ladder, experiments: Sequence[Experiment]) -> None:
    """Make the finite sets, and the bases that are not there or were made of other code."""
    for experiment in experiments:
        base, recipe = ladder.base_of(experiment), digest(RECIPE)
        if base.is_relative_to(KEPT) and read(base / "recipe") != recipe:
            partial = base.with_name(f".{base.name}")
            for directory in (partial, base):
                shutil.rmtree(directory, ignore_errors=True)
            command = [sys.executable, HERE / "bases.py", experiment.base, partial, ladder.size]
            subprocess.run(command, check=True)
            (partial / "recipe").write_text(recipe)
            partial.rename(base)
        if experiment.num_prompts is not None:
            rows = (EXAMPLE / "data/train.jsonl").read_text().splitlines(keepends=True)
            KEPT.mkdir(parents=True, exist_ok=True)
            write_whole(
                KEPT / f"first_{experiment.num_prompts}.jsonl", "".join(rows[: experiment.num_prompts])
            )


def asked_of(ladder: Ladder, experiment: Experiment, arm: str) -> dict[str, str]:
    """Return what a run depends on besides dapo's code: its options, and digests of what they name."""
    options = options_of(ladder, experiment, arm)
    base = ladder.base_of(experiment)
    inputs = [*sorted((EXAMPLE / "data").glob("*.jsonl")), HERE / "rewards.py", base / "model.safetensors"]
    inputs += [base / name for name in ("config.json", "tokenizer.json")]
    return {
        "options": " ".join(options).replace(str(KEPT), "runs"),  # the same where the checkout is another
        "files": digest(ROOT / option for option in options if option.endswith(".yaml")),
        "inputs": digest(inputs),
    }


def digest(paths: Iterable[Path]) -> str:
    each = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths]
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def read(path: Path) -> str:
    """Return a file's text; "" if there is none."""
    return path.read_text() if path.exists() else ""


def run(ladder: Ladder, name: str, arm: str, seed: int) -> report.Run:
    """Train, unless the same has been trained; return metrics, CPU and wall seconds."""
    experiment = EXPERIMENTS[name]
    directory = ladder.directory / name / arm.replace(" ", "_") / str(seed)
    done, asked = directory / "done.json", asked_of(ladder, experiment, arm)
    kept = json.loads(read(done) or "{}")
    if kept.get("asked") != asked:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        kept = {
            "asked": asked,
            "run": train(f"{name}, {arm}", seed, options_of(ladder, experiment, arm), directory),
        }
        write_whole(done, json.dumps(kept))
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    if experiment.wider and kept.get("wider") != [*experiment.wider]:
        kept["run"]["wider"] = evaluate(options_of(ladder, experiment, arm), experiment.wider, directory)
        write_whole(done, json.dumps(kept | {"wider": [*experiment.wider]}))
    return report.Run(**kept["run"])


def train(name: str, seed: int, options: Sequence[str], directory: Path) -> dict[str, Any]:
    """Run `dapo train` to its end, or end with what went wrong; return the fields of a report.Run."""
    command = [sys.executable, "-m", "dapo", "train", *options, f"run.dir={directory}", f"run.seed={seed}"]
    start, begun_at = time.perf_counter(), commit()
    with (directory / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode or not (directory / "hf").exists():  # a run that was stopped exports nothing
        last = (directory / "output").read_text().splitlines()[-1:]
        sys.exit(f"{name}, seed {seed}: {' '.join(last)}; all of it: {directory / 'output'}")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    print(f"{name}, seed {seed}: {seconds:.0f} s", flush=True)
    cpu_seconds = used.ru_utime + used.ru_stime
    return {"seed": seed, "rows": rows, "cpu_seconds": cpu_seconds, "seconds": seconds, "commit": begun_at}


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


def main(ladder: Ladder, num_seeds: int, names: Sequence[str]) -> None:
    import torch

    prepare(ladder, [EXPERIMENTS[name] for name in names])
    seeds = range(FIRST_SEED, FIRST_SEED + num_seeds)
    for name in names:
        arms = EXPERIMENTS[name].arms
        keys = [(name, arm, seed) for seed in seeds for arm in arms]
        with ThreadPoolExecutor(1 if torch.cuda.is_available() else os.cpu_count()) as pool:
            try:
                found = dict(zip(keys, pool.map(lambda key: run(ladder, *key), keys), strict=True))
            finally:  # a failure ends the others that have not begun
                pool.shutdown(cancel_futures=True)
        runs = {arm: [found[name, arm, seed] for seed in seeds] for arm in arms}
        place = name if ladder.size == bases.EXAMPLE else f"{ladder.size}_{name}"
        is_short = num_seeds < SEEDS or ladder.overrides
        target = ladder.home / "short" if is_short else report.RESULTS
        report.write(place, EXPERIMENTS[name], runs, ladder.overrides, target)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    numbers = [int(argument) for argument in arguments if argument.isdigit()]
    sizes = [argument for argument in arguments if argument in bases.SIZES]
    overrides = [argument for argument in arguments if "=" in argument]
    chosen = [argument for argument in arguments if argument in EXPERIMENTS]
    if unknown := set(arguments) - {*map(str, numbers), *sizes, *overrides, *chosen}:
        sys.exit(f"{', '.join(unknown)}: neither an experiment ({', '.join(EXPERIMENTS)}) nor a size")
    if 0 in numbers:
        sys.exit("0 seeds: expected at least 1")
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(
                f"another ladder runs in {KEPT}; wait for its end, or set DAPO_LADDER to another directory"
            )
        ladder = Ladder(*sizes[:1], overrides=overrides)
        main(ladder, numbers[0] if numbers else SEEDS, chosen or list(EXPERIMENTS))
