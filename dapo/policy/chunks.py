"""The files of Megatron's distributed checkpoints (torch_dist), as a single process reads and writes them.

A directory holds *.distcp files (chunks of tensors end to end, each an archive of torch.save with its
CRC-32), .metadata (a pickle: the file and offset of each chunk) and metadata.json (the format's name). What
is no tensor is an object among the chunks, "common_state"; Megatron-core before 0.19, and our converter,
write common.pt. A pickle can run code when it is read: only the classes that the format needs are admitted.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import pickle
import struct
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from isal.isal_zlib import crc32
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dapo.config import ConfigError
from dapo.files import ChunkFile, Sum
from dapo.types import reason

Index = tuple[int, ...]
STATE = "optimizer.state."  # what begins the names of an optimizer's tensors
MAIN = STATE + "param."  # of a 16-bit parameter's float32 values
Ranges = list[tuple[int, int]]
MOST_THREADS = 4  # of a rank that write or read
# what zipfile raises where it finds no archive, or a strange one
UNREADABLE = (ValueError, RuntimeError, EOFError, struct.error, zipfile.BadZipFile, zlib.error)
BYTES_PER_THREAD = 64 * 2**20  # at least
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


def read_metadata(directory: Path) -> Metadata:
    """Read .metadata. Raise ConfigError if it is none, or holds a class that a checkpoint has no use for."""
    try:
        with open(directory / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
    except _NotAdmitted as error:
        raise ConfigError(no_use(directory / ".metadata", str(error))) from error
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


def no_use(path: Path, name: str) -> str:
    return f"{path} names {name}, which no checkpoint needs and could run code: use only your own checkpoints"


class Damaged(ConfigError):
    """A file of a checkpoint is not what was written, or is not there."""


class Box(NamedTuple):
    """A part of a tensor, and where to put it. First dimensions that `out` lacks have size 1 in it."""

    name: str
    offsets: Index
    out: Tensor


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
            Damaged: a file is missing, cut short or damaged.
        """
        depth = len(index)
        chunks = self._by_index(name, depth)[index]
        if len(chunks) == 1:
            return self._chunk(name, chunks[0])[(0,) * depth]
        whole = torch.empty(self.sizes[name][depth:], dtype=self.dtype(name))
        self.fill([Box(name, (*index, *[0] * whole.dim()), whole)])
        return whole

    def fill(self, boxes: list[Box]) -> None:
        """Read boxes in place, in several threads. A chunk is read once, however many boxes it is part of.

        What of a box lies beyond the saved tensor stays: vocabularies are padded for a layout.

        Raises:
            Damaged: a file is missing, cut short or damaged, or has not all of a box.
        """
        pieces: dict[tuple[str, Index], list[_Piece]] = {}  # by chunk
        for box in boxes:
            found = list(self._pieces(box))
            whole = self.sizes[box.name]
            inside = _overlap(box.offsets, _full_size(box), (0,) * len(whole), whole)
            wanted = prod(end - begin for begin, end in inside) if inside else 0
            if sum(piece.out.numel() for piece in found) != wanted:
                raise Damaged(f"{self.directory}: it has not all of {box.name}")
            for piece in found:
                pieces.setdefault((box.name, tuple(piece.chunk.offsets)), []).append(piece)
        in_order = sorted(pieces.items(), key=lambda item: self._place(*item[0]))
        num_bytes = sum(box.out.nbytes for box in boxes)
        memory = _Memory()
        with ThreadPoolExecutor(num_threads(num_bytes), thread_name_prefix="checkpoint") as threads:
            for done in [threads.submit(self._copy, name, parts, memory) for (name, _), parts in in_order]:
                done.result()

    def damaged_object(self) -> str | None:
        """Return what is wrong with what is no tensor, or None. It is small, and read as a whole."""
        for name, metadata in self._metadata.state_dict_metadata.items():
            if isinstance(metadata, TensorStorageMetadata):
                continue
            where = self._metadata.storage_data[MetadataIndex(name)]
            path = self.directory / where.relative_path
            try:
                with zipfile.ZipFile(io.BytesIO(self._object(where))) as entries:
                    is_damaged = entries.testzip() is not None
            except (*UNREADABLE, OSError):
                is_damaged = True
            if is_damaged:
                return f"{path} is not what was written: {name} cannot be read"
        return None

    def common_state(self) -> bytes | None:
        """Return the archive of torch.save that holds what is no tensor and of no rank; None: there is none.

        Raises:
            Damaged: its file is missing or cannot be read.
        """
        path = self.directory / "common.pt"
        where = self._metadata.storage_data.get(MetadataIndex("common_state/shard_0_1"))
        try:
            return path.read_bytes() if path.exists() else self._object(where) if where else None
        except OSError as error:
            raise Damaged(f"{self.directory}: what is no tensor cannot be read: {reason(error)}") from error

    def _object(self, where: _StorageInfo) -> bytes:
        with open(self.directory / where.relative_path, "rb") as file:
            file.seek(where.offset)
            return file.read(where.length)

    def damage(self) -> str | None:
        """Read everything. Return what is damaged, or None."""
        try:
            for name in self.sizes:
                for chunk in self._by_index(name, 0)[()]:
                    self._chunk(name, chunk)
        except Damaged as error:
            return str(error)
        return self.damaged_object()

    @functools.cache  # noqa: B019  # as long-lived as the process that converts
    def _by_index(self, name: str, depth: int) -> dict[Index, list[ChunkStorageMetadata]]:
        found: dict[Index, list[ChunkStorageMetadata]] = {}
        for chunk in self._metadata.state_dict_metadata[name].chunks:  # type: ignore[union-attr]
            found.setdefault(tuple(chunk.offsets[:depth]), []).append(chunk)
        return found

    @functools.cache  # noqa: B019
    def _depth(self, name: str) -> int:
        """Number of first dimensions that no chunk has more than 1 of."""
        largest = [max(sizes) for sizes in zip(*(c.sizes for c in self._by_index(name, 0)[()]), strict=True)]
        return next((i for i, size in enumerate(largest) if size > 1), len(largest))

    def _pieces(self, box: Box) -> Iterator[_Piece]:
        """Yield the parts of chunks that lie in a box."""
        size, depth = _full_size(box), self._depth(box.name)
        by_index, out = self._by_index(box.name, depth), box.out.view(size)
        firsts = zip(box.offsets[:depth], size[:depth], strict=True)
        for index in itertools.product(*(range(first, first + n) for first, n in firsts)):
            for chunk in by_index.get(index, []):
                if common := _overlap(box.offsets, size, chunk.offsets, chunk.sizes):
                    here, there = _within(common, chunk.offsets), _within(common, box.offsets)
                    yield _Piece(chunk, here, out[there])

    def _place(self, name: str, offsets: Index) -> tuple[str, int]:
        where = self._metadata.storage_data[MetadataIndex(name, torch.Size(offsets))]
        return where.relative_path, where.offset

    def _copy(self, name: str, pieces: list[_Piece], memory: _Memory) -> None:
        device = pieces[0].out.device
        if device.type == "cuda":  # a new thread would open a context on the first GPU
            torch.cuda.set_device(device)
        chunk = self._chunk(name, pieces[0].chunk, memory)
        for piece in pieces:
            piece.out.copy_(chunk[piece.source])

    def _chunk(self, name: str, chunk: ChunkStorageMetadata, memory: _Memory | None = None) -> Tensor:
        """Read a chunk; in a thread's `memory` it lasts until that thread reads the next one.

        torch.save's archive is not compressed; its CRC-32 is checked.
        """
        where = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        path = self.directory / where.relative_path
        try:
            data = _read(path, where.offset, where.length, memory)
            archive = _Archive(data)
            with zipfile.ZipFile(archive) as entries:  # type: ignore[arg-type]
                [entry] = [info for info in entries.infolist() if info.filename.endswith("/data/0")]
                with entries.open(entry):  # checks the entry's own header
                    header = archive.bytes_at(entry.header_offset, 30)
        except (*UNREADABLE, OSError) as error:
            cause = f"missing, cut short or damaged at {name}: {reason(error)}"
            raise Damaged(f"{path} is not what was written: {cause}") from error
        begin = entry.header_offset + 30
        begin += sum(struct.unpack("<HH", header[26:30]))  # lengths of the name and of the extra field
        if crc32(data[begin : begin + entry.file_size]) != entry.CRC:
            raise Damaged(f"{path} is not what was written: the checksum of {name} differs")
        dtype = self.dtype(name)
        count = entry.file_size // dtype.itemsize
        return torch.frombuffer(data, dtype=dtype, count=count, offset=begin).view(*chunk.sizes)


