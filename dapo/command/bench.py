"""Measures a config's layout, without weights, data and engine: seconds and memory, beside the plan's.

dapo bench CONFIG --nproc 8
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dapo import files
from dapo.checkpoint import Checkpoints
from dapo.clock import heartbeat, timed
from dapo.command.parse import version
from dapo.config import Config, ConfigError
from dapo.learn.batch import Share, shares
from dapo.measure import scripted
from dapo.measure.step import forget_peak_memory, gpu_of, learning_flops, peak_flops, peak_memory_gib
from dapo.mesh import Mesh
from dapo.model.routing import sampled_routing
from dapo.plan.advice import Plan
from dapo.plan.memory import CHECKPOINT, GIB
from dapo.plan.plan import make_plan
from dapo.plan.servers import are_colocated
from dapo.policy.cpu import has_transformer_engine
from dapo.policy.megatron import Policy
from dapo.policy.weights import RandomWeights
from dapo.recorder import Recorder
from dapo.rollout.buffer import Buffer

FOLDER = ".bench"  # below run.dir: the checkpoint, until it is loaded


@dataclass(frozen=True)
class Row:
    """One phase as it was measured, and as it was planned, if it was."""

    phase: str
    seconds: list[list[float]]  # of each rank, of each step
    gib: list[float]  # of each rank, the most in any step
    planned_seconds: float | None
    planned_gib: float | None

    @property
    def usual(self) -> float:
        """Median seconds of the slowest rank; of several steps without the first, which warms up."""
        slowest = np.max(self.seconds, axis=0)
        return float(np.median(slowest[len(slowest) > 1 :]))

    def __str__(self) -> str:
        return f"{self.phase:<14}" + "".join(
            f"{'–':>10}" if value is None else f"{value:>10.3g}"
            for value in (self.usual, self.planned_seconds, max(self.gib), self.planned_gib)
        )


class Stopwatch:
    """Seconds and peak memory of this rank by phase: on a GPU what torch allocates, else since the start."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.gib: dict[str, float] = defaultdict(float)
        forget_peak_memory()
        self.at_start = 0.0 if mesh.device.type == "cuda" else peak_memory_gib()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block, which all ranks enter together."""
        self.mesh.barrier()
        forget_peak_memory()
        start = time.perf_counter()
        yield
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name].append(time.perf_counter() - start)
        self.gib[name] = max(self.gib[name], peak_memory_gib() - self.at_start)


class NoSampler:
    """Stands in for the sampler in a checkpoint."""

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...


def bench(config: Config, mesh: Mesh, steps: int, mean_length: int | None) -> None:
    """Take some steps with random weights and responses; print a table, write <run.dir>/bench.json.

    `mean_length`: mean number of tokens of a sample; None: half of the longest.

    Raises:
        ConfigError: the model's sizes or the layout cannot be used, or the memory does not do.
        CheckpointError: the checkpoint cannot be written.
    """
    with ExitStack() as opened:
        plan = mesh.on_main(_enter, config, mesh, mean_length, opened)
        watch = Stopwatch(mesh)
        with _out_of_memory_explained(plan, mesh):
            policy = Policy(config, mesh, RandomWeights(getattr(torch, config.policy.dtype)))
            recorded = config.run.dir / "stalls", config.engine.limits, mesh.rank, mesh.world
            recorder = Recorder(*recorded, mesh.store("stalls"), lambda: "the other ranks")
            opened.callback(recorder.close)
            learnt = [_step(policy, watch, plan, step) for step in range(steps)]
            _checkpoint(policy, watch)
        found = mesh.gather((watch.seconds, watch.gib))
        if mesh.is_main:
            planned = _planned(plan, mesh)
            rows = [
                Row(phase, [s[phase] for s, _ in found], [g[phase] for _, g in found], *planned[phase])
                for phase in watch.seconds
            ]
            _report(plan, mesh, rows, _learning(plan, mesh, rows, learnt))


def _enter(config: Config, mesh: Mesh, mean_length: int | None, opened: ExitStack) -> Plan:
    """Make the plan, which checks model and layout, then lock the run directory."""
    gpu = "cpu" if mesh.device.type == "cpu" else gpu_of(mesh.device) or "h100"  # its times are not shown
    plan = make_plan(config, gpu, mesh.world, mean_length, has_transformer_engine())
    opened.enter_context(files.run_directory(config.run.dir))
    return plan


def _step(policy: Policy, watch: Stopwatch, plan: Plan, step: int) -> dict[str, float]:
    """Do what a run does in a step, but for sampling. Return the metrics of its batch."""
    config, mesh = policy.config, policy.mesh
    with watch.phase("sync"):
        if are_colocated(config):
            policy.release_memory()
        for _ in policy.weights():
            heartbeat()
    share = mesh.scatter(
        _shares, config, mesh, plan, step, by_stage=config.policy.routing_replay == "rollout"
    )
    batch = share.batch(config.parallel, mesh.context_rank)
    with watch.phase("old_logprobs"):
        placed = policy.place(batch)
        policy.score(placed)
    with watch.phase("update"):
        for minibatch in placed.minibatches:
            policy.update(minibatch)
    policy.take_traces()
    return batch.metrics


def _checkpoint(policy: Policy, watch: Stopwatch) -> None:
    run = policy.config.run.model_copy(update={"dir": policy.config.run.dir / FOLDER, "resume": "auto"})
    try:
        with watch.phase("save"):
            Checkpoints(run, policy.mesh).save(0, policy, NoSampler())
        with watch.phase("load"):
            _load(Checkpoints(run, policy.mesh), policy)
    finally:
        if policy.mesh.is_main:
            files.remove(run.dir)


@timed("checkpoint")  # a disk may be silent for long
def _load(checkpoints: Checkpoints, policy: Policy) -> None:
    checkpoints.find(policy.shape)
    checkpoints.load(policy, NoSampler())


def _shares(config: Config, mesh: Mesh, plan: Plan, step: int) -> Iterator[Share]:
    groups = scripted.groups(config, plan.shape.vocab_size, plan.length, step)
    if routing := sampled_routing(config):
        scripted.route(groups, routing)
    metrics = Buffer(len(groups), is_dynamic=False, kept=groups).ledger()
    return shares(groups, config, mesh.data, metrics, step, routing=routing)


@contextmanager
def _out_of_memory_explained(plan: Plan, mesh: Mesh) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        planned = f"the plan has {plan.worst.peak / GIB:.1f} GiB, during {plan.worst.peak_moment}"
        said = str(error).partition(". ")[0]
        raise ConfigError(
            f"rank {mesh.rank}: {said}; {planned}: `dapo plan` names what takes less"
        ) from error


def _planned(plan: Plan, mesh: Mesh) -> dict[str, tuple[float | None, float | None]]:
    """Return seconds and GiB of each phase, where the plan has them; the GiB without an engine's."""
    is_known = mesh.device.type == "cpu" or gpu_of(mesh.device)
    updates = plan.config.updates_per_step * plan.time.update
    held = [
        (moment, (rank.at(moment) - rank.engine) / GIB) for rank in plan.stages for moment in rank.moments
    ]
    return {
        "sync": (None, None),
        "old_logprobs": (plan.time.scores if is_known else None, None),
        "update": (updates if is_known else None, max(gib for moment, gib in held if moment != CHECKPOINT)),
        "save": (None, max(gib for moment, gib in held if moment == CHECKPOINT)),
        "load": (None, None),
    }


