"""A run's main process with two real servers and a router. One is killed at work, and hangs when it is back.

Three steps are collected as a run does it: under the first the server dies, before the second it gets the
weights again, under the third it hangs. What was seen is printed as JSON, and the process stays.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import psutil
import torch
from safetensors.torch import load_file

from dapo.assemble import make_engine
from dapo.config import Config, Limits
from dapo.engine import generate
from dapo.engine.control import Server
from dapo.engine.fleet import Fleet
from dapo.engine.sglang import SGLangEngine, SGLangStream
from dapo.reward.pool import Decoder, Reward
from dapo.rollout.prompts import PromptStream
from dapo.rollout.rollouts import Rollouts
from dapo.types import EngineError, Prompt, Request, Sample
from tests.sglang.conftest import server_config

GROUPS, SAMPLES = 12, 4  # of a step, of a group
STALL = 5.0  # seconds


class Seen(SGLangStream):
    """Records the samples that the engine returns."""

    samples: ClassVar[list[tuple[int, int, list[int]]]] = []  # group, index, versions

    def completed(self) -> Iterator[Sample]:
        for sample in super().completed():
            versions = sorted({version for version, _, _ in sample.versions})
            self.samples.append((sample.group, sample.index, versions))
            yield sample


class Work:
    """Counts the most requests that each worker was seen to run at once."""

    def __init__(self, workers: list[Server]):
        self.most = {worker.url: 0 for worker in workers}
        self.is_over = threading.Event()
        for worker in workers:  # one at work answers late, and must not keep the other from being asked
            threading.Thread(target=self._watch, args=(worker,), daemon=True).start()

    def _watch(self, worker: Server) -> None:
        while not self.is_over.wait(0.02):
            self.most[worker.url] = max(self.most[worker.url], running(worker))


def main(folder: Path, model: Path, python: str) -> None:
    generate.body = endless(generate.body)  # type: ignore[assignment]
    rollouts, said = make_rollouts(
        server_config(folder, model, python=python, servers=2, weight_sync="tensor")
    )
    servers: Fleet = rollouts.engine.servers  # type: ignore[attr-defined]
    weights = load_file(model / "model.safetensors")
    rollouts.load_weights(weights.items(), 0)
    first, _ = servers.workers
    seen: dict[str, Any] = {"urls": [worker.url for worker in servers.workers]}

    killer = threading.Thread(target=kill_at_work, args=(servers, first, seen))
    killer.start()
    seen["first_step"] = collect(rollouts, 0)
    killer.join()

    deadline = time.monotonic() + 600
    while servers.local[0].state != "up" and time.monotonic() < deadline:
        time.sleep(0.5)
    seen["workers_before_sync"] = [worker.url for worker in servers.workers]
    rollouts.load_weights(weights.items(), 1)
    seen["urls_after_sync"] = [worker.url for worker in servers.workers]
    work = Work(servers.workers)
    seen["second_step"] = collect(rollouts, 1)
    work.is_over.set()
    seen["most_running"] = work.most
    seen["num_processes"] = len(psutil.Process().children(recursive=True))

    scheduler(servers.local[0].process.pid).suspend()  # its HTTP goes on
    rollouts.engine.client.limits = Limits(STALL)  # type: ignore[attr-defined]
    seen["third_step"] = collect(rollouts, 2)
    seen["said"] = said
    seen["family"] = [child.pid for child in psutil.Process().children(recursive=True)]
    seen["guardian"] = servers.local[1].process.pid
    seen["guarded"] = [
        child.pid for child in psutil.Process(servers.local[1].process.pid).children(recursive=True)
    ]
    print(json.dumps(seen), flush=True)
    servers._is_closing.set()  # what is killed next stays dead
    time.sleep(600)


def make_rollouts(config: Config) -> tuple[Rollouts, list[str]]:
    """Return the rollouts, and the list that the servers' news are appended to."""
    said: list[str] = []
    rollout = {
        "prompts_per_step": GROUPS,
        "prompts_per_round": GROUPS,
        "group_size": SAMPLES,
        "dynamic_sampling": False,
    }
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout)})
    engine = make_engine(config, SimpleNamespace(device=torch.device("cpu")), lambda: False)  # type: ignore[arg-type]
    assert isinstance(engine, SGLangEngine)
    engine.servers.say = said.append  # type: ignore[attr-defined]
    engine.stream = lambda: Seen(engine)  # type: ignore[method-assign]
    prompts = [Prompt(i, np.full(8, 2 + i, np.int32), "1") for i in range(2 * GROUPS)]
    reward = Reward(
        config.reward.model_copy(update={"workers": 0}),
        config.rollout.max_response_length,
        decoder=Decoder(lambda tokens: " ".join(map(str, tokens))),
    )
    stream = PromptStream(prompts, 1)
    return Rollouts(config, 1, engine, stream, reward, (1,), None), said


def collect(rollouts: Rollouts, step: int) -> dict[str, Any]:
    Seen.samples.clear()
    buffer = rollouts.collect(step)
    return {
        "kept": [[group.id, len(group.samples)] for group in buffer.kept],
        "samples": list(Seen.samples),
    }


def kill_at_work(servers: Fleet, worker: Server, seen: dict[str, Any]) -> None:
    for _ in itertools.takewhile(lambda _: running(worker) == 0, range(600)):
        time.sleep(0.1)
    seen["running_when_killed"] = running(worker)
    scheduler(servers.local[0].process.pid).kill()


def running(worker: Server) -> int:
    try:
        return sum(
            load["num_running_reqs"] for load in worker.get("/v1/loads", fields={"loads": list})["loads"]
        )
    except EngineError:
        return 0


def endless(body: Any) -> Any:
    """Responses go on behind a stop token, so that there is work for seconds; the client cuts there."""

    def longer(request: Request, rid: str) -> bytes:
        asked = json.loads(body(request, rid))
        asked["sampling_params"]["ignore_eos"] = True
        return json.dumps(asked).encode()

    return longer


def scheduler(guardian: int) -> psutil.Process:
    return next(
        child
        for child in psutil.Process(guardian).children(recursive=True)
        if "scheduler" in " ".join(child.cmdline())
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    os._exit(0)
