"""Brings π_θ to the servers by any transport (transports.py, broadcast.py). The order of the calls:

prepare: inspect every server, connect with it. One that is not there, or not fit, is found here, before any
         rank enters a collective.
load:    fill the first bucket, or write all files, while servers generate. Then pause generation, open the
         update, send bucket by bucket; free the buckets, resume and flush the caches, set the weight version
         and read it back, compare checksums, continue generation.

Responses in progress are retracted, not lost: they continue with the new weights, and their `weight_versions`
say which version wrote each token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dapo.clock import timed
from dapo.config import ConfigError
from dapo.engine.broadcast import Broadcast
from dapo.engine.buckets import Bucket, buckets
from dapo.engine.checksums import Checksums
from dapo.engine.control import NOTHING, SUCCESS, Fields, Json, Server, on_all
from dapo.engine.transports import Disk, Tensors, Transport
from dapo.engine.versions import Peer, inspect
from dapo.model.families import FAMILIES
from dapo.model.shape import kv_heads, of_text, read_config
from dapo.types import EngineError

STATUS = {"status": str}


@dataclass(eq=False)
class WeightSync:
    """Takes all servers through an update. Every method may raise EngineError with a server and its answer.

    After an update that broke off servers stay paused, because some of their weights are new.
    """

    find_workers: Callable[[], Sequence[Server]]
    transport: Transport
    num_kv_heads: int
    num_experts: int
    verify: bool

    def __post_init__(self) -> None:
        self.timeout = self.transport.timeout
        self.workers: Sequence[Server] = []
        self.peers: list[Peer] = []
        self.prepared: int | None = None  # the version that `load` may bring
        self._synced: dict[str, str] = {}  # url → the version last set; empty after a failure
        self._released: dict[str, str] = {}  # url → its version when it last released its memory
        self._weightless: set[str] = set()  # urls of servers that have no memory for weights now
        self._cacheless: set[str] = set()  # urls of servers that have no memory for the cache now

    def prepare(self, version: int) -> None:
        """Make every server ready to take the weights of `version`."""
        self.prepared = None
        self.workers = self.find_workers()
        versions = self._versions(self.workers)
        # at the first sync, after a failure, or if the servers are not the same
        if not self._synced or versions != self._synced:
            self.transport.forget()
            self.peers = inspect(self.workers)
        # a server that was restarted has its memory
        restarted = {url for url, version in self._released.items() if versions.get(url) != version}
        self._weightless -= restarted
        self._cacheless -= restarted
        self._resume(["weights"], self._weightless)
        self.transport.open(self.peers)
        self.prepared = version

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send the weights to every server, after `prepare`. On return all of them generate with these.

        Servers generate until there is something to load.
        """
        if self.prepared != version:
            self.prepare(version)
        self.prepared, self._synced = None, {}
        tensor_ranks = [peer.tensor_ranks for peer in self.peers]
        device = self.peers[0].device
        checksums = Checksums(tensor_ranks, self.num_kv_heads, device, self.num_experts)
        watched = checksums.watch(weights) if self.verify else weights
        made = buckets(watched, self.transport.bucket_bytes, self.transport.device)
        self.transport.store(made, version)
        self._replace(_begun(made), version, checksums)

    @timed("pause")
    def _replace(self, made: Iterator[Bucket], version: int, checksums: Checksums) -> None:
        """Do what generation pauses for."""
        self._post(self.workers, "/pause_generation", {"mode": "retract"}, STATUS)
        on_all(self._in_session(), self._begin)
        self.transport.send(made)
        self.transport.commit(version)
        if torch.cuda.is_initialized():  # servers on this GPU take the memory of buckets and the last weight
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()
        self._post(self._in_session(), "/end_weight_update", fields=SUCCESS)
        self._resume(["kv_cache", "cuda_graph"], self._cacheless)
        self._post(self.workers, "/flush_cache")  # keys and values of the old weights
        named = {"new_version": str(version), "abort_all_requests": False}
        self._post(self.workers, "/update_weight_version", named, SUCCESS)
        self._check(version, checksums)
        self._post(self.workers, "/continue_generation", fields=STATUS)

    @property
    def is_colocated(self) -> bool:
        """True if a server shares the trainer's GPUs."""
        return any(peer.can_release for peer in self.peers)

    def release(self) -> None:
        """Make servers that share the trainer's GPUs free their memory until the next `prepare`."""
        if not self.peers:  # no sync has been
            self.workers = self.find_workers()
            self.peers = inspect(self.workers)
        live = {worker.url for worker in self.find_workers()} - self._cacheless
        on_all([peer for peer in self.peers if peer.can_release and peer.server.url in live], self._release)

    def close(self) -> None:
        self.transport.close()

    def _release(self, peer: Peer) -> None:
        """Free the server's memory and note it at once, because another server's failure ends `release`."""
        server, tags = peer.server, ["kv_cache", "weights", "cuda_graph"]
        server.post("/pause_generation", {"mode": "retract"}, self.timeout, STATUS)  # only an idle server can
        server.post("/release_memory_occupation", {"tags": tags}, self.timeout)
        self._weightless.add(server.url)
        self._cacheless.add(server.url)
        self._released.update(self._versions([server]))

    def _resume(self, tags: list[str], lacking: set[str]) -> None:
        """Give each of these servers its memory back, once: SGLang ends if it resumes memory that it has."""

        def resume(server: Server) -> None:
            server.post("/resume_memory_occupation", {"tags": tags}, self.timeout)
            lacking.discard(server.url)

        on_all([server for server in self.workers if server.url in lacking], resume)

    def _begin(self, server: Server) -> None:
        """Open the update. A session that a broken sync left open is closed first."""
        try:
            server.post("/begin_weight_update", None, self.timeout, SUCCESS)
        except EngineError as refusal:
            try:
                server.post("/end_weight_update", None, self.timeout, SUCCESS)
            except EngineError:  # no session was open
                raise refusal from None
            server.post("/begin_weight_update", None, self.timeout, SUCCESS)

    def _check(self, version: int, checksums: Checksums) -> None:
        versions = self._versions(self.workers)
        for url, found in versions.items():
            if found != str(version):
                raise EngineError(f"{url} says that it holds weights {found}, after a sync of {version}")
        if self.verify:
            for peer, found_of_ranks in zip(self.peers, on_all(self.peers, self._checksums), strict=True):
                if wrong := checksums.differences(found_of_ranks):
                    where = f"{peer.server.url}: after the sync of {version}"
                    raise EngineError(f"{where}, {len(wrong)} weights are not the policy's: {wrong[0]}")
        self._synced = versions

    def _checksums(self, peer: Peer) -> list[dict[str, str]]:
        """Return the checksums by parameter, on each of the server's tensor ranks."""
        answer = peer.server.post("/weights_checker", {"action": "checksum"}, self.timeout, {"ranks": list})
        ranks = [rank.get("checksums") for rank in answer["ranks"] if isinstance(rank, dict)]
        found = [checksums for checksums in ranks if isinstance(checksums, dict)]
        if len(found) != peer.tensor_ranks:
            lacking = f"checksums of {peer.tensor_ranks} tensor ranks"
            raise EngineError(f"{peer.server.url}/weights_checker answered without {lacking}")
        return found

    def _versions(self, servers: Sequence[Server]) -> dict[str, str]:
        def version(server: Server) -> tuple[str, str]:
            return server.url, server.get("/model_info", fields={"weight_version": str})["weight_version"]

        return dict(on_all(servers, version))

    def _in_session(self) -> list[Server]:
        """Return the servers that take this transport's weights in a session only."""
        return [peer.server for peer in self.peers if peer.has_sessions and self.transport.needs_session]

    def _post(
        self, servers: Sequence[Server], path: str, body: Json | None = None, fields: Fields = NOTHING
    ) -> None:
        on_all(servers, lambda server: server.post(path, body, self.timeout, fields))


