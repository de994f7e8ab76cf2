"""Measures where a step's time goes: the arithmetic recipe on one process and one thread.

It prints CPU seconds by phase, and the costliest operators.
python benchmarks/step_time.py [steps]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from record import heading, save, spread, table

from dapo import config as configs
from dapo.assemble import make_sampler
from dapo.mesh import Mesh
from dapo.policy.megatron import Policy

ROOT = Path(__file__).parents[1]
WARM_UP = 3
T = TypeVar("T")


def main(steps: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        config = configs.load(
            ROOT / "examples/arithmetic/config.yaml", [f"run.dir={directory}", "parallel.tensor=1"]
        )
        mesh = Mesh(config.parallel)
        sampler, _ = make_sampler(config, mesh)
        rollouts = sampler.rollouts
        policy = Policy(config, mesh)
        seconds = measure(policy, rollouts, steps)
    rows = [[phase, spread(values)] for phase, values in seconds.items()]
    text = heading("Step time: the arithmetic recipe on one process")
    text += (
        f"\nCPU seconds, median (min–max) of {steps} steps after {WARM_UP}; OMP threads 1; 16 groups of 8 "
        "samples, 4 updates a step.\n\n"
    )
    text += table(["phase", "CPU s"], rows) + "\n"
    text += "## Costliest operators of one step's policy part\n\nSelf CPU time, torch.profiler.\n\n" + table(
        ["operator", "calls", "ms"], profile(policy, rollouts)
    )
    save("step_time_cpu.md", text)


def measure(policy: Any, rollouts: Any, steps: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = defaultdict(list)

    def clocked(function: Callable[..., T], *args: Any) -> tuple[float, T]:
        start = time.process_time()
        result = function(*args)
        return time.process_time() - start, result

    for step in range(steps + WARM_UP):
        sync, _ = clocked(lambda step=step: rollouts.load_weights(policy.weights(), step))
        sampling, [share] = clocked(lambda step=step: list(rollouts.next_batch(step)))
        batch = share.batch(rollouts.config.parallel, 0)
        placed = policy.place(batch)
        old, _ = clocked(policy.score, placed)
        updates = [clocked(policy.update, minibatch)[0] for minibatch in placed.minibatches]
        if step >= WARM_UP and len(updates) == 4:
            groups = batch.metrics["groups/asked"] / rollouts.config.rollout.prompts_per_step
            seconds["weights to the engine"].append(sync)
            seconds["generation, per 16 groups"].append(sampling / groups)
            seconds["old log-probs"].append(old)
            seconds["4 updates"].append(sum(updates))
            seconds["policy: old log-probs + 4 updates"].append(old + sum(updates))
    return seconds


def profile(policy: Any, rollouts: Any) -> list[list[object]]:
    [share] = rollouts.next_batch(10_000)
    placed = policy.place(share.batch(rollouts.config.parallel, 0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        policy.score(placed)
        for minibatch in placed.minibatches:
            policy.update(minibatch)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:12]
    return [[event.key, event.count, f"{event.self_cpu_time_total / 1e3:.1f}"] for event in events]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
