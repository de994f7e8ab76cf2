"""How many tokens the engine of SGLang servers takes in per second of CPU time: of the trainer, and of the
intake process.

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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import orjson
import psutil
from record import heading, save, spread, table

from dapo import http
from dapo.config import Limits
from dapo.engine import generate, intake
from dapo.engine.control import Server
from dapo.engine.sglang import SGLangEngine
from dapo.types import Prompt, Request, Sample, Sampling

TOKENS, CONCURRENT, SERVERS, RUNS = 4096, 1000, 2, 3
VOCABULARY, STOP = 151_936, 151_643
PROMPT = Prompt(0, np.arange(200, dtype=np.int32), "")
RID = b"0123abcd-0.0-0;"  # a server puts the request's in its place
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def make_request(index: int, tokens: int) -> Request:
    return Request(index // 16, index % 16, PROMPT, index, Sampling(1.0, tokens, (STOP,)))


def make_answer(seed: int, tokens: int = TOKENS) -> bytes:
    """As SGLang 0.5.23 answers: float32 log-probs written as doubles, ids of a vocabulary of 152 k, the text
    of the response.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, STOP, tokens).tolist()
    logprobs = (-rng.exponential(0.5, tokens)).astype(np.float32).tolist()
    meta = {
        "id": RID.decode(),
        "finish_reason": {"type": "length", "length": tokens},
        "prompt_tokens": 200,
        "weight_version": "1",
        "num_retractions": 0,
        "input_token_logprobs": [],
        "output_token_logprobs": [[logprob, id, None] for logprob, id in zip(logprobs, ids, strict=True)],
        "completion_tokens": tokens,
        "cached_tokens": 0,
        "weight_versions": [{"version": "1", "start": 0, "end": tokens}],
        "e2e_latency": 60.5,
    }
    return orjson.dumps({"meta_info": meta, "output_ids": ids, "text": "word " * tokens})


class Answering(asyncio.Protocol):
    """HTTP of a server that answers every POST with one of `answers`, half a second to one and a half
    later.
    """

    answers: ClassVar[list[tuple[bytes, memoryview]]] = []  # before and behind the request's id

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, separator, rest = self.received.partition(b"\r\n\r\n")
        if separator and len(rest) >= _content_length(head):
            self.received = b""
            if head.startswith(b"GET"):  # a look at its health
                self.transport.write(HEAD % 0)  # type: ignore[attr-defined]
                return
            rid = orjson.loads(rest)["rid"].encode()
            asyncio.get_running_loop().call_later(random.uniform(0.5, 1.5), self._answer, rid)

    def _answer(self, rid: bytes) -> None:
        if not self.transport.is_closing():
            before, after = random.choice(self.answers)
            head = HEAD % (len(before) + len(rid) + len(after))
            self.transport.write(head + before + rid)  # type: ignore[attr-defined]
            self.transport.write(after)  # type: ignore[attr-defined]


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0


def serve(pipe: Connection, tokens: int) -> None:
    """A process: sends its port, ends when the pipe is closed."""
    for answer in [make_answer(seed, tokens) for seed in range(16)]:
        start = answer.index(RID)
        Answering.answers.append((answer[:start], memoryview(answer)[start + len(RID) :]))

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


def start_servers(count: int, tokens: int) -> tuple[list[Connection], list[int]]:
    """Return pipes, which end servers when they are closed, and ports."""
    context = multiprocessing.get_context("spawn")
    pipes, ports = [], []
    for _ in range(count):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, tokens), daemon=True).start()
        pipes.append(ours)
        ports.append(ours.recv())
    return pipes, ports


def read_answer(answer: bytes) -> Sample:
    return generate.read(answer, generate.asked(make_request(0, TOKENS), RID.decode()), VOCABULARY)


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


@dataclass(frozen=True)
class Seconds:
    """CPU seconds of this process and of the intake process, and wall seconds; at a time, or in between."""

    trainer: float
    intake: float
    wall: float

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.trainer - other.trainer, self.intake - other.intake, self.wall - other.wall)


