"""Sends requests to servers, again where that is safe, and acts on servers that stand still.

Generating changes nothing at a server, so a request is sent again after a failed connection, a server that is
not ready (429, 5xx), an invalid answer, or an abort that nobody asked for: MAX_FAILURES of these end the run.
A router that has no worker for any request fails none of them; if that lasts, the run ends without progress.
A refusal (another 4xx) would repeat itself: it ends the run.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
import uuid
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from dapo import http
from dapo.clock import heartbeat
from dapo.config import Limits
from dapo.engine import generate
from dapo.engine.endpoint import Endpoint, Job, Servers, first_few
from dapo.engine.generate import UNKNOWN_VERSION, BadAnswer, NoWorker
from dapo.engine.intake import Intake
from dapo.model.routing import Routing
from dapo.types import EngineError, Request, Sample

MAX_FAILURES = 8  # of one request
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds that a server is left alone, doubled at each further failure
ABORT_TIMEOUT = 10.0  # seconds
NUM_ABORTS = 32  # sent at a time
CLOSE_TIMEOUT = 2.0  # seconds


@dataclass(eq=False)
class Client:
    """Sends requests until each is answered, aborted or has failed.

    A worker has at most `max_concurrent` requests outstanding. One that stands still for `limits.stall` is
    restarted or, if it is external, left alone until the next sync of weights; its requests are sent again,
    elsewhere if there is another server. Without progress anywhere for `limits.stop`, the client fails.

    All of it runs in the event loop of dapo.http; any thread may call `add`, `abandon`, `begin_load`,
    `end_load` and `waiting`.
    """

    servers: Servers
    max_concurrent: int
    limits: Limits
    vocab_size: int
    routing: Routing | None = None  # of the policy: samples come with their routes

    def __post_init__(self) -> None:
        self.version = UNKNOWN_VERSION  # of the weights that were last sent
        self.loaded_version = UNKNOWN_VERSION  # of those that all servers generate with, or newer ones
        self.is_loading = False
        self.is_closed = False
        self.failure: BaseException | None = None  # the first one: every stream raises it
        self.name = uuid.uuid4().hex[:8]  # servers may still work for a trainer that died
        self.numbers = itertools.count()  # of the attempts
        self.endpoints: list[Endpoint] = []
        self.ready: deque[Job] = deque()  # to be sent
        self.progressed_at = time.monotonic()
        self.tasks: set[asyncio.Task[None]] = set()
        self.aborts: set[asyncio.Task[None]] = set()  # those of the tasks that abort requests at a server
        self.abort_slots = asyncio.Semaphore(NUM_ABORTS)
        num_connections = self.max_concurrent * len(self.servers.workers)
        self.intake = Intake(self.vocab_size, num_connections, self.routing)

    def add(self, jobs: list[Job]) -> None:
        """Send these as soon as a server has room: those with a priority before what has less."""
        http.loop().call_soon_threadsafe(self._add, jobs)

    def abandon(self, jobs: list[Job]) -> None:
        """Abort these at the servers and do not wait for them."""
        http.loop().call_soon_threadsafe(self._abandon, jobs)

    def begin_load(self, version: int) -> None:
        """Note that weights `version` are on their way: the next answers may be theirs, or older ones'."""
        self.is_loading = True
        self.version = version

    def end_load(self) -> None:
        self.is_loading = False

    def waiting(self) -> str:
        """Say which responses are outstanding, where, and for how long."""
        endpoints = list(self.endpoints)
        unsent = [job.request.id for job in list(self.ready) if job.is_wanted]
        count = sum(len(endpoint.outstanding) for endpoint in endpoints) + len(unsent)
        age = time.monotonic() - self.progressed_at
        lines = [f"waiting for {count} responses; the last one came {age:.0f} s ago"]
        lines += [endpoint.describe() for endpoint in endpoints]
        if unsent:
            lines.append(f"  not asked: {len(unsent)}: {' '.join(first_few(unsent))}")
        return "\n".join(lines)

    async def open(self) -> None:
        await self.intake.open()
        self._spawn(self._watch())
        await self.update_endpoints()

    async def update_endpoints(self) -> None:
        """Use workers that joined or were left alone, drop those that have left: called after a sync."""
        known = {endpoint.url: endpoint for endpoint in self.endpoints}
        urls = [url.rstrip("/") for url in self.servers.generate_urls]
        self.endpoints = [known.get(url) or Endpoint(url, self.servers, self.limits.stall) for url in urls]
        self._send()

    async def take_idle(self) -> list[float]:
        """Return the seconds of each endpoint without a request since the last call."""
        return [endpoint.idle.take() for endpoint in self.endpoints]

    async def finish_aborts(self) -> None:
        """Wait until the servers know of every abort."""
        await asyncio.gather(*self.aborts)

    async def close(self) -> None:
        """Abort all requests."""
        self.is_closed = True
        jobs = list(self._outstanding())
        self._wake(jobs)
        self.ready.clear()
        self._abandon(jobs)
        if self.aborts:
            await asyncio.wait(self.aborts, timeout=CLOSE_TIMEOUT)
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.intake.close()

    def _outstanding(self) -> Iterator[Job]:
        yield from self.ready
        for endpoint in self.endpoints:
            yield from endpoint.outstanding.values()

    def _is_idle(self) -> bool:
        return next(self._outstanding(), None) is None

    def _add(self, jobs: list[Job]) -> None:
        if self._is_idle():
            self.progressed_at = time.monotonic()  # until now there was nothing to wait for
        if first := [job for job in jobs if job.request.priority]:
            least = first[0].request.priority
            more = itertools.takewhile(lambda job: job.request.priority > least, self.ready)
            num_before = len(list(more))
            self.ready.rotate(-num_before)
            self.ready.extendleft(reversed(first))
            self.ready.rotate(num_before)
        self.ready.extend(job for job in jobs if not job.request.priority)
        self._send()

    def _send(self) -> None:
        """Send what is ready, to the least busy servers; what failed to another one, if there is one."""
        while self.ready:
            free = [endpoint for endpoint in self.endpoints if self._has_room(endpoint)]
            if not free:
                return
            job = self.ready.popleft()
            if job.is_wanted:
                last = job.endpoint
                self._send_to(min(free, key=lambda e: (e is last, len(e.outstanding))), job)

    def _has_room(self, endpoint: Endpoint) -> bool:
        """Return True if it may get another request: a router that has lost a worker gets fewer."""
        room = self.max_concurrent * len(endpoint.worker_urls)
        return endpoint.is_usable and len(endpoint.outstanding) < room

    def _send_to(self, endpoint: Endpoint, job: Job) -> None:
        job.endpoint = endpoint
        job.sent_at = time.monotonic()
        # with a mark at the end: a server aborts every request whose id begins with the one in the abort
        job.rid = f"{self.name}-{job.request.id}-{next(self.numbers)};"
        if not endpoint.outstanding:
            endpoint.progressed_at = job.sent_at
        endpoint.outstanding[job.rid] = job
        endpoint.idle.note(False)
        job.task = self._spawn(self._attempt(job, endpoint, job.rid))
        # a callback: a task that is cancelled before it begins runs no `finally`
        job.task.add_done_callback(partial(self._end_attempt, endpoint, job.rid))

    async def _attempt(self, job: Job, endpoint: Endpoint, rid: str) -> None:
        try:
            sample = await self._ask(endpoint, job.request, rid)
            self._check_versions(job, sample)
        except (http.NoAnswer, BadAnswer) as error:
            self._note_fault(endpoint, str(error), job.sent_at)
            self._send_again(job, has_failed=not isinstance(error, NoWorker))
        else:
            endpoint.num_faults = 0
            self._note_progress(endpoint)
            job.outcomes.put((job, sample))

    def _end_attempt(self, endpoint: Endpoint, rid: str, task: asyncio.Task[None]) -> None:
        endpoint.outstanding.pop(rid, None)
        self._send()
        endpoint.idle.note(not endpoint.outstanding)

    async def _ask(self, endpoint: Endpoint, request: Request, rid: str) -> Sample:
        body, asked = generate.body(request, rid), generate.asked(request, rid)
        return await self.intake.ask(endpoint.url, body, self.servers.key_of(endpoint.url), asked)

    def _check_versions(self, job: Job, sample: Sample) -> None:
        """Raise BadAnswer if other weights wrote it: the server was restarted, or missed a sync."""
        for version, _, _ in sample.versions:
            if job.version != UNKNOWN_VERSION and not job.version <= version <= self.version:
                found = f"generates with weight version {version}, not {job.version}"
                raise BadAnswer(f"{found}: it missed the last weight sync")

    def _send_again(self, job: Job, has_failed: bool = True) -> None:
        assert job.endpoint
        job.num_failures += has_failed
        if job.num_failures < MAX_FAILURES:
            self.ready.appendleft(job)
        elif job.is_wanted:
            where = f"{job.endpoint.url}: {job.endpoint.fault}"
            failed = f"request {job.request.id} failed {job.num_failures} times, the last time at {where}"
            self._fail(EngineError(failed))

    def _note_fault(self, endpoint: Endpoint, fault: str, sent_at: float) -> None:
        """Leave the server alone for a while. Requests from before it was last well are of the same fault."""
        endpoint.fault = http.one_line(fault.encode())
        if endpoint.is_usable and sent_at >= endpoint.usable_since:
            endpoint.is_usable = False
            endpoint.num_faults += 1
            self._spawn(self._restore(endpoint))

    async def _restore(self, endpoint: Endpoint) -> None:
        """Use the server again once it is well, after a pause."""
        pause = min(FIRST_PAUSE * 2.0 ** min(endpoint.num_faults - 1, 10), LONGEST_PAUSE)
        others = f"{len(endpoint.outstanding)} more responses asked there"
        _print(f"{endpoint.url} failed, {others}: {endpoint.fault}")
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        while endpoint in self.endpoints and not await self._is_well(endpoint):
            pause = min(2 * pause, LONGEST_PAUSE)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        if endpoint in self.endpoints:
            endpoint.is_usable = True
            endpoint.usable_since = time.monotonic()
            _print(f"{endpoint.url} is asked again")
            self._send()

    async def _is_well(self, endpoint: Endpoint) -> bool:
        is_known = self.version != UNKNOWN_VERSION and not self.is_loading
        return await endpoint.is_well(self.version if is_known else None)

    def _fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        self._wake(self._outstanding())

    def _wake(self, jobs: Iterable[Job]) -> None:
        """Make the streams of these jobs look for a failure."""
        for job in jobs:
            job.outcomes.put(None)

    def _abandon(self, jobs: list[Job]) -> None:
        self.ready = deque(job for job in self.ready if job.is_wanted)
        silent = set[str]()
        for job in jobs:
            if not job.task or job.task.done() or not job.endpoint:
                continue
            if job.endpoint.outstanding.pop(job.rid, None):  # else it is being aborted
                job.task.cancel()
                task = self._spawn(self._abort(job.task, job.endpoint, job.rid, silent))
                self.aborts.add(task)
                task.add_done_callback(self.aborts.discard)

    async def _abort(
        self, attempt: asyncio.Task[None], endpoint: Endpoint, rid: str, silent: set[str]
    ) -> None:
        """Abort it at the server once the attempt has ended: the request must not come after its abort."""
        await asyncio.wait([attempt], timeout=ABORT_TIMEOUT)
        await self._abort_at(endpoint, rid, silent)

    async def _abort_at(self, endpoint: Endpoint, rid: str, silent: set[str]) -> None:
        """Abort `rid` at the server, or at every worker behind a router, but not at those that are `silent`.

        A server that cannot be reached has nothing to abort. One that lets ABORT_TIMEOUT pass becomes silent.
        """
        body = orjson.dumps({"rid": rid})
        for url in endpoint.worker_urls:
            async with self.abort_slots:
                if url in silent:
                    continue
                try:
                    key = self.servers.key_of(url)
                    await http.exchange("POST", url + "/abort_request", body, ABORT_TIMEOUT, key)
                except http.TimedOut:
                    silent.add(url)
                except http.NoAnswer:
                    pass

    def _note_progress(self, endpoint: Endpoint) -> None:
        endpoint.progressed_at = self.progressed_at = time.monotonic()
        heartbeat()

    async def _watch(self) -> None:
        """Act on servers that stand still; fail when all of them do."""
        while True:
            await asyncio.sleep(min(self.limits.stall / 10, 10.0))
            busy = [endpoint for endpoint in self.endpoints if endpoint.outstanding]
            progressed = await asyncio.gather(*(endpoint.has_progressed() for endpoint in busy))
            for endpoint in itertools.compress(busy, progressed):
                self._note_progress(endpoint)
            now = time.monotonic()
            if self.is_loading or self._is_idle():
                self.progressed_at = now  # and no heartbeat: the ranks may be stuck elsewhere
            if now - self.progressed_at > self.limits.stop:
                lines = "; ".join(line.strip() for line in self.waiting().splitlines())
                stall = f"engine.stall_seconds={self.limits.stall:g}"
                self._fail(EngineError(f"no progress for 2 × {stall}: {lines}"))
                return
            for endpoint in list(self.endpoints):
                self._check_stall(endpoint, now)

    def _check_stall(self, endpoint: Endpoint, now: float) -> None:
        """Restart workers that stand still behind a router; leave an endpoint that stands still."""
        stall = self.limits.stall
        if self.is_loading or not endpoint.outstanding:
            endpoint.progressed_at = now
            endpoint.moved_at = {}
        for url in [url for url, moved_at in endpoint.moved_at.items() if now - moved_at > stall]:
            self.servers.restart(url, f"stood still for {stall:g} s")
            del endpoint.moved_at[url]
        if now - endpoint.progressed_at > stall:
            _print(f"no progress at {endpoint.url} for {stall:g} s, asking again\n{self.waiting()}")
            self.servers.restart(endpoint.url, f"stood still for {stall:g} s")
            self._leave(endpoint)

    def _leave(self, endpoint: Endpoint) -> None:
        """Send its requests again, elsewhere if there is another server."""
        jobs = list(endpoint.outstanding.values())
        if len(self.endpoints) > 1:
            self.endpoints.remove(endpoint)  # until the next sync: /health does not prove that it generates
        self._note_fault(endpoint, f"no progress for {self.limits.stall:g} s", time.monotonic())
        self._abandon(jobs)
        for job in jobs:
            self._send_again(job)
        self._send()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._end_task)
        return task

    def _end_task(self, task: asyncio.Task[None]) -> None:
        """Pass any error on to the streams, a bug too: else they would wait forever."""
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._fail(error)


def _print(text: str) -> None:
    print(f"engine: {text}", file=sys.stderr, flush=True)
