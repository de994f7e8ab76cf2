"""Measures each step: seconds by phase over all ranks, tokens a second, model FLOP/s, memory.

R = ranks.
"""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from dapo import clock
from dapo.config import Config
from dapo.mesh import Mesh
from dapo.model.families import read_shape
from dapo.model.shape import ModelShape
from dapo.plan.memory import GIB
from dapo.plan.time import HARDWARE, forward_flops, known_gpu

TOGETHER = ("old_logprobs", "update", "reduce", "checkpoint")  # phases that all ranks are in
PASSES = 4  # forward passes' FLOPs for each token: the log-probs' one, an update's own and a backward of two


class Meter:
    """Measures a run's steps. Every rank has one; all ranks make and call it together."""

    def __init__(self, config: Config, mesh: Mesh):
        self.mesh = mesh
        self.shape = read_shape(config.policy.model)
        self.peak = peak_flops(mesh.device)
        self.last = time.perf_counter()
        clock.take()  # what came before is no step's

    def measured(self, values: dict[str, float]) -> dict[str, float]:
        """Return the metrics of a step, `values`, and what it took since the last call."""
        now, seconds = time.perf_counter(), clock.take()
        took = {"time/step": now - self.last, "perf/peak_memory_gib": peak_memory_gib()}
        self.last = now
        took |= seconds | spread(self._of_all_ranks(seconds))
        if "rollout/tokens" in values:
            rate = values["rollout/tokens"] / took["time/step"]
            took["perf/tokens_per_second"] = rate
            took["perf/tokens_per_second_per_rank"] = rate / self.mesh.world
        if self.peak and "time/update" in took and "rollout/tokens_learnt" in values:
            flops = learning_flops(self.shape, values["rollout/tokens_learnt"], values["rollout/attended"])
            learning = took["time/old_logprobs"] + took["time/update"]
            took["perf/mfu"] = flops / (learning * self.mesh.world * self.peak)
        return values | took

    def _of_all_ranks(self, seconds: dict[str, float]) -> dict[str, np.ndarray]:
        """Return the seconds of all ranks, [R], for each phase that they are in together."""
        own = np.zeros((self.mesh.world, len(TOGETHER)))
        own[self.mesh.rank] = [seconds.get(f"time/{phase}", 0.0) for phase in TOGETHER]
        return dict(zip(TOGETHER, self.mesh.sum(own).T, strict=True))


def spread(seconds: dict[str, np.ndarray]) -> dict[str, float]:
    """Return mean, least and most seconds of each phase, [R], and which rank computes its updates longest.

    In an update ranks wait for each other where gradients are summed: a rank's own time is the rest.
    """
    found: dict[str, float] = {}
    for phase, each in seconds.items():
        if each.any():
            found[f"time/{phase}"] = float(each.mean())
        if each.any() and len(each) > 1:
            found[f"time/{phase}_min"] = float(each.min())
            found[f"time/{phase}_max"] = float(each.max())
    own = seconds["update"] - seconds["reduce"]
    if own.any() and len(own) > 1:
        found["perf/slowest_rank"] = int(own.argmax())
        found["perf/imbalance"] = float(own.max() / own.mean())
    return found


def learning_flops(shape: ModelShape, tokens: float, attended: float) -> float:
    """Return a step's model FLOPs: the log-probs and one update of so many tokens, nothing computed again.

    `attended`: number of tokens that one of them attends to, on average.
    """
    return PASSES * tokens * forward_flops(shape, 2 * attended)


def gpu_of(device: torch.device) -> str | None:
    """Return the key of a GPU in HARDWARE; None for a CPU, and where it is not known."""
    if device.type != "cuda":
        return None
    memory = torch.cuda.get_device_properties(device).total_memory / GIB
    return known_gpu(torch.cuda.get_device_name(device), memory)


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU's data sheet; None for a CPU, and where it is not known."""
    gpu = gpu_of(device)
    return HARDWARE[gpu].flops if gpu else None


def forget_peak_memory() -> None:
    """Let `peak_memory_gib` begin anew with what is held now, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib() -> float:
    """Most GiB that this process has used: allocated by torch on a GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
