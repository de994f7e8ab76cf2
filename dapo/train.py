"""DAPO (arXiv:2503.14476), Algorithm 1. Every rank runs this same program; the main rank also samples.

dapo train examples/arithmetic/config.yaml --nproc 2
"""

from __future__ import annotations

from contextlib import ExitStack

from dapo.assemble import enter, make_sampler
from dapo.checkpoint import Checkpoints
from dapo.config import Config
from dapo.log import Console, RankLog
from dapo.mesh import Mesh
from dapo.policy.exports import export
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
    is_interrupted, console = Interruption(mesh.store("signal"), mesh.is_main), Console()
    checkpoints = Checkpoints(config.run, mesh)
    with ExitStack() as opened:  # closed in reverse order, each also if another fails
        opened.callback(is_interrupted.close)
        opened.callback(console.close)
        resumed = checkpoints.find(enter(config, mesh, opened))
        sampler, record = make_sampler(config, mesh, resumed, is_interrupted, console.progress)  # π_θold
        opened.callback(sampler.close)
        policy = Policy(config, mesh)  # π_θ
        step = checkpoints.load(policy, sampler)
        opened.callback(make_recorder(config, mesh, sampler).close)
        # all that can be refused has been: now the run's record is written
        log = RankLog(config, mesh, console, record, step)
        opened.push(log.close)
        opened.push(checkpoints.close)
        try:
            for step in range(step, config.run.steps):  # noqa: B020  # 1
                sampler.load_weights(policy, version=step)  # 3: π_θold ← π_θ
                scores = sampler.evaluate(step)
                export(step, policy, scores)
                batch = policy.place(sampler.next_batch(step))  # 2, 4–9: the main rank samples for all
                # log π_θold, in the trainer's numerics and the updates' own packing
                mismatch = policy.score(batch)
                updates = [policy.update(minibatch) for minibatch in batch.minibatches]  # 10–11: Eq. 8
                sampler.write_traces(step, policy.take_traces())
                log(step, scores | batch.metrics | mismatch | step_metrics(updates))
                del batch  # servers may generate on its device
                checkpoints.maybe_save(step + 1, policy, sampler)
            step = config.run.steps
            sampler.load_weights(policy, version=step)
            log(step, scores := sampler.evaluate(step))
            export(step, policy, scores)
        except Stopped as stop:
            checkpoints.save(step, policy, sampler)
            stop.is_saved = True
            raise


def make_recorder(config: Config, mesh: Mesh, sampler: Sampler) -> Recorder:
    """Start the watch for stalls: stacks go to <run.dir>/stalls."""
    stalls, store = config.run.dir / "stalls", mesh.store("stalls")
    return Recorder(stalls, config.engine.limits, mesh.rank, mesh.world, store, sampler.waiting)
