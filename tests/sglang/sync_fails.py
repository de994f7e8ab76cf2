"""Training on two ranks whose sync of weights fails at the third step, each time otherwise; then the same
command without the fault.

torchrun --nproc-per-node 2 -m tests.sglang.sync_fails OUT.json. Sampling is the embedded engine's; the
weights also go to a server that takes them, and fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch

import dapo.assemble
import dapo.policy  # before Megatron, which it adapts
from dapo.__main__ import main as run_dapo
from dapo.config import Parallel
from dapo.engine.control import Server
from dapo.engine.embedded import EmbeddedEngine
from dapo.engine.weight_sync import make_sync
from dapo.mesh import Mesh
from tests.distributed.launch import ROOT
from tests.sglang.weight_server import WeightServer

UPDATE = "/update_weights_from_distributed"
CASES: dict[str, dict[str, list[str | None]]] = {
    "refused_at_first": {"/begin_weight_update": ["refuse", "refuse"]},
    "refused_half_way": {UPDATE: [None, "refuse"]},
    "silent_half_way": {UPDATE: [None, "silence"]},
    "dead_half_way": {UPDATE: [None, "die"]},
    "garbage_at_first": {"/model_info": ["garbage"]},
    "half_a_500_half_way": {UPDATE: [None, "half a 500"]},
    "half_a_json_half_way": {UPDATE: [None, "half a JSON"]},
    "empty_half_way": {UPDATE: [None, "empty"]},
    "slow_half_way": {UPDATE: [None, "slow"]},
    "no_fault": {},
}
FAILS_AT = 2


OPTIONS = [
    "eval.data=null", "reward.workers=0", "rollout.prompts_per_step=4", "rollout.prompts_per_round=4",
    "rollout.max_rounds=1", "rollout.max_empty_steps=9", "parallel.tensor=2", "run.steps=3",
    "run.save_every=100",
]  # fmt: skip


class SyncingEngine(EmbeddedEngine):
    faults: ClassVar[dict[str, list[str | None]]] = {}

    def __init__(self, model: Path, *arguments: Any):
        super().__init__(model, *arguments)
        self.server = WeightServer()
        options: dict[str, Any] = dict(
            bucket_bytes=40_000, device=self.device, directory=Path(), model=model, timeout=5
        )
        self.sync = make_sync("broadcast", lambda: [Server(self.server.url)], **options)

    def prepare_weights(self, version: int) -> None:
        self.server.faults = (
            {path: list(what) for path, what in self.faults.items()} if version == FAILS_AT else {}
        )
        self.sync.prepare(version)

    def load_weights(self, weights: Any, version: int) -> None:
        self.sync.load(weights, version)
        super().load_weights(self.server.weights.items(), version)

    def close(self) -> None:
        self.sync.close()
        self.server.__exit__()


def attempt(options: list[str]) -> dict[str, Any]:
    """`dapo train` on this rank: how it ended, and what it printed."""
    from megatron.core import parallel_state

    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        status = run_dapo(["train", str(ROOT / "examples/arithmetic/config.yaml"), *options])
    parallel_state.destroy_model_parallel()
    return {"status": status, "printed": printed.getvalue()}


def main(out: str) -> None:
    torch.set_num_threads(1)
    dapo.assemble.EmbeddedEngine = SyncingEngine  # type: ignore[misc]
    root, mesh, results = Path(out).parent, Mesh(Parallel(tensor=2)), []
    for name, SyncingEngine.faults in CASES.items():
        # the last one goes on where that one stopped
        run = root / ("refused_half_way" if name == "no_fault" else name)
        mine = attempt([*OPTIONS, f"run.dir={run}"])
        ranks: list[Any] = [None] * mesh.world
        torch.distributed.all_gather_object(ranks, mine)
        saved = sorted(path.name for path in (run / "checkpoints").glob("*"))
        results.append({"name": name, "ranks": ranks, "saved": saved})
    if mesh.is_main:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
