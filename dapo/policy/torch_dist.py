"""Megatron's distributed checkpoints (torch_dist), written and read by all ranks of a run, each its own part.

The files are described in chunks.py.
"""

from __future__ import annotations

import itertools
import os
import pickle
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from dapo.clock import timed
from dapo.config import ConfigError
from dapo.files import ChunkFile, Sum
from dapo.mesh import FailedElsewhere
from dapo.policy.chunks import MAIN, Box, Damaged, Reader, no_use, num_threads, on_cpu
from dapo.types import reason

ONLY_DATA = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load reads tensors and plain values, whoever calls it
Item: TypeAlias = tuple[WriteItem, Any]  # and its tensor, or the bytes of an object


class Save:
    """A checkpoint on its way to the disk. Every method but `is_written` and `detach` is collective.

    Threads write. Megatron's own writers are forked processes and a manager process, which a killed trainer
    leaves behind.
    """

    def __init__(
        self, state: dict[str, Any], directory: Path, copies: dist.ProcessGroup, barrier: Callable[[], None]
    ):
        """Plan each rank's part, in an existing, empty directory. Nothing large is written yet.

        `copies`: ranks with the same state, which divide the writing among them. `barrier` waits for a slow
        disk, which NCCL's does not.
        """
        strategy = _Strategy("torch_dist", 1)
        shared = FullyParallelSaveStrategyWrapper(strategy, copies)
        # "mcore": Megatron's own plan, not that of NVIDIA's resiliency package
        own: Any = {"async_sharded_save": True, "async_strategy": "mcore"}
        self._request = dist_checkpointing.save(state, str(directory), shared, **own)
        self._writer = strategy.writer
        self._barrier = barrier
        self._directory = directory

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's part."""
        return self._writer.num_bytes

    def start(self, in_background: bool) -> None:
        """Write. In the background: until `detach` the tensors must not change."""
        self._writer.start(in_background)
        if not in_background:
            self._writer.wait()

    @timed("checkpoint")
    def detach(self) -> None:
        """Copy to main memory what is not written yet: then the tensors may change."""
        self._writer.detach()

    def is_written(self) -> bool:
        return self._writer.is_written()

    def finish(self) -> dict[str, Sum]:
        """Wait for all parts; the main rank then writes .metadata. Returns the sums of this rank's files.

        Raises:
            OSError: a part could not be written.
            FailedElsewhere: this rank's part was written, another's was not.
        """
        self._writer.wait()
        self._barrier()
        try:
            for finalize in self._request.finalize_fns:
                finalize()
        except CheckpointException as error:  # a BaseException; only the main rank knows the reasons
            reasons = [reason(failure) for failure, _ in error.failures.values()]
            if reasons:
                raise OSError(reasons[0]) from error
            raise FailedElsewhere("a part of the checkpoint could not be written") from error
        return {f"{self._directory.name}/{file.path.name}": file.sum for file in self._writer.files}


class _Strategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's plan, written by our writer."""

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path, async_strategy: str) -> AsyncRequest:
        only_main = self.keep_only_main_replica
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, only_main)
        self.writer = _Writer(checkpoint_dir)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        plan, *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(tensors), self.writer, planner=planner)
        return self._get_save_and_finalize_callbacks(self.writer, plan, async_strategy)


