"""The ranks of a run, and the control traffic between the main rank and the others.

Tensors of the policy travel in Megatron's own groups. Here Python objects and a few numbers travel over gloo,
with a timeout long enough for any rollout: NCCL's watchdog would end a run whose rollout takes an hour.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dapo.config import ConfigError, Engine, Parallel
from dapo.types import Stopped

T = TypeVar("T")
CONTROL_TIMEOUT = timedelta(hours=24)  # how long ranks wait for the main rank's rollouts
GPU_ENVIRONMENT = {  # what a process needs before it first uses CUDA; a value that is there already stays
    # sequence parallelism's gathers start before the products that they overlap with
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
# SGLang sets the same: processes that differ in it cannot join in a group. NCCL reads it once in a process,
# so it holds for training's groups too, and all ranks need it: only runs that broadcast to servers set it
WITH_SERVERS = {"NCCL_CUMEM_ENABLE": "0"}


class FailedElsewhere(Exception):
    """The main rank failed and prints why: the message, and True if it was what the user wrote."""

    def __init__(self, message: str = "", is_users: bool = False):
        super().__init__(message, is_users)
        self.is_users = is_users

    def __str__(self) -> str:
        return str(self.args[0])


def set_gpu_environment(engine: Engine | None = None) -> None:
    """Set GPU_ENVIRONMENT, before anything asks CUDA for its devices.

    `engine`: set WITH_SERVERS too, if it needs that, before the first use of NCCL.
    """
    broadcasts = engine is not None and engine.kind == "sglang" and engine.weight_sync == "broadcast"
    for name, value in (GPU_ENVIRONMENT | (WITH_SERVERS if broadcasts else {})).items():
        os.environ.setdefault(name, value)


def _device(local_rank: int) -> torch.device:
    set_gpu_environment()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} finds {torch.cuda.device_count()} GPUs on this machine, one a process "
            "is needed: launch fewer processes, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return torch.device("cuda", local_rank)


@functools.cache
def _connect(device: torch.device) -> tuple[Any, dist.ProcessGroup]:
    """Join the other ranks, once per process. Return the store they share, and the control group."""
    # without torchrun
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    store, rank, world = next(iter(rendezvous("env://")))
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    # for a program that does not end by os._exit: gloo's threads, left running, would abort the process
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    return store, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)


def is_lost(error: Exception) -> bool:
    """True if a collective failed because another rank's process has ended or cannot be reached."""
    by_peer = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    return isinstance(error, RuntimeError) and any(cause in str(error) for cause in by_peer)


