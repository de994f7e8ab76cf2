"""One URL that generates: its outstanding requests, its faults and its progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import orjson

from dapo import http
from dapo.engine.control import Server
from dapo.engine.idle import Idle
from dapo.types import Request, Sample

PROBE_TIMEOUT = 10.0  # seconds, at most


class Servers(Protocol):
    """An engine's servers: `workers` take control calls, `generate_urls` (theirs or a router's) requests."""

    @property
    def workers(self) -> Sequence[Server]: ...

    @property
    def generate_urls(self) -> Sequence[str]: ...

    def key_of(self, url: str) -> str | None:
        """Return the key for `url`, or None. Raise NoAnswer if another process may have taken its place."""

    def refresh(self) -> bool:
        """Add servers that were restarted, before a sync. Return True if the workers changed."""

    def lost(self) -> list[str]:
        """Return the workers that have died since the last `refresh`."""

    def serve(self) -> None:
        """Let every worker take requests, after a sync: all have the weights."""

    def check(self) -> None:
        """Raise EngineError if no worker is left; WeightsLost if a sync would bring one back."""

    def restart(self, url: str, fault: str) -> None:
        """Restart a worker that stands still, unless it is external. Return at once."""

    def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class Job:
    """A request, until its sample is read from its stream."""

    request: Request
    version: int  # of the weights when it was submitted: no older policy may answer
    outcomes: SimpleQueue[tuple[Job, Sample] | None]  # of its stream; None: look for a failure
    is_wanted: bool = True  # False once it is read or aborted
    num_failures: int = 0
    endpoint: Endpoint | None = None  # where it was sent last
    rid: str = ""  # id sent to the server; unique per attempt
    sent_at: float = 0.0
    task: asyncio.Task[None] | None = None  # the last attempt


class Endpoint:
    """A worker, or the router in front of several. Used in the event loop, but for `describe`."""

    def __init__(self, url: str, servers: Servers, stall: float):
        self.url = url
        self.servers = servers
        self.probe_timeout = min(PROBE_TIMEOUT, stall / 4)  # a stall must be seen before it has lasted twice
        self.is_router = url not in [worker.url for worker in servers.workers]
        self.outstanding: dict[str, Job] = {}  # by rid
        self.idle = Idle()
        self.is_usable = True
        self.usable_since = 0.0
        self.num_faults = 0  # since its last answer
        self.fault = ""  # the last one
        self.progressed_at = 0.0  # when it last answered, or was seen to generate
        self.moved_at: dict[str, float] = {}  # worker behind a router → when it last generated or was idle
        self.loads: dict[str, Any] = {}  # worker → requests and tokens that it reported at the last check

    @property
    def worker_urls(self) -> list[str]:
        """URLs for calls that a router does not forward: this one, or those of all workers behind it."""
        return [worker.url for worker in self.servers.workers] if self.is_router else [self.url]

    def describe(self) -> str:
        """Return one line: its state and its oldest requests."""
        now = time.monotonic()
        jobs = sorted(list(self.outstanding.values()), key=lambda job: job.sent_at)
        state = "usable" if self.is_usable else "left alone"
        if self.fault:
            state += f", last fault: {self.fault}"
        ages = first_few([f"{job.request.id} for {now - job.sent_at:.0f} s" for job in jobs])
        return f"  {self.url} ({state}): {len(jobs)} asked" + (f": {'; '.join(ages)}" if jobs else "")

    async def is_well(self, version: int | None) -> bool:
        """Return True if it answers and has weights `version`, if given.

        Of a router: if none of its workers is dead and still listed, for it has no room for their requests.
        """
        if await self._get(self.url, "/health") is None:
            return False
        if self.is_router:
            return not any([await self._is_dead(url) for url in self.worker_urls])
        if version is None:
            return True
        found = (await self._get(self.url, "/model_info") or {}).get("weight_version")
        if found == str(version):
            return True
        self.fault = f"has weight version {str(found)[:20]}, not {version}: it missed the last weight sync"
        return False

    async def has_progressed(self) -> bool:
        """Return True if a worker generates: it reports another number of tokens than at the last check."""
        busy = await self._busy_workers() if self.is_router else set()
        has_progressed = False
        for url in self.worker_urls:
            loads = await self._list(url, "/v1/loads", "loads")
            load = [(load.get("num_running_reqs"), load.get("num_used_tokens")) for load in loads]
            has_moved = load != self.loads.get(url) and any(running for running, _ in load)
            self.loads[url] = load
            has_progressed = has_progressed or has_moved
            if self.is_router and (has_moved or url not in busy or url not in self.moved_at):
                self.moved_at[url] = time.monotonic()
        return has_progressed

    async def _busy_workers(self) -> set[str]:
        """Return the workers from which the router expects answers: one that hangs does not report them."""
        workers = await self._list(self.url, "/workers", "workers")
        return {str(worker.get("url")).rstrip("/") for worker in workers if worker.get("load")}

    async def _is_dead(self, url: str) -> bool:
        """Return True if nobody answers there, and at once: one that is late may only be busy."""
        try:
            await http.exchange(
                "GET", url + "/health", timeout=self.probe_timeout, key=self.servers.key_of(url)
            )
        except http.TimedOut:
            return False
        except http.NoAnswer:
            return True
        return False

    async def _list(self, url: str, path: str, name: str) -> list[dict[str, Any]]:
        """Return the objects in the list `name` of the answer; [] if there is none."""
        found = (await self._get(url, path) or {}).get(name)
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

    async def _get(self, url: str, path: str) -> dict[str, Any] | None:
        """Return the JSON object at url + path, {} for any other text, None for any other status than 200."""
        try:
            key = self.servers.key_of(url)
            answer = await http.exchange("GET", url + path, timeout=self.probe_timeout, key=key)
            value = orjson.loads(answer.body) if answer.body.startswith(b"{") else {}
        except (http.NoAnswer, orjson.JSONDecodeError):
            return None
        return value if answer.status == 200 else None


def first_few(names: list[str]) -> list[str]:
    return [*names[:8], "…"] if len(names) > 8 else names
