"""One table of names: every tensor of a model, as Hugging Face and as Megatron call it. No torch.

It is read in both directions: for loading, exporting, weight sync, and for counting parameters. `kind` says
how Megatron shards and fuses a tensor:
  whole    the same on every tensor rank
  rows     split along dimension 0
  columns  split along dimension 1
  qkv      q, k, v interleaved by KV group, split along dimension 0
  pair     gate and up, each split along dimension 0, then stacked
Experts are split among expert ranks: each has whole ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from dapo.model.shape import ModelShape

Kind = Literal["whole", "rows", "columns", "qkv", "pair"]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors in it.

    `megatron` is relative to its layer, and one name stands for all experts. `layer` and `expert` count over
    the whole model; None: outside the layers, of no expert.
    """

    megatron: str
    hf: tuple[str, ...]
    kind: Kind
    layer: int | None = None
    stage: Literal["first", "last", "layer"] = "layer"  # pipeline stage
    expert: int | None = None

    @property
    def key(self) -> str:
        """Name of the tensor in a checkpoint, where one tensor holds all layers, and all their experts."""
        return self.megatron if self.layer is None else f"decoder.layers.{self.megatron}"

    @property
    def place(self) -> tuple[int, ...]:
        """Index of the tensor in that tensor, whose first dimensions count layers and experts."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)


def table(shape: ModelShape, is_fused: bool) -> list[Entry]:
    """Return the whole model's entries, layer by layer.

    `is_fused`: the linear after a norm holds it, as in Transformer Engine's layers and in every checkpoint.
    """
    entries = [
        Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "rows", stage="first")
    ]
    for layer in range(shape.num_layers):
        entries += _layer(shape, layer, is_fused)
    entries.append(Entry("decoder.final_layernorm.weight", ("model.norm.weight",), "whole", stage="last"))
    if not shape.is_tied:
        entries.append(Entry("output_layer.weight", ("lm_head.weight",), "rows", stage="last"))
    return entries


def _layer(shape: ModelShape, layer: int, is_fused: bool) -> list[Entry]:
    entries = []

    def add(megatron: str, kind: Kind, *hf: str, expert: int | None = None) -> None:
        names = tuple(f"model.layers.{layer}.{name}" for name in hf)
        entries.append(Entry(megatron, names, kind, layer, expert=expert))

    input_norm = "self_attention.linear_qkv.layer_norm_weight" if is_fused else "input_layernorm.weight"
    is_mlp_fused = is_fused and not shape.num_experts
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if is_mlp_fused else "pre_mlp_layernorm.weight"
    add(input_norm, "whole", "input_layernorm.weight")
    add("self_attention.linear_qkv.weight", "qkv", *(f"self_attn.{x}_proj.weight" for x in "qkv"))
    add("self_attention.linear_proj.weight", "columns", "self_attn.o_proj.weight")
    add(mlp_norm, "whole", "post_attention_layernorm.weight")
    if shape.num_experts:
        add("mlp.router.weight", "whole", "mlp.gate.weight")
    for expert in range(shape.num_experts) or [None]:
        ours, hf = "mlp.", "mlp."
        if expert is not None:
            ours, hf = "mlp.experts.experts.", f"mlp.experts.{expert}."
        add(ours + "linear_fc1.weight", "pair", hf + "gate_proj.weight", hf + "up_proj.weight", expert=expert)
        add(ours + "linear_fc2.weight", "columns", hf + "down_proj.weight", expert=expert)
    if shape.has_qkv_bias:
        add("self_attention.linear_qkv.bias", "qkv", *(f"self_attn.{x}_proj.bias" for x in "qkv"))
    if shape.has_qk_norm:
        add("self_attention.q_layernorm.weight", "whole", "self_attn.q_norm.weight")
        add("self_attention.k_layernorm.weight", "whole", "self_attn.k_norm.weight")
    return entries


def hf_shapes(entry: Entry, shape: ModelShape) -> list[tuple[int, ...]]:
    """Return the shapes of the entry's Hugging Face tensors."""
    hidden, q, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    ffn = shape.ffn_size if entry.expert is None else shape.expert_ffn_size
    if entry.kind == "qkv":
        return [(n,) if entry.megatron.endswith("bias") else (n, hidden) for n in (q, kv, kv)]
    if entry.kind == "pair":
        return [(ffn, hidden)] * 2
    if entry.kind == "rows":
        return [(shape.vocab_size, hidden)]
    if entry.kind == "columns":
        return [(hidden, q if "linear_proj" in entry.megatron else ffn)]
    if "router" in entry.megatron:
        return [(shape.num_experts, hidden)]
    is_of_head = entry.megatron.endswith(("q_layernorm.weight", "k_layernorm.weight"))
    return [(shape.head_dim,) if is_of_head else (hidden,)]


def size(entry: Entry, shape: ModelShape) -> int:
    """Return the number of parameters of an entry, on all tensor ranks together, without padding."""
    return sum(prod(dimensions) for dimensions in hf_shapes(entry, shape))
