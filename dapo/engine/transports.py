"""What carries the weights to the servers, bucket by bucket: files, broadcasts, or memory of the same
host.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import pickle
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import reductions

from dapo.engine.buckets import Bucket
from dapo.engine.control import SUCCESS, Server, on_all
from dapo.engine.versions import Peer
from dapo.types import EngineError

GRACE = 5.0  # seconds that a server has to say why its broadcast broke, or to forget a group
SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Transport:
    """`open`, then `start` for each bucket, then `commit`; when anything has failed on the way, `forget`. No
    wait beyond `limit` seconds.

    Two buckets at most are on their way: what a `start` has returned is called after the next `start`, before
    the one after that.

    Raises: EngineError.
    """

    needs_session = True

    def __init__(self, bucket_bytes: int, limit: float, device: torch.device):
        # buckets are filled on `device`
        self.bucket_bytes, self.limit, self.device = bucket_bytes, limit, device
        self.peers: list[Peer] = []
        self.pool = ThreadPoolExecutor(max_workers=64, thread_name_prefix="weights")

    def open(self, peers: list[Peer]) -> None:
        self.peers = peers

    def start(self, bucket: Bucket) -> Callable[[], object]:
        """Set off with a bucket. Returns what waits until its memory can be filled anew."""
        raise NotImplementedError

    def commit(self, version: int) -> None:
        """There are no more buckets: on return every server has loaded them all."""

    def forget(self) -> None:
        """Let go of what was set up with the servers as they were, and of what a broken sync left."""

    def close(self) -> None:
        self.forget()
        self.pool.shutdown(wait=False, cancel_futures=True)

    @property
    def urls(self) -> str:
        return ", ".join(peer.server.url for peer in self.peers)


class Disk(Transport):
    """A Hugging Face directory below `directory`, which every server can read. It appears whole; then the one
    before is removed.
    """

    needs_session = False

    def __init__(self, bucket_bytes: int, limit: float, directory: Path, model: Path):
        super().__init__(bucket_bytes, limit, torch.device("cpu"))
        self.directory, self.model = directory.resolve(), model
        self.partial = self.directory / ".partial"
        self.files: list[list[str]] = []  # the tensors of each file
        self.num_bytes = 0

    def open(self, peers: list[Peer]) -> None:
        super().open(peers)
        self.files, self.num_bytes = [], 0
        with _writing(self.partial):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            for path in self.model.iterdir():  # config and tokenizer: a server can start from this directory
                if (
                    path.is_file()
                    and path.suffix in {".json", ".txt", ".model", ".jinja"}
                    and not path.name.endswith(".index.json")
                ):
                    shutil.copy2(path, self.partial / path.name)

    def start(self, bucket: Bucket) -> Callable[[], object]:
        self.files.append([part.name for part in bucket.parts])
        self.num_bytes += len(bucket.data)
        path = self.partial / _file_name(len(self.files))
        writing = self.pool.submit(_write, path, bucket)
        return lambda: _settle([writing], self.limit, f"writing weights to {path}")

    def commit(self, version: int) -> None:
        names = {name: _file_name(i) for i, file in enumerate(self.files, start=1) for name in file}
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": names}
        whole = self.directory / f"{version:06}"
        with _writing(whole):
            (self.partial / "model.safetensors.index.json").write_text(json.dumps(index))
            shutil.rmtree(whole, ignore_errors=True)
            os.rename(self.partial, whole)
        call = {"model_path": str(whole), "flush_cache": False}
        on_all(
            [peer.server for peer in self.peers],
            lambda server: server.post("/update_weights_from_disk", call, self.limit, SUCCESS),
        )
        for path in self.directory.iterdir():
            if path != whole:
                shutil.rmtree(path, ignore_errors=True)

    def forget(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


@dataclass
class _Group:
    """A process group with the servers, and what is going on in it."""

    name: str
    backend: Any  # ProcessGroupGloo or ProcessGroupNCCL
    # the last broadcast, until it has ended: it holds the bucket's memory
    work: Future[dist.Work] | None = None
    answers: list[Future[Any]] = field(default_factory=list)  # the servers', to the call that goes with it


class Broadcast(Transport):
    """Process groups in which this process is rank 0, the servers' tensor ranks come after. NCCL from a GPU,
    else gloo.

    Servers are called for the next bucket while they load the last. Calls may overtake each other on their
    way, so there are two groups, used in turn: a call names the group whose next broadcast is its own.
    """

    def __init__(self, bucket_bytes: int, limit: float, device: torch.device):
        super().__init__(bucket_bytes, limit, device)
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self.groups: list[_Group] = []  # the next bucket goes through the first

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
            load_format="flattened_bucket",
            flush_cache=False,
        )
        self._settle(group)
        path, limit = "/update_weights_from_distributed", self.limit + GRACE  # `_finish` comes first
        group.answers = [
            self.pool.submit(peer.server.post, path, call, limit, SUCCESS) for peer in self.peers
        ]
        group.work = self.pool.submit(self._broadcast, group, bucket.data)
        return lambda: self._finish(group)

    def commit(self, version: int) -> None:
        for group in self.groups:
            self._settle(group)

    def forget(self) -> None:
        groups, self.groups = self.groups, []
        for group in groups:
            if self.backend == "nccl":
                group.backend.abort()
            threading.Thread(target=_outlive, args=(group,), daemon=True).start()
            with contextlib.suppress(EngineError):  # a server that was restarted does not know it
                on_all(
                    [p.server for p in self.peers],
                    partial(
                        Server.post,
                        path="/destroy_weights_update_group",
                        body={"group_name": group.name},
                        timeout=GRACE,
                    ),
                )

    def _broadcast(self, group: _Group, data: Tensor) -> dist.Work:
        """In a thread: NCCL's first call in a group waits until the servers make theirs, and one that has
        refused never does.
        """
        if data.is_cuda:
            torch.cuda.set_device(data.device)
        return group.backend.broadcast(data, 0)  # type: ignore[no-any-return]

    def _connect(self) -> _Group:
        """Join with all servers. Each blocks until all have joined, so the calls are in flight while this
        rank joins.
        """
        name = f"dapo-{os.getpid()}-{time.time_ns()}"  # no name twice: a server may still hold the old group
        addresses = [_address_towards(peer.server) for peer in self.peers]
        address = next((a for a in addresses if a not in ("127.0.0.1", "::1")), addresses[0])
        store = dist.TCPStore(
            address, 0, is_master=True, timeout=timedelta(seconds=self.limit), wait_for_workers=False
        )  # type: ignore[attr-defined]
        *offsets, world = itertools.accumulate([1, *(peer.tensor_ranks for peer in self.peers)])
        call = dict(
            master_address=address,
            master_port=store.port,
            world_size=world,
            group_name=name,
            backend=self.backend,
        )
        joining = [
            self.pool.submit(
                peer.server.post,
                "/init_weights_update_group",
                call | {"rank_offset": offset},
                self.limit,
                SUCCESS,
            )
            for peer, offset in zip(self.peers, offsets, strict=True)
        ]
        # `_finish` comes first
        ours = self.pool.submit(_join, self.backend, store, name, world, self.limit + GRACE)
        try:
            _settle([*joining, ours], self.limit, f"joining a {self.backend} group with {self.urls}")
        except RuntimeError as error:
            raise EngineError(f"no {self.backend} group with {self.urls}: {_first_line(error)}") from None
        return _Group(name, ours.result())

    def _finish(self, group: _Group) -> None:
        """Wait for a group's broadcast; a refusal is seen while the broadcast still waits for that server."""
        assert group.work is not None
        deadline = time.monotonic() + self.limit
        while not (group.work.done() and (group.work.exception() or group.work.result().is_completed())):
            self._heed()
            if time.monotonic() > deadline:
                raise EngineError(f"a broadcast of weights to {self.urls} took more than {self.limit:.0f} s")
            time.sleep(0.0005)
        try:
            work = group.work.result()
            work.wait()
            if self.backend == "nccl" and not work.is_success():  # its wait is for the device's order alone
                raise RuntimeError("it ended with an error")
        except RuntimeError as error:
            wait(group.answers, GRACE, FIRST_EXCEPTION)  # whoever is the cause may say it better
            self._heed()
            raise EngineError(f"broadcast of weights to {self.urls}: {_first_line(error)}") from None
        group.work = None

    def _heed(self) -> None:
        """Raise the refusal of any server that has refused."""
        for answer in itertools.chain.from_iterable(group.answers for group in self.groups):
            if answer.done():
                answer.result()

    def _settle(self, group: _Group) -> None:
        """Wait until every server has loaded the group's last bucket."""
        _settle(group.answers, self.limit, f"a bucket of weights at {self.urls}")
        group.answers = []


