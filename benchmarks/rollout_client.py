"""How many tokens one trainer process takes in per second of its CPU time, through the engine of SGLang
servers.

Servers are processes of their own that send answers made beforehand. 1,000 requests are outstanding at a
time, responses have 4,096 tokens.

python benchmarks/rollout_client.py [responses]
"""

from __future__ import annotations

import asyncio
import cProfile
import multiprocessing
import os
import pstats
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import orjson
from record import heading, save, spread, table

from dapo import http
from dapo.config import Limits
from dapo.engine import generate
from dapo.engine.control import Server
from dapo.engine.sglang import SGLangEngine
from dapo.types import Prompt, Request, Sample, Sampling

TOKENS, CONCURRENT, SERVERS, RUNS = 4096, 1000, 2, 3
VOCABULARY, STOP = 151_936, 151_643
PROMPT = Prompt(0, np.arange(200, dtype=np.int32), "")
RID = b"0123abcd-0.0-0;"  # a server puts the request's in its place
REQUEST = Request(0, 0, PROMPT, 0, Sampling(1.0, TOKENS, (STOP,)))


def make_answer(seed: int) -> bytes:
    """As SGLang 0.5.23 answers: float32 log-probs written as doubles, ids of a vocabulary of 152 k, the text
    of the response.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, STOP, TOKENS).tolist()
    logprobs = (-rng.exponential(0.5, TOKENS)).astype(np.float32).tolist()
    meta = {
        "id": RID.decode(),
        "finish_reason": {"type": "length", "length": TOKENS},
        "prompt_tokens": 200,
        "weight_version": "1",
        "num_retractions": 0,
        "input_token_logprobs": [],
        "output_token_logprobs": [[logprob, id, None] for logprob, id in zip(logprobs, ids, strict=True)],
        "completion_tokens": TOKENS,
        "cached_tokens": 0,
        "weight_versions": [{"version": "1", "start": 0, "end": TOKENS}],
        "e2e_latency": 60.5,
    }
    return orjson.dumps({"text": "word " * TOKENS, "output_ids": ids, "meta_info": meta})


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


class Answering(asyncio.Protocol):
    """HTTP of a server that answers every POST with one of `answers`, half a second to one and a half
    later.
    """

    answers: ClassVar[list[bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, separator, rest = self.received.partition(b"\r\n\r\n")
        if separator and len(rest) >= _content_length(head):
            self.received = b""
            rid = orjson.loads(rest)["rid"].encode()
            asyncio.get_running_loop().call_later(random.uniform(0.5, 1.5), self._answer, rid)

    def _answer(self, rid: bytes) -> None:
        if not self.transport.is_closing():
            body = random.choice(self.answers).replace(RID, rid, 1)
            self.transport.write(HEAD % len(body))  # type: ignore[attr-defined]
            self.transport.write(body)  # type: ignore[attr-defined]


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0


def serve(pipe: Connection) -> None:
    """A process: sends its port, ends when the pipe is closed."""
    Answering.answers = [make_answer(seed) for seed in range(16)]

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Answering, "127.0.0.1", 0, backlog=2048)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.get_running_loop().run_in_executor(None, _until_closed, pipe)
        server.close()

    asyncio.run(run())
    os._exit(0)


def _until_closed(pipe: Connection) -> None:
    try:
        pipe.recv()
    except EOFError:
        return


def read_answer(answer: bytes) -> Sample:
    return generate.read(answer, REQUEST, RID.decode(), VOCABULARY)


class Bare:
    """Servers and weight sync of servers that never fail and take no weights."""

    def __init__(self, ports: list[int]):
        self.prepared = None
        self.generate_urls = [f"http://127.0.0.1:{port}" for port in ports]
        self.workers = [Server(url) for url in self.generate_urls]

    def refresh(self) -> None: ...

    def restart(self, url: str, fault: str) -> None: ...

    def key_of(self, url: str) -> None: ...

    def lost(self) -> list[str]:
        return []

    def prepare(self, version: int) -> None: ...

    def load(self, weights: object, version: int) -> None: ...

    def serve(self) -> None: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


def through_engine(ports: list[int], num_responses: int) -> tuple[float, float]:
    """Return CPU and wall seconds of the engine, from `submit` to the last sample."""
    servers = Bare(ports)
    engine = SGLangEngine(servers, servers, CONCURRENT // len(ports), Limits(300.0), VOCABULARY)
    engine.load_weights([], 1)
    stream = engine.stream()
    wanted = [replace(REQUEST, group=i // 16, index=i % 16, seed=i) for i in range(num_responses)]
    cpu, wall = time.process_time(), time.perf_counter()
    stream.submit(wanted)
    num_tokens = sum(sample.length for sample in stream.completed())
    taken = time.process_time() - cpu, time.perf_counter() - wall
    assert num_tokens == num_responses * TOKENS
    engine.close()
    return taken


def parsing_alone(num_responses: int, make: Callable[[bytes], object]) -> tuple[float, float]:
    """Return CPU and wall seconds of `make` on as many answers, without HTTP."""
    answers = [make_answer(seed) for seed in range(16)]
    cpu, wall = time.process_time(), time.perf_counter()
    for i in range(num_responses):
        make(answers[i % 16])
    return time.process_time() - cpu, time.perf_counter() - wall


def orjson_and_numpy(answer: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Do the least that any client must do."""
    entries = orjson.loads(answer)["meta_info"]["output_token_logprobs"]
    return np.array([e[0] for e in entries], np.float32), np.array([e[1] for e in entries], np.int32)