class _Memory(threading.local):
    """A thread's memory for chunks, one after another: new memory costs as much as reading."""

    data = np.empty(0, np.uint8)


def _read(path: Path, offset: int, length: int, memory: _Memory | None) -> memoryview:
    """Read a part of a file, into memory of its own or a thread's. Raise OSError or EOFError if that fails:
    with mapped memory it would end the process.
    """
    memory = memory or _Memory()
    if len(memory.data) < length:
        memory.data = np.empty(length, np.uint8)
    data = rest = memory.data[:length].data
    with open(path, "rb", buffering=0) as file:
        while rest:
            count = os.preadv(file.fileno(), [rest], offset + length - len(rest))
            if not count:
                raise EOFError(f"it ends {len(rest)} bytes too early")
            rest = rest[count:]
    return data


class _Piece(NamedTuple):
    """The part of a box that a chunk has, and where to put it."""

    chunk: ChunkStorageMetadata
    source: tuple[slice, ...]  # within the chunk
    out: Tensor


def _overlap(a: Sequence[int], a_size: Sequence[int], b: Sequence[int], b_size: Sequence[int]) -> Ranges:
    """Return what two boxes have in common, (begin, end) by dimension; [] if that is nothing."""
    found = [(max(x, y), min(x + m, y + n)) for x, m, y, n in zip(a, a_size, b, b_size, strict=True)]
    return found if all(begin < end for begin, end in found) else []