def _begun(made: Iterator[Bucket]) -> Iterator[Bucket]:
    """Return the same buckets, of which the first is filled before this returns."""
    first = list(itertools.islice(made, 1))

    def rest() -> Iterator[Bucket]:
        while first:
            yield first.pop()  # and holds it no more
        yield from made

    return rest()


def make_sync(
    kind: Literal["disk", "broadcast", "tensor"], workers: Callable[[], Sequence[Server]], *,
    bucket_bytes: int, device: torch.device, directory: Path, model: Path, timeout: float,
    verify: bool = False,
) -> WeightSync:  # fmt: skip
    """Return the sync of this kind. Raise ConfigError if the weights of such a model cannot be verified.

    `workers` is called before every sync, because servers come and go. The policy's weights are on `device`.
    `timeout`, in seconds, is for an answer and for a bucket. Only "disk" uses `directory`; it copies the
    small files of `model` there.
    """
    # not its whole shape: an evaluated model need not be one that can be trained
    layout = of_text(read_config(model))
    num_experts = layout.get("num_experts", layout.get("num_local_experts", 0))
    family = FAMILIES.get(str(layout.get("model_type")))
    if verify and family and not family.has_checksums:
        known = f"the checksums that a server has of a {family.model_type} are not known; leave it false"
        raise ConfigError(f"engine.verify_weights=true: {model}: {known}")
    if verify and num_experts and device.type == "cuda":
        experts = "a mixture of experts, which a server on GPUs orders by the kernel that it chooses"
        remedy = "their checksums are not known; leave it false"
        raise ConfigError(f"engine.verify_weights=true: {model} is {experts}: {remedy}")
    transport: Transport
    if kind == "disk":
        transport = Disk(bucket_bytes, timeout, directory, model)
    elif kind == "broadcast":
        transport = Broadcast(bucket_bytes, timeout, device)
    else:
        transport = Tensors(bucket_bytes, timeout, device)
    return WeightSync(workers, transport, kv_heads(layout), num_experts, verify)