def make_engine(ports: list[int], concurrent: int) -> SGLangEngine:
    servers = Bare(ports)
    engine = SGLangEngine(servers, servers, concurrent // len(ports), Limits(300.0), VOCABULARY)
    engine.load_weights([], 1)
    return engine


def intake_of(engine: SGLangEngine) -> int:
    """Return the id of the intake process."""
    process = engine.client.intake.process
    assert process and process.process.pid
    return process.process.pid


def seconds(engine: SGLangEngine) -> Seconds:
    times = psutil.Process(intake_of(engine)).cpu_times()
    return Seconds(time.process_time(), times.user + times.system, time.perf_counter())


def through_engine(ports: list[int], num_responses: int) -> Seconds:
    """Return the seconds of the engine from `submit` to the last sample."""
    engine = make_engine(ports, CONCURRENT)
    stream = engine.stream()
    wanted = [make_request(i, TOKENS) for i in range(num_responses)]
    before = seconds(engine)
    stream.submit(wanted)
    num_tokens = sum(sample.length for sample in stream.completed())
    taken = seconds(engine) - before
    assert num_tokens == num_responses * TOKENS
    engine.close()
    return taken


def parsing_alone(num_responses: int, make: Callable[[bytes], object]) -> float:
    """Return CPU seconds of `make` on as many answers, without HTTP."""
    answers = [make_answer(seed) for seed in range(16)]
    cpu = time.process_time()
    for i in range(num_responses):
        make(answers[i % 16])
    return time.process_time() - cpu


def orjson_and_numpy(answer: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Do the least that any client must do."""
    entries = orjson.loads(answer)["meta_info"]["output_token_logprobs"]
    return np.array([e[0] for e in entries], np.float32), np.array([e[1] for e in entries], np.int32)


def main(num_responses: int, profiled: bool) -> None:
    _pipes, ports = start_servers(SERVERS, TOKENS)
    if profiled:
        return profile_intake(ports, num_responses)
    through_engine(ports, CONCURRENT)  # warm
    engine, reading, unpaused, least = [], [], [], []
    for _ in range(RUNS):
        engine.append(through_engine(ports, num_responses))
        reading.append(parsing_alone(num_responses, read_answer))
        with patch.object(generate, "_collector_paused", nullcontext):
            unpaused.append(parsing_alone(num_responses, read_answer))
        least.append(parsing_alone(num_responses, orjson_and_numpy))
    rows = [
        ["the engine, the intake process: HTTP, checks", [run.intake for run in engine]],
        ["the engine, the trainer's process: requests, samples", [run.trainer for run in engine]],
        ["`generate.read` alone, without HTTP", reading],
        ["the same, Python's garbage collector not paused while an answer is parsed", unpaused],
        ["orjson and numpy alone, nothing checked, collector not paused", least],
    ]
    text = heading("Taking in responses from SGLang servers")
    size = f"{len(make_answer(0)) / 1024:.0f} KiB"
    text += (
        f"\n{num_responses} responses of {TOKENS} tokens with log-probs ({size} each), {CONCURRENT} requests "
        f"outstanding, {SERVERS} server processes on the same machine, which answer in 0.5 to 1.5 s: "
        f"{spread([run.wall for run in engine], 1)} s. CPU time of a process, all its threads; median "
        f"(range) of {RUNS}, in turns.\n\n"
    )
    millions = num_responses * TOKENS / 1e6
    text += table(
        ["", "million tokens per CPU second"],
        [[name, spread([millions / cpu for cpu in runs], 2)] for name, runs in rows],
    )
    save("rollout_client.md", text)


def profile_intake(ports: list[int], num_responses: int) -> None:
    """Print where the time of the intake process goes, by doing its work in this one."""
    profile = cProfile.Profile()

    async def ask(index: int, slots: asyncio.Semaphore) -> None:
        request, rid = make_request(index, TOKENS), f"0123abcd-{index};"
        async with slots:
            url = f"http://127.0.0.1:{ports[index % len(ports)]}"
            body, asked = generate.body(request, rid), generate.asked(request, rid)
            await intake.fetch(intake.Ask(index, url, body, None, asked), VOCABULARY)

    async def ask_all() -> None:
        slots = asyncio.Semaphore(CONCURRENT)
        profile.enable()
        await asyncio.gather(*(ask(index, slots) for index in range(num_responses)))
        profile.disable()

    http.wait(ask_all())
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--profile"]
    main(int(arguments[0]) if arguments else 1500, "--profile" in sys.argv)