class Tensors(Transport):
    """In the call itself, to servers of this host: CUDA IPC handles from a GPU, the pickled bytes from a
    CPU.
    """

    def __init__(self, bucket_bytes: int, limit: float, device: torch.device):
        # of two buckets' memory: both buckets, and of one: its clone, pickled, in base64, as JSON, encoded,
        # sent
        if device.type == "cpu":
            bucket_bytes //= 4
        super().__init__(bucket_bytes, limit, device)
        # one call after the other: each holds copies of its bucket
        self.pool = ThreadPoolExecutor(1, "weights")
        self.last: Future[None] | None = None

    def start(self, bucket: Bucket) -> Callable[[], object]:
        if bucket.data.is_cuda:
            torch.cuda.synchronize(bucket.data.device)  # filled, before another process reads it
        self.last = self.pool.submit(self._send, bucket)
        return self.last.result

    def commit(self, version: int) -> None:
        if self.last:
            self.last.result()

    def _send(self, bucket: Bucket) -> None:
        for peer in self.peers:
            payloads = _payloads(bucket, peer.tensor_ranks)
            call = {
                "serialized_named_tensors": payloads,
                "load_format": "flattened_bucket",
                "flush_cache": False,
            }
            peer.server.post("/update_weights_from_tensor", call, self.limit, SUCCESS)


