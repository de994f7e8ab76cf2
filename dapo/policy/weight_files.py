"""A model's weights in files, of either format: Hugging Face safetensors, and Megatron's distributed
checkpoint. Both are streamed.

Reading takes the name table's entries; writing holds one tensor at a time, in each thread. HF directory:
config.json, *.safetensors, tokenizer. Megatron directory: policy/ in torch_dist, manifest.json; one that
hf_to_megatron.py made has config.json and tokenizer too.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dapo import files
from dapo.config import ConfigError
from dapo.model.files import open_safetensors, read_dtypes, read_tensor
from dapo.model.shape import ModelShape
from dapo.policy import torch_dist
from dapo.policy.weights import Entry, StoredWeights, from_shards, hf_shapes, table, to_shard

T = TypeVar("T")
Named = Iterator[tuple[str, Tensor]]  # by their Hugging Face names
SHARD_BYTES = 4 * 2**30  # of a written file
THREADS = 2  # that convert: reading, checking, rearranging and writing take about as long as the disk
SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def open_weights(directory: Path, shape: ModelShape) -> HFWeights | MegatronWeights:
    """The weights of a directory, whichever format it holds.

    Raises:
        ConfigError: none there; or a tensor is missing or has no place in this architecture.
    """
    return (
        MegatronWeights(directory, shape) if (directory / "policy").is_dir() else HFWeights(directory, shape)
    )


class HFWeights:
    """*.safetensors, as the table's entries."""

    def __init__(self, directory: Path, shape: ModelShape):
        self.directory, self.shape, self._files = directory, shape, open_safetensors(directory)
        expected = {name for entry in table(shape, is_fused=True) for name in entry.hf}
        _check_names(
            directory, set(self._files), expected, allowed={"lm_head.weight"} if shape.is_tied else set()
        )
        self._files = {name: self._files[name] for name in expected}

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors. Raises ConfigError: they are of several."""
        known = {code: dtype for dtype, code in SAFETENSORS_DTYPE.items()}
        return _only_dtype(
            self.directory, {name: known.get(code, code) for name, code in read_dtypes(self._files).items()}
        )

    def read(self, entry: Entry) -> list[Tensor]:
        """See StoredWeights."""
        return _checked(
            self.directory, entry, [read_tensor(self._files[name], name) for name in entry.hf], self.shape
        )


class MegatronWeights:
    """A distributed checkpoint of any layout, as the table's entries. Optimizer state is not touched."""

    def __init__(self, directory: Path, shape: ModelShape):
        self.directory, self.shape = directory, shape
        check_model(directory, shape)
        # a pickle: damage in it could do anything; the tensors are verified as they are read
        name = "policy/.metadata"
        if damage := files.file_damage(
            directory, name, files.read_manifest(directory)["files"].get(name, (0, 0))
        ):
            raise ConfigError(f"{directory}: damaged: {damage}")
        self._reader = torch_dist.Reader(directory / "policy")
        self.optimizer_sizes = {
            name: size for name, size in self._reader.sizes.items() if name.startswith("optimizer.")
        }
        self.sizes = sizes = {
            name: size for name, size in self._reader.sizes.items() if name not in self.optimizer_sizes
        }
        self._entries = {entry.hf: entry for entry in table(shape, is_fused=True)}
        expected = {_key(entry): entry for entry in self._entries.values()}
        _check_names(directory, set(sizes), set(expected), allowed=set())
        for key, entry in expected.items():
            counts = _counts(entry, shape)
            size = list(sizes[key])[len(counts) :]
            wanted = _megatron_size(entry, shape)
            if entry.kind == "rows":  # padded for its layout
                wanted[0] = max(size[0], shape.vocab_size)
            if (*counts, *wanted) != (*sizes[key][: len(counts)], *size):
                raise ConfigError(
                    f"{directory}: tensor {key} has shape {sizes[key]}, the model's config.json means "
                    f"{(*counts, *wanted)}"
                )

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors. Raises ConfigError: they are of several."""
        return _only_dtype(self.directory, {name: self._reader.dtype(name) for name in self.sizes})

    def read(self, entry: Entry) -> list[Tensor]:
        """See StoredWeights."""
        entry = self._entries[entry.hf]  # under the name that checkpoints use
        tensors = from_shards(entry, [self._reader.read(_key(entry), entry.place)], self.shape)
        return _checked(self.directory, entry, tensors, self.shape)


def _key(entry: Entry) -> str:
    """The tensor's name in a checkpoint, where one tensor holds all layers, and all their experts."""
    return entry.megatron if entry.layer is None else f"decoder.layers.{entry.megatron}"


def _counts(entry: Entry, shape: ModelShape) -> tuple[int, ...]:
    """First dimensions of that tensor."""
    return (shape.num_layers, shape.num_experts)[: len(entry.place)]


def _megatron_size(entry: Entry, shape: ModelShape) -> list[int]:
    """Of the whole tensor that the entry's Hugging Face tensors make, one layer, without padding."""
    sizes = hf_shapes(entry, shape)
    return [sum(size[0] for size in sizes), *sizes[0][1:]]


