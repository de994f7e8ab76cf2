"""Hugging Face ↔ Megatron weights: one name table, read in both directions, for loading, exporting and weight
sync.

Every tensor of the model is named here once. `kind` says how Megatron shards and fuses it:
  whole  the same on every tensor rank          rows  split along dimension 0      columns  split along
  dimension 1 qkv    q, k, v interleaved by KV group, rows  pair  gate and up, each split along dimension 0,
  stacked
Experts are split among expert ranks, each has whole ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from dapo.model.layout import padded_vocab
from dapo.model.shape import ModelShape
from dapo.policy.cpu import has_transformer_engine

Kind = Literal["whole", "rows", "columns", "qkv", "pair"]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors it holds.

    `layer` and `expert` count over the whole model; None: outside the layers, of no expert. One name stands
    for all experts.
    """

    megatron: str
    hf: tuple[str, ...]
    kind: Kind
    layer: int | None = None
    stage: Literal["first", "last", "layer"] = "layer"
    expert: int | None = None

    @property
    def place(self) -> tuple[int, ...]:
        """Where the tensor lies in that of a checkpoint, whose first dimensions count layers and experts."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)


def table(shape: ModelShape, is_fused: bool) -> list[Entry]:
    """The whole model's entries, in the order of its layers. `megatron` names are relative to the layer for
    those inside one.

    `is_fused`: the linear after a norm holds it, as in Transformer Engine's layers, and in every checkpoint.
    """
    entries = [
        Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "rows", stage="first")
    ]
    for i in range(shape.num_layers):
        hf, attn, mlp = f"model.layers.{i}.", f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        input_norm = "self_attention.linear_qkv.layer_norm_weight" if is_fused else "input_layernorm.weight"
        mlp_norm = (
            "mlp.linear_fc1.layer_norm_weight"
            if is_fused and not shape.num_experts
            else "pre_mlp_layernorm.weight"
        )
        entries += [
            Entry(input_norm, (hf + "input_layernorm.weight",), "whole", i),
            Entry(
                "self_attention.linear_qkv.weight", tuple(f"{attn}{x}_proj.weight" for x in "qkv"), "qkv", i
            ),
            Entry("self_attention.linear_proj.weight", (attn + "o_proj.weight",), "columns", i),
            Entry(mlp_norm, (hf + "post_attention_layernorm.weight",), "whole", i),
        ]
        if shape.num_experts:
            entries.append(Entry("mlp.router.weight", (mlp + "gate.weight",), "whole", i))
        for expert in range(shape.num_experts) or [None]:
            here, part = (
                (mlp, "mlp.") if expert is None else (f"{mlp}experts.{expert}.", "mlp.experts.experts.")
            )
            gate_up, down = (here + "gate_proj.weight", here + "up_proj.weight"), (here + "down_proj.weight",)
            entries.append(Entry(part + "linear_fc1.weight", gate_up, "pair", i, expert=expert))
            entries.append(Entry(part + "linear_fc2.weight", down, "columns", i, expert=expert))
        if shape.has_qkv_bias:
            entries.append(
                Entry(
                    "self_attention.linear_qkv.bias", tuple(f"{attn}{x}_proj.bias" for x in "qkv"), "qkv", i
                )
            )
        if shape.has_qk_norm:
            entries.append(Entry("self_attention.q_layernorm.weight", (attn + "q_norm.weight",), "whole", i))
            entries.append(Entry("self_attention.k_layernorm.weight", (attn + "k_norm.weight",), "whole", i))
    entries.append(Entry("decoder.final_layernorm.weight", ("model.norm.weight",), "whole", stage="last"))
    if not shape.is_tied:
        entries.append(Entry("output_layer.weight", ("lm_head.weight",), "rows", stage="last"))
    return entries


def hf_shapes(entry: Entry, shape: ModelShape) -> list[tuple[int, ...]]:
    """Shapes of the entry's Hugging Face tensors."""
    h, q, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    ffn = shape.ffn_size if entry.expert is None else shape.expert_ffn_size
    if entry.kind == "qkv":
        return [(n,) if entry.megatron.endswith("bias") else (n, h) for n in (q, kv, kv)]
    if entry.kind == "pair":
        return [(ffn, h)] * 2
    if entry.kind == "rows":
        return [(shape.vocab_size, h)]
    if entry.kind == "columns":
        return [(h, q if "linear_proj" in entry.megatron else ffn)]
    if "router" in entry.megatron:
        return [(shape.num_experts, h)]
    return [
        (shape.head_dim,) if entry.megatron.endswith(("q_layernorm.weight", "k_layernorm.weight")) else (h,)
    ]


def to_shard(entry: Entry, tensors: list[Tensor], shape: ModelShape, rank: int, size: int) -> Tensor:
    """Hugging Face tensors → the shard of tensor rank `rank` of `size`."""
    if entry.kind == "whole":
        return tensors[0]
    if entry.kind == "rows":
        padding = padded_vocab(shape, size) - shape.vocab_size
        # by nothing it would copy all the same
        padded = torch.nn.functional.pad(tensors[0], (0, 0, 0, padding)) if padding else tensors[0]
        return padded.chunk(size)[rank]
    if entry.kind == "columns":
        return tensors[0].chunk(size, dim=1)[rank]
    if entry.kind == "pair":
        return torch.cat([t.chunk(size)[rank] for t in tensors])
    # Megatron keeps each KV group's q heads, k and v together
    grouped = [t.unflatten(0, (shape.num_kv_heads, -1)) for t in tensors]
    return torch.cat(grouped, dim=1).flatten(0, 1).chunk(size)[rank]


