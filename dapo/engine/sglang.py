"""The engine of SGLang servers: requests go out from a thread of its own, samples come back through a
queue.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

import torch

from dapo.engine.client import Dispatch, Job, Servers
from dapo.engine.weight_sync import WeightSync
from dapo.types import EngineError, Interrupted, Request, Sample

NOTICED = 1.5  # seconds within which a server that has died is known to have


class SGLangEngine:
    """The Engine protocol over servers that generate. Its methods may be called from any thread.

    What the threads share: `jobs` (one dict operation at a time), `outcomes` (a queue), and plain flags.

    Raises, from `completed`:
        EngineError: a refused request, one that failed too often, no server left, no response at all for 2 ×
            stall_seconds.
        WeightsLost: no server left that had the weights, but some that start again; what is outstanding is to
        be aborted. Interrupted: `is_interrupted` said so, which is asked every half second of waiting; what
        was outstanding is aborted.
    """

    def __init__(self, servers: Servers, sync: WeightSync, max_concurrent: int, stall_seconds: float):
        self.servers, self.sync = servers, sync
        self.is_interrupted: Callable[[], bool] = lambda: False
        self.prepared: int | None = None
        self.is_closed = False
        self.jobs: dict[str, Job] = {}  # submitted, neither aborted nor taken from `completed`
        # None: look again at `failure` and `jobs`
        self.outcomes: queue.SimpleQueue[tuple[Job, Sample] | None] = queue.SimpleQueue()
        self.failure: BaseException | None = None
        self.dispatch = Dispatch(
            servers, max_concurrent, stall_seconds, self._is_wanted, self._deliver, self._fail
        )
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()
        self._wait_for(self.dispatch.open())

    def submit(self, requests: Iterable[Request]) -> None:
        jobs = [Job(request, self.dispatch.version) for request in requests]
        for job in jobs:
            assert job.request.id not in self.jobs, f"request {job.request.id} is outstanding already"
            self.jobs[job.request.id] = job
        self.loop.call_soon_threadsafe(self.dispatch.add, jobs)

    def completed(self) -> Iterator[Sample]:
        while self.jobs:
            if self.failure:
                raise self.failure
            if self.is_interrupted():
                self.abort(list(self.jobs))
                raise Interrupted
            try:
                outcome = self.outcomes.get(timeout=0.5)
            except queue.Empty:
                self.servers.check()
                continue
            if outcome and self.jobs.get(outcome[0].request.id) is outcome[0]:  # else it was aborted since
                del self.jobs[outcome[0].request.id]
                yield outcome[1]

    def abort(self, ids: Iterable[str]) -> None:
        jobs = [job for id in ids if (job := self.jobs.pop(id, None))]
        if jobs and not self.is_closed:
            self.outcomes.put(None)
            self.loop.call_soon_threadsafe(self.dispatch.abandon, jobs)

    def prepare_weights(self, version: int) -> None:
        """Ready every server for weights: whoever refuses does so here, before any rank enters a
        collective.
        """
        self._wait_for(self.dispatch.settle())
        self.servers.refresh()
        try:
            self.sync.prepare(version)
        except EngineError:
            time.sleep(NOTICED)
            if not self.servers.refresh():
                raise
            self.sync.prepare(version)  # without the one that has died
        self.prepared = version

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Hand the weights to every server, after `prepare_weights`. Responses that are outstanding go on
        under the new weights.
        """
        self.dispatch.is_loading = True
        try:
            if self.prepared != version:
                self.prepare_weights(version)
            self.prepared, self.dispatch.version = None, version  # before the first answer of the new weights
            self.sync.load(weights, version)
            self.servers.serve()
            self._wait_for(self.dispatch.meet())
        finally:
            self.dispatch.is_loading = False

    def release_memory(self) -> None:
        """Servers that share the trainer's GPUs give their memory to it until the next weights."""
        self.sync.release()

    def waiting(self) -> str:
        """What is outstanding, and where, for a person to read."""
        return self.dispatch.waiting()

    def close(self) -> None:
        """Forget what is outstanding, tell the servers, end the thread, the sync and the servers. A second
        call does nothing.
        """
        if self.is_closed:
            return
        self.is_closed = True
        self.jobs.clear()
        self.outcomes.put(None)
        try:
            self._wait_for(self.dispatch.close())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
        finally:
            try:
                self.sync.close()
            finally:
                self.servers.close()

    def _run(self) -> None:
        self.loop.run_forever()
        self.loop.close()

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def _is_wanted(self, job: Job) -> bool:
        return self.jobs.get(job.request.id) is job

    def _deliver(self, job: Job, sample: Sample) -> None:
        self.outcomes.put((job, sample))

    def _fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        self.outcomes.put(None)