class _Handle:
    """A CUDA tensor, pickled as an IPC handle that names its GPU by UUID: SGLang resolves it, however the
    server numbers its GPUs.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(self.tensor)
        uuid = str(torch.cuda.get_device_properties(self.tensor.device).uuid)
        return rebuild, (*arguments[:6], uuid, *arguments[7:])  # 6: the number of the storage's device


def _payloads(bucket: Bucket, tensor_ranks: int) -> list[str]:
    """What each of a server's tensor ranks reads."""
    metadata = [
        SimpleNamespace(
            name=p.name, shape=p.shape, dtype=p.dtype, start_idx=p.start, end_idx=p.end, numel=p.end - p.start
        )
        for p in bucket.parts
    ]

    def encode(tensor: Any) -> str:
        return base64.b64encode(
            pickle.dumps({"flattened_tensor": tensor, "metadata": metadata}, protocol=4)
        ).decode()

    if bucket.data.is_cuda:  # a handle for each: who opens one gives it back
        return [encode(_Handle(bucket.data)) for _ in range(tensor_ranks)]
    # a clone, for pickle takes all the memory that a slice lies in
    return [encode(bucket.data.clone())] * tensor_ranks


def _file_name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def _write(path: Path, bucket: Bucket) -> None:
    """One safetensors file: length of the header, header, the bucket as it is. Not forced onto the disk: it
    is read now or never.
    """
    header: dict[str, Any] = {
        part.name: {
            "dtype": SAFETENSORS[part.dtype],
            "shape": part.shape,
            "data_offsets": [part.start, part.end],
        }
        for part in bucket.parts
    }
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with _writing(path), open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = memoryview(bucket.data.numpy())  # type: ignore[arg-type]
        while left:
            left = left[file.write(left) :]  # 2 GiB at most in one go


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EngineError(f"weights cannot be written to {path}: {error.strerror}") from None


def _join(backend: str, store: Any, name: str, world: int, limit: float) -> Any:
    """Rank 0 of the group: the backend by itself, for torch.distributed keeps book of groups within the
    trainer's own world only.

    SGLang prefixes the store with the name; torch's helper, by which it joins, with "name/" and the backend's
    first device.
    """
    device = "cuda/" if backend == "nccl" else "cpu/"
    seen = dist.PrefixStore(device, dist.PrefixStore(f"{name}/", dist.PrefixStore(name, store)))  # type: ignore[attr-defined]
    if backend == "gloo":
        return dist.ProcessGroupGloo(seen, 0, world, timedelta(seconds=limit))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=limit)
    handling, before = "TORCH_NCCL_ASYNC_ERROR_HANDLING", os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    # a server that is lost must not end this process, which has the policy to save; `_finish` sees it
    os.environ[handling] = "0"
    try:
        return dist.ProcessGroupNCCL(seen, 0, world, options)
    finally:
        os.environ.pop(handling) if before is None else os.environ.update({handling: before})


def _settle(futures: Sequence[Future[Any]], limit: float, doing: str) -> None:
    """Wait until all are done, or one has failed: its failure is raised."""
    done, waiting = wait(futures, limit, FIRST_EXCEPTION)
    for future in futures:
        if future in done:
            future.result()
    if waiting:
        raise EngineError(f"{doing}: not done after {limit:.0f} s")


def _outlive(group: _Group) -> None:
    """Keep a group until its broadcast has ended, if only by the time limit: its destructor would wait for
    that, and stop every thread.
    """
    if group.work is not None:
        with contextlib.suppress(RuntimeError):
            group.work.result().wait()


def _address_towards(server: Server) -> str:
    """This machine's address on the way to the server; nothing is sent."""
    url = urlsplit(server.url)
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            url.hostname, url.port or 80, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EngineError(f"{server.url} cannot be reached: {error}") from None


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:300]
