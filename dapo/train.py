"""DAPO (arXiv:2503.14476), Algorithm 1. Every rank runs this same program; the main rank also samples.

torchrun --nproc-per-node 2 -m dapo train examples/arithmetic/config.yaml
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

from dapo import clock
from dapo.assemble import make_rollouts
from dapo.checkpoint import Checkpoints
from dapo.config import Config, ConfigError
from dapo.files import write_text
from dapo.learn.traces import merged
from dapo.log import Log, SilentLog, mean
from dapo.mesh import Mesh
from dapo.model.layout import check_layout
from dapo.model.shape import ModelShape, read_shape
from dapo.policy.megatron import Policy
from dapo.recorder import Recorder
from dapo.rollout import dump, evaluate
from dapo.rollout.rollouts import Rollouts, RolloutsElsewhere
from dapo.types import Interrupted, WeightsLost

P = ParamSpec("P")
R = TypeVar("R")
RESTARTS = 3  # in one step's rollouts: servers that are lost more often are not well


def train(config: Config, mesh: Mesh) -> None:
    """Run Algorithm 1 from the newest checkpoint to config.run.steps. Interrupted, it saves and raises
    Interrupted.
    """
    is_interrupted = Interruption()
    checkpoints = Checkpoints(config.run, mesh)
    checkpoints.find(mesh.on_main(_shape, config))  # what will not do is refused before anything is written
    mesh.on_main(_prepare, config)
    rollouts, sets = make_rollouts(config, mesh, is_interrupted)
    policy = Policy(config, mesh)  # π_θ
    step = checkpoints.load(policy, rollouts)
    log = make_log(config, rollouts, start=step)
    recorder = make_recorder(config, mesh, rollouts)
    try:
        for step in range(step, config.run.steps):  # noqa: B020  # 1
            load = partial(sync, policy, rollouts, mesh, version=step)
            load()  # 3: π_θold ← π_θ
            scores = sampled(load, mesh.on_main, evaluate.maybe, step, rollouts, sets, config)
            # 2, 4–9: the main rank collects; each receives its share
            batch = sampled(load, mesh.scatter, rollouts.next_batch, step)
            received = mesh.received()
            # log π_θold, in the trainer's numerics and the updates' own packing
            mismatch = policy.set_old_logprobs(batch)
            updates = [policy.update(minibatch) for minibatch in batch.minibatches]  # 10–11: Eq. 8
            keep_traces(step, policy, mesh, config)
            log(step, scores | batch.metrics | received | mismatch | mean(updates))
            checkpoints.maybe_save(step + 1, policy, rollouts)
        step = config.run.steps
        load = partial(sync, policy, rollouts, mesh, version=step)
        load()
        log(step, sampled(load, mesh.on_main, evaluate.maybe, step, rollouts, sets, config))
        policy.save_hf(config.run.dir / "hf")
    except Interrupted as stop:
        checkpoints.save(step, policy, rollouts)
        stop.is_saved = True
        raise
    finally:
        recorder.close()
        log.close()
        rollouts.close()


def sync(policy: Policy, rollouts: Rollouts | RolloutsElsewhere, mesh: Mesh, version: int) -> None:
    """The engine's weights become the policy's. Every rank drains them to the end, whatever becomes of the
    engine.

    Raises, on every rank:
        EngineError: the engine refused, and no rank has entered a collective; or it failed on the way, and
            all have left the last one.
    """
    policy.free_unused()
    mesh.on_main(rollouts.prepare_weights, version)
    weights = policy.weights()

    def load() -> None:
        try:
            rollouts.load_weights(weights, version)
        finally:
            for _ in weights:
                pass

    mesh.together(load)


def sampled(load: Callable[[], None], ask: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`ask(*args)`; where every server was lost under it, anew from servers that have started again and been
    sent the weights.

    Its prompts are back in the stream by then, and seeds are functions of names: the same is asked for.

    Raises, on every rank:
        WeightsLost: the servers were lost more than RESTARTS times.
    """
    for _ in range(RESTARTS):
        with contextlib.suppress(WeightsLost):
            return ask(*args, **kwargs)
        load()
    return ask(*args, **kwargs)


def keep_traces(step: int, policy: Policy, mesh: Mesh, config: Config) -> None:
    """Write beside the step's dump what the updates saw of its tokens; nothing is gathered where nothing is
    dumped.
    """
    if config.rollout.dump_share:
        traces = [trace for of_a_rank in mesh.gather(policy.take_traces()) for trace in of_a_rank]
        dump.write_traces(dump.traces_path_of(config.run.dir / "rollouts", step), merged(traces))


def make_log(config: Config, rollouts: Rollouts | RolloutsElsewhere, start: int) -> Log | SilentLog:
    if isinstance(rollouts, RolloutsElsewhere):
        return SilentLog()
    log = Log(config, start)
    rollouts.on_progress = log.console.progress
    clock.listen(log.console.progress)
    if start:
        log.console.say(f"going on from step {start} of {config.run.steps} in {config.run.dir}")
    return log


def make_recorder(config: Config, mesh: Mesh, rollouts: Rollouts | RolloutsElsewhere) -> Recorder:
    stalls = config.run.dir / "stalls"
    return Recorder(
        stalls, config.engine.stall_seconds, mesh.rank, mesh.world, mesh.store("stalls"), rollouts.waiting
    )


class Interruption:
    """Ctrl-C or SIGTERM, caught on every rank: called, it says whether one has come. A second Ctrl-C, two
    seconds on, ends the process.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        signal.signal(signal.SIGINT, self._note)
        signal.signal(signal.SIGTERM, self._note)

    def __call__(self) -> bool:
        return self.since is not None

    def _note(self, number: int, frame: Any) -> None:
        if self.since is not None and number == signal.SIGINT and time.monotonic() - self.since > 2:
            raise KeyboardInterrupt
        self.since = self.since or time.monotonic()


def _shape(config: Config) -> ModelShape:
    """The model's, if the layout can hold it."""
    shape = read_shape(config.policy.model)
    check_layout(shape, config)
    return shape


def _prepare(config: Config) -> None:
    """Make the run directory and keep the resolved config in it."""
    for warning in config.warnings():
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    try:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        write_text(config.run.dir / "config.yaml", config.dump())
    except OSError as error:
        raise ConfigError(f"run.dir={config.run.dir} cannot be written: {error.strerror}") from error
