"""A server that only records: it takes weights from a pretended GPU through every transport.

The embedded engine then samples with what the server received, so a run shows that all of it arrived.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from dapo.engine.checksums import Checksums
from dapo.engine.control import Server
from dapo.engine.embedded import EmbeddedEngine
from dapo.engine.weight_sync import WeightSync, make_sync
from tests.pretend_cuda.gpu import SENT
from tests.pretend_cuda.pretence import MEMORY
from tests.pretend_cuda.report import REPORT
from tests.sglang.weight_server import WeightServer

Kind = Literal["broadcast", "tensor", "disk"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BUCKET = 40_000  # bytes: many of them
TIMEOUT = 60.0


class RecordingServer(WeightServer):
    """Says that it shares a GPU with the trainer; it keeps what it receives in main memory."""

    def __init__(self, num_kv_heads: int) -> None:
        super().__init__(has_memory_saver=True)
        self.num_kv_heads = num_kv_heads
        self.before = 0  # bytes that the trainer had when its update began

    def get(self, path: str) -> dict[str, Any]:
        answer = super().get(path)
        return answer | {"device": "cuda"} if path == "/server_info" else answer

    def post(self, path: str, body: dict[str, Any]) -> None:
        if path == "/init_weights_update_group":
            self.groups[body["group_name"]] = _Receiver(body)
            return
        if path == "/pause_generation":
            self.before = MEMORY.reserved
        if path == "/resume_memory_occupation" and "kv_cache" in body["tags"]:
            kept = MEMORY.reserved - self.before
            if kept > 0:
                REPORT.find("cache", "a sync left memory on the GPU when the server took it back")
        super().post(path, body)

    def answer(self, path: str) -> bytes:
        if path != "/weights_checker":
            return super().answer(path)
        checksums = Checksums([1], self.num_kv_heads, "cuda")
        for name, tensor in self.weights.items():
            checksums.add(name, tensor)
        return json.dumps({"ranks": [{"checksums": checksums.of_ranks[1][0]}]}).encode()


class _Receiver:
    """Rank 1 of a broadcast: joins through the trainer's store as torch.distributed would."""

    def __init__(self, body: dict[str, Any]):
        address, port = body["master_address"], body["master_port"]
        store: Any = dist.TCPStore(address, port, body["world_size"], False, timedelta(seconds=TIMEOUT))  # type: ignore[attr-defined]
        for prefix in (body["group_name"], f"{body['group_name']}/", "cuda/"):
            store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
        assert body["backend"] == "nccl"
        self.sent: SimpleQueue[Tensor] = SENT[store.get("number").decode()]

    def broadcast(self, data: Tensor, root: int) -> _Receiver:
        data.copy_(self.sent.get(timeout=TIMEOUT))
        return self

    def wait(self) -> None: ...


class SyncedEngine(EmbeddedEngine):
    """Samples with the weights that a recording server received, each sync by the next transport."""

    is_colocated = True
    run: Path  # its directory, set on the class, because nothing else reaches the constructor

    def __init__(self, model: Path, dtype: torch.dtype, device: torch.device, *others: Any):
        super().__init__(model, dtype, device, *others)
        config = self.model.config
        self.server = RecordingServer(config.num_key_value_heads)
        self.syncs = {kind: self._make_sync(kind, device) for kind in KINDS}
        self.syncs[KINDS[0]].release()

    def prepare_weights(self, version: int) -> None:
        self._sync(version).prepare(version)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.server.weights.clear()
        self._sync(version).load(weights, version)
        super().load_weights(self.server.weights.items(), version)
        self._sync(version + 1).release()

    def close(self) -> None:
        for sync in self.syncs.values():
            sync.close()
        self.server.die()

    def _sync(self, version: int) -> WeightSync:
        return self.syncs[KINDS[version % len(KINDS)]]

    def _make_sync(self, kind: Kind, device: torch.device) -> WeightSync:
        return make_sync(
            kind,
            lambda: [Server(self.server.url)],
            bucket_bytes=BUCKET,
            device=device,
            directory=self.run / "weights",
            model=Path(self.model.config._name_or_path),
            timeout=TIMEOUT,
            verify=not hasattr(self.model.config, "num_experts"),
        )
