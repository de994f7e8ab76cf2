"""How π_θ reaches the servers, whatever carries it (transports.py). One order of calls:

    prepare  ask every server, pause its generation, open its update: whoever refuses does so here, before a
    collective is entered load     bucket by bucket; then flush the cache, set the weight version and read it
    back, compare checksums, continue generation

What was being generated is retracted, not lost: it goes on with the new weights, and its `weight_versions`
say which token is whose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dapo.config import ConfigError
from dapo.engine.buckets import buckets
from dapo.engine.checksums import Checksums
from dapo.engine.control import NOTHING, SUCCESS, Server, on_all
from dapo.engine.transports import Broadcast, Disk, Tensors, Transport
from dapo.engine.versions import Peer, meet
from dapo.types import EngineError

STATUS = {"status": str}


class WeightSync:
    """Takes all servers through an update.

    Raises, in every method but `close`: EngineError naming the server and its answer. No wait is longer than
    `limit` seconds. Servers whose update broke off stay paused, for their weights are partly new; the next
    sync begins anew.
    """

    def __init__(self, workers: Callable[[], Sequence[Server]], transport: Transport, *, num_kv_heads: int, num_experts: int = 0,
                 verify: bool, limit: float):  # fmt: skip
        self.find_workers, self.transport, self.num_kv_heads, self.num_experts = (
            workers,
            transport,
            num_kv_heads,
            num_experts,
        )
        self.verify, self.limit = verify, limit
        self.workers: Sequence[Server] = []
        self.peers: list[Peer] = []
        self._synced: dict[str, str] = {}  # url → the version last set, if all went well
        self._prepared: int | None = None
        self._released: dict[str, str] = {}  # url → the version held when its memory was last given away
        self._weightless: set[str] = set()  # urls of those whose weights have no memory yet
        self._cacheless: set[str] = set()  # whose cache has none

    def prepare(self, version: int) -> None:
        """Have every server ready to take the weights of `version`."""
        self._prepared = None
        self.workers = self.find_workers()
        versions = self._versions()
        # the first sync, the one after a failure, or not the same servers
        if not self._synced or versions != self._synced:
            self.transport.forget()
            self.peers = meet(self.workers)
        # these hold their memory
        restarted = {url for url, version in self._released.items() if versions.get(url) != version}
        self._weightless -= restarted
        self._cacheless -= restarted
        self._resume(["weights"], self._weightless)
        self._post("/pause_generation", {"mode": "retract"}, STATUS)
        on_all(self._in_session(), self._begin)
        self.transport.open(self.peers)
        self._prepared = version

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send the weights to every server; on return all of them generate with them. Prepares, if that has
        not been done.
        """
        if self._prepared != version:
            self.prepare(version)
        self._prepared, self._synced = None, {}
        checksums = Checksums(
            (peer.tensor_ranks for peer in self.peers),
            self.num_kv_heads,
            self.peers[0].device,
            self.num_experts,
        )
        watched = checksums.watch(weights) if self.verify else weights
        finish: Callable[[], object] = dict  # waits for the bucket before; there is none yet
        for bucket in buckets(watched, self.transport.bucket_bytes, self.transport.device):
            started = self.transport.start(bucket)
            finish()
            finish = started
        finish()
        self.transport.commit(version)
        self._post("/end_weight_update", fields=SUCCESS, to=self._in_session())
        self._resume(["kv_cache", "cuda_graph"], self._cacheless)
        self._post("/flush_cache")  # the old weights' keys and values
        self._post(
            "/update_weight_version", {"new_version": str(version), "abort_all_requests": False}, SUCCESS
        )
        self._check(version, checksums)
        self._post("/continue_generation", fields=STATUS)

    def release(self) -> None:
        """Servers that share the trainer's GPUs give their memory to it, until the next `prepare`; before the
        first sync, too.
        """
        if not self.peers:
            self.workers = self.find_workers()
            self.peers = meet(self.workers)
        sharing = [peer.server for peer in self.peers if peer.can_release]
        if self._cacheless or not sharing:
            return
        self._post("/pause_generation", {"mode": "retract"}, STATUS, to=sharing)  # only an idle server can
        self._post("/release_memory_occupation", {"tags": ["kv_cache", "weights", "cuda_graph"]}, to=sharing)
        self._released = {
            url: version
            for url, version in self._versions().items()
            if url in {server.url for server in sharing}
        }
        self._weightless, self._cacheless = set(self._released), set(self._released)

    def close(self) -> None:
        self.transport.close()

    def _resume(self, tags: list[str], lacking: set[str]) -> None:
        """Each server that lacks it, once: SGLang ends when it is told to resume what it has."""

        def resume(server: Server) -> None:
            server.post("/resume_memory_occupation", {"tags": tags}, self.limit)
            lacking.discard(server.url)

        on_all([server for server in self.workers if server.url in lacking], resume)

    def _begin(self, server: Server) -> None:
        """Open the update. A session that a broken sync left open is closed first."""
        try:
            server.post("/begin_weight_update", None, self.limit, SUCCESS)
        except EngineError as refusal:
            try:
                server.post("/end_weight_update", None, self.limit, SUCCESS)
            except EngineError:  # it was not that
                raise refusal from None
            server.post("/begin_weight_update", None, self.limit, SUCCESS)

    def _check(self, version: int, checksums: Checksums) -> None:
        versions = self._versions()
        for url, found in versions.items():
            if found != str(version):
                raise EngineError(f"{url} says that it holds weights {found}, after a sync of {version}")
        if self.verify:
            for peer, held in zip(self.peers, on_all(self.peers, self._checksums), strict=True):
                wrong = checksums.differences(held)
                if wrong:
                    raise EngineError(
                        f"{peer.server.url}: after the sync of {version}, {len(wrong)} weights are not the "
                        f"policy's: {wrong[0]}"
                    )
        self._synced = versions

    def _checksums(self, peer: Peer) -> list[dict[str, str]]:
        """By parameter, on each of the server's tensor ranks."""
        answer = peer.server.post("/weights_checker", {"action": "checksum"}, self.limit, {"ranks": list})
        held = [
            rank["checksums"]
            for rank in answer["ranks"]
            if isinstance(rank, dict) and isinstance(rank.get("checksums"), dict)
        ]
        if len(held) != peer.tensor_ranks:
            raise EngineError(
                f"{peer.server.url}/weights_checker answered without checksums of {peer.tensor_ranks} tensor "
                "ranks"
            )
        return held

    def _versions(self) -> dict[str, str]:
        def version(server: Server) -> tuple[str, str]:
            return server.url, server.get("/model_info", fields={"weight_version": str})["weight_version"]

        return dict(on_all(self.workers, version))

    def _in_session(self) -> list[Server]:
        """Servers that take this transport's weights in a session only."""
        return [peer.server for peer in self.peers if peer.has_sessions and self.transport.needs_session]

    def _post(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        fields: Mapping[str, type] = NOTHING,
        to: Sequence[Server] | None = None,
    ) -> None:
        on_all(self.workers if to is None else to, lambda server: server.post(path, body, self.limit, fields))


