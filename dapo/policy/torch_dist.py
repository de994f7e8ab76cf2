"""Megatron's distributed checkpoints (torch_dist).

A run writes one with a thread of each rank; a single process reads and writes one chunk by chunk.
A directory holds *.distcp files (chunks of tensors end to end, each as torch.save writes it), .metadata (a
pickle: the file and offset of each chunk) and metadata.json (the format's name). What is no tensor is an
object among the chunks, "common_state"; Megatron-core before 0.19, and our converter, write common.pt.
A pickle can run code when it is read: only the classes that the format needs are admitted.
"""

from __future__ import annotations

import functools
import mmap
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo, _write_item
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from dapo.config import ConfigError
from dapo.files import Sum, SummedFile
from dapo.mesh import FailedElsewhere
from dapo.types import reason

Index = tuple[int, ...]
ONLY_DATA = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load reads tensors and plain values, whoever calls it
ADMITTED = {  # module → classes that .metadata may name, beside torch's dtypes
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip

# --- all ranks of a run, each with its own part ---


class Save:
    """A checkpoint on its way to the disk. Every method but `is_written` is collective.

    A thread writes. Megatron's own writers are forked processes and a manager process, which a killed trainer
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
        self._file = f"{directory.name}/{self._writer.file_name}"

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's part."""
        return self._writer.num_bytes

    def start(self, in_background: bool) -> None:
        """Write. In the background, from a copy in main memory: training may then change the parameters."""
        if in_background:
            self._writer.copy_items()
        self._writer.start()
        if not in_background:
            self._writer.wait()

    def is_written(self) -> bool:
        return self._writer.future.done()

    def finish(self) -> dict[str, Sum]:
        """Wait for all parts; the main rank then writes .metadata. Returns the sum of this rank's file.

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
        return {self._file: self._writer.sum} if self._writer.items else {}


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
    """Writes this rank's chunks into one file, in a thread."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.items: list[tuple[WriteItem, Any]] = [(item, planner.resolve_data(item)) for item in plan.items]
        sizes = [d.nbytes if isinstance(d, Tensor) else len(d.getbuffer()) for _, d in self.items]
        self.num_bytes = sum(sizes)
        self.file_name = f"{plan.storage_data.prefix}0.distcp"
        self.sum: Sum = (0, 0)

    def copy_items(self) -> None:
        for i, (item, data) in enumerate(self.items):
            if isinstance(data, Tensor):
                self.items[i] = item, _on_cpu(data, copy=True)

    def start(self) -> None:
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.future: Future[list[Any]] = thread.submit(self._write)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        self.future.exception()

    def get_save_function_and_args(self) -> tuple[None, None, list[Any]]:
        return None, None, []  # Save writes

    def retrieve_write_results(self) -> Any:
        error = self.future.exception()
        return _wrap_exception(error) if error else self.future.result()

    def _write(self) -> list[Any]:
        if not self.items:
            return []
        file = SummedFile(Path(self.checkpoint_dir) / self.file_name)
        results = []
        try:
            for item, data in sorted(self.items, key=lambda pair: pair[0].type != WriteItemType.BYTE_IO):
                if isinstance(data, Tensor):
                    if data.is_cuda:  # a new thread would open a context on the first GPU
                        torch.cuda.set_device(data.device)
                    data = _on_cpu(data)
                form = SerializationFormat.TORCH_SAVE
                results.append(_write_item(self.transforms, file, data, item, self.file_name, form))  # type: ignore[arg-type]
            file.close()
        except (OSError, RuntimeError) as error:
            raise file.error or error from None
        self.sum = file.sum
        return results


def _on_cpu(tensor: Tensor, copy: bool = False) -> Tensor:
    """Return the tensor in memory of its own: of a view torch.save would write the whole storage."""
    tensor = tensor.detach()
    is_view = tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous()
    if copy or is_view or not tensor.is_cpu:
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return tensor


def load(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Read a state's tensors and all else from a checkpoint of any layout. Collective.

    Raises:
        ConfigError: a pickle in it holds what a checkpoint has no use for; none of it was run.
    """
    read_metadata(directory)  # Megatron reads it once more, with plain pickle
    os.environ[ONLY_DATA] = "1"
    try:
        return dist_checkpointing.load(state, str(directory))  # type: ignore[no-any-return]
    except (pickle.UnpicklingError, CheckpointException) as error:
        failures = [error] if isinstance(error, Exception) else [f for f, _ in error.failures.values()]
        refused = [str(failure) for failure in failures if isinstance(failure, pickle.UnpicklingError)]
        if not refused:
            raise
        found = re.search(r"GLOBAL (\S+)", refused[0])
        raise ConfigError(_no_use(directory, found[1] if found else reason(error))) from error
    finally:
        del os.environ[ONLY_DATA]


def read_metadata(directory: Path) -> Metadata:
    """Read .metadata. Raise ConfigError if it is none, or holds a class that a checkpoint has no use for."""
    try:
        with open(directory / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
    except _NotAdmitted as error:
        raise ConfigError(_no_use(directory / ".metadata", str(error))) from error
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        AttributeError,
        ImportError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        message = f"{directory}: no Megatron checkpoint (torch_dist) is there: .metadata: {reason(error)}"
        raise ConfigError(message) from error
    if not isinstance(metadata, Metadata):
        raise ConfigError(f"{directory}: .metadata holds no Metadata, but {type(metadata).__name__}")
    return metadata


class _NotAdmitted(Exception):
    """A pickle names a class or a function that is not admitted; the message is its name."""


class _Unpickler(pickle.Unpickler):
    """Reads .metadata, which describes tensors."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in ADMITTED.get(module, ()):
            raise _NotAdmitted(f"{module}.{name}")
        return super().find_class(module, name)


def _no_use(path: Path, name: str) -> str:
    return f"{path} names {name}, which no checkpoint needs and could run code: use only your own checkpoints"


# --- a single process, any layout ---


class Reader:
    """Reads the tensors of a checkpoint of any layout. Raises ConfigError if the directory holds none."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._metadata = read_metadata(directory)
        found = self._metadata.state_dict_metadata.items()
        self.sizes = {name: tuple(m.size) for name, m in found if isinstance(m, TensorStorageMetadata)}

    def dtype(self, name: str) -> torch.dtype:
        return self._metadata.state_dict_metadata[name].properties.dtype  # type: ignore[union-attr]

    def read(self, name: str, index: Index = ()) -> Tensor:
        """Return the whole tensor; `index`: the layer (and expert) of one whose first dimensions count them.

        Raises:
            ConfigError: a file is missing, cut short or damaged.
        """
        depth = len(index)
        chunks = self._by_index(name, depth)[index]
        parts = [self._chunk(name, chunk) for chunk in chunks]
        if len(parts) == 1:
            return parts[0][(0,) * depth]
        whole = torch.empty(self.sizes[name][depth:], dtype=self.dtype(name))
        for chunk, part in zip(chunks, parts, strict=True):
            part = part[(0,) * depth]
            ranges = zip(chunk.offsets[depth:], part.shape, strict=True)
            whole[tuple(slice(start, start + size) for start, size in ranges)] = part
        return whole

    @functools.cache  # noqa: B019  # as long-lived as the process that converts
    def _by_index(self, name: str, depth: int) -> dict[Index, list[ChunkStorageMetadata]]:
        found: dict[Index, list[ChunkStorageMetadata]] = {}
        for chunk in self._metadata.state_dict_metadata[name].chunks:  # type: ignore[union-attr]
            found.setdefault(tuple(chunk.offsets[:depth]), []).append(chunk)
        return found

    def _chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """Map a chunk, without a copy. torch.save's archive is not compressed; its CRC-32 is checked."""
        where = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        path = self.directory / where.relative_path
        start = where.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = where.offset + where.length - start
        try:
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
                mapped.madvise(mmap.MADV_WILLNEED)
                archive = _Slice(mapped, where.offset - start, where.length)
            with zipfile.ZipFile(archive) as entries:  # type: ignore[arg-type]
                [entry] = [info for info in entries.infolist() if info.filename.endswith("/data/0")]
                with entries.open(entry):  # checks the entry's own header
                    header = archive.bytes_at(entry.header_offset, 30)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path}: missing, damaged or cut short, at {name}: {error}") from error
        begin = archive.start + entry.header_offset + 30
        begin += sum(struct.unpack("<HH", header[26:30]))  # lengths of the name and of the extra field
        if zlib.crc32(memoryview(mapped)[begin : begin + entry.file_size]) != entry.CRC:
            raise ConfigError(f"{path}: damaged: the checksum of {name} differs")
        dtype = self.dtype(name)
        count = entry.file_size // dtype.itemsize
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin).view(*chunk.sizes)


