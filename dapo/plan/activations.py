"""Tensors that autograd keeps of a layer, in dapo/policy/layers.py and in Megatron-core's layers around it.

They are counted one by one; tests/distributed/test_memory.py counts the same in a real forward pass. For
Transformer Engine's layers the list is read from its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dapo.model.families import FAMILIES
from dapo.model.shape import ModelShape

Backend = Literal["cpu", "cuda", "transformer_engine"]  # cpu, cuda: the plain layers

# on a CPU, sequences of like length are padded to one: at most by a third, by an eighth on mixed lengths; and
# to a multiple of 16
ATTENTION_PADDING = 1.14


@dataclass(frozen=True)
class Layer:
    """Bytes that one token's forward pass through a layer leaves for the backward pass, on a tensor rank.

    q, kv, ffn: numbers of columns of all heads' queries, of all KV heads' keys, of the feed-forward network.
    """

    shape: ModelShape
    tensor: int
    value_bytes: int  # b, of a value of the parameters' type
    backend: Backend
    context: int = 1
    is_fp8: bool = False

    @property
    def saved_bytes(self) -> int:
        """Bytes of a value that a linear keeps of its own input; attention's output is kept as it is."""
        return 1 if self.is_fp8 else self.value_bytes

    @property
    def keys(self) -> float:
        """Number of keys that plain attention holds for each token: with context ranks, both chunks' past."""
        return self.context + 0.5 if self.context > 1 else 1

    @property
    def q(self) -> int:
        return self.shape.num_heads * self.shape.head_dim // self.tensor

    @property
    def kv(self) -> int:
        return self.shape.num_kv_heads * self.shape.head_dim // self.tensor

    @property
    def ffn(self) -> int:
        return self.shape.ffn_size // self.tensor

    @property
    def stream(self) -> float:
        """Bytes of the token's row of the residual stream, which tensor ranks share."""
        return self.value_bytes * self.shape.hidden_size / self.tensor

    @property
    def norm(self) -> float:
        """Bytes of a norm of the residual stream."""
        return self._norm(self.shape.hidden_size, rows=1) / self.tensor

    def _norm(self, width: int, rows: int) -> int:
        """Return the bytes of the input and the inverse root."""
        b = self.value_bytes
        # the plain norm keeps the input in float32, and also what the weight multiplies
        return (b if self.backend == "transformer_engine" else 4 + b) * width + 4 * rows

    @property
    def mlp(self) -> float:
        """Bytes of the feed-forward network or of the experts, without the norm's output."""
        if self.shape.num_experts:
            return self._experts
        # gate and up, silu(gate), up + 0; their product
        return (4 * self.value_bytes + self.saved_bytes) * self.ffn

    @property
    def _experts(self) -> float:
        shape, b = self.shape, self.value_bytes
        # the token as it is sent; gate and up, silu(gate), up + 0, their product, the weighted product; its
        # weight, and its place before it was sent
        sent = 5 * b * shape.expert_ffn_size + 4 + 8
        sent += self.saved_bytes * (shape.hidden_size + shape.expert_ffn_size)
        chosen = 8 if shape.is_expert_sum_one else 8 - 4  # which ones, and the softmax over them, or over all
        # for each expert a weight, and whether it is chosen
        router = (5 if shape.is_expert_sum_one else 9) * shape.num_experts
        return (shape.experts_per_token * (sent + chosen + 4) + router) / self.tensor

    @property
    def core_attention(self) -> float:
        """Bytes of attention itself, without projections and norms."""
        b, q, kv, heads = self.value_bytes, self.q, self.kv, self.q // self.shape.head_dim
        if self.backend == "transformer_engine":
            return b * (q + kv) + b * (q + 2 * kv) + 4 * heads  # v is a view of the fused q, k, v
        if self.backend == "cuda":
            # KV heads are repeated; the output is the projection's input
            return b * (1 + 2 * self.keys) * q + 4 * heads
        if self.context > 1:
            return self.keys * (b * (2 * q + 2 * kv) + 4 * heads)  # queries are padded to the keys' length
        return ATTENTION_PADDING * (b * (2 * q + 2 * kv) + 4 * heads)  # q, k, v, output

    @property
    def turns(self) -> int:
        """Bytes of cos and sin that rotate the token in all layers; the fused kernel's are a sequence's."""
        return 0 if self.backend == "transformer_engine" else 2 * self.value_bytes * self.shape.head_dim

    @property
    def core_attention_inputs(self) -> float:
        """Bytes of q, k and v. v is a view of the fused q, k, v; so is k, if it comes from no norm and, with
        Transformer Engine, from no RoPE.
        """
        is_view = self.backend != "transformer_engine" and not FAMILIES[self.shape.model_type].has_qk_norm
        return self.value_bytes * (2 * self.q + (2 if is_view else 3) * self.kv)

    @property
    def attention(self) -> float:
        """Bytes of attention with its norms of q and k, without the norm before it."""
        b, q, kv, width = self.value_bytes, self.q, self.kv, self.shape.head_dim
        kept = b * q + self.core_attention  # and the projection's input
        if self.backend == "transformer_engine":
            kept += 4 * b * width  # cos and sin, for q and for k
        if FAMILIES[self.shape.model_type].has_qk_norm:
            kept += self._norm(q, q // width) + self._norm(kv, kv // width)
            if b == 4:
                # k in float32 is a view of the fused q, k, v, and keeps them all; so is q with one KV head
                kept += b * (kv if kv == width else q + kv)
        return kept

    @property
    def everything(self) -> float:
        """Bytes of the whole layer: both norms, the inputs of the linears after them, attention and MLP."""
        normed = self.saved_bytes * self.shape.hidden_size / self.tensor
        return 2 * (self.norm + normed) + self.attention + self.mlp