def make_sync(
    kind: Literal["disk", "broadcast", "tensor"],
    workers: Callable[[], Sequence[Server]],
    *,
    bucket_bytes: int,
    device: torch.device,
    directory: Path,
    model: Path,
    limit: float,
    verify: bool = False,
) -> WeightSync:
    """`workers` is asked before every sync, for servers come and go; `device` is where the policy's weights
    are; `limit`, in seconds, is for an answer, and for a bucket.

    `directory` belongs to disk alone; the config.json of `model` says how the weights are laid out, and its
    small files go along on disk.

    Raises:
        ConfigError: the weights of such a model cannot be verified.
    """
    kinds: dict[str, Callable[[], Transport]] = {
        "disk": lambda: Disk(bucket_bytes, limit, directory, model),
        "broadcast": lambda: Broadcast(bucket_bytes, limit, device),
        "tensor": lambda: Tensors(bucket_bytes, limit, device),
    }
    layout = json.loads((model / "config.json").read_text())
    num_experts = layout.get("num_experts", layout.get("num_local_experts", 0))
    if verify and num_experts and device.type == "cuda":
        raise ConfigError(
            f"engine.verify_weights=true: {model} is a mixture of experts, which a server on GPUs orders by "
            "the kernel that it chooses: "
            "their checksums are not known; leave it false"
        )
    options = dict(num_kv_heads=layout["num_key_value_heads"], num_experts=num_experts)
    return WeightSync(workers, kinds[kind](), **options, verify=verify, limit=limit)
