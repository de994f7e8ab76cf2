"""The engine of SGLang servers: weights, memory and waiting; and its streams, which take requests."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dapo import http
from dapo.clock import heartbeat, waiting
from dapo.config import Limits
from dapo.engine.client import Client
from dapo.engine.endpoint import Job, Servers
from dapo.engine.scoring import score
from dapo.engine.weight_sync import WeightSync
from dapo.model.routing import Routing
from dapo.types import EngineError, Group, Interrupted, Request, Sample, WeightsLost

DEATH_NOTICED = 20.0  # seconds within which a server ends one of whose processes has died
SCORED_TOGETHER = 16  # responses
CHECK_EVERY = 0.5  # seconds of waiting between two checks for an interruption, or for servers that died


class SGLangEngine:
    """The Engine protocol over servers that generate. Its methods may be called from any thread.

    No token id is `vocab_size` or larger. `routing`: of the policy, whose samples come with their routes.
    """

    def __init__(self, servers: Servers, sync: WeightSync, max_concurrent: int, limits: Limits,
                 vocab_size: int, is_interrupted: Callable[[], bool] = lambda: False,
                 routing: Routing | None = None):  # fmt: skip
        self.servers = servers
        self.sync = sync
        self.is_interrupted = is_interrupted
        self.client = Client(servers, max_concurrent, limits, vocab_size, routing)
        http.wait(self.client.open())

    @property
    def is_colocated(self) -> bool:
        return self.sync.is_colocated

    def stream(self) -> SGLangStream:
        return SGLangStream(self)

    def prepare_weights(self, version: int) -> None:
        """Make every server ready for weights. Raise EngineError now, before collectives, if one refuses."""
        http.wait(self.client.finish_aborts())
        self.servers.refresh()
        with self._deaths_noticed():
            self.sync.prepare(version)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Send the weights to all servers, or raise EngineError. Outstanding responses continue with them.

        Raise WeightsLost if a server died meanwhile: the next sync goes to those that live or were restarted.
        """
        if self.sync.prepared != version:
            self.prepare_weights(version)
        self.client.begin_load(version)
        try:
            with self._deaths_noticed():
                self.sync.load(weights, version)
                self.servers.serve()
            http.wait(self.client.update_endpoints())
            self.client.loaded_version = version
        finally:
            self.client.end_load()

    @contextlib.contextmanager
    def _deaths_noticed(self) -> Iterator[None]:
        """Raise WeightsLost in place of an EngineError if a server has died since the last `refresh`."""
        try:
            yield
        except EngineError as error:
            if not (lost := self._await_deaths()):
                raise
            raise WeightsLost(f"{', '.join(lost)} died under a weight sync: {error}") from error

    def _await_deaths(self) -> list[str]:
        """Return the servers that died, once there is one; [] if there is none in DEATH_NOTICED seconds."""
        deadline = time.monotonic() + DEATH_NOTICED
        while not (lost := self.servers.lost()) and time.monotonic() < deadline:
            heartbeat()  # this wait has a limit of its own
            time.sleep(CHECK_EVERY)
        return lost

    def release_memory(self) -> None:
        """Make servers that share the trainer's GPUs free their memory until the next weights."""
        try:
            self.sync.release()
        except EngineError:
            if not self._await_deaths():
                raise
            self.sync.release()  # without the server that died, which has no memory

    def score(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """Score on the first server, a few at a time. Raise EngineError if it does not."""
        server = self.servers.workers[0]
        with ThreadPoolExecutor(SCORED_TOGETHER) as pool:
            asked = [pool.submit(score, server, g.prompt, sample) for g in groups for sample in g.samples]
            return [future.result() for future in asked]

    def waiting(self) -> str:
        return self.client.waiting()

    def take_idle(self) -> list[float]:
        """Return the seconds since the last call in which a server, or the router, had no request."""
        return http.wait(self.client.take_idle())

    def close(self) -> None:
        """Abort all requests of every stream, close sync and servers. A second call does nothing."""
        if self.client.is_closed:
            return
        with contextlib.ExitStack() as closing:
            closing.callback(self.servers.close)  # last, even if what comes before it fails
            closing.callback(self.sync.close)
            http.wait(self.client.close())


class SGLangStream:
    """One user's requests to the engine. Its samples come through a queue of its own.

    Raises, from `completed`:
        EngineError: a request was refused or failed too often, no server is left, or none progressed in time.
        WeightsLost: no server with the weights is left, but some restart; the caller aborts its requests.
        Interrupted: the engine's `is_interrupted()` is true; the stream's requests are aborted.
    """

    def __init__(self, engine: SGLangEngine):
        self.engine = engine
        self.client = engine.client
        self.jobs: dict[str, Job] = {}  # submitted, neither aborted nor read, by request id
        self.outcomes: queue.SimpleQueue[tuple[Job, Sample] | None] = queue.SimpleQueue()

    def submit(self, requests: Iterable[Request]) -> None:
        jobs = [Job(request, self.client.loaded_version, self.outcomes) for request in requests]
        for job in jobs:
            assert job.request.id not in self.jobs, f"request {job.request.id} is outstanding already"
            self.jobs[job.request.id] = job
        self.client.add(jobs)

    def completed(self) -> Iterator[Sample]:
        while self.jobs and not self.client.is_closed:
            if self.client.failure:
                raise self.client.failure
            waiting()  # the client has the timeout
            if self.engine.is_interrupted():
                self.abort()
                raise Interrupted
            try:
                outcome = self.outcomes.get(timeout=CHECK_EVERY)
            except queue.Empty:
                self.engine.servers.check()
                continue
            if outcome is None:
                continue
            job, sample = outcome
            if job.is_wanted:  # else it was aborted since
                job.is_wanted = False
                del self.jobs[job.request.id]
                yield sample

    def abort(self, ids: Iterable[str] | None = None) -> None:
        ids = list(self.jobs) if ids is None else ids
        jobs = [job for id in ids if (job := self.jobs.pop(id, None))]
        for job in jobs:
            job.is_wanted = False
        if jobs and not self.client.is_closed:
            self.outcomes.put(None)
            self.client.abandon(jobs)