class _Writer(FileSystemWriterAsync):  # type: ignore[misc]
    """Writes this rank's chunks, a file in each thread."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        items = [(item, planner.resolve_data(item)) for item in plan.items]
        items.sort(key=_size_of, reverse=True)
        self.num_bytes = sum(map(_size_of, items))
        parts: list[list[Item]] = [[] for _ in range(num_threads(self.num_bytes))]
        sizes = [0] * len(parts)
        for item in items:  # the largest first, into the smallest part
            smallest = sizes.index(min(sizes))
            parts[smallest].append(item)
            sizes[smallest] += _size_of(item)
        names = (f"{plan.storage_data.prefix}{number}.distcp" for number in itertools.count())
        directory = Path(self.checkpoint_dir)
        self._writing: list[Future[Any]] = []
        self._is_started = False
        self.files = [_File(directory / name, part) for name, part in zip(names, parts, strict=False) if part]

    def start(self, in_background: bool) -> None:
        threads = ThreadPoolExecutor(max(1, len(self.files)), thread_name_prefix="checkpoint")
        self._writing = [threads.submit(file.write, self.transforms, in_background) for file in self.files]
        threads.shutdown(wait=False)
        self._is_started = True

    def detach(self) -> None:
        with ExitStack() as paused:
            for file in self.files:
                paused.enter_context(file.detaching())
            if torch.cuda.is_available():
                torch.cuda.synchronize()

    def is_written(self) -> bool:
        return self._is_started and all(writing.done() for writing in self._writing)

    def wait(self) -> None:
        wait(self._writing)

    def get_save_function_and_args(self) -> tuple[None, None, list[Any]]:
        return None, None, []  # Save writes

    def retrieve_write_results(self) -> Any:
        errors = [error for writing in self._writing if (error := writing.exception())]
        if errors:
            return _wrap_exception(errors[0])
        return [result for writing in self._writing for result in writing.result()]


class _File:
    """A file of a checkpoint, and the items that are still to be written into it."""

    def __init__(self, path: Path, items: list[Item]):
        self.path = path
        self.sum: Sum = (0, None)
        self._todo = deque(items)
        self._lock = threading.Lock()  # held while an item is taken
        self._in_hand = threading.Event()  # set once the last one that was taken needs its tensor no more
        self._in_hand.set()

    def write(self, transforms: Any, in_background: bool) -> list[Any]:
        """Write all items. In the background each is copied first, so that nobody waits for the disk."""
        file = ChunkFile(self.path)
        results = []
        try:
            while taken := self._take():
                (item, data), in_hand = taken
                if isinstance(data, Tensor):
                    if data.is_cuda:  # a new thread would open a context on the first GPU
                        torch.cuda.set_device(data.device)
                    data = on_cpu(data, copy=in_background)
                taken = None  # the tensor's memory may be given back now
                in_hand.set()
                form = SerializationFormat.TORCH_SAVE
                results.append(_write_item(transforms, file, data, item, self.path.name, form))  # type: ignore[arg-type]
            file.close()
        except (OSError, RuntimeError) as error:
            raise file.error or error from None
        finally:
            self._in_hand.set()
        self.sum = file.tell(), None
        return results

    @contextmanager
    def detaching(self) -> Iterator[None]:
        """Begin to copy the tensors that are not yet written. At the block's end the copies must be there."""
        with self._lock:
            self._todo = deque((item, _in_main_memory(data)) for item, data in self._todo)
            self._in_hand.wait()
            yield

    def _take(self) -> tuple[Item, threading.Event] | None:
        with self._lock:
            if not self._todo:
                return None
            self._in_hand = threading.Event()
            return self._todo.popleft(), self._in_hand


def _size_of(item: Item) -> int:
    data = item[1]
    return data.nbytes if isinstance(data, Tensor) else len(data.getbuffer())


def _in_main_memory(data: Any) -> Any:
    """Begin to copy a tensor: a GPU copies into page-locked memory by itself. Objects stay as they are."""
    if not isinstance(data, Tensor):
        return data
    data = data.detach()
    host = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
    return host.copy_(data, non_blocking=True)


def load(state: dict[str, Any], directory: Path) -> tuple[dict[str, Any], str | None]:
    """Read a state's tensors, in place, and all else, from a checkpoint of any layout.

    Also returns what is damaged of what this rank has read, or None: the state is then not whole.

    Raises:
        ConfigError: a pickle in it holds what a checkpoint has no use for; none of it was run.
    """
    strategy = _LoadStrategy(Reader(directory))  # Megatron reads .metadata once more, with plain pickle
    if damage := strategy.reader.damaged_object():
        return {}, damage
    os.environ[ONLY_DATA] = "1"
    try:
        # the reader finds what a rank lacks; Megatron would have all ranks exchange what each of them loads
        found = dist_checkpointing.load(state, str(directory), strategy, validate_access_integrity=False)
        return found, strategy.damage
    except (pickle.UnpicklingError, CheckpointException) as error:
        failures = [error] if isinstance(error, Exception) else [f for f, _ in error.failures.values()]
        refused = [str(failure) for failure in failures if isinstance(failure, pickle.UnpicklingError)]
        if not refused:
            raise
        found = re.search(r"GLOBAL (\S+)", refused[0])
        raise ConfigError(no_use(directory, found[1] if found else reason(error))) from error
    finally:
        del os.environ[ONLY_DATA]


class _LoadStrategy(TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """Reads tensors by our reader."""

    def __init__(self, reader: Reader):
        super().__init__(stream_ckpt_dequant=False)  # the planner would do that
        self.reader = reader
        self.damage: str | None = None

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path, async_strategy: str = "mcore") -> Any:
        found = list(nested_values(sharded_state_dict))
        boxes = [Box(self._key(t), t.global_offset, t.data.detach()) for t in found]
        try:
            self.reader.fill(boxes)
        except Damaged as error:
            self.damage = str(error)
        return dict_list_map_outplace(lambda tensor: tensor.data, sharded_state_dict)

    def _key(self, tensor: ShardedTensor) -> str:
        """Return the name that a tensor has there: a float32 parameter's exact values, if it was 16-bit."""
        key, main = str(tensor.key), MAIN + str(tensor.key)
        is_rounded = tensor.data.dtype == torch.float32 and main in self.reader.sizes
        return main if is_rounded and self.reader.dtype(key) != torch.float32 else key