def from_shards(entry: Entry, shards: list[Tensor], shape: ModelShape) -> list[Tensor]:
    """All tensor ranks' shards → Hugging Face tensors: the inverse of `to_shard`."""
    if entry.kind == "whole":
        return [shards[0]]
    if entry.kind == "rows":
        return [_join(shards)[: shape.vocab_size]]
    if entry.kind == "columns":
        return [_join(shards, dim=1)]
    if entry.kind == "pair":
        return [_join(halves) for halves in zip(*(s.chunk(2) for s in shards), strict=True)]
    grouped = _join(shards).unflatten(0, (shape.num_kv_heads, -1))
    per_group = shape.num_heads // shape.num_kv_heads * shape.head_dim
    return [t.flatten(0, 1) for t in grouped.split([per_group, shape.head_dim, shape.head_dim], dim=1)]


def _join(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)  # of one, cat would make a copy


class StoredWeights(Protocol):
    """A model's weights in files: weight_files.py has one for each format."""

    def read(self, entry: Entry) -> list[Tensor]:
        """The entry's Hugging Face tensors, of the right shapes and finite. Raises ConfigError where they are
        not.
        """
        ...


class Weights:
    """The table against one rank's part of a model: which parameter each entry is here, if any.

    The part is one or more chunks of layers: chunk v of stage p is the whole model's chunk v · stages + p,
    and the first and last hold what is outside the layers. Parameters bear their chunk's number:
    "1.decoder.layers.0.…".
    """

    def __init__(self, chunks: Sequence[GPTModel], shape: ModelShape):
        self.shape, self.entries = shape, table(shape, is_fused=has_transformer_engine())
        self.params = {
            f"{i}.{name}": param for i, chunk in enumerate(chunks) for name, param in chunk.named_parameters()
        }
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
        """Which of the whole model's chunks holds it."""
        if entry.layer is None:
            return 0 if entry.stage == "first" else self.num_stages * self.num_chunks - 1
        return int(entry.layer // self.layers_per_chunk)

    def stage_of(self, entry: Entry) -> int:
        return int(self.chunk_of(entry) % self.num_stages)

    def local_name(self, entry: Entry) -> str | None:
        """The parameter's name in this rank's model, None if it lives on another pipeline stage or expert
        rank.
        """
        if self.stage_of(entry) != self.stage or self.expert_rank_of(entry) not in (None, self.expert_rank):
            return None
        layer = "" if entry.layer is None else f"decoder.layers.{entry.layer % self.layers_per_chunk}."
        name = f"{self.chunk_of(entry) // self.num_stages}.{layer}{entry.megatron}"
        if entry.expert is None:
            return name
        here = entry.expert % self.experts_per_rank
        if self.is_grouped:
            return f"{name.replace('.experts.experts.', '.experts.')}{here}"
        return name.replace(".experts.experts.", f".experts.local_experts.{here}.")

    def expert_rank_of(self, entry: Entry) -> int | None:
        return None if entry.expert is None else entry.expert // self.experts_per_rank

    def load(self, weights: StoredWeights) -> None:
        """Copy stored weights into the model, this rank's part of them.

        Raises:
            ConfigError: a tensor is of another shape, or not finite; nothing was left half-used.
        """
        seen = set()
        for entry in self.entries:
            name = self.local_name(entry)
            if name is not None:
                self._copy(entry, name, weights)
                seen.add(name)
        copy = f"{self.num_chunks - 1}.output_layer.weight"
        if self.shape.is_tied and copy in self.params:  # the last stage's own copy of the embedding
            self._copy(self.entries[0], copy, weights)
            seen.add(copy)
        assert seen == set(self.params), f"parameters outside the name table: {set(self.params) - seen}"

    def _copy(self, entry: Entry, name: str, weights: StoredWeights) -> None:
        with torch.no_grad():
            rank, size = (self.tensor_rank, self.tensor_size) if entry.expert is None else (0, 1)
            self.params[name].copy_(to_shard(entry, weights.read(entry), self.shape, rank, size))

    def export(
        self, read: Callable[[torch.nn.Parameter], Tensor] = lambda p: p.data
    ) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) of the whole model, on every rank, tensor by tensor. Collective:
        every rank drains it.
        """
        stages, owners = (
            dist.get_process_group_ranks(group) for group in (self.pipeline_group, self.expert_group)
        )
        for entry in self.entries:
            name = self.local_name(entry)
            if name is not None:
                shard = read(self.params[name]).contiguous()
                tensors = from_shards(
                    entry, self._gather(shard) if entry.expert is None else [shard.clone()], self.shape
                )
            else:
                like = read(next(iter(self.params.values())))
                tensors = [
                    torch.empty(size, dtype=like.dtype, device=like.device)
                    for size in hf_shapes(entry, self.shape)
                ]
            for hf_name, tensor in zip(entry.hf, tensors, strict=True):
                tensor = tensor.contiguous()
                if (
                    (owner := self.expert_rank_of(entry)) is not None
                    and len(owners) > 1
                    and self.stage_of(entry) == self.stage
                ):
                    dist.broadcast(tensor, owners[owner], group=self.expert_group)
                if self.num_stages > 1:
                    dist.broadcast(tensor, stages[self.stage_of(entry)], group=self.pipeline_group)
                yield hf_name, tensor

    def _gather(self, shard: Tensor) -> list[Tensor]:
        if self.tensor_size == 1:
            return [shard.clone()]  # who takes it may share its memory with a server: not the parameter's
        shards = [torch.empty_like(shard) for _ in range(self.tensor_size)]
        dist.all_gather(shards, shard, group=self.tensor_group)
        return shards