class _Slice:
    """A part of mapped memory, as a file for zipfile."""

    def __init__(self, mapped: mmap.mmap, start: int, length: int):
        self.mapped = mapped
        self.start = start
        self.length = length
        self.offset = 0

    def bytes_at(self, offset: int, size: int) -> bytes:
        return self.mapped[self.start + offset : self.start + min(offset + size, self.length)]

    def read(self, size: int = -1) -> bytes:
        data = self.bytes_at(self.offset, self.length if size < 0 else size)
        self.offset += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self.offset = offset + (0, self.offset, self.length)[whence]
        return self.offset

    def tell(self) -> int:
        return self.offset

    def seekable(self) -> bool:
        return True


class Writer:
    """Writes a checkpoint, a part in each thread, in files of at most `file_bytes` (or one chunk)."""

    def __init__(self, directory: Path, file_bytes: int):
        self.directory, self.file_bytes = directory, file_bytes
        self.sums: dict[str, Sum] = {}  # of finished files
        self._files: dict[int, tuple[str, SummedFile]] = {}  # part → its open file
        self._counts: Counter[int] = Counter()  # part → number of its files
        self._closing = ThreadPoolExecutor(1)  # waits for the disk while the next file is written
        self._closed: list[Future[None]] = []
        self._metadata: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, name: str, tensor: Tensor, index: Index = (), counts: Index = (), part: int = 0) -> None:
        """Write a whole tensor; or layer (and expert) `index` of one whose first dimensions are `counts`."""
        offsets = torch.Size([*index, *[0] * tensor.dim()])
        size = torch.Size([*counts, *tensor.shape])
        tensor = tensor[(None,) * len(index)]
        file_name, file = self._file_of(part, tensor.nbytes)
        start = file.tell()
        torch.save(_on_cpu(tensor), file)  # type: ignore[arg-type]
        new = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, [])
        known = self._metadata.setdefault(name, new)
        known.chunks.append(ChunkStorageMetadata(offsets, tensor.shape))
        self._storage[MetadataIndex(name, offsets)] = _StorageInfo(file_name, start, file.tell() - start)

    def close(self) -> None:
        """Finish the files and write .metadata, without which there is no checkpoint."""
        for part in list(self._files):
            self._end_file(part)
        for closed in self._closed:
            closed.result()
        for known in self._metadata.values():
            known.chunks.sort(key=lambda chunk: tuple(chunk.offsets))
        torch.save({}, self.directory / "common.pt")
        metadata = Metadata(self._metadata, storage_data=self._storage)
        (self.directory / ".metadata").write_bytes(pickle.dumps(metadata))
        save_config(CheckpointingConfig("torch_dist", 1), str(self.directory))

    def _file_of(self, part: int, num_bytes: int) -> tuple[str, SummedFile]:
        """Return the part's file, a new one if the open one has no room for so many bytes."""
        if part in self._files and self._files[part][1].tell() + num_bytes > self.file_bytes:
            self._end_file(part)
        if part not in self._files:
            name = f"__{part}_{self._counts[part]}.distcp"
            self._counts[part] += 1
            self._files[part] = name, SummedFile(self.directory / name)
        return self._files[part]

    def _end_file(self, part: int) -> None:
        name, file = self._files.pop(part)
        self._closed.append(self._closing.submit(file.close))
        self.sums[name] = file.sum