class Mesh:
    """The ranks of this run: world = tensor × context × data × pipeline.

    Tensor ranks are adjacent (Megatron's order tp-cp-dp-pp). A step's batch has one shard for each pair of
    data and context rank; all tensor and pipeline ranks of the pair receive it.

    Raises:
        ConfigError: the world size does not divide by tensor × pipeline × context.
    """

    _numbers = itertools.count()

    def __init__(self, parallel: Parallel):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.tensor, self.pipeline, self.context = parallel.tensor, parallel.pipeline, parallel.context
        self.data = parallel.data(self.world)
        self.num_shards = self.data * self.context
        self.shard = self.shard_of(self.rank)  # data rank × context + context rank
        self.is_main = self.rank == 0
        self.device = _device(int(os.environ.get("LOCAL_RANK", 0)))
        self._store, self.control = _connect(self.device)
        self._number = next(Mesh._numbers)  # the same on every rank
        self._num_received = 0  # bytes, by this rank's last `scatter`

    def shard_of(self, rank: int) -> int:
        """Number of the batch shard that the rank receives."""
        return rank // self.tensor % self.num_shards

    def scatter(self, function: Callable[..., Sequence[T]], *args: Any) -> T:
        """Run `function` on the main rank. It returns `num_shards` shards; each rank receives its own only.

        Raises:
            Stopped: the function raised it; on every rank.
            FailedElsewhere: the function raised something else; the main rank has the exception itself.
        """
        if not self.is_main:
            return cast(T, self._receive())
        try:
            shards = function(*args)
        except BaseException as error:
            failure = FailedElsewhere(str(error), isinstance(error, ConfigError))
            for rank in range(1, self.world):
                self._send(error if isinstance(error, Stopped) else failure, rank)
            raise
        wanted = f"{self.data} data-parallel × {self.context} context ranks"
        assert len(shards) == self.num_shards, f"{len(shards)} shards for {wanted}"
        for rank in range(1, self.world):
            self._send(shards[self.shard_of(rank)], rank)
        return shards[0]

    def received(self) -> dict[str, float]:
        """Return metrics of the last `scatter`: bytes received by the rank with most, and by all. Collective.

        The main rank has its shard already.
        """
        return {
            "perf/bytes_received_max": self.max(self._num_received),
            "perf/bytes_received": float(self.sum(np.array([self._num_received]))[0]),
        }

    def on_main(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function` on the main rank and return its result on every rank. Raises as `scatter` does."""
        return self.scatter(lambda: [function(*args)] * self.num_shards)

    def on_main_only(self, function: Callable[..., T], *args: Any) -> T | None:
        """Run `function` on the main rank, which keeps the result; the others get None. Raises as `scatter`
        does.
        """
        made: list[T] = []
        self.on_main(lambda: made.append(function(*args)))
        return made[0] if made else None

    def together(self, function: Callable[[], None]) -> None:
        """Run `function` on every rank.

        Once all have, the main rank's exception, if any, is raised on every rank as `scatter` does.
        """
        failure: Exception | None = None
        try:
            function()
        except Exception as error:
            if not self.is_main:
                raise
            failure = error

        def report() -> None:
            if failure:
                raise failure

        self.on_main(report)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on the main rank; nothing elsewhere."""
        if not self.is_main:
            self._send(value, 0)
            return []
        return [value, *(self._receive(rank) for rank in range(1, self.world))]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over all ranks, in float64, on every rank."""
        total = torch.from_numpy(np.asarray(values, dtype=np.float64).copy())
        dist.all_reduce(total, group=self.control)
        return total.numpy()

    def sum_by_key(self, values: dict[str, float]) -> dict[str, float]:
        """Sum each value over all ranks, on every rank. All ranks have the same keys, in the same order."""
        return dict(zip(values, self.sum(np.array(list(values.values()))).tolist(), strict=True))

    def max(self, value: float) -> float:
        """Return the largest value of all ranks, on every rank."""
        largest = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return float(largest)

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self.control)

    def wait_for_main(self) -> None:
        """Wait for the main rank to call this, or end: once others have, a launcher gives it little time."""
        with suppress(RuntimeError, dist.DistError):
            dist.barrier(group=self.control)

    def is_first_to_fail(self) -> bool:
        """True on one rank, so that an error is printed once; on every rank whose store has ended."""
        try:
            return bool(self._store.add(f"dapo/failed/{self._number}", 1) == 1)
        except (RuntimeError, dist.DistError):  # it has ended with its host: better twice than never
            return True

    def store(self, name: str) -> Store:
        """Return the ranks' shared store, under a prefix and over a new connection: another thread may use
        it.
        """
        return PrefixStore(f"dapo/{name}/{self._number}", self._store.clone())

    def _send(self, value: Any, rank: int) -> None:
        data = torch.frombuffer(bytearray(pickle.dumps(value, protocol=5)), dtype=torch.uint8)
        dist.send(torch.tensor([len(data)]), rank, group=self.control)
        dist.send(data, rank, group=self.control)

    def _receive(self, rank: int = 0) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        dist.recv(size, rank, group=self.control)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, rank, group=self.control)
        self._num_received = len(data)
        value = pickle.loads(data.numpy().tobytes())
        if isinstance(value, BaseException):
            raise value
        return value
