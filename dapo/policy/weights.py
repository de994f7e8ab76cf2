"""Loading and exporting one rank's part of a model: the name table, sharded over process groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from dapo.model.entries import Dimensions, Entry
from dapo.model.layout import padded_vocab
from dapo.model.names import table
from dapo.model.shape import ModelShape
from dapo.policy.cpu import has_transformer_engine


def to_shard(entry: Entry, tensors: list[Tensor], shape: ModelShape, rank: int, size: int) -> Tensor:
    """Return the shard of tensor rank `rank` of `size`, made of the entry's Hugging Face tensors."""
    if entry.kind == "whole":
        return tensors[0]
    if entry.kind == "columns":
        return tensors[0].chunk(size, dim=1)[rank]
    if entry.layer is None and (padding := padded_vocab(shape, size) - shape.vocab_size):
        tensors = [torch.nn.functional.pad(tensors[0], (0, 0, 0, padding))]
    return _join([section.chunk(size)[rank] for section in _sections(entry, tensors, shape)])


def from_shards(entry: Entry, shards: list[Tensor], shape: ModelShape) -> list[Tensor]:
    """Return the Hugging Face tensors made of all tensor ranks' shards: the inverse of `to_shard`."""
    if entry.kind == "whole":
        return [shards[0]]
    if entry.kind == "columns":
        return [_join(shards, dim=1)]
    if entry.layer is None:
        return [_join(shards)[: shape.vocab_size]]
    rows = [n // len(shards) for n in _section_rows(entry)]
    sections = [_join(parts) for parts in zip(*(shard.split(rows) for shard in shards), strict=True)]
    return _unsectioned(entry, sections, shape)


def _section_rows(entry: Entry) -> Sequence[int]:
    rows = entry.section_rows
    return rows if entry.kind in ("sections", "key_heads") else [sum(rows)]


def _sections(entry: Entry, tensors: list[Tensor], shape: ModelShape) -> list[Tensor]:
    """Return the whole tensors of which a rank has its shards one after another."""
    if entry.kind == "sections" and entry.sections:
        return list(_join(tensors).split(entry.sections))
    if entry.kind == "key_heads":
        return _regrouped(tensors, entry.section_rows, shape)
    if entry.kind in ("qkv", "gated_qkv"):  # Megatron keeps each KV group's q heads, k and v together
        grouped = [t.unflatten(0, (shape.num_kv_heads, -1)) for t in tensors]
        if entry.kind == "gated_qkv":  # query and gate, head by head → all queries, all gates
            by_head = grouped[0].unflatten(1, (-1, 2, shape.head_dim))
            grouped[0] = by_head.transpose(1, 2).flatten(1, 3)
        return [torch.cat(grouped, dim=1).flatten(0, 1)]
    return tensors


def _unsectioned(entry: Entry, sections: list[Tensor], shape: ModelShape) -> list[Tensor]:
    """Return the Hugging Face tensors: the inverse of `_sections`."""
    if entry.kind == "sections" and entry.sections:
        return list(_join(sections).split([rows for rows, *_ in entry.shapes]))
    if entry.kind == "key_heads":
        return _regrouped(sections, [rows for rows, *_ in entry.shapes], shape)
    if entry.kind in ("qkv", "gated_qkv"):
        rows = [n // shape.num_kv_heads for n, *_ in entry.shapes]
        grouped = list(sections[0].unflatten(0, (shape.num_kv_heads, -1)).split(rows, dim=1))
        if entry.kind == "gated_qkv":
            by_kind = grouped[0].unflatten(1, (2, -1, shape.head_dim))
            grouped[0] = by_kind.transpose(1, 2).flatten(1, 3)
        return [t.flatten(0, 1) for t in grouped]
    return sections


def _regrouped(tensors: list[Tensor], rows: Sequence[int], shape: ModelShape) -> list[Tensor]:
    """Cut the rows that each key head of a DeltaNet has in all tensors anew: into tensors of so many rows."""
    assert shape.delta
    heads = shape.delta.num_key_heads
    of_heads = torch.cat([tensor.unflatten(0, (heads, -1)) for tensor in tensors], dim=1)
    return [part.flatten(0, 1) for part in of_heads.split([n // heads for n in rows], dim=1)]


def _join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)  # cat would copy a single one


class StoredWeights(Protocol):
    """A model's weights in files; weight_files.py reads each format."""

    def read(self, entry: Entry) -> list[Tensor]:
        """Return the entry's Hugging Face tensors. Raise ConfigError on a wrong shape or value."""
        ...


class RandomWeights:
    """Weights that nobody has learnt, for measurements of a model of which only the sizes are there."""

    def __init__(self, dtype: torch.dtype):
        # of a prime length: each row of a matrix begins elsewhere. Drawing every value would take minutes
        drawn = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
        self._values = (0.02 * drawn).to(dtype)

    def read(self, entry: Entry) -> list[Tensor]:
        """See StoredWeights."""
        return [self._make(name, dimensions) for name, dimensions in zip(entry.hf, entry.shapes, strict=True)]

    def _make(self, name: str, dimensions: Dimensions) -> Tensor:
        if name.endswith("norm.weight"):
            return self._values.new_ones(dimensions)
        if name.endswith("e_score_correction_bias"):
            return self._values.new_zeros(dimensions, dtype=torch.float32)
        size = prod(dimensions)
        return self._values.repeat(-(-size // len(self._values)))[:size].view(dimensions)


class Weights:
    """The table with one rank's part of a model: which parameter each entry is here, if any.

    The part is one or more chunks of layers. Chunk v of stage p is the whole model's chunk v · stages + p;
    the first and the last one also have what is outside the layers. A parameter's name begins with the
    number of its chunk: "1.decoder.layers.0.…".
    """

    def __init__(self, chunks: Sequence[GPTModel], shape: ModelShape):
        self.shape = shape
        self.entries = table(shape, is_fused=has_transformer_engine())
        self.params: dict[str, Tensor] = {
            f"{i}.{name}": param for i, chunk in enumerate(chunks) for name, param in chunk.named_parameters()
        }
        self._learnt = set(self.params)
        buffers = [(i, name, b) for i, chunk in enumerate(chunks) for name, b in chunk.named_buffers()]
        self.params |= {f"{i}.{name}": buffer for i, name, buffer in buffers}
        self.num_chunks = len(chunks)
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self.tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.num_stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.layers_per_chunk = shape.num_layers // (self.num_stages * self.num_chunks)
        self.expert_group = parallel_state.get_expert_model_parallel_group()
        self.expert_rank = parallel_state.get_expert_model_parallel_rank()
        self.experts_per_rank = shape.num_experts // parallel_state.get_expert_model_parallel_world_size()
        self.is_grouped = bool(shape.num_experts) and chunks[0].config.moe_grouped_gemm

    def chunk_of(self, entry: Entry) -> int:
        """Return the number of the entry's chunk among the whole model's chunks."""
        if entry.layer is None:
            return 0 if entry.stage == "first" else self.num_stages * self.num_chunks - 1
        return int(entry.layer // self.layers_per_chunk)

    def stage_of(self, entry: Entry) -> int:
        return int(self.chunk_of(entry) % self.num_stages)

    def expert_rank_of(self, entry: Entry) -> int | None:
        return None if entry.expert is None else entry.expert // self.experts_per_rank

    def local_name(self, entry: Entry) -> str | None:
        """Return the parameter's name in this rank's model; None: another stage or expert rank has it."""
        if self.stage_of(entry) != self.stage or self.expert_rank_of(entry) not in (None, self.expert_rank):
            return None
        layer = "" if entry.layer is None else f"decoder.layers.{entry.layer % self.layers_per_chunk}."
        name = f"{self.chunk_of(entry) // self.num_stages}.{layer}{entry.megatron}"
        if entry.expert is None:
            return name
        local = entry.expert % self.experts_per_rank
        if self.is_grouped:
            return f"{name.replace('.experts.experts.', '.experts.')}{local}"
        return name.replace(".experts.experts.", f".experts.local_experts.{local}.")

    def load(self, weights: StoredWeights) -> None:
        """Copy this rank's part into the model. Raise ConfigError if a tensor's shape or value is wrong."""
        seen = set()
        for entry in self.entries:
            name = self.local_name(entry)
            if name is not None:
                self._copy(entry, name, weights)
                seen.add(name)
        head = f"{self.num_chunks - 1}.output_layer.weight"
        if self.shape.is_tied and head in self.params:  # the last stage's own copy of the embedding
            self._copy(self.entries[0], head, weights)
            seen.add(head)
        assert seen >= self._learnt, f"parameters outside the name table: {self._learnt - seen}"

    def _copy(self, entry: Entry, name: str, weights: StoredWeights) -> None:
        with torch.no_grad():
            rank, size = (self.tensor_rank, self.tensor_size) if entry.expert is None else (0, 1)
            self.params[name].copy_(to_shard(entry, weights.read(entry), self.shape, rank, size))

    def export(self, read: Callable[[Tensor], Tensor] = lambda p: p.data) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, full tensor) of the whole model, on every rank. Every rank drains it."""
        stages = dist.get_process_group_ranks(self.pipeline_group)
        expert_ranks = dist.get_process_group_ranks(self.expert_group)
        like = read(next(iter(self.params.values())))
        for entry in self.entries:
            name = self.local_name(entry)
            if name is not None:
                tensors = from_shards(entry, self._shards(entry, read(self.params[name])), self.shape)
            else:
                dtype = torch.float32 if entry.is_buffer else like.dtype
                tensors = [like.new_empty(dimensions, dtype=dtype) for dimensions in entry.shapes]
            expert_rank, stage = self.expert_rank_of(entry), self.stage_of(entry)
            for hf_name, tensor in zip(entry.hf, tensors, strict=True):
                tensor = tensor.contiguous()
                if expert_rank is not None and len(expert_ranks) > 1 and stage == self.stage:
                    dist.broadcast(tensor, expert_ranks[expert_rank], group=self.expert_group)
                if self.num_stages > 1:
                    dist.broadcast(tensor, stages[stage], group=self.pipeline_group)
                yield hf_name, tensor

    def broken(self) -> list[str]:
        """Return the Hugging Face names of this rank's parameters that hold NaN or infinite values.

        One name stands for those that Megatron keeps in one parameter.
        """
        here = {entry.hf[0]: self.params[name] for entry in self.entries if (name := self.local_name(entry))}
        # with a NaN both ends are NaN; takes an eighth of isfinite's time, and waits once for the device
        ends = [torch.stack(torch.aminmax(param.detach())).float() for param in here.values()]
        is_finite = torch.stack(ends).isfinite().all(1).tolist()
        return [name for name, is_good in zip(here, is_finite, strict=True) if not is_good]

    def _shards(self, entry: Entry, shard: Tensor) -> list[Tensor]:
        """Gather all tensor ranks' shards; an expert's only shard is the whole."""
        shard = shard.contiguous()
        if self.tensor_size == 1 or entry.expert is not None:
            # the receiver may share the tensor's memory with a server: it must not be the parameter's
            return [shard.clone()]
        shards = [torch.empty_like(shard) for _ in range(self.tensor_size)]
        dist.all_gather(shards, shard, group=self.tensor_group)
        return shards
