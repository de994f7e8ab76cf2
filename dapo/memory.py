"""The bytes that a rank holds while it learns, from the config alone: nothing is allocated and torch is not loaded.

T = packed tokens of a microbatch, t = T/tp of them under sequence parallelism, H = hidden size. Of one tensor rank: q, kv = columns of
all heads' queries and of all KV heads' keys, F = feed-forward columns, V = vocabulary rows. b = bytes of the parameters' type.

Activations are what autograd keeps in dapo/policy/layers.py and in Megatron-core's local layers around it, tensor by tensor;
tests/dapo/test_plan.py counts the same in a real backward pass. For Transformer Engine's layers the list is read from its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any, Literal

from dapo.config import Config
from dapo.shape import ModelShape, padded_vocab

Backend = Literal["cpu", "cuda", "transformer_engine"]  # cpu, cuda: the plain layers

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2400 << 20, "transformer_engine": 2400 << 20}  # of logits, as in dapo_kernels.linear_policy_loss
ATTENTION_PADDING = 1.12  # on a CPU, sequences of like length are padded to one: at most by a third, by an eighth on mixed lengths
BATCH_BYTES = 41  # a token of the step's batch: ids, targets, positions of 8 bytes, four numbers of 4, the mask

# fields of policy.megatron that change what is counted here, and those that change no memory worth counting
COUNTED = {
    "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules", "optimizer_cpu_offload",
    "optimizer_offload_fraction",
}  # fmt: skip
NEGLIGIBLE = {"adam_eps", "bucket_size", "overlap_grad_reduce", "overlap_param_gather", "attention_backend", "log_num_zeros_in_grad"}


def stage_parameters(shape: ModelShape, tensor: int, pipeline: int, stage: int) -> tuple[int, int]:
    """Parameters on a rank of a pipeline stage: (its shards of those that tensor ranks split, those that every tensor rank has whole)."""
    hidden, heads, kv = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    matrices = hidden * (heads + 2 * kv) + heads * hidden + 3 * hidden * shape.ffn_size  # qkv, projection; gate, up, down
    bias = heads + 2 * kv if shape.has_qkv_bias else 0
    norms = 2 * hidden + (2 * shape.head_dim if shape.has_qk_norm else 0)
    layers = shape.num_layers // pipeline
    is_first, is_last = stage == 0, stage == pipeline - 1
    # a tied head is the embedding itself where both are on one stage, else the last stage's own copy
    tables = is_first + (is_last and not (shape.is_tied and is_first))
    embedding = padded_vocab(shape, tensor) * hidden
    return (layers * (matrices + bias) + tables * embedding) // tensor, layers * norms + (hidden if is_last else 0)


def num_parameters(shape: ModelShape) -> int:
    """Of the whole model, as its authors count: no padding, a tied head once."""
    split, whole = stage_parameters(shape, 1, 1, 0)
    padding = (padded_vocab(shape, 1) - shape.vocab_size) * shape.hidden_size
    return split + whole - padding * (1 if shape.is_tied else 2)


@dataclass(frozen=True)
class Rank:
    """A rank of one pipeline stage. The properties are bytes, at the largest batch that the config allows."""

    config: Config
    shape: ModelShape
    backend: Backend
    data: int  # data-parallel ranks
    stage: int = 0

    @property
    def pipeline(self) -> int:
        return self.config.parallel.pipeline

    @property
    def is_last(self) -> bool:
        return self.stage == self.pipeline - 1

    @property
    def holds_tied_table(self) -> bool:
        """One table is embedding and head at once."""
        return self.shape.is_tied and self.pipeline == 1

    @property
    def value_bytes(self) -> int:
        return 2 if self.config.policy.dtype == "bfloat16" else 4

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return self.config.data.max_prompt_length + self.config.rollout.max_response_length

    @property
    def microbatches(self) -> int:
        """Of an update, on each data-parallel rank, when every sample is as long as it may be."""
        samples = self.config.optim.prompts_per_minibatch * self.config.rollout.group_size
        return ceil(samples / (self.data * (self.config.policy.tokens_per_microbatch // self.longest)))

    @property
    def in_flight(self) -> int:
        """Microbatches whose activations are held together, in the 1F1B schedule."""
        return min(self.microbatches, self.pipeline - self.stage)

    @cached_property
    def parameters(self) -> int:
        return sum(stage_parameters(self.shape, self.config.parallel.tensor, self.pipeline, self.stage))

    @property
    def params(self) -> int:
        return self.value_bytes * self.parameters

    @property
    def grads(self) -> int:
        return 4 * self.parameters  # Megatron's main_grad: float32, whole on every data-parallel rank

    @property
    def optimizer(self) -> int:
        """Adam's two moments, and the float32 parameters where the model's are 16-bit; each data-parallel rank holds its share."""
        kept = (8 if self.value_bytes == 4 else 12) * self.parameters // self.data
        options = self.config.policy.megatron
        return round(kept * (1 - options.get("optimizer_offload_fraction", 0.0))) if options.get("optimizer_cpu_offload") else kept

    @property
    def batch(self) -> int:
        samples = self.config.rollout.prompts_per_step * self.config.rollout.group_size
        return BATCH_BYTES * ceil(samples / self.data) * self.longest

    @property
    def engine(self) -> int:
        """The embedded engine's own copy of the model, on the main rank."""
        is_here = self.config.engine.kind == "embedded" and self.stage == 0
        return self.value_bytes * num_parameters(self.shape) if is_here else 0

    @property
    def activations(self) -> int:
        return self.in_flight * self._kept

    @property
    def logits(self) -> int:
        """The fused loss at work: a chunk of logits, its gradient where that is of another type, the chunk's hidden states."""
        if not self.is_last:
            return 0
        b, hidden, columns = self.value_bytes, self.shape.hidden_size, self._vocab
        rows = max(CHUNK_BYTES[self.backend] // (4 * columns), self.config.parallel.tensor)
        rows = ceil(self._tokens / ceil(self._tokens / rows))  # chunks are of equal size
        chunk = rows * columns * (4 if b == 4 else 6)
        if self._slices > 1:  # two gathered chunks, the next one underway; the live rows, their gradient, what is sent of it
            chunk += 5 * b * rows * hidden
        if self.backend == "cpu" and b == 2:  # 16-bit factors are widened
            chunk += 4 * columns * (hidden + rows)
        return chunk

    @property
    def working(self) -> int:
        """One layer's backward pass beyond what it was kept for: recomputed activations, gradients on their way."""
        b, hidden, ffn = self.value_bytes, self.shape.hidden_size, self._ffn
        recomputed, layer = 0, self._tokens * self._layer_bytes
        if self._recompute == "full":
            recomputed = layer * (self._recomputed_layers if self._option("recompute_method") == "uniform" else 1)
        if self._recompute == "selective":
            recomputed = self._tokens * self._recomputed_bytes
        gathered = b * self._tokens * hidden if self._slices > 1 else 0
        gated = 2 * b * self._tokens * ffn  # the gradients of gate and up, while the product's own is there
        projected = b * self._tokens * ffn + b * hidden * ffn + 2 * gathered  # through the last matrix, and that matrix's gradient
        return recomputed + max(gated, projected) + 2 * b * self._tokens * hidden // self._slices + gathered

    @property
    def moments(self) -> dict[str, int]:
        """What is there beyond parameters, gradients, optimizer, batch and engine, at each moment that can be the peak."""
        b, kept = self.value_bytes, self._kept
        table = b * self._vocab * self.shape.hidden_size
        moments = {"a layer's backward pass": self.activations + self.working + (table if self.holds_tied_table else 0)}
        if self.is_last:
            hidden_grad = b * self._tokens * self.shape.hidden_size // self._slices
            # the head's gradient goes to main_grad; autograd wants one too, and gets zeros
            moments["the loss"] = self.activations + hidden_grad + max(self.logits, table)
        if self.stage == 0:
            moments["the embedding's gradient"] = self.activations - kept + table * (2 if self.holds_tied_table else 1)
        # clipping writes each scaled gradient beside the old one; gloo sums a copy of all gradients
        largest = max(self._vocab, 2 * self._ffn) * self.shape.hidden_size
        summed = self.grads if self.backend == "cpu" and self.data > 1 else 0
        moments["the optimizer's step"] = max(4 * largest // self.data, summed)
        return moments

    @property
    def peak(self) -> int:
        return self.params + self.grads + self.optimizer + self.batch + self.engine + max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=self.moments.__getitem__)

    # What one microbatch leaves behind

    @property
    def _tokens(self) -> int:
        tensor = self.config.parallel.tensor
        return ceil(self.config.policy.tokens_per_microbatch / tensor) * tensor

    @property
    def _slices(self) -> int:
        """How many ranks share the tokens of the residual stream."""
        return self.config.parallel.tensor

    @property
    def _vocab(self) -> int:
        return padded_vocab(self.shape, self.config.parallel.tensor) // self.config.parallel.tensor

    @property
    def _ffn(self) -> int:
        return self.shape.ffn_size // self.config.parallel.tensor

    def _option(self, name: str) -> Any:
        return self.config.policy.megatron.get(name)

    @property
    def _recompute(self) -> str | None:
        return self._option("recompute_granularity")  # type: ignore[no-any-return]

    @property
    def _recomputed_layers(self) -> int:
        return min(self._option("recompute_num_layers") or 1, self.shape.num_layers // self.pipeline)

    @property
    def _recomputed_modules(self) -> set[str]:
        return set(self._option("recompute_modules") or ["core_attn"]) if self._recompute == "selective" else set()

    @property
    def _kept(self) -> int:
        """Bytes that one microbatch's forward pass leaves for its backward pass on this stage."""
        b, hidden, layers = self.value_bytes, self.shape.hidden_size, self.shape.num_layers // self.pipeline
        stream = b * hidden / self._slices  # the residual stream, a token
        layer = self._layer_bytes - self._recomputed_bytes
        if self._recompute == "full" and self._option("recompute_method") == "uniform":
            kept = ceil(layers / self._recomputed_layers) * stream
        elif self._recompute == "full":
            kept = self._recomputed_layers * stream + (layers - self._recomputed_layers) * layer
        else:
            kept = layers * layer
        if self.is_last:
            kept += self._norm_bytes + stream  # the final norm and the hidden states
        else:
            kept += stream  # what was sent on is held until its gradient comes
        return round(kept * self._tokens)

    @property
    def _norm_bytes(self) -> float:
        """A norm's input in float32 and what it is multiplied with; a token of the residual stream."""
        return self._norm(self.shape.hidden_size, rows=1) / self._slices

    def _norm(self, width: int, rows: int) -> int:
        if self.backend == "transformer_engine":
            return self.value_bytes * width + 4 * rows
        return (4 + self.value_bytes) * width + 4 * rows

    @property
    def _layer_bytes(self) -> float:
        """A token of one layer, nothing recomputed: two norms and the inputs of the linears after them, attention, the gated unit."""
        b = self.value_bytes
        stream = 2 * (self._norm_bytes + b * self.shape.hidden_size / self._slices)
        return stream + self._attention_bytes + self._mlp_bytes

    @property
    def _mlp_bytes(self) -> int:
        return 5 * self.value_bytes * self._ffn  # gate and up, silu(gate), up + 0, their product

    @property
    def _columns(self) -> tuple[int, int]:
        """(q, kv) of this rank."""
        tensor, width = self.config.parallel.tensor, self.shape.head_dim
        return self.shape.num_heads * width // tensor, self.shape.num_kv_heads * width // tensor

    @property
    def _attention_bytes(self) -> float:
        b, (q, kv) = self.value_bytes, self._columns
        heads, kv_heads = q // self.shape.head_dim, kv // self.shape.head_dim
        kept = b * q + 4 * b * self.shape.head_dim + self._core_attention_bytes  # the projection's input; cos and sin for q and for k
        if self.shape.has_qk_norm:
            kept += self._norm(q, heads) + self._norm(kv, kv_heads)
            if b == 4:  # k in float32 is a view of the fused q, k, v, and keeps them all; so is q where there is one KV head
                kept += b * (kv if kv_heads == 1 else q + kv)
        return kept

    @property
    def _core_attention_bytes(self) -> float:
        b, (q, kv) = self.value_bytes, self._columns
        heads = q // self.shape.head_dim
        if self.backend == "transformer_engine":
            return b * (q + kv) + b * (q + 2 * kv) + 4 * heads  # v is a view of the fused q, k, v
        if self.backend == "cuda":
            return b * 3 * q + 4 * heads  # KV heads are repeated; the output is the projection's input
        return ATTENTION_PADDING * (b * (2 * q + 2 * kv) + 4 * heads) + 8  # q, k, v, output; where each row belongs

    @property
    def _recomputed_bytes(self) -> float:
        """What selective recompute saves of a layer, a token."""
        b, (q, kv), modules = self.value_bytes, self._columns, self._recomputed_modules
        saved = 0.0
        if "core_attn" in modules:
            saved += self._core_attention_bytes - b * (q + kv) - b * (q + 2 * kv)  # its inputs; v is a view of the fused q, k, v
        if "mlp" in modules:
            saved += self._mlp_bytes
        if "layernorm" in modules and self.backend != "transformer_engine":  # there the norm is part of the linear after it
            saved += 2 * self._norm_bytes  # and the linears' inputs, but the norms' inputs are kept for them
        return saved
