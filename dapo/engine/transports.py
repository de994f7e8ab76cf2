"""Transports bring buckets of weights to the servers: by files, by memory of one host, or by broadcast.py."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from dapo.engine.buckets import Bucket
from dapo.engine.control import SUCCESS, on_all
from dapo.engine.versions import Peer
from dapo.types import EngineError

FLATTENED: dict[str, Any] = {"load_format": "flattened_bucket", "flush_cache": False}  # of every bucket
SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Transport:
    """Sends buckets: `open`, `store`, `send`, `commit`; after a failure, `forget`.

    Servers generate until `store` returns, and pause from then on. Each wait has a timeout, in seconds.
    Buckets are filled on `device`. Every method may raise EngineError with the server and its answer.
    """

    needs_session = True  # if the server has sessions

    def __init__(self, bucket_bytes: int, timeout: float, device: torch.device):
        self.bucket_bytes = bucket_bytes
        self.timeout = timeout
        self.device = device
        self.peers: list[Peer] = []
        self.pool = ThreadPoolExecutor(max_workers=64, thread_name_prefix="weights")

    def open(self, peers: list[Peer]) -> None:
        self.peers = peers

    def store(self, made: Iterator[Bucket], version: int) -> None:
        """Take the buckets that need no server yet: none, if they go straight to the servers."""

    def send(self, made: Iterator[Bucket]) -> None:
        """Start bucket after bucket, one while the next is filled. On return nothing holds their memory."""
        finish: Callable[[], object] = dict  # waits for the bucket before; the first has none
        for bucket in made:
            started = self.start(bucket)
            finish()
            finish = started
        finish()

    def start(self, bucket: Bucket) -> Callable[[], object]:
        """Begin to send a bucket. Return a function that waits until its memory may be filled anew."""
        raise NotImplementedError

    def commit(self, version: int) -> None:
        """Wait until every server has loaded all buckets; there are no more."""

    def forget(self) -> None:
        """Drop what was set up with the servers, and what a broken sync left behind."""

    def close(self) -> None:
        self.forget()
        self.pool.shutdown(wait=False, cancel_futures=True)

    @property
    def urls(self) -> str:
        return ", ".join(peer.server.url for peer in self.peers)


class Disk(Transport):
    """Writes a Hugging Face directory, which appears whole, and removes the one before. Servers read it."""

    needs_session = False

    def __init__(self, bucket_bytes: int, timeout: float, directory: Path, model: Path):
        super().__init__(bucket_bytes, timeout, torch.device("cpu"))
        self.directory = directory.resolve()
        self.model = model
        self.partial = self.directory / ".partial"
        self.files: list[list[str]] = []  # tensor names of each file
        self.num_bytes = 0

    def open(self, peers: list[Peer]) -> None:
        super().open(peers)
        self.files, self.num_bytes = [], 0
        with _writing(self.partial):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            for path in self.model.iterdir():  # config and tokenizer: a server can start from this directory
                is_small = path.is_file() and path.suffix in {".json", ".txt", ".model", ".jinja"}
                if is_small and not path.name.endswith(".index.json"):
                    shutil.copy2(path, self.partial / path.name)

    def store(self, made: Iterator[Bucket], version: int) -> None:
        self.send(made)
        names = {name: _file_name(i) for i, file in enumerate(self.files, start=1) for name in file}
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": names}
        whole = self._whole(version)
        with _writing(whole):
            (self.partial / "model.safetensors.index.json").write_text(json.dumps(index))
            shutil.rmtree(whole, ignore_errors=True)
            os.rename(self.partial, whole)
        for old in self.directory.iterdir():  # servers have read it
            if old != whole:
                shutil.rmtree(old, ignore_errors=True)

    def start(self, bucket: Bucket) -> Callable[[], object]:
        self.files.append([part.name for part in bucket.parts])
        self.num_bytes += len(bucket.data)
        path = self.partial / _file_name(len(self.files))
        writing = self.pool.submit(_write, path, bucket)
        return lambda: wait_for_all([writing], self.timeout, f"writing weights to {path}")

    def commit(self, version: int) -> None:
        path = "/update_weights_from_disk"
        call = {"model_path": str(self._whole(version)), "flush_cache": False}
        on_all(self.peers, lambda peer: peer.server.post(path, call, self.timeout, SUCCESS))

    def forget(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def _whole(self, version: int) -> Path:
        return self.directory / f"{version:06}"


class Tensors(Transport):
    """Sends buckets in calls to servers on this host: as CUDA IPC handles from a GPU, as bytes from a CPU."""

    def __init__(self, bucket_bytes: int, timeout: float, device: torch.device):
        # on a CPU this memory must also hold a bucket's clone, pickled, in base64, as JSON, encoded, sent
        if device.type == "cpu":
            bucket_bytes //= 4
        super().__init__(bucket_bytes, timeout, device)
        self.pool = ThreadPoolExecutor(1, "weights")  # one call at a time: each holds copies of its bucket
        self.last: Future[None] | None = None

    def start(self, bucket: Bucket) -> Callable[[], object]:
        if bucket.data.is_cuda:
            torch.cuda.synchronize(bucket.data.device)  # it is filled before another process reads it
        self.last = self.pool.submit(self._send, bucket)
        return self.last.result

    def commit(self, version: int) -> None:
        if self.last:
            self.last.result()

    def _send(self, bucket: Bucket) -> None:
        if bucket.data.is_cuda:  # else this thread would open a context on the first GPU
            torch.cuda.set_device(bucket.data.device)
        for peer in self.peers:
            call = FLATTENED | {"serialized_named_tensors": _payloads(bucket, peer.tensor_ranks)}
            peer.server.post("/update_weights_from_tensor", call, self.timeout, SUCCESS)


class _Handle:
    """A CUDA tensor, pickled as an IPC handle with its GPU's UUID: servers may number GPUs differently."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(self.tensor)
        uuid = str(torch.cuda.get_device_properties(self.tensor.device).uuid)
        return rebuild, (*arguments[:6], uuid, *arguments[7:])  # 6: the number of the storage's device


