"""Is a run with run.deterministic the same when it is repeated? The quickstart, each way twice, on a CPU.

python benchmarks/deterministic.py PYTHON [steps, default 4]

PYTHON has SGLang (`make sglang-cpu` prints one).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from record import ROOT, heading, save, table

from dapo import verify
from dapo.rollout import dump

COLUMNS = {name: dump.COLUMNS[name] for name in ("group", "index", "tokens", "behavior_logprobs")}

[DRAWS] = [what for what in verify.SAMPLED if what.startswith("draws")]


def train(directory: Path, steps: int, nproc: int, options: list[str]) -> None:
    always = [f"run.dir={directory}", f"run.steps={steps}", "rollout.dump_share=1.0", "eval.data=null"]
    command = [sys.executable, "-m", "dapo", "train", "examples/arithmetic/config.yaml"]
    command += ["--nproc", str(nproc), "run.deterministic=true", *always, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def samples(run: Path, step: int) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    rows = dump.read_rows(dump.path_of(run / "rollouts", step), COLUMNS)
    return {
        (row["group"], row["index"]): (np.array(row["tokens"]), np.array(row["behavior_logprobs"]))
        for row in rows
    }


def compare(a: Path, b: Path, steps: int) -> dict[str, Any]:
    """Compare the samples of step 0, which the same weights draw; then the whole runs.

    Log-probs are compared as far as tokens are equal: those of one text.
    """
    first, second = samples(a, 0), samples(b, 0)
    gaps, num_same = [np.zeros(0)], 0
    common = first.keys() & second.keys()
    for key in common:
        (tokens, logprobs), (others, other_logprobs) = first[key], second[key]
        length = min(len(tokens), len(others))
        unlike = np.flatnonzero(tokens[:length] != others[:length])
        length = int(unlike[0]) if len(unlike) else length
        gaps.append(np.abs(logprobs[:length] - other_logprobs[:length]))
        num_same += len(tokens) == len(others) and not len(unlike)
    gap = np.concatenate(gaps)
    findings = {finding.what: finding.gap for finding in verify.runs(a, b, 0, steps)}
    return {
        "same": f"{num_same} of {len(first)}",
        "logprobs": f"{int((gap == 0).sum())} of {len(gap)}",
        "gap": float(gap.max()) if len(gap) else float("nan"),
        "findings": findings,
    }


def main(python: str, steps: str = "4") -> None:
    num_steps = int(steps)
    server = ["engine.kind=sglang", f"engine.python={python}"]
    alone = ["engine.max_concurrent=1", "engine.sglang.random-seed=1", "rollout.prompts_per_round=16"]
    few = ["rollout.prompts_per_step=8", "rollout.group_size=4"]
    ways: list[tuple[str, int, list[str]]] = [
        ("embedded engine, two data-parallel ranks", 2, []),
        ("embedded engine, two tensor-parallel ranks", 2, ["parallel.tensor=2"]),
        ("SGLang, 256 requests at a time", 1, server),
        ("SGLang, one request at a time, --random-seed 1", 1, [*server, *alone, *few]),
        (
            "the same without dynamic sampling: no request is cancelled",
            1,
            [*server, *alone, *few, "rollout.dynamic_sampling=false"],
        ),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for number, (name, nproc, options) in enumerate(ways):
            runs = [folder / f"{number}-{which}" for which in "ab"]
            for run in runs:
                train(run, num_steps, nproc, options)
            rows.append(row(name, compare(*runs, num_steps), num_steps))
            print(rows[-1], flush=True)
        replay = [f"rollout.replay={folder / '2-a' / 'rollouts'}"]  # SGLang's
        runs = [folder / f"replay-{which}" for which in "ab"]
        for run in runs:
            train(run, num_steps, 2, replay)
        found = compare(*runs, num_steps)
        rows.append(row("SGLang's samples of one run, learnt from twice by two ranks", found, num_steps))
    save("deterministic.md", report(rows, num_steps))


def row(name: str, found: dict[str, Any], steps: int) -> list[str]:
    findings = found["findings"]
    same_steps = f"{steps - round(findings[DRAWS] * steps)} of {steps}"
    gaps = [findings["loss"], findings["parameters"], findings["moments"]]
    shown = ["equal" if gap == 0 else f"{gap:.1e}" for gap in gaps]
    return [name, found["same"], found["logprobs"], f"{found['gap']:.1e}", same_steps, *shown]


def report(rows: list[list[str]], steps: int) -> str:
    text = heading("Two runs of the same command with run.deterministic")
    text += f"""
The quickstart, {steps} steps, one seed, each way twice; on a CPU, where SGLang has no deterministic
inference. Samples of step 0 are drawn by the same weights: how many have the same tokens, and how many
log-probs are equal, as far as the tokens are. Then the steps all of whose samples are equal. Loss: the
largest difference of a step. Parameters and moments after the last step: the norm of the difference relative
to theirs. A server on a CPU draws from one generator, so what it draws depends on all it has drawn before,
for requests that are cancelled at the end of a step too.

"""
    names = ["run", "equal samples", "equal log-probs", "largest difference"]
    names += ["steps with equal samples", "loss", "parameters", "moments"]
    return text + table(names, rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
