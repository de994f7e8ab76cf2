"""DAPO (arXiv:2503.14476), Algorithm 1. Every rank runs this same program; the main rank also samples.

torchrun --nproc-per-node 2 -m dapo train examples/arithmetic/config.yaml
"""

from __future__ import annotations

import sys

from dapo.assemble import make_sampler
from dapo.checkpoint import Checkpoints
from dapo.config import Config, ConfigError
from dapo.files import write_text
from dapo.log import Console, Log, SilentLog
from dapo.mesh import Mesh
from dapo.model.layout import check_layout, check_length
from dapo.model.shape import ModelShape, read_shape
from dapo.policy.megatron import Policy
from dapo.policy.metrics import step_metrics
from dapo.recorder import Recorder
from dapo.sampler import Sampler
from dapo.types import Stopped
from dapo.watch.interruption import Interruption


def train(config: Config, mesh: Mesh) -> None:
    """Run Algorithm 1 from the newest checkpoint to config.run.steps.

    Raises:
        Stopped: the run was interrupted or the engine failed; a checkpoint is saved.
    """
    is_interrupted = Interruption(mesh.store("signal"), mesh.is_main)
    console = Console()
    checkpoints = Checkpoints(config.run, mesh)
    checkpoints.find(mesh.on_main(_read_shape, config))  # reject what cannot work before anything is written
    mesh.on_main(_prepare, config)
    sampler = make_sampler(config, mesh, is_interrupted, console.progress)  # π_θold
    policy = Policy(config, mesh)  # π_θ
    step = checkpoints.load(policy, sampler)
    log = Log(config, console, start=step) if mesh.is_main else SilentLog()
    recorder = make_recorder(config, mesh, sampler)
    try:
        for step in range(step, config.run.steps):  # noqa: B020  # 1
            sampler.load_weights(policy, version=step)  # 3: π_θold ← π_θ
            scores = sampler.evaluate(step)
            batch = policy.place(sampler.next_batch(step))  # 2, 4–9: the main rank samples, all get a shard
            # log π_θold, in the trainer's numerics and the updates' own packing
            mismatch = policy.score(batch)
            updates = [policy.update(minibatch) for minibatch in batch.minibatches]  # 10–11: Eq. 8
            sampler.write_traces(step, policy.take_traces())
            log(step, scores | batch.metrics | mismatch | step_metrics(updates))
            checkpoints.maybe_save(step + 1, policy, sampler)
        step = config.run.steps
        sampler.load_weights(policy, version=step)
        log(step, sampler.evaluate(step))
        policy.save_hf(config.run.dir / "hf")
    except Stopped as stop:
        checkpoints.save(step, policy, sampler)
        stop.is_saved = True
        raise
    finally:
        recorder.close()
        log.close()
        sampler.close()
        is_interrupted.close()


def make_recorder(config: Config, mesh: Mesh, sampler: Sampler) -> Recorder:
    """Start the watch for stalls: stacks go to <run.dir>/stalls."""
    stalls, store = config.run.dir / "stalls", mesh.store("stalls")
    return Recorder(stalls, config.engine.limits, mesh.rank, mesh.world, store, sampler.waiting)


def _read_shape(config: Config) -> ModelShape:
    """Read the model's sizes. Raise ConfigError if the layout cannot hold them."""
    shape = read_shape(config.policy.model)
    check_layout(shape, config)
    check_length(config)
    return shape


def _prepare(config: Config) -> None:
    """Make the run directory and write the resolved config into it."""
    for warning in config.warnings():
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    try:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        write_text(config.run.dir / "config.yaml", config.dump())
    except OSError as error:
        raise ConfigError(f"run.dir={config.run.dir} cannot be written: {error.strerror}") from error