def _within(ranges: Ranges, offsets: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(begin - o, end - o) for (begin, end), o in zip(ranges, offsets, strict=True))


def _full_size(box: Box) -> Index:
    """Return the size of a box in all dimensions of its tensor."""
    return (*[1] * (len(box.offsets) - box.out.dim()), *box.out.shape)


class _Archive:
    """Memory as a file for zipfile, which copies what it reads and no more."""

    def __init__(self, data: memoryview):
        self.data = data
        self.offset = 0

    def bytes_at(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size])

    def read(self, size: int = -1) -> bytes:
        found = self.bytes_at(self.offset, len(self.data) if size < 0 else size)
        self.offset += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        self.offset = offset + (0, self.offset, len(self.data))[whence]
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
        self._files: dict[int, tuple[str, ChunkFile]] = {}  # part → its open file
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
        torch.save(on_cpu(tensor), file)  # type: ignore[arg-type]
        new = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, [])
        known = self._metadata.setdefault(name, new)
        known.chunks.append(ChunkStorageMetadata(offsets, tensor.shape))
        self._storage[MetadataIndex(name, offsets)] = _StorageInfo(file_name, start, file.tell() - start)

    def write_object(self, name: str, value: Any, index: Index, counts: Index) -> None:
        """Write object `index` of those that Megatron calls `name`: there are `counts` of them."""
        key = f"{name}/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, counts))}"
        file_name, file = self._file_of(0, 0)
        start = file.tell()
        torch.save([value], file)  # type: ignore[arg-type]
        self._metadata[key] = BytesStorageMetadata()
        self._storage[MetadataIndex(key)] = _StorageInfo(file_name, start, file.tell() - start)

    def close(self, common: dict[str, Any] | None = None) -> None:
        """Finish the files and write .metadata, without which there is no checkpoint.

        `common`: what is no tensor; all versions of Megatron-core read it from a file of its own.
        """
        for part in list(self._files):
            self._end_file(part)
        for closed in self._closed:
            closed.result()
        for known in self._metadata.values():
            if isinstance(known, TensorStorageMetadata):
                known.chunks.sort(key=lambda chunk: tuple(chunk.offsets))
        torch.save(common or {}, self.directory / "common.pt")
        metadata = Metadata(self._metadata, storage_data=self._storage)
        (self.directory / ".metadata").write_bytes(pickle.dumps(metadata))
        save_config(CheckpointingConfig("torch_dist", 1), str(self.directory))

    def _file_of(self, part: int, num_bytes: int) -> tuple[str, ChunkFile]:
        """Return the part's file, a new one if the open one has no room for so many bytes."""
        if part in self._files and self._files[part][1].tell() + num_bytes > self.file_bytes:
            self._end_file(part)
        if part not in self._files:
            name = f"__{part}_{self._counts[part]}.distcp"
            self._counts[part] += 1
            self._files[part] = name, ChunkFile(self.directory / name)
        return self._files[part]

    def _end_file(self, part: int) -> None:
        name, file = self._files.pop(part)
        self._closed.append(self._closing.submit(file.close))
        self.sums[name] = file.tell(), None


def num_threads(num_bytes: int) -> int:
    """Return how many threads of a rank write or read so much: few, if the machine has few cores for it."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MOST_THREADS, cores, num_bytes // BYTES_PER_THREAD))


def on_cpu(tensor: Tensor, copy: bool = False) -> Tensor:
    """Return the tensor in memory of its own: of a view torch.save would write the whole storage."""
    tensor = tensor.detach()
    is_view = tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous()
    if copy or is_view or not tensor.is_cpu:
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return tensor
