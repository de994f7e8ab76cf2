"""One rank gets on while the other waits, for longer than a stall; then it hangs, with the other in a
collective.

torchrun --nproc-per-node 2 -m tests.distributed.stalled DIRECTORY
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dapo.clock import heartbeat, timed
from dapo.config import Limits, Parallel
from dapo.mesh import Mesh
from dapo.recorder import Recorder

STALL = 2.0


@timed("old_logprobs")
def work(mesh: Mesh) -> None:
    end = time.monotonic() + 4 * STALL
    while mesh.rank == 1 and time.monotonic() < end:
        heartbeat()
        time.sleep(0.05)
    mesh.barrier()


@timed("update")
def update(mesh: Mesh) -> None:
    if mesh.rank == 1:
        never_return()
    mesh.barrier()


def never_return() -> None:
    time.sleep(600)


def main(directory: str) -> None:
    mesh = Mesh(Parallel(tensor=1))
    Recorder(
        Path(directory), Limits(STALL), mesh.rank, mesh.world, mesh.store("stalls"), waiting=lambda: "nobody"
    )
    mesh.barrier()
    work(mesh)
    print("worked", flush=True)
    update(mesh)


if __name__ == "__main__":
    main(sys.argv[1])