async def read_in_chunks(response: Any) -> bytes:
    """Read the body piece by piece, as it arrives: in place of http._read."""
    return b"".join([chunk async for chunk in response.content.iter_any()])


def main(num_responses: int, profiled: bool) -> None:
    context = multiprocessing.get_context("spawn")
    pipes, ports = [], []
    for _ in range(SERVERS):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs,), daemon=True).start()
        pipes.append(ours)
        ports.append(ours.recv())
    if profiled:
        return profile_loop(ports, num_responses)
    through_engine(ports, CONCURRENT)  # warm
    engine, unpaused, chunks, reading, least = [], [], [], [], []
    for _ in range(RUNS):
        engine.append(through_engine(ports, num_responses))
        with patch.object(generate, "_collector_paused", nullcontext):
            unpaused.append(through_engine(ports, num_responses))
        with patch.object(http, "_read", read_in_chunks):
            chunks.append(through_engine(ports, num_responses))
        reading.append(parsing_alone(num_responses, read_answer))
        least.append(parsing_alone(num_responses, orjson_and_numpy))
    rows = [
        ["the engine: HTTP, checks, samples", engine],
        ["the same, Python's garbage collector not paused while an answer is parsed", unpaused],
        ["the same, bodies taken piece by piece (`iter_any`), not at once (`read`)", chunks],
        ["`generate.read` alone, without HTTP", reading],
        ["orjson and numpy alone, nothing checked, collector not paused", least],
    ]
    text = heading("Taking in responses from SGLang servers")
    size = f"{len(make_answer(0)) / 1024:.0f} KiB"
    text += (
        f"\n{num_responses} responses of {TOKENS} tokens with log-probs ({size} each), {CONCURRENT} requests "
        f"outstanding, {SERVERS} server processes on the same machine, which answer in 0.5 to 1.5 s. "
        f"CPU time of the trainer's process, all its threads; median (range) of {RUNS}, in turns.\n\n"
    )
    millions = num_responses * TOKENS / 1e6
    columns = ["", "million tokens per CPU second", "wall seconds"]
    text += table(
        columns,
        [
            [name, spread([millions / cpu for cpu, _ in runs], 2), spread([wall for _, wall in runs], 1)]
            for name, runs in rows
        ],
    )
    save("rollout_client.md", text)


def profile_loop(ports: list[int], num_responses: int) -> None:
    """Print where the loop's thread spends its time."""
    profile = cProfile.Profile()

    async def switch(turn: Callable[[], None]) -> None:
        turn()

    http.wait(switch(profile.enable))
    print(through_engine(ports, num_responses))
    http.wait(switch(profile.disable))
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--profile"]
    main(int(arguments[0]) if arguments else 1500, "--profile" in sys.argv)
