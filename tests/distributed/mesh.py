"""What four ranks receive from each other; prints nothing.

torchrun --nproc-per-node 4 -m tests.distributed.mesh OUT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

import dapo.mesh
from dapo.config import Parallel
from dapo.mesh import LARGE, MAX_PARTS, Mesh
from dapo.types import EngineError, Interrupted


def outcome(call: Callable[[], Any]) -> Any:
    """Return the result, or the name, text and signal of what was raised."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001
        return [type(error).__name__, str(error), getattr(error, "signal", None)]


def sky(mesh: Mesh) -> dict[str, str]:
    return {"the sun": "up", "the moon": f"m{mesh.rank // 2}", "the tide": f"t{mesh.rank % 2}"}


def raise_error(error: Exception) -> Any:
    raise error


def together(mesh: Mesh, error: Exception | None, calls: list[int]) -> None:
    def function() -> None:
        calls.append(mesh.rank)
        if error and mesh.is_main:
            raise error

    mesh.together(function)


def large_shares() -> Iterator[dict[str, Any]]:
    """Two shares with arrays that travel by themselves: more of them than fit, one read-only, one empty."""
    for share in range(2):
        arrays = [np.full(LARGE // 4, 100 * share + i, np.int32) for i in range(MAX_PARTS + 2)]
        arrays[0].flags.writeable = False
        yield {
            "arrays": arrays,
            "empty": np.zeros(0),
            "small": np.arange(share, share + 3),
            "name": f"share {share}",
        }


def arrays_of(share: dict[str, Any]) -> Any:
    """What arrived, as JSON can hold it; the arrays can be written into on the ranks that received them."""
    *_, last = arrays = share["arrays"]
    is_whole = all((a == a[0]).all() and len(a) == LARGE // 4 for a in arrays)
    last += 1
    return [
        share["name"],
        is_whole,
        [int(a[0]) for a in arrays],
        len(share["empty"]),
        share["small"].tolist(),
    ]


def one_share_then_an_error() -> Iterator[str]:
    yield "the first"
    raise KeyError("y")


def main(out: str) -> None:
    mesh = Mesh(Parallel(tensor=2, context=1))
    tree = Mesh(
        Parallel(tensor=2, pipeline=2)
    )  # the main rank sends to two, one of which passes on to the last
    calls: list[int] = []
    Interrupted.number = 15 if mesh.is_main else 2  # on the main rank it was SIGTERM
    found = {
        "layout": [mesh.rank, mesh.world, mesh.data, mesh.data_rank, mesh.context_rank, mesh.is_main],
        "data ranks of ranks": [mesh.data_rank_of(rank) for rank in range(mesh.world)],
        "scatter": outcome(lambda: mesh.scatter(lambda a, b: [f"{a}0{b}", f"{a}1{b}" * 1000], "<", ">")),
        "received": outcome(mesh.received),
        "on_main": outcome(lambda: mesh.on_main(lambda value: value + mesh.rank, 7)),
        "on_main_only": outcome(lambda: mesh.on_main_only(lambda: {"only": "here"})),
        "interrupted": outcome(lambda: mesh.on_main(raise_error, Interrupted())),
        "engine": outcome(lambda: mesh.on_main(raise_error, EngineError("server 3"))),
        "same": outcome(lambda: mesh.check_same({"the moon": "full"}, "look again")),
        "not the same": outcome(lambda: mesh.check_same(sky(mesh), "look again")),
        "large": outcome(lambda: arrays_of(mesh.scatter(large_shares))),
        "in a tree": outcome(lambda: arrays_of(tree.scatter(lambda: [next(large_shares())]))),
        "received in a tree": outcome(tree.received),
        "by stage": outcome(lambda: tree.scatter(lambda: ["first", "last"], by_stage=True)),
        "bug by stage": outcome(lambda: tree.scatter(raise_error, EngineError("server 6"), by_stage=True)),
        "bug in a tree": outcome(lambda: tree.on_main(raise_error, EngineError("server 5"))),
        "bug late": outcome(lambda: mesh.scatter(one_share_then_an_error)),
        "too few": outcome(lambda: mesh.scatter(lambda: ["only one"])),
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
    dapo.mesh._code = lambda: f"code {mesh.rank % 2}"
    found["other code"] = outcome(lambda: Mesh(Parallel(tensor=1)))
    every: list[Any] = [None] * mesh.world
    dist.all_gather_object(every, found)
    if mesh.is_main:
        Path(out).write_text(
            json.dumps([{"name": name, "ranks": [each[name] for each in every]} for name in found])
        )


if __name__ == "__main__":
    main(sys.argv[1])
