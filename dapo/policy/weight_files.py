"""A model's weights in files, as Hugging Face safetensors or as Megatron's distributed checkpoint.

Both are streamed: reading takes the name table's entries; writing holds one tensor at a time, in each thread.
A Hugging Face directory has config.json, *.safetensors and a tokenizer. A Megatron directory has policy/ in
torch_dist and manifest.json, and Megatron-LM's what megatron_lm.py says; those that hf_to_megatron.py made
also have config.json and a tokenizer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from dapo import files
from dapo.clock import heartbeat
from dapo.config import ConfigError
from dapo.model import file_names
from dapo.model.entries import Dimensions, Entry
from dapo.model.files import EMBEDDING, HEAD, open_safetensors, read_dtypes, read_tensor, read_tied
from dapo.model.names import table
from dapo.model.shape import ModelShape, read_config
from dapo.policy import chunks, megatron_lm
from dapo.policy.weights import StoredWeights, from_shards, to_shard

T = TypeVar("T")
Named = Iterator[tuple[str, Tensor]]  # with Hugging Face names
SHARD_BYTES = 4 * 2**30  # size of a written file
EXPORT = "export.json"  # of a directory that a run has exported: see exports.py
NONE: Mapping[str, bytes] = MappingProxyType({})
THREADS = 2  # with two, reading, checking, rearranging and writing take about as long as the disk
SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
OF_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")  # in a tensor's name
DTYPES = (*SAFETENSORS_DTYPE, torch.float64)  # that are read; others are quantized


def open_weights(directory: Path, shape: ModelShape) -> HFWeights | MegatronWeights:
    """Open the weights of a directory of either format.

    Raises:
        ConfigError: none there; or a tensor is missing or has no place in this architecture.
    """
    is_megatron = (directory / "policy").is_dir() or megatron_lm.find(directory) is not None
    return MegatronWeights(directory, shape) if is_megatron else HFWeights(directory, shape)


class HFWeights:
    """*.safetensors, read as the table's entries."""

    def __init__(self, directory: Path, shape: ModelShape):
        self.directory = directory
        self._files, self._is_tied = open_safetensors(directory), shape.is_tied
        self._places, self.aside = file_names.places(self._files, shape)
        entries = table(shape, is_fused=True)
        names = {name for entry in entries for name in entry.hf}
        _check_names(directory, set(self._places), names, {HEAD} if shape.is_tied else set())
        self._learnt = {name for entry in entries for name in entry.hf if not entry.is_buffer}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors. Raise ConfigError if they are of several."""
        known = {code: dtype for dtype, code in SAFETENSORS_DTYPE.items()}
        stored = {self._places[name].name for name in self._learnt}
        files = {name: self._files[name] for name in stored}
        dtypes = {name: known.get(code, code) for name, code in read_dtypes(files).items()}
        return _only_dtype(self.directory, dtypes)

    def read(self, entry: Entry) -> list[Tensor]:
        """See StoredWeights."""
        if self._is_tied and entry.hf == (EMBEDDING,):
            name = self._places[EMBEDDING].name
            return _checked(self.directory, entry, [read_tied(self.directory, self._files, name)])
        return _checked(self.directory, entry, [self._read(self._places[name]) for name in entry.hf])

    def _read(self, place: file_names.Place) -> Tensor:
        return read_tensor(self._files[place.name], place.name, place.part)


class MegatronWeights:
    """A distributed checkpoint of any layout, ours or Megatron-LM's, read as the table's entries.

    Optimizer state is not read.
    """

    def __init__(self, directory: Path, shape: ModelShape):
        self.directory, self.shape = directory, shape
        if folder := megatron_lm.find(directory):
            self._reader = chunks.Reader(folder)
            megatron_lm.check_arguments(self._reader, shape)
        else:
            self._reader = _our_reader(directory, shape)
        sizes = self._reader.sizes
        self.sizes = {name: sizes[name] for name in sizes if not OF_OPTIMIZER.match(name)}
        self.optimizer_sizes = {name: sizes[name] for name in sizes if name not in self.sizes}
        self._entries = {entry.hf: entry for entry in table(shape, is_fused=True)}
        expected = {key: entry for entry in self._entries.values() for key in entry.keys}
        _check_names(directory, set(self.sizes), set(expected), allowed=set())
        for key, entry in expected.items():
            found = self.sizes[key]
            rows, columns = entry.keys[key], entry.shapes[0][1:]
            if entry.kind == "rows" and entry.layer is None:  # padded for its layout
                rows = max(rows, found[0])
            if found != (wanted := (*entry.counts(shape), rows, *columns)):
                both = f"has shape {found}, the model's config.json means {wanted}"
                raise ConfigError(f"{directory}: tensor {key} {both}")
        self._buffers = {key for key, entry in expected.items() if entry.is_buffer}
        self.learnt_sizes = {key: size for key, size in self.sizes.items() if key not in self._buffers}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors. Raise ConfigError if they are of several."""
        return _only_dtype(self.directory, {name: self._reader.dtype(name) for name in self.learnt_sizes})

    def dtype_of(self, name: str) -> torch.dtype:
        return self._reader.dtype(name)

    def read(self, entry: Entry) -> list[Tensor]:
        """See StoredWeights."""
        entry = self._entries[entry.hf]  # with the name that checkpoints use
        parts = [self._reader.read(key, entry.place) for key in entry.keys]
        tensors = from_shards(entry, [parts[0] if len(parts) == 1 else torch.cat(parts)], self.shape)
        return _checked(self.directory, entry, tensors)


