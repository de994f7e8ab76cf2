"""benchmarks/crash_test.py in small: ranks that are forked from one process, so that torch and Megatron are imported once.

python -m tests.distributed.crashes OUT.json
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import dapo.train  # noqa: F401  # before the ranks are forked
from dapo.__main__ import end
from dapo.__main__ import main as dapo_main
from tests.distributed.launch import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import crash_test

WORLD, KILLS, SEED = 2, 10, 0


class Forked:
    """The ranks of a run."""

    def __init__(self, options: list[str], log: Path):
        log.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        self.ranks = [fork.Process(target=_rank, args=(rank, port, options, log)) for rank in range(WORLD)]
        for rank in self.ranks:
            rank.start()

    def kill(self) -> None:
        for rank in self.ranks:
            if rank.is_alive():
                os.kill(rank.pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.join()

    def status(self) -> int | None:
        codes = [rank.exitcode for rank in self.ranks]
        return None if None in codes else max(map(abs, codes))


def _rank(rank: int, port: int, options: list[str], log: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    end(dapo_main(["train", str(ROOT / "examples/arithmetic/config.yaml"), f"parallel.tensor={WORLD}", *options]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        found = crash_test.crash(Path(directory), KILLS, SEED, Forked)
    Path(sys.argv[1]).write_text(json.dumps(found | {"kills": [asdict(kill) | {"moment": kill.moment} for kill in found["kills"]]}))
