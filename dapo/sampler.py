"""Every rank's side of sampling: the weight sync, evaluation, and each rank's part of the next batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from dapo.clock import heartbeat
from dapo.config import Config
from dapo.learn.batch import Batch, Share
from dapo.learn.traces import Trace, merged
from dapo.mesh import Mesh
from dapo.policy.megatron import Policy
from dapo.rollout import dump, evaluate
from dapo.rollout.rollouts import Rollouts
from dapo.types import Prompt, WeightsLost

R = TypeVar("R")
RETRIES = 3  # of one step's sampling: servers that die more often than that are not restarted into health


@dataclass(eq=False)
class Sampler:
    """Samples π_θold. The main rank has the Rollouts; the other ranks take part in the collectives.

    `load_weights`, `evaluate`, `next_batch` and `write_traces` are collective. If servers died and others
    live or restart, weights and requests are sent again; the seeds, and so the samples, are the same.

    Raises, on every rank:
        EngineError: the engine failed; no rank is left in a collective.
        WeightsLost: servers died more than RETRIES times in one call.
        Interrupted: the run is to stop.
    """

    config: Config
    mesh: Mesh
    main: Rollouts | None  # on the main rank
    sets: dict[str, list[Prompt]]  # held-out problems by name, on the main rank

    def __post_init__(self) -> None:
        self._reload: Callable[[], None] = lambda: None

    @property
    def rollouts(self) -> Rollouts:
        """The main rank's Rollouts."""
        assert self.main, f"rank {self.mesh.rank} does not sample: the main rank does"
        return self.main

    def load_weights(self, policy: Policy, version: int) -> None:
        """π_θold ← π_θ: send the policy's weights to the engine."""
        self._reload = partial(self._send_weights, policy, version)
        with_retries(lambda: None, self._reload, is_loaded=False)

    def evaluate(self, step: int) -> dict[str, float]:
        """Return the held-out metrics of the loaded weights on every rank; {} at steps without evaluation."""
        return with_retries(
            lambda: self.mesh.on_main(lambda: evaluate.metrics_at(step, self.rollouts, self.sets)),
            self._reload,
        )

    def next_batch(self, step: int) -> Batch:
        """Collect and plan the step's batch on the main rank (Algorithm 1, lines 4–9); return this rank's
        part.
        """
        by_stage = self.config.policy.routing_replay == "rollout"  # each has its own layers' routes

        def scatter() -> Share:
            return self.mesh.scatter(lambda: self.rollouts.next_batch(step), by_stage=by_stage)

        share = with_retries(scatter, self._reload)
        batch = share.batch(self.config.parallel, self.mesh.context_rank)
        batch.metrics |= self.mesh.received()
        return batch

    def write_traces(self, step: int, traces: list[Trace]) -> None:
        """Write beside the step's dump what the updates saw of its tokens, if anything is dumped."""
        if self.config.rollout.dump_share:
            gathered = [trace for rank_traces in self.mesh.gather(traces) for trace in rank_traces]
            if self.main:
                path = dump.traces_path_of(self.config.run.dir / "rollouts", step)
                self.main.dumps.write_traces(path, merged(gathered))

    def save(self, directory: Path) -> None:
        """Write what the next step depends on into `directory`. Main rank only."""
        self.rollouts.save(directory)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote; nothing on other ranks. Raises ConfigError if the data has changed under
        the run.
        """
        if self.main:
            self.main.load(directory)

    def waiting(self) -> str:
        """Say who is waited for. Any thread may call it."""
        return self.main.waiting() if self.main else "the main rank"

    def close(self) -> None:
        """Stop the engine and the reward's processes."""
        if self.main:
            self.main.close()

    def _send_weights(self, policy: Policy, version: int) -> None:
        if self.mesh.on_main(lambda: self.rollouts.engine.is_colocated):
            policy.release_memory()
        self.mesh.on_main(lambda: self.rollouts.prepare_weights(version))
        weights = policy.weights()

        def load() -> None:
            try:
                if self.main:
                    self.main.load_weights(weights, version)
            finally:
                # every rank drains them to the end, even if the engine has failed; none keeps the last one
                while next(weights, None):
                    heartbeat()

        self.mesh.together(load)


def with_retries(ask: Callable[[], R], load: Callable[[], None], is_loaded: bool = True) -> R:
    """Return `ask()`; call `load()` before it, unless `is_loaded`.

    If either raises WeightsLost, load and ask again, RETRIES times at most; then it is raised.
    """
    for _ in range(RETRIES):
        with suppress(WeightsLost):
            if not is_loaded:
                load()
            return ask()
        is_loaded = False
    load()
    return ask()
