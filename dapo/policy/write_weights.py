"""Writing a model's weights, as Hugging Face safetensors or as Megatron's distributed checkpoint.

Both are streamed: one tensor is held at a time, in each thread. What directories hold is in weight_files.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import sys
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
from dapo.model import file_names
from dapo.model.entries import Dimensions, Entry
from dapo.model.files import read_tensor
from dapo.model.names import table
from dapo.model.shape import ModelShape, read_config
from dapo.policy import chunks, megatron_lm
from dapo.policy.weight_files import (
    EXPORT,
    SAFETENSORS_DTYPE,
    TORCH_DTYPE,
    Kept,
    Named,
    dtype_name,
    hf_tensors,
)
from dapo.policy.weights import StoredWeights, to_shard

T = TypeVar("T")
SHARD_BYTES = 4 * 2**30  # size of a written file
NONE: Mapping[str, Any] = MappingProxyType({})
THREADS = 2  # with two, reading, checking, rearranging and writing take about as long as the disk


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
    kept: Kept = NONE,
) -> None:
    """Write a Hugging Face directory: the table's tensors in its order; config, tokenizer etc. from `source`;
    and, as they are, tensors that are no part of the language model: `kept`.

    `tensors`: all of them, in any order; a thread for each iterator, or this thread for a single one.
    `beside`: other files. The directory appears whole or not at all.

    Raises:
        ConfigError: `target` exists and may not be replaced, or the disk has no room.
    """
    if gone := sorted({str(path) for path, *_ in kept.values() if not path.is_file()}):
        why = f"{gone[0]} is gone, which had tensors beside the language model"
        print(f"warning: {target} is written without them: {why}", file=sys.stderr, flush=True)
        kept = {name: where for name, where in kept.items() if where[0].is_file()}
    wanted = {
        file_names.name_in_files(name, shape): (
            SAFETENSORS_DTYPE[torch.float32 if entry.is_buffer else dtype], dimensions
        )
        for entry in table(shape, is_fused=True)
        for name, dimensions in zip(entry.hf, entry.shapes, strict=True)
    }  # fmt: skip
    wanted |= {name: (code, dimensions) for name, (_, code, dimensions) in kept.items()}
    shards: list[dict[str, tuple[str, Dimensions]]] = [{}]
    room, total = shard_bytes, 0
    for name, (code, dimensions) in wanted.items():
        num_bytes = prod(dimensions) * _itemsize(code)
        if num_bytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = code, dimensions
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
        for name, (path, *_) in kept.items():
            written.pop(name).write(name, read_tensor(path, name))
        assert not written, f"not in `tensors`: {sorted(written)}"
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for name, content in beside.items():
            (partial / name).write_bytes(content)


def _itemsize(code: str) -> int:
    """Return the bytes of a value of a dtype, as safetensors calls it: BF16, I64, F8_E4M3, BOOL."""
    bits = re.search(r"\d+", code)
    return int(bits[0]) // 8 if bits else 1


class _Safetensors:
    """A safetensors file whose tensors are written in any order, from any thread.

    It has 8 bytes of the header's length, a JSON header, and the tensors end to end.
    """

    def __init__(self, path: Path, sizes: dict[str, tuple[str, Dimensions]]):
        self.sizes = sizes
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (code, dimensions) in sizes.items():
            start, end = end, end + prod(dimensions) * _itemsize(code)
            header[name] = {"dtype": code, "shape": dimensions, "data_offsets": [start, end]}
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
        found, (code, wanted) = tuple(tensor.shape), self.sizes[name]
        assert found == tuple(wanted), f"{name} {found} instead of {wanted}"
        dtype = TORCH_DTYPE.get(code, tensor.dtype)  # any other is as it was
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
    common = megatron_lm.common_state(shape) if for_megatron_lm else None
    total = sum(entry.size for entry in entries) * dtype.itemsize
    with files.made_whole(target, total) as partial:
        carry_over(source, partial, dtype)
        folder = partial / (megatron_lm.RELEASE if for_megatron_lm else "policy")
        writer = _write_chunks(weights, shape, dtype, folder, shard_bytes)
        if common:
            for name, index, counts in megatron_lm.extra_states(entries, shape):
                writer.write_object(name, megatron_lm.EMPTY, index, counts)
            writer.close(common)
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
            for key, section in zip(entry.keys, sections, strict=True):
                writer.write(key, section, entry.place, entry.counts(shape), number)

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
    parts = [config, *([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])]
    names = ["torch_dtype" if "torch_dtype" in part else "dtype" for part in parts]
    if any(part.get(name) != dtype_name(dtype) for part, name in zip(parts, names, strict=True)):
        for part, name in zip(parts, names, strict=True):
            part[name] = dtype_name(dtype)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