def _our_reader(directory: Path, shape: ModelShape) -> chunks.Reader:
    """Open a directory with a manifest. Raise ConfigError if it is damaged or of another model."""
    check_model(directory, shape)
    # the file is a pickle: damage in it could do anything; the tensors are verified as they are read
    name = "policy/.metadata"
    wanted = files.read_manifest(directory)["files"].get(name, (0, 0))
    if damage := files.file_damage(directory, name, wanted):
        raise ConfigError(f"{directory}: damaged: {damage}")
    return chunks.Reader(directory / "policy")


def _checked(directory: Path, entry: Entry, tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors. Raise ConfigError if a shape is not config.json's, a dtype is none of a model's
    weights, or a value is not finite.
    """
    for name, tensor, wanted in zip(entry.hf, tensors, entry.shapes, strict=True):
        if tensor.dtype not in DTYPES:
            expected = ", ".join(map(_name, DTYPES))
            raise ConfigError(f"{directory}: tensor {name} is {_name(tensor.dtype)}; expected {expected}")
        if (found := tuple(tensor.shape)) != wanted:
            raise ConfigError(f"{directory}: tensor {name} has shape {found}, config.json means {wanted}")
        # with a NaN both are NaN; takes an eighth of isfinite's time
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ConfigError(f"{directory}: tensor {name} holds NaN or infinite values")
    return tensors


def _only_dtype(directory: Path, dtypes: dict[str, torch.dtype | str]) -> torch.dtype:
    """Return the dtype of every tensor. Raise ConfigError if there are several: some would be rounded."""
    first = min(dtypes)
    dtype = dtypes[first]
    if other := min((name for name in dtypes if dtypes[name] != dtype), default=None):
        both = f"tensor {first} is {_name(dtype)}, {other} is {_name(dtypes[other])}"
        raise ConfigError(f"{directory}: {both}: choose one for all of them with --dtype")
    if not isinstance(dtype, torch.dtype) or dtype not in SAFETENSORS_DTYPE:
        known = ", ".join(map(_name, SAFETENSORS_DTYPE))
        raise ConfigError(f"{directory}: the tensors are {_name(dtype)}: choose {known} with --dtype")
    return dtype


def _check_names(directory: Path, found: set[str], expected: set[str], allowed: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected - allowed)
    if missing:
        first = f"{len(missing)} tensors are missing, first {missing[0]}"
        raise ConfigError(f"{directory}: {first}; config.json does not describe these weights")
    if extra:
        first = f"{len(extra)} tensors have no place in this architecture, first {extra[0]}"
        raise ConfigError(f"{directory}: {first}")


def check_model(directory: Path, shape: ModelShape) -> None:
    """Compare the model in a Megatron directory's manifest with `shape`: tensors do not show rope and heads.

    Raises:
        ConfigError: they differ, and in which fields; or there is no manifest.
    """
    try:
        there = files.read_manifest(directory)["model"]
    except (OSError, ValueError, KeyError) as error:
        message = f"{directory}: no Megatron checkpoint is there: {files.MANIFEST}: {error}"
        raise ConfigError(message) from error
    here = json.loads(json.dumps(asdict(shape)))
    differ = [name for name in here if name in there and there[name] != here[name]]
    if differ:
        both = "; ".join(f"{name}={there[name]!r} there, {here[name]!r} here" for name in differ)
        raise ConfigError(f"{directory} is a checkpoint of another model: {both}")


def check_checkpoint(directory: Path, shape: ModelShape) -> None:
    """Check by shapes that a run of this model can resume from a checkpoint's weights and optimizer.

    Raises:
        ConfigError: it is of another model; a tensor is missing, of another shape, or has no place in this
            architecture.
    """
    weights = MegatronWeights(directory, shape)
    for part in ("param", "exp_avg", "exp_avg_sq"):
        for key, wanted in weights.learnt_sizes.items():
            name = f"optimizer.state.{part}.{key}"
            found = weights.optimizer_sizes.get(name)
            if found is None and part == "param" and weights.dtype_of(key) == torch.float32:
                continue  # the parameter is its own main parameter
            if found is None:
                remedy = f"no run can resume from it; policy.model={directory} starts one"
                raise ConfigError(f"{directory}: tensor {name} is missing: {remedy}")
            if found != wanted:
                message = f"tensor {name} has shape {found}, the parameter has {wanted}"
                raise ConfigError(f"{directory}: {message}")


def parts(shape: ModelShape) -> list[list[Entry]]:
    """Return the table in THREADS parts of about the same size, one for each thread that reads and writes."""
    entries = table(shape, is_fused=True)
    found: list[list[int]] = [[] for _ in range(THREADS)]
    loads = [0] * THREADS
    # the largest first: small ones fill what is left
    for i in sorted(range(len(entries)), key=lambda i: -entries[i].size):
        least = loads.index(min(loads))
        found[least].append(i)
        loads[least] += entries[i].size
    return [[entries[i] for i in sorted(part)] for part in found]


def hf_tensors(
    weights: StoredWeights,
    shape: ModelShape,
    dtype: torch.dtype | None,
    entries: list[Entry] | None = None,
) -> Named:
    """Yield (Hugging Face name, tensor) of these entries; None: of all, in the table's order. `dtype` None:
    as stored.
    """
    for entry in table(shape, is_fused=True) if entries is None else entries:
        own = torch.float32 if entry.is_buffer else dtype
        for name, tensor in zip(entry.hf, weights.read(entry), strict=True):
            yield name, _cast(name, tensor, own) if own else tensor


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor. Raise ConfigError if a value is beyond the dtype's range, so would be infinite."""
    if tensor.dtype != dtype:
        largest, limit = max(torch.aminmax(tensor), key=abs), torch.finfo(dtype).max
        if largest.to(dtype).isinf():
            value = float(largest)
            raise ConfigError(f"tensor {name} holds {value:.9g}, but {_name(dtype)} ends at {limit:.9g}")
    return tensor.to(dtype)


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def save_hf(
    tensors: Sequence[Named],
    shape: ModelShape,
    dtype: torch.dtype,
    source: Path,
    target: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    may_replace: bool = False,
    beside: Mapping[str, bytes] = NONE,
) -> None:
    """Write a Hugging Face directory: the table's tensors in its order; config, tokenizer etc. from `source`.

    `tensors`: all of them, in any order; a thread for each iterator, or this thread for a single one.
    `beside`: other files. The directory appears whole or not at all.

    Raises:
        ConfigError: `target` exists and may not be replaced, or the disk has no room.
    """
    shards: list[dict[str, tuple[torch.dtype, Dimensions]]] = [{}]
    room, total = shard_bytes, 0
    for entry in table(shape, is_fused=True):
        own = torch.float32 if entry.is_buffer else dtype
        for name, dimensions in zip(entry.hf, entry.shapes, strict=True):
            num_bytes = prod(dimensions) * own.itemsize
            if num_bytes > room and shards[-1]:
                shards.append({})
                room = shard_bytes
            shards[-1][file_names.name_in_files(name, shape)] = own, dimensions
            room -= num_bytes
            total += num_bytes
    with files.made_whole(target, total, may_replace) as partial, contextlib.ExitStack() as opened:
        carry_over(source, partial, dtype)
        written: dict[str, _Safetensors] = {}
        places: dict[str, str] = {}
        for i, shard in enumerate(shards):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            written |= dict.fromkeys(shard, opened.enter_context(_Safetensors(partial / name, shard)))
            places |= dict.fromkeys(shard, name)

        def write(part: Named) -> None:
            for name, tensor in part:
                name = file_names.name_in_files(name, shape)
                written.pop(name).write(name, tensor)
                heartbeat()

        _in_threads(write, tensors)
        assert not written, f"not in `tensors`: {sorted(written)}"
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for name, content in beside.items():
            (partial / name).write_bytes(content)


class _Safetensors:
    """A safetensors file whose tensors are written in any order, from any thread.

    It has 8 bytes of the header's length, a JSON header, and the tensors end to end.
    """

    def __init__(self, path: Path, sizes: dict[str, tuple[torch.dtype, Dimensions]]):
        self.sizes = sizes
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, dimensions) in sizes.items():
            start, end = end, end + prod(dimensions) * dtype.itemsize
            offsets = [start, end]
            header[name] = {"dtype": SAFETENSORS_DTYPE[dtype], "shape": dimensions, "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  # until close
        begin = self._file.write(len(text).to_bytes(8, "little") + text)
        self._places = {name: begin + header[name]["data_offsets"][0] for name in sizes}

    def __enter__(self) -> _Safetensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        found, (dtype, wanted) = tuple(tensor.shape), self.sizes[name]
        assert found == wanted, f"{name} {found} instead of {wanted}"
        data = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy().data
        files.write_at(self._file, data, self._places[name])


def save_megatron(
    weights: StoredWeights,
    shape: ModelShape,
    dtype: torch.dtype,
    source: Path,
    target: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    for_megatron_lm: bool = False,
) -> None:
    """Write a Megatron directory that any layout can load: weights, and config etc. from `source`.

    `for_megatron_lm`: as Megatron-LM wants it. It appears whole or not at all.

    Raises:
        ConfigError: as `save_hf`.
    """
    entries = table(shape, is_fused=True)
    total = sum(entry.size for entry in entries) * dtype.itemsize
    with files.made_whole(target, total) as partial:
        carry_over(source, partial, dtype)
        folder = partial / (megatron_lm.RELEASE if for_megatron_lm else "policy")
        writer = _write_chunks(weights, shape, dtype, folder, shard_bytes)
        if for_megatron_lm:
            for name, index, counts in megatron_lm.extra_states(entries, shape):
                writer.write_object(name, megatron_lm.EMPTY, index, counts)
            writer.close(megatron_lm.common_state(shape))
            (partial / megatron_lm.TRACKER).write_text(megatron_lm.RELEASE)
        else:
            writer.close()
            sums = {f"policy/{name}": size for name, size in writer.sums.items()}
            files.write_manifest(partial, sums, {"model": asdict(shape)})


def _write_chunks(
    weights: StoredWeights, shape: ModelShape, dtype: torch.dtype, directory: Path, shard_bytes: int
) -> chunks.Writer:
    """Write all tensors into a new directory. Return the writer, which is to be closed."""
    directory.mkdir()
    writer = chunks.Writer(directory, shard_bytes)

    def convert(part: Iterator[tuple[int, Entry]]) -> None:
        for number, entry in part:
            tensors = [tensor for _, tensor in hf_tensors(weights, shape, dtype, [entry])]
            whole = to_shard(entry, tensors, shape, 0, 1)
            sections = whole.split(entry.sections) if entry.section_names else [whole]
            for key, part in zip(entry.keys, sections, strict=True):
                writer.write(key, part, entry.place, entry.counts(shape), number)

    _in_threads(convert, [zip(itertools.repeat(i), part) for i, part in enumerate(parts(shape))])
    return writer


def _in_threads(work: Callable[[Iterator[T]], None], parts: Sequence[Iterator[T]]) -> None:
    """Call `work` with every part, in a thread for each; with a single one in this thread.

    When one fails, or the caller is interrupted, the others stop at their next item.
    """
    if len(parts) == 1:
        work(parts[0])
        return
    is_over = threading.Event()

    def until_over(part: Iterator[T]) -> Iterator[T]:
        return itertools.takewhile(lambda _: not is_over.is_set(), part)

    with ThreadPoolExecutor(len(parts)) as pool:
        working = [pool.submit(work, until_over(part)) for part in parts]
        try:
            wait(working, return_when=FIRST_EXCEPTION)
        finally:
            is_over.set()
        for each in working:
            each.result()


def carry_over(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy config.json, with the new dtype, and the tokenizer, generation config and the like."""
    for path in source.iterdir():
        is_ours = path.name in (files.MANIFEST, EXPORT) or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in {".json", ".txt", ".model", ".jinja"} and not is_ours:
            shutil.copy2(path, target / path.name)
    config = read_config(target)
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(name) != _name(dtype):
        (target / "config.json").write_text(json.dumps(config | {name: _name(dtype)}, indent=2) + "\n")