def _learning(
    plan: Plan, mesh: Mesh, rows: list[Row], learnt: list[dict[str, float]]
) -> dict[str, float | None]:
    """Return the tokens of a step, tokens a second while it learns, and the MFU if it is known."""
    seconds = sum(row.usual for row in rows if row.phase in ("old_logprobs", "update"))
    tokens, attended = (
        float(np.mean([metrics[f"rollout/{name}"] for metrics in learnt[len(learnt) > 1 :]]))
        for name in ("tokens_learnt", "attended")
    )
    flops, peak = learning_flops(plan.shape, tokens, attended), peak_flops(mesh.device)
    mfu = flops / (seconds * mesh.world * peak) if peak else None
    return {"tokens": tokens, "tokens_per_second": tokens / seconds, "mfu": mfu}


def _report(plan: Plan, mesh: Mesh, rows: list[Row], learning: dict[str, float | None]) -> None:
    """Print the table; write it with every rank's and step's numbers. Raise ConfigError if it cannot be."""
    config, parallel = plan.config, plan.config.parallel
    device = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "CPU core"
    samples = config.rollout.prompts_per_step * config.rollout.group_size
    mfu = "" if learning["mfu"] is None else f", {learning['mfu']:.0%} of the data sheet's FLOP/s"
    print(
        f"layout    {mesh.world} × {device} = tensor {parallel.tensor} × pipeline {parallel.pipeline} × "
        f"context {parallel.context} × data {mesh.data}",
        f"a step    {samples:,} samples of {plan.length:,} tokens, {config.updates_per_step} updates",
        f"learning  {learning['tokens_per_second']:,.0f} tokens/s{mfu}",
        f"\n{'of a step':<14}{'seconds':>10}{'planned':>10}{'GiB':>10}{'planned':>10}",
        *rows,
        sep="\n",
    )
    found = {"version": version(), "device": device, "world": mesh.world, "mean_length": plan.length}
    found |= learning | {"phases": {row.phase: {"median_seconds": row.usual} | vars(row) for row in rows}}
    found |= {"config": config.model_dump(mode="json")}
    path = config.run.dir / "bench.json"
    try:
        files.write_text(path, json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    print(f"\nwritten   {path}")
