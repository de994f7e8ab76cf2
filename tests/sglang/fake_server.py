"""A server that answers as SGLang does, with the faults that a test gives it. For faults only: what the real
server does is tested with the real server.

A fault is an async function of (the server, the HTTP request, its body) that answers, or does not.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import numpy as np
import orjson
from aiohttp import web

from dapo.types import Prompt, Request, Sampling

STOP = 9
Fault = Callable[["FakeServer", web.Request, dict], Awaitable[web.StreamResponse]]


class FakeServer:
    """Listens at `url` until stopped. `faults` answer the first generation requests in turn, `afterwards` all
    later ones.
    """

    def __init__(
        self,
        faults: Iterable[Fault] = (),
        afterwards: Fault | None = None,
        seconds: float = 0.0,
        port: int = 0,
    ):
        self.faults, self.afterwards, self.seconds, self.port = (
            list(faults),
            afterwards or well,
            seconds,
            port,
        )
        self.version = "default"
        self.is_hung = False
        self.bodies: list[dict] = []  # of the generation requests, in order of arrival
        self.aborted: list[str] = []  # rids
        self.loads: Any = None  # what /v1/loads says
        self.workers: Any = []  # what a router's /workers says
        self.num_asked = self.most_asked = 0
        self.num_probes = 0  # of its health
        self.probe_seconds = 0.0  # until it answers one
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._call(self._start())

    def die(self) -> None:
        """As a killed process does: every connection is reset, new ones are refused."""
        self._call(self._die())

    def stop(self) -> None:
        """A second call does nothing."""
        if not self.thread.is_alive():
            return
        self.die()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    async def _start(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/health", self._health)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/v1/loads", self._loads)
        app.router.add_get("/workers", self._workers)
        self.runner = web.AppRunner(app, shutdown_timeout=0, handler_cancellation=True)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self.runner.addresses[0][1]

    async def _die(self) -> None:
        for connection in list(self.runner.server.connections) if self.runner.server else []:
            if connection.transport:
                connection.transport.abort()
        await self.runner.cleanup()

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        self.bodies.append(body)
        fault = self.faults.pop(0) if self.faults else self.afterwards
        self.num_asked += 1
        self.most_asked = max(self.most_asked, self.num_asked)
        try:
            return await fault(self, request, body)
        finally:
            self.num_asked -= 1

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append(orjson.loads(await request.read())["rid"])
        if self.is_hung:
            await asyncio.sleep(3600)
        return web.Response()

    async def _health(self, request: web.Request) -> web.Response:
        self.num_probes += 1
        await asyncio.sleep(self.probe_seconds)
        return web.Response(status=503 if self.is_hung else 200)

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.5.23"})

    async def _loads(self, request: web.Request) -> web.Response:
        return web.json_response({"loads": self.loads}, status=404 if self.loads is None else 200)

    async def _workers(self, request: web.Request) -> web.Response:
        return web.json_response({"workers": self.workers})


def tokens_of(request: Request) -> np.ndarray:
    """What a well server answers: a function of the seed, between 1 token and max_tokens, most of them ending
    with STOP.
    """
    return _tokens(request.seed, request.sampling.max_tokens)


def _tokens(seed: int, limit: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 1000, int(rng.integers(1, limit + 1)), dtype=np.int32)
    tokens[tokens < 50] = 0  # a token like any other; the stop ids are none of these
    if len(tokens) < limit:
        tokens[-1] = STOP
    return tokens


def answer(body: dict, version: str = "default", **changes: Any) -> dict:
    """As SGLang 0.5.23 answers `body`."""
    sampling = body["sampling_params"]
    tokens = _tokens(sampling["sampling_seed"], sampling["max_new_tokens"]).tolist()
    reason = (
        {"type": "stop", "matched": STOP} if tokens[-1] == STOP else {"type": "length", "length": len(tokens)}
    )
    meta = {
        "id": body["rid"],
        "finish_reason": reason,
        "prompt_tokens": len(body["input_ids"]),
        "weight_version": version,
        "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
        "output_token_logprobs": [[-token / 1000, token, None] for token in tokens],
        "completion_tokens": len(tokens),
    }
    return {"text": "", "output_ids": tokens, "meta_info": meta | changes}


# ---- what a server may do with a request ----


async def well(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    await asyncio.sleep(server.seconds)
    return web.json_response(answer(body, server.version))


def status(code: int, text: str = "not now") -> Fault:
    async def fault(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
        return web.json_response({"error": {"message": text}}, status=code)

    return fault


def changed(**changes: Any) -> Fault:
    """A well-formed answer in which these fields of meta_info are others."""

    async def fault(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
        return web.json_response(answer(body, server.version, **changes))

    return fault


async def garbage(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    return web.Response(body=b"<html>\xff\x00 502")


async def half_a_json(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    text = orjson.dumps(answer(body))
    return web.Response(body=text[: len(text) // 2])


async def half_a_body(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    """Fewer bytes than announced, then the end of the connection."""
    text = orjson.dumps(answer(body))
    assert request.transport
    request.transport.write(
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text[: len(text) // 2]
    )
    request.transport.close()
    await asyncio.sleep(60)
    raise AssertionError("the connection is closed")


async def closed(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    assert request.transport
    request.transport.abort()
    await asyncio.sleep(60)
    raise AssertionError("the connection is closed")


async def nothing(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    await asyncio.sleep(3600)
    raise AssertionError("nobody waits for an hour")


async def slow(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    await asyncio.sleep(0.5)
    response = web.StreamResponse()
    await response.prepare(request)
    text = orjson.dumps(answer(body, server.version))
    for i in range(0, len(text), 100):
        await response.write(text[i : i + 100])
        await asyncio.sleep(0.01)
    return response


async def two_samples(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    return web.json_response([answer(body), answer(body)])


async def no_sample(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    return web.json_response([])


async def too_few_logprobs(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    full = answer(body)
    full["meta_info"]["output_token_logprobs"].pop()
    return web.json_response(full)


async def null_logprobs(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    """JSON's NaN."""
    full = answer(body)
    full["meta_info"]["output_token_logprobs"][-1][0] = None
    return web.json_response(full)


async def unknown_token(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    full = answer(body)
    full["output_ids"][0] = full["meta_info"]["output_token_logprobs"][0][1] = 1000
    return web.json_response(full)


async def too_large(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    """More bytes than a response of so few tokens can have, without end."""
    response = web.StreamResponse()
    await response.prepare(request)
    while request.transport and not request.transport.is_closing():
        await response.write(b" " * 2**16)
        await asyncio.sleep(0)
    return response


async def logprobs_of_others(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
    full = answer(body)
    full["meta_info"]["output_token_logprobs"][0][1] += 1
    return web.json_response(full)


def requests(count: int, sampling: Sampling | None = None, first: int = 0) -> list[Request]:
    """Groups of two."""
    sampling = sampling or Sampling(1.0, 64, (STOP,))
    return [
        Request(i // 2, i % 2, Prompt(i // 2, np.arange(3, dtype=np.int32), ""), 1000 + i, sampling)
        for i in range(first, first + count)
    ]
