"""The ranks of a run, and the control traffic between the main rank and the others.

Tensors of the policy travel in Megatron's own groups. Here Python objects and a few numbers travel over gloo,
with a timeout long enough for any rollout: NCCL's watchdog would end a run whose rollout takes an hour.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import itertools
import os
import pickle
import resource
import socket
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dapo.config import Config, ConfigError, Parallel
from dapo.joining import join
from dapo.types import Stopped

T = TypeVar("T")
LARGE = 1 << 20  # bytes of an array that travels by itself
MAX_PARTS = 32  # of a message
MOST_NAMED = 8  # machines, values and options in one line
CONTROL_TIMEOUT = timedelta(hours=24)  # how long ranks wait for the main rank's rollouts
GPU_ENVIRONMENT = {  # what a process needs before it first uses CUDA; a value that is there already stays
    # sequence parallelism's gathers start before the products that they overlap with
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
# SGLang sets the same: processes that differ in it cannot join in a group. NCCL reads it once in a process,
# so it holds for training's groups too, and all ranks need it: only runs that broadcast to servers set it
WITH_SERVERS = {"NCCL_CUMEM_ENABLE": "0"}
# with these values cuBLAS, Transformer Engine and NCCL add in a fixed order (NCCL's trees may differ from run
# to run); where there is none, the first is set
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "NCCL_ALGO": ("Ring",),
}


class FailedElsewhere(Exception):
    """The main rank failed and prints why: the message, and True if it was what the user wrote."""

    def __init__(self, message: str = "", is_users: bool = False):
        super().__init__(message, is_users)
        self.is_users = is_users

    def __str__(self) -> str:
        return str(self.args[0])


def set_gpu_environment(config: Config | None = None) -> None:
    """Set GPU_ENVIRONMENT, before anything asks CUDA for its devices.

    `config`: set WITH_SERVERS too, if its engine needs that, and what run.deterministic needs, torch's own
    setting included, before the first use of NCCL and cuBLAS.

    Raises:
        ConfigError: a variable has a value with which run.deterministic does not hold.
    """
    values = dict(GPU_ENVIRONMENT)
    if config and config.engine.kind == "sglang" and config.engine.weight_sync == "broadcast":
        values |= WITH_SERVERS
    if config and config.run.deterministic:
        values |= {name: accepted[0] for name, accepted in DETERMINISTIC.items()}
        for name, accepted in DETERMINISTIC.items():
            if (found := os.environ.get(name, accepted[0])) not in accepted:
                remedy = f"unset it, or set {' or '.join(accepted)}"
                raise ConfigError(f"{name}={found} with run.deterministic=true: sums may differ: {remedy}")
        torch.use_deterministic_algorithms(True)
    for name, value in values.items():
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
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS has a lower limit than the hard one
        # each group of gloo connects every rank with every other
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    # without torchrun
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    store, rank, world = next(iter(rendezvous("env://")))
    store = join(store, rank, world)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    # for a program that does not end by os._exit: gloo's threads, left running, would abort the process
    atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    return store, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)


@functools.cache
def _code() -> str:
    """Return a hash of the code of dapo: ranks of other code may not understand what the main rank sends."""
    state, folder = hashlib.blake2b(digest_size=6), Path(__file__).parent
    for path in sorted(folder.rglob("[!.]*.py")):  # an editor's files are hidden
        state.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return state.hexdigest()


def _which(what: str, found: list[tuple[dict[str, str], str]]) -> str:
    """Say which machines have which value: "1 on a b, 2 on c"."""
    hosts = dict[str, dict[str, None]]()
    for values, host in found:
        hosts.setdefault(values[what], {})[host] = None
    each = [
        f"{value} on {' '.join(list(names)[:MOST_NAMED])}{_and_more(names)}" for value, names in hosts.items()
    ]
    return ", ".join(each[:MOST_NAMED]) + _and_more(each)


def _and_more(names: Sized) -> str:
    return " …" if len(names) > MOST_NAMED else ""


def is_lost(error: Exception) -> bool:
    """True if a collective failed because another rank's process has ended or cannot be reached."""
    by_peer = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    return isinstance(error, RuntimeError) and any(cause in str(error) for cause in by_peer)


