"""The engine's thread: which server is asked for which response, again where that is safe, and what is done
about one that stands still.

Generating changes nothing at a server, so whatever is lost is asked for again: after a connection that
failed, a server that is not ready (429, 5xx), an answer that is no answer, an abort that nobody asked for. A
refusal (another 4xx) would come again: it ends the run.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import aiohttp
import orjson

from dapo.clock import heartbeat
from dapo.engine import generate
from dapo.engine.control import Server, one_line
from dapo.engine.generate import UNKNOWN_VERSION, BadAnswer
from dapo.types import EngineError, Request, Sample

RETRIED = {408, 429, 500, 502, 503, 504}  # HTTP: not now; anything else but 200 is a refusal
MAX_ATTEMPTS = 8  # for one response
# seconds for which a server that failed is left alone, doubled from failure to failure
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
ABORT_LIMIT, NUM_ABORTS = 10.0, 32  # seconds for one, so many at a time
# seconds that an idle connection is kept: fewer than the server's 5, which would close it under a new request
KEEP_ALIVE = 2.0
FAULTS = (aiohttp.ClientError, OSError, TimeoutError, BadAnswer)  # of a server, in one request


class Servers(Protocol):
    """Who generates. `workers` take control calls; `generate_urls` take requests: the workers' own, or their
    router's.
    """

    @property
    def workers(self) -> Sequence[Server]: ...

    @property
    def generate_urls(self) -> Sequence[str]: ...

    def refresh(self) -> object:
        """Before a sync: count those that were restarted among the workers."""

    def serve(self) -> None:
        """After it: every worker has the weights, and may be asked."""

    def check(self) -> None:
        """Raises EngineError if nobody is left who could answer: WeightsLost if somebody can after a sync."""

    def restart(self, url: str, fault: str) -> None:
        """Start a worker that stands still again, if it is not someone else's. Returns at once."""

    def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class Job:
    """A request until its sample has left `completed`."""

    request: Request
    version: int  # of the weights when it was submitted: no older policy may answer
    attempts: int = 0
    endpoint: Endpoint | None = None  # where it was asked last
    rid: str = ""  # by which name
    task: asyncio.Task[None] | None = None  # the asking, while it lasts
    asked_at: float = 0.0


@dataclass(eq=False, slots=True)
class Endpoint:
    """A URL that generates: a worker, or the router before several."""

    url: str
    is_router: bool
    asked: dict[str, Job] = field(default_factory=dict)  # not answered yet, by the id of the attempt
    is_usable: bool = True
    usable_since: float = 0.0
    progressed_at: float = 0.0  # when it last answered, or was seen to generate
    # of each worker behind a router: when it last generated, or had nothing to do
    moved_at: dict[str, float] = field(default_factory=dict)
    num_faults: int = 0  # since it last answered
    fault: str = ""  # the last one