def _payloads(bucket: Bucket, tensor_ranks: int) -> list[str]:
    """Return one payload for each of a server's tensor ranks."""
    metadata = [
        SimpleNamespace(
            name=p.name, shape=p.shape, dtype=p.dtype, start_idx=p.start, end_idx=p.end, numel=p.end - p.start
        )
        for p in bucket.parts
    ]

    def encode(tensor: Any) -> str:
        pickled = pickle.dumps({"flattened_tensor": tensor, "metadata": metadata}, protocol=4)
        return base64.b64encode(pickled).decode()

    if bucket.data.is_cuda:  # a handle for each: the process that opens one also releases it
        return [encode(_Handle(bucket.data)) for _ in range(tensor_ranks)]
    # a clone, because pickle takes all the memory that a slice lies in
    return [encode(bucket.data.clone())] * tensor_ranks


def _file_name(number: int) -> str:
    return f"model-{number:05}.safetensors"


def _write(path: Path, bucket: Bucket) -> None:
    """Write a safetensors file: length of the header, header, bytes. No fsync: a crash makes it useless."""
    header: dict[str, Any] = {}
    for part in bucket.parts:
        offsets = [part.start, part.end]
        header[part.name] = {"dtype": SAFETENSORS[part.dtype], "shape": part.shape, "data_offsets": offsets}
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    text += b" " * (-len(text) % 8)
    with _writing(path), open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = memoryview(bucket.data.numpy())  # type: ignore[arg-type]
        while left:
            left = left[file.write(left) :]  # one write takes 2 GiB at most


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EngineError(f"weights cannot be written to {path}: {error.strerror}") from None


def wait_for_all(futures: Sequence[Future[Any]], timeout: float, doing: str) -> None:
    """Wait until all are done or one fails, and raise its error; that of a timeout begins with `doing`."""
    done, waiting = wait(futures, timeout, FIRST_EXCEPTION)
    for future in futures:
        if future in done:
            future.result()
    if waiting:
        raise EngineError(f"{doing}: not done after {timeout:.0f} s")