def _checked(directory: Path, entry: Entry, tensors: list[Tensor], shape: ModelShape) -> list[Tensor]:
    for name, tensor, size in zip(entry.hf, tensors, hf_shapes(entry, shape), strict=True):
        if tuple(tensor.shape) != size:
            raise ConfigError(
                f"{directory}: tensor {name} has shape {tuple(tensor.shape)}, config.json means {size}"
            )
        # of NaN both are NaN; an eighth of isfinite's time
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ConfigError(f"{directory}: tensor {name} holds NaN or infinite values")
    return tensors


def _only_dtype(directory: Path, dtypes: dict[str, torch.dtype | str]) -> torch.dtype:
    """The one that every tensor has: in one that only some have, the others would be rounded without a
    word.
    """
    first = min(dtypes)
    dtype = dtypes[first]
    if other := min((name for name in dtypes if dtypes[name] != dtype), default=None):
        raise ConfigError(
            f"{directory}: tensor {first} is {_name(dtype)}, {other} is {_name(dtypes[other])}: choose one "
            "for all of them with --dtype"
        )
    if not isinstance(dtype, torch.dtype) or dtype not in SAFETENSORS_DTYPE:
        raise ConfigError(
            f"{directory}: the tensors are {_name(dtype)}: choose {', '.join(map(_name, SAFETENSORS_DTYPE))} "
            "with --dtype"
        )
    return dtype


def _check_names(directory: Path, found: set[str], expected: set[str], allowed: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected - allowed)
    if missing:
        raise ConfigError(
            f"{directory}: {len(missing)} tensors are missing, first {missing[0]}; config.json does not "
            "describe these weights"
        )
    if extra:
        raise ConfigError(
            f"{directory}: {len(extra)} tensors have no place in this architecture, first {extra[0]}"
        )


def check_model(directory: Path, shape: ModelShape) -> None:
    """Compare the model that a Megatron directory's manifest names with `shape`: rope and heads are not seen
    in tensors.

    Raises:
        ConfigError: they differ, with the fields that do; or there is no manifest.
    """
    try:
        there = files.read_manifest(directory)["model"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{directory}: no Megatron checkpoint is there: {files.MANIFEST}: {error}"
        ) from error
    here = json.loads(json.dumps(asdict(shape)))
    differences = [
        f"{name}={there[name]!r} there, {here[name]!r} here"
        for name in here
        if name in there and there[name] != here[name]
    ]
    if differences:
        raise ConfigError(f"{directory} is a checkpoint of another model: {'; '.join(differences)}")


def check_checkpoint(directory: Path, shape: ModelShape) -> None:
    """Is there what a run of this model goes on from, weights and optimizer, every tensor of the right shape?
    Reads none of them.

    Raises:
        ConfigError: it is of another model; a tensor is missing, of another shape, or has no place in this
            architecture.
    """
    weights = MegatronWeights(directory, shape)
    for part in ("param", "exp_avg", "exp_avg_sq"):
        for key, size in weights.sizes.items():
            name = f"optimizer.state.{part}.{key}"
            if name not in weights.optimizer_sizes:
                raise ConfigError(
                    f"{directory}: tensor {name} is missing: no run can go on from there; "
                    f"policy.model={directory} starts one"
                )
            if weights.optimizer_sizes[name] != size:
                raise ConfigError(
                    f"{directory}: tensor {name} has shape {weights.optimizer_sizes[name]}, the parameter "
                    f"has {size}"
                )


def shares(shape: ModelShape) -> list[list[Entry]]:
    """The table in THREADS parts of about the same size: whoever reads and writes in threads gives each one
    of them.
    """
    entries = table(shape, is_fused=True)
    sizes = [sum(prod(size) for size in hf_shapes(entry, shape)) for entry in entries]
    part, loads = [0] * len(entries), [0] * THREADS
    # the largest first: small ones fill what is left
    for i in sorted(range(len(entries)), key=lambda i: -sizes[i]):
        part[i] = loads.index(min(loads))
        loads[part[i]] += sizes[i]
    return [[entry for entry, where in zip(entries, part, strict=True) if where == i] for i in range(THREADS)]


