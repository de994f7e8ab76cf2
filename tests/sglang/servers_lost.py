"""Training on two ranks whose engine loses its servers during evaluations, rollouts and syncs; and for good.

torchrun --nproc-per-node 2 -m tests.sglang.servers_lost OUT.json. The embedded engine samples, which loses
nothing by itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

import dapo.assemble
import dapo.policy  # before Megatron, which it adapts
from dapo.config import Parallel
from dapo.engine.embedded import EmbeddedEngine, EmbeddedStream
from dapo.mesh import Mesh
from dapo.rollout import dump
from dapo.types import Sample, WeightsLost
from tests.distributed.launch import numbers
from tests.sglang.sync_fails import attempt

# readings of samples that end in a loss, and syncs that do
CASES: dict[str, tuple[list[int], list[int]]] = {
    "never": ([], []),
    "now_and_then": ([0, 1, 2], []),
    "under_syncs": ([1], [0, 2, 4]),
    "for_ever": (list(range(9)), []),
    "under_every_sync": ([], list(range(9))),
    "ahead": ([2, 5, 11, 40, 41], [2, 5]),
}
AHEAD = [
    "rollout.max_staleness=2", "run.steps=5", "rollout.dump_share=1.0", "parallel.tensor=1", "eval.every=3",
]  # fmt: skip


OPTIONS = [
    "eval.every=1", "eval.samples=1", "reward.workers=0", "rollout.prompts_per_step=4",
    "rollout.prompts_per_round=4", "parallel.tensor=2", "run.steps=1", "run.save_every=100",
    "engine.max_concurrent=32",
]  # fmt: skip


class LosingEngine(EmbeddedEngine):
    losses: ClassVar[list[int]] = []
    sync_losses: ClassVar[list[int]] = []
    is_ahead: ClassVar[bool] = False  # what is outstanding goes on under new weights
    instances: ClassVar[list[LosingEngine]] = []

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.num_readings = 0
        self.synced: list[int] = []
        self.instances.append(self)

    def stream(self) -> LosingStream:
        made = LosingStream(self)
        self.streams.add(made)
        return made

    def load_weights(self, weights: Any, version: int) -> None:
        for stream in self.streams:
            assert self.is_ahead or not (stream.queue or stream.finished), "what was lost is aborted"
        self.synced.append(version)
        if len(self.synced) - 1 in self.sync_losses:
            next(iter(weights))  # all ranks are in the collectives, and most weights are still to come
            raise WeightsLost("http://a died under a weight sync: connection refused")
        super().load_weights(weights, version)


class LosingStream(EmbeddedStream):
    engine: LosingEngine

    def completed(self) -> Iterator[Sample]:
        reading = self.engine.num_readings
        self.engine.num_readings += 1
        for number, sample in enumerate(super().completed()):
            if number == (0 if self.engine.is_ahead else 10) and reading in self.engine.losses:
                raise WeightsLost("no server has the policy's weights")
            yield sample


def main(out: str) -> None:
    torch.set_num_threads(1)
    dapo.assemble.EmbeddedEngine = LosingEngine  # type: ignore[misc]
    root, mesh, results = Path(out).parent, Mesh(Parallel(tensor=2)), []
    for name, (LosingEngine.losses, LosingEngine.sync_losses) in CASES.items():
        # the run that is compared with keeps its memory, the others release it for their engine
        LosingEngine.is_ahead = name == "ahead"
        LosingEngine.is_colocated = name not in ("never", "ahead")
        mine = attempt([*OPTIONS, *(AHEAD if name == "ahead" else []), f"run.dir={root / name}"])
        ranks: list[Any] = [None] * mesh.world
        torch.distributed.all_gather_object(ranks, mine)
        if mesh.is_main:
            saved = sorted(path.name for path in (root / name / "checkpoints").glob("*"))
            made = numbers(root / name) if (root / name / "hf").exists() else None
            results.append(
                {
                    "name": name,
                    "ranks": ranks,
                    "saved": saved,
                    "numbers": made,
                    "synced": LosingEngine.instances[-1].synced,
                    "groups": [
                        sorted({row["group"] for row in dump.read_rows(path, {"group": "int64"})})
                        for path in sorted((root / name).glob("rollouts/*.parquet"))
                        if dump.TRACES not in path.name
                    ],
                }
            )
    if mesh.is_main:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
