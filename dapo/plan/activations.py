"""Tensors that autograd keeps of a layer, in dapo/policy/layers.py and in Megatron-core's layers around it.

They are counted one by one; tests/distributed/test_memory.py counts the same in a real forward pass. For
Transformer Engine's layers, and for flash-linear-attention's kernels with them, the list is read from their
source. A DeltaNet's context ranks have all tokens of some heads: as much as some tokens of all heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dapo.model.families import FAMILIES
from dapo.model.shape import DeltaNet, LayerKind, ModelShape

Backend = Literal["cpu", "cuda", "transformer_engine"]  # cpu, cuda: the plain layers

# on a CPU, sequences of like length are padded to one: at most by a third, by an eighth on mixed lengths; and
# to a multiple of 16
ATTENTION_PADDING = 1.14
# tokens of a chunk of the delta rule: policy/delta_rule.py's, which would import torch, and fla's
DELTA_CHUNK = {"cpu": 32, "cuda": 32, "transformer_engine": 64}


@dataclass(frozen=True)
class Layer:
    """Bytes that one token's forward pass through a layer leaves for the backward pass, on a tensor rank.

    q, kv, ffn: numbers of columns of all heads' queries, of all KV heads' keys, of the feed-forward network.
    """

    shape: ModelShape
    kind: LayerKind
    tensor: int
    value_bytes: int  # b, of a value of the parameters' type
    backend: Backend
    length: float  # mean tokens of a sequence
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
        multiplied = 4 if self.shape.is_zero_centred else b
        return (b if self.backend == "transformer_engine" else 4 + multiplied) * width + 4 * rows

    @property
    def mlp(self) -> float:
        """Bytes of the feed-forward network or of the experts, without the norm's output."""
        return self._experts if self.kind.has_experts else self._gated(self.ffn)

    def _gated(self, columns: float) -> float:
        """Return the bytes of gate and up, silu(gate), up + 0; and of their product."""
        return (4 * self.value_bytes + self.saved_bytes) * columns

    @property
    def _experts(self) -> float:
        shape, b = self.shape, self.value_bytes
        # the token as it is sent; gate and up, silu(gate), up + 0, their product, the weighted product; its
        # weight, and its place before it was sent
        sent = 5 * b * shape.expert_ffn_size + 4 + 8
        sent += self.saved_bytes * (shape.hidden_size + shape.expert_ffn_size)
        chosen = 8 if shape.is_expert_sum_one else 8 - 4  # which ones, and the softmax over them, or over all
        # for each expert a weight, and whether it is chosen; all sigmoids, where it is no softmax
        is_over_all = not shape.is_expert_sum_one or shape.sigmoid_router
        router = (9 if is_over_all else 5) * shape.num_experts
        # the shared expert's output, which its gate multiplies
        gated = b * shape.hidden_size if shape.is_shared_gated else 0
        shared = self._gated(shape.shared_ffn_size / self.tensor)
        return (shape.experts_per_token * (sent + chosen + 4) + router + gated) / self.tensor + shared

    @property
    def core_attention(self) -> float:
        """Bytes of attention itself, without projections and norms. Of latent attention values are as wide as
        keys: Megatron pads them.
        """
        b, q, kv, heads = self.value_bytes, self.q, self.kv, self.q // self.shape.head_dim
        if self.backend == "transformer_engine":
            if self.shape.latent:
                return b * 3 * q + 4 * heads
            return b * (q + kv) + self._fused + 4 * heads  # v is a view of the fused q, k, v
        if self.backend == "cuda":
            # KV heads are repeated; the output is the projection's input
            return b * (1 + 2 * self.keys) * q + 4 * heads
        if self.context > 1:
            return self.keys * (b * (2 * q + 2 * kv) + 4 * heads)  # queries are padded to the keys' length
        return ATTENTION_PADDING * (b * (2 * q + 2 * kv) + 4 * heads)  # q, k, v, output

    @property
    def turns(self) -> int:
        """Bytes of cos and sin that rotate the token in all layers; the fused kernel's are a sequence's."""
        return 0 if self.backend == "transformer_engine" else 2 * self.value_bytes * self.shape.num_rotated

    @property
    def _fused(self) -> int:
        """Bytes of the projection of q, k and v, and of the output's gate."""
        return self.value_bytes * ((2 if self.shape.is_gated else 1) * self.q + 2 * self.kv)

    @property
    def core_attention_inputs(self) -> float:
        """Bytes of q, k and v. v is a view of the fused q, k, v; so is k, if it comes from no norm and, with
        Transformer Engine, from no RoPE.
        """
        if self.shape.latent:
            return self.value_bytes * 3 * self.q
        is_view = self.backend != "transformer_engine" and not FAMILIES[self.shape.model_type].has_qk_norm
        return self._fused + self.value_bytes * (self.q + (0 if is_view else self.kv))

    @property
    def mixer(self) -> float:
        """Bytes of attention, or of the DeltaNet in its place, without the norm before it."""
        if self.kind.is_delta:
            assert self.shape.delta
            return self._delta(self.shape.delta)
        return self._latent if self.shape.latent else self._attention

    @property
    def _attention(self) -> float:
        """Bytes of attention with its norms of q and k, and of its output's gate."""
        b, q, kv, width = self.value_bytes, self.q, self.kv, self.shape.head_dim
        kept = b * q + self.core_attention  # and the projection's input
        kept += (4 + b) * q if self.shape.is_gated else 0  # the gate's sigmoid, and what it multiplies
        if self.backend == "transformer_engine":
            kept += 4 * b * self.shape.num_rotated  # cos and sin, for q and for k
        if FAMILIES[self.shape.model_type].has_qk_norm:
            kept += self._norm(q, q // width) + self._norm(kv, kv // width)
            if b == 4:
                # k in float32 is a view of the fused q, k, v, and keeps them all; so is q with one KV head
                kept += self._fused - b * (kv + q if kv == width else kv)
        return kept

    @property
    def _latent(self) -> float:
        """Bytes of multi-head latent attention."""
        shape, latent, b = self.shape, self.shape.latent, self.value_bytes
        assert latent
        # both norms, and the inputs of the projections after them
        low = self._norm(latent.query_rank, 1) + self._norm(latent.kv_rank, 1)
        low += b * (latent.query_rank + latent.kv_rank)
        if b == 4:
            low += b * shape.num_rotated  # it is in one tensor with the input of the keys' and values' norm
        values = shape.num_heads * latent.value_dim // self.tensor  # the last projection's input
        is_other = self.backend != "cpu" and latent.value_dim != shape.head_dim  # cut off attention's output
        return low / self.tensor + self.core_attention + b * (values + (self.q if is_other else 0))

    def _delta(self, delta: DeltaNet) -> float:
        """Return the bytes of a Gated DeltaNet: projection, convolution, delta rule, gated norm."""
        b, k, v = self.value_bytes, delta.key_dim, delta.value_dim
        keys, values = delta.keys / self.tensor, delta.values / self.tensor
        heads, key_heads = delta.num_value_heads / self.tensor, delta.num_key_heads / self.tensor
        columns, chunk = 2 * keys + values, DELTA_CHUNK[self.backend]
        projected = b * (columns + values + 2 * heads)
        # the decay's two factors; β; inverse roots of keys and queries
        kept = (8 + b) * heads + 8 * key_heads
        # the output's norm, its gate in float32 and the gate's silu, their factors' product
        kept += (8 + 2 * b) * values + 4 * heads
        if self.backend == "transformer_engine":
            # fla keeps the convolution's input, normalised keys and queries, of the rule q, k, v and the
            # inverse matrix of a chunk; the norm its input
            kept += projected + 2 * b * keys + heads * (b * (2 * k + v + chunk) + 4) + b * values
        else:
            # the convolution's input, moved on by one token and another, and its sum
            kept += (projected if b == 4 else 4 * columns) + 4 * delta.conv_width * columns
            kept += 8 * keys  # the input of the norms of keys and queries
            # q, k, βk, q and k with their decays, and U's and W's columns; v, written; of a chunk's matrices
            # five; the state before a chunk; β and the decays
            rule = 6 * k + 3 * v + 5 * chunk + k * v / chunk + 3
            padding = 1 + (chunk - 1) / 2 / self.length  # sequences end with a chunk of their own
            kept += 4 * heads * rule * padding
            kept += (4 + b) * values
        if self.context > 1:
            kept += 2 * 8 * self.context  # places of the tokens of all ranks, and back
        return kept

    @property
    def delta_working(self) -> float:
        """Bytes that the delta rule's backward pass takes at its peak, beyond what was kept for it."""
        delta, chunk = self.shape.delta, DELTA_CHUNK[self.backend]
        assert delta
        k, v = delta.key_dim, delta.value_dim
        if self.backend == "transformer_engine":
            # what fla computes again, W, U, what is written and the states; and gradients of all these
            of_head = self.value_bytes * (5 * k + 4 * v + 2 * k * v / chunk)
        else:
            of_head = 4 * (2 * k + v + 12 * chunk)  # measured, for k and v of 64 and 128
        return delta.num_value_heads / self.tensor * of_head

    @property
    def everything(self) -> float:
        """Bytes of the whole layer: both norms, the inputs of the linears after them, mixer and MLP."""
        normed = self.saved_bytes * self.shape.hidden_size / self.tensor
        return 2 * (self.norm + normed) + self.mixer + self.mlp
