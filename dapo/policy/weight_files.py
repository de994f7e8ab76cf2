"""A model's weights in files, as Hugging Face safetensors or as Megatron's distributed checkpoint: reading.

They are read as the name table's entries, one at a time. A Hugging Face directory has config.json,
*.safetensors and a tokenizer. A Megatron directory has policy/ in torch_dist and manifest.json, and
Megatron-LM's what megatron_lm.py says; what hf_to_megatron.py made also has config.json and a tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from dapo import files
from dapo.config import ConfigError
from dapo.model import file_names
from dapo.model.entries import Dimensions, Entry
from dapo.model.files import EMBEDDING, HEAD, open_safetensors, read_headers, read_tensor, read_tied
from dapo.model.names import table
from dapo.model.shape import ModelShape
from dapo.policy import chunks, megatron_lm
from dapo.policy.weights import StoredWeights, from_shards

Kept = Mapping[str, tuple[Path, str, Dimensions]]  # file, dtype as safetensors calls it, shape, by name
Named = Iterator[tuple[str, Tensor]]  # with Hugging Face names
EXPORT = "export.json"  # of a directory that a run has exported: see exports.py
SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TORCH_DTYPE = {code: dtype for dtype, code in SAFETENSORS_DTYPE.items()}
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
        fused = {place.name: self._files[place.name] for place in self._places.values() if place.part}
        for name, (_, dimensions) in read_headers(fused).items():
            if dimensions[:1] != (shape.num_experts,):
                means = f"config.json means {shape.num_experts} experts"
                raise ConfigError(f"{directory}: tensor {name} has shape {dimensions}, {means}")
        self._learnt = {name for entry in entries for name in entry.hf if not entry.is_buffer}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors. Raise ConfigError if they are of several."""
        stored = {self._places[name].name for name in self._learnt}
        headers = read_headers({name: self._files[name] for name in stored}).items()
        return _only_dtype(self.directory, {name: TORCH_DTYPE.get(code, code) for name, (code, _) in headers})

    @property
    def left_out(self) -> str | None:
        """Tensors that are no part of the language model, in one line; None: there are none."""
        counts = [
            f"{len(names)} tensors of {owner}, first {min(names)}" for owner, names in self.aside.items()
        ]
        return f"{self.directory}: left out: {'; '.join(counts)}" if counts else None

    def check_shapes(self, shape: ModelShape) -> None:
        """Raise ConfigError if a tensor has another shape than config.json means. No tensor is read."""
        headers = read_headers(self._files)
        for entry in table(shape, is_fused=True):
            for name, wanted in zip(entry.hf, entry.shapes, strict=True):
                place = self._places[name]
                found = headers[place.name][1]
                if place.expert is not None:
                    rows = len(range(*slice(*place.rows).indices(found[1])))
                    found = (rows, *found[2:])
                if found != wanted:
                    raise ConfigError(_wrong_shape(self.directory, name, found, wanted))

    def kept(self) -> Kept:
        """Return file, dtype and shape of the tensors that are no part of the language model, by name."""
        files = {name: self._files[name] for owned in self.aside.values() for name in owned}
        return {name: (files[name], *header) for name, header in read_headers(files).items()}

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
            expected = ", ".join(map(dtype_name, DTYPES))
            raise ConfigError(
                f"{directory}: tensor {name} is {dtype_name(tensor.dtype)}; expected {expected}"
            )
        if (found := tuple(tensor.shape)) != wanted:
            raise ConfigError(_wrong_shape(directory, name, found, wanted))
        # with a NaN both are NaN; takes an eighth of isfinite's time
        if not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ConfigError(f"{directory}: tensor {name} holds NaN or infinite values")
    return tensors


def _wrong_shape(directory: Path, name: str, found: Dimensions, wanted: Dimensions) -> str:
    return f"{directory}: tensor {name} has shape {found}, config.json means {wanted}"


def _only_dtype(directory: Path, dtypes: dict[str, torch.dtype | str]) -> torch.dtype:
    """Return the dtype of every tensor. Raise ConfigError if there are several: some would be rounded."""
    first = min(dtypes)
    dtype = dtypes[first]
    if other := min((name for name in dtypes if dtypes[name] != dtype), default=None):
        both = f"tensor {first} is {dtype_name(dtype)}, {other} is {dtype_name(dtypes[other])}"
        raise ConfigError(f"{directory}: {both}: choose one for all of them with --dtype")
    if not isinstance(dtype, torch.dtype) or dtype not in SAFETENSORS_DTYPE:
        known = ", ".join(map(dtype_name, SAFETENSORS_DTYPE))
        raise ConfigError(f"{directory}: the tensors are {dtype_name(dtype)}: choose {known} with --dtype")
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
            raise ConfigError(f"tensor {name} holds {value:.9g}, but {dtype_name(dtype)} ends at {limit:.9g}")
    return tensor.to(dtype)


def dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
