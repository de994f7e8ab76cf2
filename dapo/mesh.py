"""Who is who among the ranks, and how the main rank speaks to the others.

Two kinds of traffic. Tensors of the policy travel in Megatron's own groups. Everything here is control:
Python objects and a few numbers, over gloo, with a time limit long enough for any rollout (NCCL's watchdog
would end a run whose rollout takes an hour).
"""

from __future__ import annotations

import functools
import itertools
import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dapo.config import ConfigError, Parallel
from dapo.types import Interrupted

T = TypeVar("T")
CONTROL_TIMEOUT = timedelta(hours=24)  # how long ranks wait for the main rank's rollouts


class FailedElsewhere(Exception):
    """The main rank failed and has said why."""


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} finds {torch.cuda.device_count()} GPUs on this machine, one a process "
            "is needed: "
            "launch fewer processes, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return torch.device("cuda", local_rank)


@functools.cache
def _connect(device: torch.device) -> tuple[Any, dist.ProcessGroup]:
    """Join the other ranks, once per process: the store they share, and the control group."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(name, value)  # one process, without torchrun
    store, rank, world = next(iter(rendezvous("env://")))
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # as SGLang sets it: processes that differ in it cannot join in a group
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return store, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)


class Mesh:
    """The ranks of this run: world = tensor × context × data × pipeline, tensor ranks adjacent (Megatron's
    order tp-cp-dp-pp).

    A step's batch has a share for each pair of data and context rank, which the pair's tensor and pipeline
    ranks all receive.

    Raises:
        ConfigError: the world size does not divide by tensor × pipeline × context.
    """

    _numbers = itertools.count()

    def __init__(self, parallel: Parallel):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.tensor, self.pipeline, self.context = parallel.tensor, parallel.pipeline, parallel.context
        self.data = parallel.data(self.world)
        self.num_shares = self.data * self.context
        self.share = self.share_of(self.rank)  # data rank × context + context rank
        self.is_main = self.rank == 0
        self.device = _device(int(os.environ.get("LOCAL_RANK", 0)))
        self._store, self.control = _connect(self.device)
        self._number = next(Mesh._numbers)  # the same on every rank
        self._num_received = 0  # bytes, by this rank's last `scatter`

    def share_of(self, rank: int) -> int:
        return rank // self.tensor % self.num_shares

    def scatter(self, function: Callable[..., Sequence[T]], *args: Any) -> T:
        """Run `function` on the main rank; it returns `num_shares` shares, and each rank receives its own
        only.

        Raises, on every rank: Interrupted if the function does; its own exception on the main rank,
        FailedElsewhere on the others.
        """
        if not self.is_main:
            return cast(T, self._receive())
        try:
            shares = function(*args)
        except BaseException as error:
            for rank in range(1, self.world):
                self._send(error if isinstance(error, Interrupted) else FailedElsewhere(str(error)), rank)
            raise
        assert len(shares) == self.num_shares, (
            f"{len(shares)} shares for {self.data} data-parallel × {self.context} context ranks"
        )
        for rank in range(1, self.world):
            self._send(shares[self.share_of(rank)], rank)
        return shares[0]

    def received(self) -> dict[str, float]:
        """Metrics: bytes that the last `scatter` brought to the rank with most, and to all; the main rank has
        its share already.

        Collective.
        """
        return {
            "perf/bytes_received_max": self.max(self._num_received),
            "perf/bytes_received": float(self.sum(np.array([self._num_received]))[0]),
        }

    def on_main(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function` on the main rank; every rank returns its result. Raises as `scatter` does."""
        return self.scatter(lambda: [function(*args)] * self.num_shares)

    def on_main_only(self, function: Callable[..., T], *args: Any) -> T | None:
        """Run `function` on the main rank; the result stays there, the others have None. Raises as `scatter`
        does.
        """
        made: list[T] = []
        self.on_main(lambda: made.append(function(*args)))
        return made[0] if made else None

    def together(self, function: Callable[[], None]) -> None:
        """Run `function` on every rank. Once all have, the main rank's exception, if any, is raised on every
        rank as `scatter` does.
        """
        failure: Exception | None = None
        try:
            function()
        except Exception as error:
            if not self.is_main:
                raise
            failure = error

        def tell() -> None:
            if failure:
                raise failure

        self.on_main(tell)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on the main rank; nothing elsewhere."""
        if not self.is_main:
            self._send(value, 0)
            return []
        return [value, *(self._receive(rank) for rank in range(1, self.world))]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The sum over all ranks, in float64, on every rank."""
        total = torch.from_numpy(np.asarray(values, dtype=np.float64).copy())
        dist.all_reduce(total, group=self.control)
        return total.numpy()

    def sum_by_key(self, values: dict[str, float]) -> dict[str, float]:
        """Sum each value over all ranks, on every rank. All ranks have the same keys, in the same order."""
        return dict(zip(values, self.sum(np.array(list(values.values()))).tolist(), strict=True))

    def max(self, value: float) -> float:
        """The largest value of all ranks, on every rank."""
        largest = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return float(largest)

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def is_first_to_fail(self) -> bool:
        """True for one rank only: an error that several ranks meet, or that one rank's end causes in the
        others, is told once.
        """
        try:
            return bool(self._store.add(f"dapo/failed/{self._number}", 1) == 1)
        except (RuntimeError, dist.DistError):  # the store went with the rank that failed
            return False

    def store(self, name: str) -> Store:
        """The store that all ranks share, under a name, by a connection of its own: for another thread than
        the main one.
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