def hf_tensors(
    weights: StoredWeights, shape: ModelShape, dtype: torch.dtype, entries: list[Entry] | None = None
) -> Named:
    """(Hugging Face name, tensor) of these entries; of all, in the table's order."""
    for entry in table(shape, is_fused=True) if entries is None else entries:
        for name, tensor in zip(entry.hf, weights.read(entry), strict=True):
            yield name, _cast(name, tensor, dtype)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Raises ConfigError: a value is beyond the dtype's range, and would become infinite without a word."""
    if tensor.dtype != dtype:
        largest = max(torch.aminmax(tensor), key=abs)
        if largest.to(dtype).isinf():
            raise ConfigError(
                f"tensor {name} holds {float(largest):.9g}, but {_name(dtype)} ends at "
                f"{torch.finfo(dtype).max:.9g}"
            )
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
) -> None:
    """Write a Hugging Face directory: the table's tensors in its order, and config, tokenizer and the like
    from `source`.

    `tensors`: all of them, in any order; each iterator is drained by a thread of its own, a single one by the
    caller's. It appears whole or not at all.

    Raises:
        ConfigError: `target` exists and may not be replaced, or the disk has no room.
    """
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for entry in table(shape, is_fused=True):
        for name, size in zip(entry.hf, hf_shapes(entry, shape), strict=True):
            num_bytes = prod(size) * dtype.itemsize
            if num_bytes > room and shards[-1]:
                shards.append({})
                room = shard_bytes
            shards[-1][name] = size
            room -= num_bytes
    total = sum(prod(size) for shard in shards for size in shard.values()) * dtype.itemsize
    with files.made_whole(target, total, may_replace) as partial, contextlib.ExitStack() as opened:
        carry_over(source, partial, dtype)
        written: dict[str, _Safetensors] = {}
        places: dict[str, str] = {}
        for i, shard in enumerate(shards):
            name = (
                f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
                if len(shards) > 1
                else "model.safetensors"
            )
            written |= dict.fromkeys(shard, opened.enter_context(_Safetensors(partial / name, shard, dtype)))
            places |= dict.fromkeys(shard, name)

        def drain(share: Named) -> None:
            for name, tensor in share:
                written.pop(name).write(name, tensor)

        _in_threads(drain, tensors)
        assert not written, f"never came: {sorted(written)}"
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


class _Safetensors:
    """A file of tensors that come in any order, from any thread: 8 bytes of the header's length, a JSON
    header, the tensors end to end.
    """

    def __init__(self, path: Path, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype):
        self.sizes, self.dtype = sizes, dtype
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in sizes.items():
            start, end = end, end + prod(size) * dtype.itemsize
            header[name] = {"dtype": SAFETENSORS_DTYPE[dtype], "shape": size, "data_offsets": [start, end]}
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
        assert tuple(tensor.shape) == self.sizes[name], (
            f"{name} {tuple(tensor.shape)} instead of {self.sizes[name]}"
        )
        data = tensor.detach().to("cpu", self.dtype).contiguous().view(-1).view(torch.uint8).numpy().data
        files.write_at(self._file, data, self._places[name])


def save_megatron(
    weights: StoredWeights,
    shape: ModelShape,
    dtype: torch.dtype,
    source: Path,
    target: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Megatron directory that any layout can load: no optimizer state, and config and tokenizer from
    `source`.

    It appears whole or not at all. Raises as `save_hf` does.
    """
    parts = shares(shape)
    total = sum(prod(_megatron_size(entry, shape)) for part in parts for entry in part) * dtype.itemsize
    with files.made_whole(target, total) as partial:
        carry_over(source, partial, dtype)
        (partial / "policy").mkdir()
        writer = torch_dist.Writer(partial / "policy", shard_bytes)

        def convert(share: Iterator[tuple[int, Entry]]) -> None:
            for part, entry in share:
                tensors = [
                    _cast(name, tensor, dtype)
                    for name, tensor in zip(entry.hf, weights.read(entry), strict=True)
                ]
                writer.write(
                    _key(entry),
                    to_shard(entry, tensors, shape, 0, 1),
                    entry.place,
                    _counts(entry, shape),
                    part,
                )

        _in_threads(convert, [zip(itertools.repeat(part), entries) for part, entries in enumerate(parts)])
        writer.close()
        files.write_manifest(
            partial, {f"policy/{name}": s for name, s in writer.sums.items()}, {"model": asdict(shape)}
        )


def _in_threads(work: Callable[[Iterator[T]], None], shares: Sequence[Iterator[T]]) -> None:
    """`work` on every share, each in a thread of its own; on a single one in this thread.

    When one fails, or the caller is interrupted, the others stop at their next item.
    """
    if len(shares) == 1:
        work(shares[0])
        return
    is_over = threading.Event()

    def until_over(share: Iterator[T]) -> Iterator[T]:
        return itertools.takewhile(lambda _: not is_over.is_set(), share)

    with ThreadPoolExecutor(len(shares)) as pool:
        working = [pool.submit(work, until_over(share)) for share in shares]
        try:
            wait(working, return_when=FIRST_EXCEPTION)
        finally:
            is_over.set()
        for each in working:
            each.result()


def carry_over(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy config.json, with the new dtype, and the tokenizer, generation config and the like."""
    for path in source.iterdir():
        is_ours = path.name == files.MANIFEST or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in {".json", ".txt", ".model", ".jinja"} and not is_ours:
            shutil.copy2(path, target / path.name)
    config = json.loads((target / "config.json").read_text())
    name = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(name) != _name(dtype):
        (target / "config.json").write_text(json.dumps(config | {name: _name(dtype)}, indent=2) + "\n")
