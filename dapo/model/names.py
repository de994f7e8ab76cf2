"""One table of a model's tensors: names and shapes in Hugging Face's files, names in Megatron. No torch.

`kind` says how Megatron shards and fuses a tensor:
  whole    the same on every tensor rank
  rows     split along dimension 0
  columns  split along dimension 1
  qkv      q, k, v interleaved by KV group, split along dimension 0
  pair     gate and up, each split along dimension 0, then stacked
Experts are split among expert ranks: each has whole ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from dapo.model.shape import ModelShape

Kind = Literal["whole", "rows", "columns", "qkv", "pair"]
Dimensions = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors in it.

    `megatron` is relative to its layer, and one name stands for all experts. `layer` and `expert` count over
    the whole model; None: outside the layers, of no expert.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Dimensions, ...]  # of Hugging Face's tensors
    kind: Kind
    layer: int | None = None
    stage: Literal["first", "last", "layer"] = "layer"  # pipeline stage
    expert: int | None = None

    @property
    def key(self) -> str:
        """Name of the tensor in a checkpoint, where one tensor holds all layers, and all their experts."""
        return self.megatron if self.layer is None else f"decoder.layers.{self.megatron}"

    @property
    def place(self) -> Dimensions:
        """Index of the tensor in that tensor, whose first dimensions count layers and experts."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)

    @property
    def is_split(self) -> bool:
        """True if tensor ranks split the tensor."""
        return self.kind != "whole" and self.expert is None

    @property
    def size(self) -> int:
        """Number of parameters, on all tensor ranks together, without padding."""
        return sum(map(prod, self.shapes))


def table(shape: ModelShape, is_fused: bool) -> list[Entry]:
    """Return the whole model's entries, layer by layer.

    `is_fused`: the linear after a norm holds it, as in Transformer Engine's layers and in every checkpoint.
    """
    vocab, norm = ((shape.vocab_size, shape.hidden_size),), ((shape.hidden_size,),)
    embedding, final_norm = ("model.embed_tokens.weight",), ("model.norm.weight",)
    entries = [Entry("embedding.word_embeddings.weight", embedding, vocab, "rows", stage="first")]
    for layer in range(shape.num_layers):
        entries += _layer(shape, layer, is_fused)
    entries.append(Entry("decoder.final_layernorm.weight", final_norm, norm, "whole", stage="last"))
    if not shape.is_tied:
        entries.append(Entry("output_layer.weight", ("lm_head.weight",), vocab, "rows", stage="last"))
    return entries


def _layer(shape: ModelShape, layer: int, is_fused: bool) -> list[Entry]:
    hidden, ffn = shape.hidden_size, shape.expert_ffn_size if shape.num_experts else shape.ffn_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    entries = []

    def add(megatron: str, kind: Kind, hf: Mapping[str, Dimensions], expert: int | None = None) -> None:
        names = tuple(f"model.layers.{layer}.{name}" for name in hf)
        entries.append(Entry(megatron, names, tuple(hf.values()), kind, layer, expert=expert))

    input_norm = "self_attention.linear_qkv.layer_norm_weight" if is_fused else "input_layernorm.weight"
    is_mlp_fused = is_fused and not shape.num_experts
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if is_mlp_fused else "pre_mlp_layernorm.weight"
    qkv = {f"self_attn.{x}_proj": rows for x, rows in (("q", q), ("k", kv), ("v", kv))}
    qkv_weights = {f"{name}.weight": (rows, hidden) for name, rows in qkv.items()}
    add(input_norm, "whole", {"input_layernorm.weight": (hidden,)})
    add("self_attention.linear_qkv.weight", "qkv", qkv_weights)
    add("self_attention.linear_proj.weight", "columns", {"self_attn.o_proj.weight": (hidden, q)})
    add(mlp_norm, "whole", {"post_attention_layernorm.weight": (hidden,)})
    if shape.num_experts:
        add("mlp.router.weight", "whole", {"mlp.gate.weight": (shape.num_experts, hidden)})
    for expert in range(shape.num_experts) or [None]:
        ours, hf = "mlp.", "mlp."
        if expert is not None:
            ours, hf = "mlp.experts.experts.", f"mlp.experts.{expert}."
        gate_up = {f"{hf}gate_proj.weight": (ffn, hidden), f"{hf}up_proj.weight": (ffn, hidden)}
        add(f"{ours}linear_fc1.weight", "pair", gate_up, expert)
        add(f"{ours}linear_fc2.weight", "columns", {f"{hf}down_proj.weight": (hidden, ffn)}, expert)
    if shape.has_qkv_bias:
        qkv_biases = {f"{name}.bias": (rows,) for name, rows in qkv.items()}
        add("self_attention.linear_qkv.bias", "qkv", qkv_biases)
    if shape.has_qk_norm:
        for x in ("q", "k"):
            norm = {f"self_attn.{x}_norm.weight": (shape.head_dim,)}
            add(f"self_attention.{x}_layernorm.weight", "whole", norm)
    return entries