class Dispatch:
    """Asks the servers for what is added, until it is delivered, failed or abandoned. All in one event loop,
    unless stated.

    A worker is asked for at most `max_concurrent` responses at a time. One that stands still for
    `stall_seconds` is started again, or, if it is someone else's, left alone until the next sync of weights;
    its responses are asked for again, elsewhere if there is an elsewhere. After twice as long without
    progress, anywhere, that is a failure.
    """

    def __init__(self, servers: Servers, max_concurrent: int, stall_seconds: float, is_wanted: Callable[[Job], bool],
                 deliver: Callable[[Job, Sample], None], fail: Callable[[BaseException], None]):  # fmt: skip
        self.servers, self.max_concurrent, self.stall_seconds = servers, max_concurrent, stall_seconds
        self.is_wanted, self.deliver, self.fail = is_wanted, deliver, fail
        self.version = UNKNOWN_VERSION  # of the weights that were last sent; both are set from outside
        self.is_loading = False
        self.name = uuid.uuid4().hex[:8]  # servers may still work for a trainer that died
        self.numbers = itertools.count()  # of what was asked
        self.endpoints: list[Endpoint] = []
        self.ready: deque[Job] = deque()  # to be asked
        self.progressed_at = time.monotonic()
        self.loads: dict[str, Any] = {}  # each worker's own account of what it holds, when last asked
        self.tasks: set[asyncio.Task[None]] = set()
        self.aborts: set[asyncio.Task[None]] = set()  # of the tasks those that tell a server

    async def open(self) -> None:
        # our own limits are below
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE, socket_factory=_kept_alive)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=60)  # a long response is no error
        key = self.servers.workers[0].key
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers, cookie_jar=aiohttp.DummyCookieJar()
        )
        self.abort_slots = asyncio.Semaphore(NUM_ABORTS)
        self._spawn(self._watch())
        await self.meet()

    async def meet(self) -> None:
        """After a sync: take up those that have joined the servers or were left alone, let go of those that
        have left.
        """
        known = {endpoint.url: endpoint for endpoint in self.endpoints}
        urls, workers = (
            [url.rstrip("/") for url in self.servers.generate_urls],
            [worker.url for worker in self.servers.workers],
        )
        self.endpoints = [known.get(url) or Endpoint(url, is_router=url not in workers) for url in urls]
        self._send()

    async def settle(self) -> None:
        """Wait until the servers know of every abort."""
        await asyncio.gather(*self.aborts)

    async def close(self) -> None:
        self.ready.clear()
        self.abandon([job for endpoint in self.endpoints for job in endpoint.asked.values()])
        if self.aborts:
            await asyncio.wait(self.aborts, timeout=2)
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.session.close()

    def waiting(self) -> str:
        """Who is waited for: responses, where they were asked for, for how long. May be called from any
        thread.
        """
        now, asked, lines = time.monotonic(), 0, []
        for endpoint in self.endpoints:
            jobs = sorted(list(endpoint.asked.values()), key=lambda job: job.asked_at)
            state = f"{'usable' if endpoint.is_usable else 'left alone'}{f', last fault: {endpoint.fault}' if endpoint.fault else ''}"
            named = [f"{job.request.id} for {now - job.asked_at:.0f} s" for job in jobs[:8]] + ["…"] * (
                len(jobs) > 8
            )
            lines.append(
                f"  {endpoint.url} ({state}): {len(jobs)} asked{': ' if jobs else ''}{'; '.join(named)}"
            )
            asked += len(jobs)
        unsent = [job.request.id for job in list(self.ready) if self.is_wanted(job)]
        if unsent:
            lines.append(f"  not asked: {len(unsent)}: {' '.join(unsent[:8] + ['…'] * (len(unsent) > 8))}")
        last = f"the last one came {now - self.progressed_at:.0f} s ago"
        return "\n".join([f"waiting for {asked + len(unsent)} responses; {last}", *lines])

    def add(self, jobs: list[Job]) -> None:
        if not self.ready and not any(endpoint.asked for endpoint in self.endpoints):
            self.progressed_at = time.monotonic()  # nothing was waited for till now
        self.ready.extend(jobs)
        self._send()

    def _send(self) -> None:
        """Ask for what is ready, wherever there is room: not where it was asked for last, if possible; where
        the least is outstanding.
        """
        now = time.monotonic()
        while self.ready:
            free = [
                endpoint
                for endpoint in self.endpoints
                if endpoint.is_usable and len(endpoint.asked) < self._room_at(endpoint)
            ]
            if not free:
                return
            job = self.ready.popleft()
            if not self.is_wanted(job):
                continue
            endpoint = min(free, key=lambda endpoint: (endpoint is job.endpoint, len(endpoint.asked)))
            if not endpoint.asked:
                endpoint.progressed_at = now
            job.endpoint, job.asked_at, job.attempts = endpoint, now, job.attempts + 1
            # never used twice; and since a server aborts every id that begins with the one it is told, each
            # ends with a mark
            job.rid = f"{self.name}-{job.request.id}-{next(self.numbers)};"
            endpoint.asked[job.rid] = job
            job.task = self._spawn(self._ask(job, endpoint, job.rid))
            # also when it is cancelled before it has begun
            job.task.add_done_callback(partial(self._end_asking, endpoint, job.rid))

    def _room_at(self, endpoint: Endpoint) -> int:
        """For how many responses at a time: fewer at a router that has lost a worker since the last sync."""
        return self.max_concurrent * len(self._workers_at(endpoint))

    async def _ask(self, job: Job, endpoint: Endpoint, rid: str) -> None:
        try:
            sample = generate.read(await self._post(endpoint, job.request, rid), job.request)
            self._check_versions(job, sample)
        except FAULTS as error:
            self._note_fault(
                endpoint, f"{type(error).__name__}: {error}".removeprefix("BadAnswer: "), job.asked_at
            )
            self._ask_again(job)
        else:
            endpoint.num_faults = 0
            self._note_progress(endpoint)
            self.deliver(job, sample)

    def _end_asking(self, endpoint: Endpoint, rid: str, task: asyncio.Task[None]) -> None:
        endpoint.asked.pop(rid, None)
        self._send()

    async def _post(self, endpoint: Endpoint, request: Request, rid: str) -> bytes:
        async with self.session.post(
            endpoint.url + "/generate", data=generate.body(request, rid)
        ) as response:
            answer = await response.read()
        if response.status in RETRIED:
            raise BadAnswer(f"{response.status} {one_line(answer)}")
        if response.status != 200:
            raise EngineError(
                f"{endpoint.url} refused request {request.id} ({len(request.prompt.tokens)} tokens of prompt, "
                "max_tokens "
                f"{request.sampling.max_tokens}): {response.status} {one_line(answer)}"
            )
        return answer

    def _check_versions(self, job: Job, sample: Sample) -> None:
        """A server that was restarted, or missed a sync, answers well, and from another policy."""
        if job.version != UNKNOWN_VERSION and not all(
            job.version <= version <= self.version for version, _, _ in sample.versions
        ):
            raise BadAnswer(
                f"generates with weight version {sample.versions[0][0]}, not {job.version}: it missed the "
                "last weight sync"
            )

    def _ask_again(self, job: Job) -> None:
        assert job.endpoint
        if job.attempts < MAX_ATTEMPTS:
            self.ready.appendleft(job)
        elif self.is_wanted(job):
            self.fail(
                EngineError(
                    f"request {job.request.id} failed {job.attempts} times, the last time at "
                    f"{job.endpoint.url}: {job.endpoint.fault}"
                )
            )

    def _note_progress(self, endpoint: Endpoint) -> None:
        endpoint.progressed_at = self.progressed_at = time.monotonic()
        heartbeat()

    def _note_fault(self, endpoint: Endpoint, fault: str, asked_at: float) -> None:
        """Leave the server alone for a while. What was asked for before it was last found well belongs to the
        same failure.
        """
        endpoint.fault = fault
        if endpoint.is_usable and asked_at >= endpoint.usable_since:
            endpoint.is_usable = False
            endpoint.num_faults += 1
            self._spawn(self._restore(endpoint))

    async def _restore(self, endpoint: Endpoint) -> None:
        pause = min(FIRST_PAUSE * 2.0 ** min(endpoint.num_faults - 1, 10), LONGEST_PAUSE)
        _say(f"{endpoint.url} failed, {len(endpoint.asked)} more responses asked there: {endpoint.fault}")
        await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        while endpoint in self.endpoints and not await self._is_well(endpoint):
            pause = min(2 * pause, LONGEST_PAUSE)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
        if endpoint not in self.endpoints:
            return
        endpoint.is_usable, endpoint.usable_since = True, time.monotonic()
        _say(f"{endpoint.url} is asked again")
        self._send()

    async def _is_well(self, endpoint: Endpoint) -> bool:
        """It answers; a worker also says that it has the weights of the last sync."""
        if await self._get(endpoint.url + "/health") is None:
            return False
        if endpoint.is_router or self.version == UNKNOWN_VERSION or self.is_loading:
            return True
        version = (await self._get(endpoint.url + "/model_info") or {}).get("weight_version")
        if version == str(self.version):
            return True
        endpoint.fault = f"has weight version {version}, not {self.version}: it missed the last weight sync"
        return False

    async def _get(self, url: str) -> dict[str, Any] | None:
        """The JSON object at `url`, {} for other words; None if there is no 200 within 10 seconds."""
        try:
            async with self.session.get(url, timeout=aiohttp.ClientTimeout(total=10)) as response:
                answer = await response.read()
            value = orjson.loads(answer) if answer.startswith(b"{") else {}
        except (aiohttp.ClientError, OSError, TimeoutError, orjson.JSONDecodeError):
            return None
        return value if response.status == 200 else None

    def abandon(self, jobs: list[Job]) -> None:
        """Stop asking, and tell the servers."""
        self.ready = deque(filter(self.is_wanted, self.ready))
        silent = set[str]()
        for job in jobs:
            if job.task and not job.task.done() and job.endpoint:
                job.task.cancel()
                job.endpoint.asked.pop(job.rid, None)
                task = self._spawn(self._tell(job.endpoint, job.rid, silent))
                self.aborts.add(task)
                task.add_done_callback(self.aborts.discard)

    async def _tell(self, endpoint: Endpoint, rid: str, silent: set[str]) -> None:
        """Abort `rid` at the server; at every worker behind a router. One that cannot be reached has nothing
        to abort.

        One that has let ABORT_LIMIT pass is `silent`, and told no more.
        """
        for url in self._workers_at(endpoint):
            async with self.abort_slots:
                if url in silent:
                    continue
                try:
                    body, limit = orjson.dumps({"rid": rid}), aiohttp.ClientTimeout(total=ABORT_LIMIT)
                    async with self.session.post(
                        url + "/abort_request", data=body, timeout=limit
                    ) as response:
                        await response.read()
                except TimeoutError:
                    silent.add(url)
                except FAULTS:
                    pass

    async def _watch(self) -> None:
        """Where a server has not progressed for stall_seconds, give it up and ask elsewhere; where nothing
        has for twice as long, fail.
        """
        while True:
            await asyncio.sleep(min(self.stall_seconds / 10, 10.0))
            await asyncio.gather(*(self._look(endpoint) for endpoint in self.endpoints if endpoint.asked))
            now = time.monotonic()
            if self.is_loading or not (self.ready or any(endpoint.asked for endpoint in self.endpoints)):
                # and no beat: of what the ranks do meanwhile this thread knows nothing
                self.progressed_at = now
            if now - self.progressed_at > 2 * self.stall_seconds:
                self.fail(
                    EngineError(
                        f"no progress for 2 × engine.stall_seconds={self.stall_seconds:g}: "
                        f"{_joined(self.waiting())}"
                    )
                )
                return
            for endpoint in list(self.endpoints):
                if self.is_loading or not endpoint.asked:
                    endpoint.progressed_at, endpoint.moved_at = now, {}
                for url in [
                    url for url, moved_at in endpoint.moved_at.items() if now - moved_at > self.stall_seconds
                ]:
                    self.servers.restart(url, f"stood still for {self.stall_seconds:g} s")
                    del endpoint.moved_at[url]
                if now - endpoint.progressed_at > self.stall_seconds:
                    self._move(endpoint)

    async def _look(self, endpoint: Endpoint) -> None:
        """Progress is also a worker that holds another number of tokens than at the last look: it works on
        long responses.
        """
        busy = await self._busy_behind(endpoint) if endpoint.is_router else set()
        for url in self._workers_at(endpoint):
            loads = (await self._get(url + "/v1/loads") or {}).get("loads", [])
            held = [(load.get("num_running_reqs"), load.get("num_used_tokens")) for load in loads]
            has_moved = held != self.loads.get(url) and any(running for running, _ in held)
            self.loads[url] = held
            if has_moved:
                self._note_progress(endpoint)
            if endpoint.is_router and (has_moved or url not in busy or url not in endpoint.moved_at):
                endpoint.moved_at[url] = time.monotonic()

    async def _busy_behind(self, router: Endpoint) -> set[str]:
        """The workers from which the router expects answers. Their own account is no evidence: what hangs has
        not brought it up to date.
        """
        workers = (await self._get(router.url + "/workers") or {}).get("workers", [])
        return {worker["url"].rstrip("/") for worker in workers if worker["load"]}

    def _move(self, endpoint: Endpoint) -> None:
        _say(f"no progress at {endpoint.url} for {self.stall_seconds:g} s, asking again\n{self.waiting()}")
        jobs = list(endpoint.asked.values())
        self.servers.restart(endpoint.url, f"stood still for {self.stall_seconds:g} s")
        if len(self.endpoints) > 1:
            # until the next sync of weights: health is no sign that it would generate now
            self.endpoints.remove(endpoint)
        self._note_fault(endpoint, f"no progress for {self.stall_seconds:g} s", time.monotonic())
        self.abandon(jobs)
        for job in jobs:
            self._ask_again(job)
        self._send()

    def _workers_at(self, endpoint: Endpoint) -> list[str]:
        """Whom to call for what a router does not forward: the endpoint itself, or every worker behind it."""
        return [worker.url for worker in self.servers.workers] if endpoint.is_router else [endpoint.url]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """An EngineError, or a fault of ours: either must reach the caller, who would wait for ever."""
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.fail(error)


def _kept_alive(address: Any) -> socket.socket:
    """A socket on which a host that vanished without a word is noticed after 75 seconds: nothing is sent
    while a response is generated.
    """
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 3)):
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def _joined(text: str) -> str:
    """Lines as one line."""
    return "; ".join(line.strip() for line in text.splitlines())


def _say(text: str) -> None:
    print(f"engine: {text}", file=sys.stderr, flush=True)
