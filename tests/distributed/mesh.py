"""What four ranks receive from each other; prints nothing.

torchrun --nproc-per-node 4 -m tests.distributed.mesh OUT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from dapo.config import Parallel
from dapo.mesh import Mesh
from dapo.types import EngineError, Interrupted


def outcome(call: Callable[[], Any]) -> Any:
    """Return the result, or the name, text and signal of what was raised."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001
        return [type(error).__name__, str(error), getattr(error, "signal", None)]


def raise_error(error: Exception) -> Any:
    raise error


def together(mesh: Mesh, error: Exception | None, calls: list[int]) -> None:
    def function() -> None:
        calls.append(mesh.rank)
        if error and mesh.is_main:
            raise error

    mesh.together(function)


def main(out: str) -> None:
    mesh = Mesh(Parallel(tensor=2, context=1))
    calls: list[int] = []
    Interrupted.number = 15 if mesh.is_main else 2  # on the main rank it was SIGTERM
    found = {
        "layout": [mesh.rank, mesh.world, mesh.data, mesh.num_shards, mesh.shard, mesh.is_main],
        "shards of ranks": [mesh.shard_of(rank) for rank in range(mesh.world)],
        "scatter": outcome(lambda: mesh.scatter(lambda a, b: [f"{a}0{b}", f"{a}1{b}" * 1000], "<", ">")),
        "received": outcome(mesh.received),
        "on_main": outcome(lambda: mesh.on_main(lambda value: value + mesh.rank, 7)),
        "on_main_only": outcome(lambda: mesh.on_main_only(lambda: {"only": "here"})),
        "interrupted": outcome(lambda: mesh.on_main(raise_error, Interrupted())),
        "engine": outcome(lambda: mesh.on_main(raise_error, EngineError("server 3"))),
        "bug": outcome(lambda: mesh.scatter(raise_error, KeyError("x"))),
        "together": outcome(lambda: together(mesh, None, calls)),
        "together failed": outcome(lambda: together(mesh, EngineError("server 4"), calls)),
        "called": calls,
        "gather": outcome(lambda: mesh.gather({"rank": mesh.rank})),
        "sum": outcome(lambda: mesh.sum(np.array([1, 10**mesh.rank])).tolist()),
        "sum_by_key": outcome(lambda: mesh.sum_by_key({"b": 1.5, "a": float(mesh.rank)})),
        "max": outcome(lambda: mesh.max(-1.0 - mesh.rank)),
        "first": mesh.is_first_to_fail(),
        "second": mesh.is_first_to_fail(),
        "store": outcome(lambda: mesh.store("count").add("key", mesh.rank + 1) > 0),
    }
    mesh.barrier()
    found["sum in the store"] = mesh.store("count").add("key", 0)
    found["another store"] = mesh.store("other").add("key", 0)
    found["not divisible"] = outcome(lambda: Mesh(Parallel(tensor=3)))
    every: list[Any] = [None] * mesh.world
    dist.all_gather_object(every, found)
    if mesh.is_main:
        Path(out).write_text(
            json.dumps([{"name": name, "ranks": [each[name] for each in every]} for name in found])
        )


if __name__ == "__main__":
    main(sys.argv[1])