class Mesh:
    """The ranks of this run: world = tensor × context × data × pipeline.

    Tensor ranks are adjacent (Megatron's order tp-cp-dp-pp). A step's batch has one share for each data rank;
    all its tensor, context and pipeline ranks receive it.

    Raises:
        ConfigError: the world size does not divide by tensor × pipeline × context, or ranks run other code.
    """

    _numbers = itertools.count()

    def __init__(self, parallel: Parallel):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.tensor, self.pipeline, self.context = parallel.tensor, parallel.pipeline, parallel.context
        self.data = parallel.data(self.world)
        self.data_rank = self.data_rank_of(self.rank)
        self.context_rank = self.rank // self.tensor % self.context
        self.is_main = self.rank == 0
        self.device = _device(int(os.environ.get("LOCAL_RANK", 0)))
        self._store, self.control = _connect(self.device)
        self._number = next(Mesh._numbers)  # the same on every rank
        self._num_received = 0  # bytes, by this rank's last `scatter`
        self.check_same({"the code of dapo": _code()}, "install the same version on all machines")

    def check_same(self, values: Mapping[str, str], remedy: str) -> None:
        """Compare values over all ranks, which have the same names for them in the same order. Collective.

        Raises:
            ConfigError: some differ; on every rank, with the machines that have each value.
        """
        hashes = [hashlib.blake2b(value.encode(), digest_size=7).digest() for value in values.values()]
        numbers = torch.tensor([int.from_bytes(each) for each in hashes])
        extremes = torch.stack([numbers, -numbers])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.control)
        unlike = [what for what, spread in zip(values, extremes.sum(0).tolist(), strict=True) if spread]
        if not unlike:
            return
        found: list[Any] = [None] * self.world
        mine = {what: values[what] for what in unlike[:MOST_NAMED]}, socket.gethostname()
        dist.all_gather_object(found, mine, group=self.control)
        differences = (f"{what} is not the same on all ranks: {_which(what, found)}" for what in mine[0])
        raise ConfigError(f"{'; '.join(differences)}{_and_more(unlike)}: {remedy}")

    def data_rank_of(self, rank: int) -> int:
        """Number of the share of a step's batch that the rank works on."""
        return rank // (self.tensor * self.context) % self.data

    def scatter(self, function: Callable[..., Iterable[T]], *args: Any, by_stage: bool = False) -> T:
        """Run `function` on the main rank. It returns a share for each data rank, which all ranks of that one
        receive; `by_stage`: one for each pipeline stage of each data rank.

        A share is sent to one of its ranks, which passes it on; the next one is made meanwhile.

        Raises:
            Stopped: the function raised it; on every rank.
            FailedElsewhere: the function raised something else; the main rank has the exception itself. Of a
                function that fails after its first shares, their ranks do not hear.
        """
        if not self.is_main:
            return cast(T, self._receive_share(by_stage))
        travelling: list[dist.Work] = []
        mine: list[T] = []
        parties = self._parties(by_stage)
        # the main rank, the first of the first, has its share
        receivers = [parties[0][1:3], *(party[:1] for party in parties[1:])]
        sent = 0  # shares
        try:
            for share in function(*args):
                mine = mine or [share]
                message = _Message.of(share)
                _wait(travelling)
                travelling = self._pass_on(message, receivers[sent])
                sent += 1
            assert sent == len(parties), f"{sent} shares, expected {len(parties)}"
        except BaseException as error:
            failure = FailedElsewhere(str(error), isinstance(error, ConfigError))
            message = _Message.of(error if isinstance(error, Stopped) else failure)
            _wait(travelling)  # what nobody waits for may never arrive
            for ranks in receivers[sent:]:
                _wait(self._pass_on(message, ranks))
            raise
        _wait(travelling)
        return mine[0]

    def received(self) -> dict[str, float]:
        """Return metrics of the last `scatter`: bytes received by the rank with most, and by all. Collective.

        The main rank receives nothing.
        """
        return {
            "perf/bytes_received_max": self.max(self._num_received),
            "perf/bytes_received": float(self.sum(np.array([self._num_received]))[0]),
        }

    def on_main(self, function: Callable[..., T], *args: Any) -> T:
        """Run `function` on the main rank and return its result on every rank. Raises as `scatter` does."""
        return self.scatter(lambda: [function(*args)] * self.data)

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
        if self.world > 1:  # alone, gloo's threads take longer than the rest
            dist.all_reduce(total, group=self.control)
        return total.numpy()

    def sum_by_key(self, values: dict[str, float]) -> dict[str, float]:
        """Sum each value over all ranks, on every rank. All ranks have the same keys, in the same order."""
        return dict(zip(values, self.sum(np.array(list(values.values()))).tolist(), strict=True))

    def max(self, value: float) -> float:
        """Return the largest value of all ranks, on every rank."""
        if self.world == 1:
            return float(value)
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
        _wait(self._pass_on(_Message.of(value), [rank]))

    def _receive(self, rank: int) -> Any:
        return self._message_from(rank).value()

    def _receive_share(self, by_stage: bool) -> Any:
        """Receive from the main rank or from the rank before in the tree, pass on, return the value."""
        ranks = next(party for party in self._parties(by_stage) if self.rank in party)
        place = ranks.index(self.rank)
        message = self._message_from(ranks[(place - 1) // 2] if place else 0)
        self._num_received = sum(map(len, message.parts))
        _wait(self._pass_on(message, ranks[2 * place + 1 : 2 * place + 3]))
        value = message.value()
        if isinstance(value, BaseException):
            raise value
        return value

    def _parties(self, by_stage: bool) -> list[list[int]]:
        """Return the ranks that receive each share: a tree, ranks 2i + 1 and 2i + 2 below rank i."""
        block = self.tensor * self.context  # ranks that are adjacent
        parties = []
        for data_rank in range(self.data):
            firsts = range(data_rank * block, self.world, self.data * block)  # of each pipeline stage
            stages = [[first + i for i in range(block)] for first in firsts]
            parties += stages if by_stage else [[rank for stage in stages for rank in stage]]
        return parties

    def _pass_on(self, message: _Message, ranks: list[int]) -> list[dist.Work]:
        """Begin to send; the message is kept until the works are done."""
        sizes = torch.zeros(MAX_PARTS, dtype=torch.int64)
        sizes[: len(message.parts)] = torch.tensor([len(part) for part in message.parts])
        parts = [sizes, *message.parts]
        return [
            cast(dist.Work, dist.isend(part, rank, group=self.control)) for rank in ranks for part in parts
        ]

    def _message_from(self, rank: int) -> _Message:
        sizes = torch.zeros(MAX_PARTS, dtype=torch.int64)
        dist.recv(sizes, rank, group=self.control)
        parts = [torch.empty(size, dtype=torch.uint8) for size in sizes.tolist() if size]
        for part in parts:
            dist.recv(part, rank, group=self.control)
        return _Message(parts)


@dataclass(frozen=True)
class _Message:
    """A value as bytes: its pickle, then its large arrays, which are not copied."""

    parts: list[torch.Tensor]  # uint8, none of them empty

    @classmethod
    def of(cls, value: Any) -> _Message:
        large: list[memoryview] = []

        def is_small(buffer: pickle.PickleBuffer) -> bool:
            memory = buffer.raw()
            is_large = memory.nbytes >= LARGE and len(large) < MAX_PARTS - 1
            if is_large:
                large.append(memory)
            return not is_large

        head = bytearray(pickle.dumps(value, protocol=5, buffer_callback=is_small))
        writable = [bytearray(memory) if memory.readonly else memory for memory in large]
        return cls([torch.frombuffer(part, dtype=torch.uint8) for part in (head, *writable)])

    def value(self) -> Any:
        head, *large = (part.numpy().data for part in self.parts)
        return pickle.loads(head, buffers=large)


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()
