"""A run's main process with two real servers and a router. One is killed at work, and hangs when it is back.
Prints what was seen as JSON, and stays.

Versions tell who answered: the first servers' weights are called 7, a restarted server's "default" until it is synced, then 8.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from dapo.engine.server import Server
from dapo.engine.servers import Servers
from dapo.engine.sglang import SGLangEngine
from dapo.types import EngineError, Sampling
from tests.sglang.conftest import server_config
from tests.sglang.fake_server import requests

NUM_REQUESTS = 48
STALL = 5.0  # seconds


def main(folder: Path, model: Path, python: str) -> None:
    said: list[str] = []
    servers = Servers(server_config(folder, model, python=python, servers=2), say=said.append)
    servers.wait()
    first, second = servers.workers
    for worker in (first, second):
        worker.post("/update_weight_version", {"new_version": "7"})
    router = Server(servers.generate_urls[0], servers.key)
    seen: dict[str, Any] = {"urls": [worker.url for worker in servers.workers], "generate_urls": servers.generate_urls}

    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        answers = [pool.submit(generate, router, i, 400) for i in range(NUM_REQUESTS)]
        while not all(worker["load"] for worker in router.get("/workers")["workers"]):
            time.sleep(0.1)
        seen["busy_when_killed"] = sum(not answer.done() for answer in answers)
        scheduler(servers.local[0].process.pid).kill()
        seen["during"] = [answer.result() for answer in answers]

    deadline = time.monotonic() + 600
    while servers.local[0].state != "up" and time.monotonic() < deadline:
        time.sleep(0.5)
    seen["workers_before_sync"] = [worker.url for worker in servers.workers]
    seen["before_sync"] = [generate(router, i, 4) for i in range(8)]
    seen["has_changed"] = servers.refresh()
    for worker in servers.workers:
        if worker.url != second.url:
            worker.post("/update_weight_version", {"new_version": "8"})
    servers.serve()
    seen["urls_after_sync"] = [worker.url for worker in servers.workers]
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        seen["after_sync"] = list(pool.map(lambda i: generate(router, i, 50), range(NUM_REQUESTS)))
    seen["num_processes"] = len(psutil.Process().children(recursive=True))

    scheduler(servers.local[0].process.pid).suspend()  # its HTTP goes on
    engine = SGLangEngine(servers, SimpleNamespace(), max_concurrent=64, stall_seconds=STALL)  # type: ignore[arg-type]  # no sync takes place
    engine.submit(requests(NUM_REQUESTS, Sampling(1.0, 100, (1,))))
    seen["beside_a_hung_server"] = [f"{sample.group}.{sample.index}" for sample in engine.completed()]
    seen["said"] = said
    seen["family"] = [child.pid for child in psutil.Process().children(recursive=True)]
    seen["guardian"] = servers.local[1].process.pid
    seen["guarded"] = [child.pid for child in psutil.Process(servers.local[1].process.pid).children(recursive=True)]
    print(json.dumps(seen), flush=True)
    servers._is_closing.set()  # what is killed next stays dead
    time.sleep(600)


def generate(router: Server, number: int, length: int) -> dict[str, Any]:
    """One response of `length` tokens, asked for until it comes."""
    body = {"input_ids": [2 + number % 20] * 8, "sampling_params": {"max_new_tokens": length, "ignore_eos": True}}
    for attempt in range(20):
        try:
            answer = router.post("/generate", body, timeout=120)
            return {"tokens": len(answer["output_ids"]), "version": answer["meta_info"]["weight_version"], "attempts": attempt + 1}
        except EngineError:
            time.sleep(0.5)
    return {"tokens": 0, "version": None, "attempts": 20}


def scheduler(guardian: int) -> psutil.Process:
    return next(child for child in psutil.Process(guardian).children(recursive=True) if "scheduler" in " ".join(child.cmdline()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    os._exit(0)
