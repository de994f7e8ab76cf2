"""Weights broadcast to the servers' tensor ranks: NCCL from a GPU, else gloo."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from dapo.engine.buckets import Bucket
from dapo.engine.control import SUCCESS, Server, on_all
from dapo.engine.transports import FLATTENED, Transport, wait_for_all
from dapo.engine.versions import Peer
from dapo.types import EngineError

GRACE = 5.0  # seconds that a server has to say why its broadcast broke, or to leave a group
ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


@dataclass
class _Group:
    """A process group with the servers, and its last broadcast."""

    name: str
    backend: Any  # ProcessGroupGloo or ProcessGroupNCCL
    work: Future[dist.Work] | None = None  # its last broadcast, which uses the bucket's memory until it ends
    answers: list[Future[Any]] = field(default_factory=list)  # of the servers, to the call for that broadcast


class Broadcast(Transport):
    """Sends buckets through process groups: this process is rank 0, the servers' tensor ranks follow.

    A server is called for the next bucket while it loads the last. One call may overtake another, so two
    groups take turns: a call names the group whose next broadcast is its own.
    """

    def __init__(self, bucket_bytes: int, timeout: float, device: torch.device):
        super().__init__(bucket_bytes, timeout, device)
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self.groups: list[_Group] = []  # two; the next bucket goes through the first

    def open(self, peers: list[Peer]) -> None:
        super().open(peers)
        while len(self.groups) < 2:
            self.groups.append(self._connect())

    def start(self, bucket: Bucket) -> Callable[[], object]:
        group, other = self.groups
        self.groups = [other, group]
        call = dict(
            names=[part.name for part in bucket.parts],
            dtypes=[str(part.dtype).removeprefix("torch.") for part in bucket.parts],
            shapes=[part.shape for part in bucket.parts],
            group_name=group.name,
            **FLATTENED,
        )
        self._wait_until_loaded(group)
        path, timeout = "/update_weights_from_distributed", self.timeout + GRACE  # `_finish` ends before it
        posts = [peer.server.post for peer in self.peers]
        group.answers = [self.pool.submit(post, path, call, timeout, SUCCESS) for post in posts]
        group.work = self.pool.submit(self._broadcast, group, bucket.data)
        return lambda: self._finish(group)

    def commit(self, version: int) -> None:
        for group in self.groups:
            self._wait_until_loaded(group)

    def forget(self) -> None:
        names = [group.name for group in self.groups]
        while self.groups:
            group = self.groups.pop()
            if self.backend == "nccl":
                group.backend.abort()
            threading.Thread(target=_keep_until_done, args=(group,), daemon=True).start()
            del group  # a server that waits for the rest of a broadcast is freed before it is called
        for name in names:
            path, body = "/destroy_weights_update_group", {"group_name": name}
            leave = partial(Server.post, path=path, body=body, timeout=GRACE)
            with contextlib.suppress(EngineError):  # a server that was restarted does not know the group
                on_all([peer.server for peer in self.peers], leave)

    def _broadcast(self, group: _Group, data: Tensor) -> dist.Work:
        """Begin, in a thread: NCCL's first call in a group waits for all servers, of which one may refuse."""
        if data.is_cuda:
            torch.cuda.set_device(data.device)
        return group.backend.broadcast(data, 0)  # type: ignore[no-any-return]

    def _connect(self) -> _Group:
        """Join a new group with the servers: each one's call returns when all, this rank too, have joined."""
        # a name is never used twice: a server may still have the old group
        name = f"dapo-{uuid.uuid4().hex}"
        addresses = [_address_towards(peer.server) for peer in self.peers]
        address = next((a for a in addresses if a not in ("127.0.0.1", "::1")), addresses[0])
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, 0, is_master=True, timeout=timedelta(seconds=self.timeout), wait_for_workers=False
        )
        *offsets, world = itertools.accumulate([1, *(peer.tensor_ranks for peer in self.peers)])
        path, where = "/init_weights_update_group", {"master_address": address, "master_port": store.port}
        group = where | {"world_size": world, "group_name": name, "backend": self.backend}
        joining = [
            self.pool.submit(peer.server.post, path, group | {"rank_offset": offset}, self.timeout, SUCCESS)
            for peer, offset in zip(self.peers, offsets, strict=True)
        ]
        ours = self.pool.submit(_join, self.backend, store, name, world, self.timeout + GRACE)
        group_with = f"{self.backend} group with {self.urls}"
        try:
            wait_for_all([*joining, ours], self.timeout, f"joining a {group_with}")
        except RuntimeError as error:
            raise EngineError(f"no {group_with}: {_first_line(error)}") from None
        return _Group(name, ours.result())

    def _finish(self, group: _Group) -> None:
        """Wait for a group's broadcast. A server that refuses ends the wait at once."""
        assert group.work is not None
        deadline = time.monotonic() + self.timeout
        while not (group.work.done() and (group.work.exception() or group.work.result().is_completed())):
            self._raise_refusals()
            if time.monotonic() > deadline:
                late = f"took more than {self.timeout:.0f} s"
                raise EngineError(f"a broadcast of weights to {self.urls} {late}")
            time.sleep(0.0005)
        try:
            group.work.result().wait()  # raises the error with which it ended, NCCL's too
        except RuntimeError as error:
            wait(group.answers, GRACE, FIRST_EXCEPTION)  # the server at fault may say it better
            self._raise_refusals()
            raise EngineError(f"broadcast of weights to {self.urls}: {_first_line(error)}") from None
        group.work = None

    def _raise_refusals(self) -> None:
        for answer in itertools.chain.from_iterable(group.answers for group in self.groups):
            if answer.done():
                answer.result()

    def _wait_until_loaded(self, group: _Group) -> None:
        """Wait until every server has loaded the group's last bucket."""
        wait_for_all(group.answers, self.timeout, f"a bucket of weights at {self.urls}")
        group.answers = []


def _join(backend: str, store: Any, name: str, world: int, timeout: float) -> Any:
    """Join as rank 0 with a bare backend: torch.distributed only registers groups within the trainer's world.

    SGLang prefixes the store with the name; torch's helper, by which it joins, with "name/" and the backend's
    first device.
    """
    device = "cuda/" if backend == "nccl" else "cpu/"
    prefixed = dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store))  # type: ignore[attr-defined]
    prefixed = dist.PrefixStore(device, prefixed)  # type: ignore[attr-defined]
    if backend == "gloo":
        return dist.ProcessGroupGloo(prefixed, 0, world, timedelta(seconds=timeout))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout)
    before = os.environ.get(ERROR_HANDLING)
    # the loss of a server must not end this process, which has the policy to save; `_finish` sees it
    os.environ[ERROR_HANDLING] = "0"
    try:
        return dist.ProcessGroupNCCL(prefixed, 0, world, options)
    finally:
        if before is None:
            del os.environ[ERROR_HANDLING]
        else:
            os.environ[ERROR_HANDLING] = before


def _keep_until_done(group: _Group) -> None:
    """Hold a group until its broadcast ends: its destructor would wait for that, and block every thread."""
    if group.work is not None:
        with contextlib.suppress(RuntimeError):
            group.work.result().wait()


def _address_towards(server: Server) -> str:
    """Return this machine's address on the way to the server; nothing is sent."""
    url = urlsplit(server.url)
    try:
        found = socket.getaddrinfo(url.hostname, url.port or 80, type=socket.SOCK_DGRAM)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EngineError(f"{server.url} cannot be reached: {error}") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:300]
