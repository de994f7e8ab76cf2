"""The bytes that a rank holds while it learns, from the config alone: nothing is allocated and torch is not
loaded.

T = packed tokens of a microbatch on one of the context ranks, t = T/tp of them under sequence parallelism, H
= hidden size. Of one tensor
rank: q, kv = columns of all heads' queries and of all KV heads' keys, F = feed-forward columns, V =
vocabulary rows. b = bytes of the parameters' type. Tensor ranks do not split experts: each sends its own
tokens to the ranks that have them. Routing is taken as balanced.

Activations are what autograd keeps in dapo/policy/layers.py and in Megatron-core's local layers around it,
tensor by tensor; tests/dapo/plan/test_plan.py counts the same in a real backward pass. For Transformer
Engine's layers the list is read from its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Literal

from dapo.config import Config
from dapo.model.layout import padded_vocab
from dapo.model.passthrough import Passthrough
from dapo.model.shape import ModelShape

Backend = Literal["cpu", "cuda", "transformer_engine"]  # cpu, cuda: the plain layers

# of logits, as in dapo_kernels.linear_policy_loss
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2400 << 20, "transformer_engine": 2400 << 20}
# on a CPU, sequences of like length are padded to one: at most by a third, by an eighth on mixed lengths
ATTENTION_PADDING = 1.12
# a token of the step's batch: ids, targets, positions of 8 bytes, four numbers of 4, the mask, its staleness
BATCH_BYTES = 42

CHECKPOINT = "a checkpoint"

# fields of policy.megatron that change no memory worth counting
NEGLIGIBLE = {"adam_eps", "bucket_size", "overlap_grad_reduce", "attention_backend", "log_num_zeros_in_grad"}


def stage_parameters(shape: ModelShape, tensor: int, pipeline: int, stage: int) -> tuple[int, int]:
    """Parameters on a rank of a pipeline stage: (its shards of those that tensor ranks split, those that
    every tensor rank has whole).

    Without experts: `expert_parameters` counts them.
    """
    hidden, heads, kv = (
        shape.hidden_size,
        shape.num_heads * shape.head_dim,
        shape.num_kv_heads * shape.head_dim,
    )
    matrices = hidden * (heads + 2 * kv) + heads * hidden  # qkv, projection
    matrices += 0 if shape.num_experts else 3 * hidden * shape.ffn_size  # gate, up, down
    bias = heads + 2 * kv if shape.has_qkv_bias else 0
    norms = 2 * hidden + (2 * shape.head_dim if shape.has_qk_norm else 0)
    layers = shape.num_layers // pipeline
    is_first, is_last = stage == 0, stage == pipeline - 1
    # a tied head is the embedding itself where both are on one stage, else the last stage's own copy
    tables = is_first + (is_last and not (shape.is_tied and is_first))
    embedding = padded_vocab(shape, tensor) * hidden
    whole = norms + shape.num_experts * hidden  # the router
    return (layers * (matrices + bias) + tables * embedding) // tensor, layers * whole + (
        hidden if is_last else 0
    )


def expert_parameters(shape: ModelShape, pipeline: int, expert: int) -> int:
    """Of the experts that a rank has."""
    return (
        shape.num_layers
        // pipeline
        * shape.num_experts
        // expert
        * 3
        * shape.hidden_size
        * shape.expert_ffn_size
    )


def num_parameters(shape: ModelShape) -> int:
    """Of the whole model, as its authors count: no padding, a tied head once."""
    split, whole = stage_parameters(shape, 1, 1, 0)
    padding = (padded_vocab(shape, 1) - shape.vocab_size) * shape.hidden_size
    return split + whole + expert_parameters(shape, 1, 1) - padding * (1 if shape.is_tied else 2)


def active_parameters(shape: ModelShape) -> int:
    """Those that one token meets: of the experts, the ones that it is sent to."""
    idle = shape.num_experts - shape.experts_per_token
    return num_parameters(shape) - idle * shape.num_layers * 3 * shape.hidden_size * shape.expert_ffn_size


@dataclass(frozen=True)
class Layer:
    """What one token's forward pass through a layer leaves for the backward pass, in bytes, on one of the
    tensor ranks.
    """

    shape: ModelShape
    tensor: int
    value_bytes: int  # b
    backend: Backend
    context: int = 1

    @property
    def keys(self) -> float:
        """Keys that plain attention holds for a token of its own: with context ranks, of each sequence both
        chunks' whole past.
        """
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
        """The token's row of the residual stream, which tensor ranks share."""
        return self.value_bytes * self.shape.hidden_size / self.tensor

    @property
    def norm(self) -> float:
        """A norm of the residual stream."""
        return self._norm(self.shape.hidden_size, rows=1) / self.tensor

    def _norm(self, width: int, rows: int) -> int:
        """The input, in float32 in the plain norm; the inverse root; in the plain norm also what the weight
        multiplies.
        """
        b, is_plain = self.value_bytes, self.backend != "transformer_engine"
        return (4 + b if is_plain else b) * width + 4 * rows

    @property
    def mlp(self) -> float:
        """Of experts, too, without the norm's output."""
        if self.shape.num_experts:
            return self.experts
        return 5 * self.value_bytes * self.ffn  # gate and up, silu(gate), up + 0, their product

    @property
    def experts(self) -> float:
        shape, b = self.shape, self.value_bytes
        # as it is sent; gate and up, silu(gate), up + 0, their product, that weighed; its weight, and its
        # place before it was sent
        sent = b * (shape.hidden_size + 6 * shape.expert_ffn_size) + 4 + 8
        chosen = 8 if shape.is_expert_sum_one else 8 - 4  # which, and the softmax over them, or over all
        # a weight for each expert, whether it is chosen
        router = (5 if shape.is_expert_sum_one else 9) * shape.num_experts
        return (shape.experts_per_token * (sent + chosen + 4) + router) / self.tensor

    @property
    def core_attention(self) -> float:
        b, q, kv, heads = self.value_bytes, self.q, self.kv, self.q // self.shape.head_dim
        if self.backend == "transformer_engine":
            return b * (q + kv) + b * (q + 2 * kv) + 4 * heads  # v is a view of the fused q, k, v
        if self.backend == "cuda":
            # KV heads are repeated; the output is the projection's input
            return b * (1 + 2 * self.keys) * q + 4 * heads
        if self.context > 1:
            return self.keys * (b * (2 * q + 2 * kv) + 4 * heads)  # queries are padded to the keys' length
        # q, k, v, output; where each row belongs
        return ATTENTION_PADDING * (b * (2 * q + 2 * kv) + 4 * heads) + 8

    @property
    def core_attention_inputs(self) -> float:
        # q and k after RoPE; v is a view of the fused q, k, v
        return self.value_bytes * (2 * self.q + 3 * self.kv)

    @property
    def attention(self) -> float:
        b, q, kv, width = self.value_bytes, self.q, self.kv, self.shape.head_dim
        # the projection's input; cos and sin, for q and for k
        kept = b * q + 4 * b * width + self.core_attention
        if self.shape.has_qk_norm:
            kept += self._norm(q, q // width) + self._norm(kv, kv // width)
            # k in float32 is a view of the fused q, k, v, and keeps them all; so is q where there is one KV
            # head
            if b == 4:
                kept += b * (kv if kv == width else q + kv)
        return kept

    @property
    def everything(self) -> float:
        # norms, and the inputs of the linears after them
        return 2 * (self.norm + self.stream) + self.attention + self.mlp


@dataclass(frozen=True)
class Rank:
    """A rank of one pipeline stage. The properties are bytes, at the largest batch that the config allows."""

    config: Config
    shape: ModelShape
    backend: Backend
    data: int  # data-parallel ranks
    stage: int = 0

    @property
    def tensor(self) -> int:
        return self.config.parallel.tensor

    @property
    def pipeline(self) -> int:
        return self.config.parallel.pipeline

    @property
    def context(self) -> int:
        return self.config.parallel.context

    @property
    def chunks(self) -> int:
        """Of layers, on this stage."""
        return self.config.parallel.virtual_pipeline

    @property
    def is_last(self) -> bool:
        return self.stage == self.pipeline - 1

    @property
    def value_bytes(self) -> int:
        return 2 if self.config.policy.dtype == "bfloat16" else 4

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return self.config.data.max_prompt_length + self.config.rollout.max_response_length

    @property
    def tokens(self) -> int:
        """T."""
        multiple = self.config.parallel.pack_multiple
        return ceil(self.config.policy.tokens_per_microbatch / multiple) * multiple // self.context

    @property
    def microbatches(self) -> int:
        """Of an update, on each data-parallel rank, when every sample is as long as it may be."""
        samples = self.config.optim.prompts_per_minibatch * self.config.rollout.group_size
        multiple = self.config.parallel.sequence_multiple
        together = self.config.policy.tokens_per_microbatch // (ceil(self.longest / multiple) * multiple)
        turns = self.pipeline if self.chunks > 1 else 1
        return ceil(samples / (self.data * together * turns)) * turns

    @property
    def in_flight(self) -> int:
        """Microbatches whose activations are held together, in the 1F1B schedule; with several chunks, each
        microbatch of each chunk.
        """
        behind = self.pipeline - self.stage - 1
        return min(
            self.microbatches * self.chunks,
            2 * behind + (self.chunks - 1) * self.pipeline + 1 if self.chunks > 1 else behind + 1,
        )

    @property
    def parameters(self) -> int:
        return (
            sum(stage_parameters(self.shape, self.tensor, self.pipeline, self.stage)) + self.expert_parameters
        )

    @property
    def expert_parameters(self) -> int:
        return expert_parameters(self.shape, self.pipeline, self.config.parallel.expert)

    @property
    def expert_data(self) -> int:
        """Ranks that have the same experts, and share the optimizer's state of them."""
        return self.tensor * self.context * self.data // self.config.parallel.expert

    # What is there all the time

    @property
    def params(self) -> int:
        return self.value_bytes * self.parameters

    @property
    def grads(self) -> int:
        return 4 * self.parameters  # Megatron's main_grad: float32, whole on every data-parallel rank

    @property
    def optimizer(self) -> int:
        """Adam's two moments, and the float32 parameters where the model's are 16-bit."""
        if self.megatron.optimizer_cpu_offload:  # all of it in main memory, with a copy of the gradients
            return 16 * self._share if self.backend == "cpu" else 0
        return (8 if self.value_bytes == 4 else 12) * self._share

    @property
    def batch(self) -> int:
        samples = self.config.rollout.prompts_per_step * self.config.rollout.group_size
        return BATCH_BYTES * ceil(samples / self.data) * ceil(self.longest / self.context)

    @property
    def engine(self) -> int:
        """The embedded engine's own copy of the model, on the main rank."""
        is_here = self.config.engine.kind == "embedded" and self.stage == 0
        return self.value_bytes * num_parameters(self.shape) if is_here else 0

    # What comes and goes

    @property
    def layer(self) -> Layer:
        return Layer(self.shape, self.tensor, self.value_bytes, self.backend, self.context)

    @property
    def kept(self) -> int:
        """What one microbatch's forward pass leaves on this stage, or the last chunk of it, for its backward
        pass.
        """
        # the final norm and the hidden states; or what was sent on, which is held until its gradient comes
        return round(
            self._kept_by_layers
            + (self.layer.norm + self.layer.stream if self.is_last else self.layer.stream) * self.tokens
        )

    @property
    def _kept_by_layers(self) -> float:
        layer, layers = self.layer, self.shape.num_layers // (self.pipeline * self.chunks)
        if self.megatron.recomputes("full"):
            unit = min(self.megatron.recompute_num_layers or 1, layers)
            # the first layers, each for itself; uniform: all, `unit` at a time
            is_block = self.megatron.recompute_method == "block"
            kept = (
                unit * layer.stream + (layers - unit) * layer.everything
                if is_block
                else layers / unit * layer.stream
            )
        else:
            kept = layers * layer.everything
        if self._recomputes_mlp:
            kept -= layers * layer.mlp
        if self.megatron.recomputes("core_attn"):
            kept -= layers * (layer.core_attention - layer.core_attention_inputs)
        return kept * self.tokens

    @property
    def activations(self) -> int:
        """Of the chunks that are held together, one is the last."""
        return self.kept + round(
            (self.in_flight - 1) * (self._kept_by_layers + self.layer.stream * self.tokens)
        )

    @property
    def working(self) -> int:
        """One layer's backward pass beyond what was kept for it: what is recomputed, gradients on their
        way.
        """
        layer, b, hidden, T = self.layer, self.value_bytes, self.shape.hidden_size, self.tokens
        recomputed = 0.0
        if self.megatron.recomputes("full"):
            is_block = self.megatron.recompute_method == "block"
            recomputed = layer.everything * (1 if is_block else self.megatron.recompute_num_layers or 1)
        recomputed += layer.mlp if self._recomputes_mlp else 0
        recomputed += layer.core_attention if self.megatron.recomputes("core_attn") else 0
        gathered = b * T * hidden if self.tensor > 1 else 0  # the stream of all tensor ranks
        if self.shape.num_experts:
            return round(recomputed * T + self._experts_working + 2 * layer.stream * T + gathered)
        gated = 2 * b * T * layer.ffn  # the gradients of gate and up, while the product's own is there
        # through the last matrix, and that matrix's own gradient
        projected = b * T * layer.ffn + b * hidden * layer.ffn + 2 * gathered
        # gradients of keys and values, before they are sent to their ranks
        shared = layer.keys + self.context if self.context > 1 else 0
        keys = 2 * b * T * layer.kv * shared
        return round(recomputed * T + max(gated, projected, keys) + 2 * layer.stream * T + gathered)

    @property
    def _experts_working(self) -> int:
        """The same of experts: the gradients of what tokens were sent as and of what came back, of gate and
        up; gathered tokens.
        """
        shape, b, tokens = self.shape, self.value_bytes, self.tokens // self.tensor
        sent = tokens * shape.experts_per_token * b * (2 * shape.hidden_size + 2 * shape.expert_ffn_size)
        gathers = self.megatron.is_allgather
        return sent + (tokens * self.config.parallel.expert * (b + 4) * shape.hidden_size if gathers else 0)

    @property
    def table(self) -> int:
        """This rank's rows of the embedding, or of the head."""
        return self.value_bytes * self._vocab * self.shape.hidden_size

    @property
    def logits(self) -> int:
        """The fused loss at work: a chunk of logits, its gradient where that is of another type, the chunk's
        hidden states.
        """
        if not self.is_last:
            return 0
        b, hidden, columns = self.value_bytes, self.shape.hidden_size, self._vocab
        most = max(CHUNK_BYTES[self.backend] // (4 * columns), self.tensor)
        rows = ceil(self.tokens / ceil(self.tokens / most))  # chunks are of equal size
        chunk = rows * columns * (4 if b == 4 else 6)
        # two gathered chunks, the next one underway; the live rows, their gradient, what is sent of it
        if self.tensor > 1:
            chunk += 5 * b * rows * hidden
        if self.backend == "cpu" and b == 2:  # 16-bit factors are widened
            chunk += 4 * columns * (hidden + rows)
        return chunk

    @property
    def written_tensor(self) -> int:
        """In main memory while a checkpoint is written: a copy of one tensor in float32, for each lies in a
        buffer with others.
        """
        return 4 * self._largest

    @property
    def copied_state(self) -> int:
        """In main memory while a checkpoint is written in the background: this rank's share of parameters and
        optimizer state.
        """
        copied = 12 * self._share + self.value_bytes * self.parameters // (self.data * self.context)
        return copied if self.config.run.async_save else 0

    @property
    def main_memory(self) -> int:
        """What a checkpoint takes of a machine's main memory, beside whatever else is there."""
        return max(self.written_tensor, self.copied_state)

    @property
    def moments(self) -> dict[str, int]:
        """Each moment that can be the peak, and what is there beyond parameters, gradients, optimizer, batch
        and engine.
        """
        is_one_table = self.shape.is_tied and self.pipeline == 1  # for embedding and head
        # the head's gradient goes to main_grad; autograd wants one too and gets zeros, which a tied
        # embedding's gradient is added to
        zeros = self.table if is_one_table else 0
        moments = {"a layer's backward pass": self.activations + self.working + zeros}
        if self.is_last:
            moments["the loss"] = round(
                self.activations + self.layer.stream * self.tokens + max(self.logits, self.table)
            )
        if self.stage == 0:
            moments["the embedding's gradient"] = self.activations - self.kept + self.table + zeros
        # clipping writes each scaled gradient beside the old one; gloo, even among one, reduces a copy of all
        # gradients
        moments["the optimizer's step"] = (
            self.grads if self.backend == "cpu" else 4 * self._largest // (self.data * self.context)
        )
        if self.backend == "cpu":
            moments = {moment: held + self.copied_state for moment, held in moments.items()}
        return moments | {CHECKPOINT: self.main_memory if self.backend == "cpu" else 0}

    @property
    def peak(self) -> int:
        return self.at(self.peak_moment)

    def at(self, moment: str) -> int:
        """All that is held at one of the moments."""
        return self.params + self.grads + self.optimizer + self.batch + self.engine + self.moments[moment]

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def _share(self) -> int:
        """Parameters whose optimizer state is this rank's: data and context ranks share them; of experts, all
        ranks that have the same.
        """
        return (self.parameters - self.expert_parameters) // (
            self.data * self.context
        ) + self.expert_parameters // self.expert_data

    @property
    def _largest(self) -> int:
        """Numbers of the largest parameter: a table, or gate and up."""
        ffn = self.shape.expert_ffn_size if self.shape.num_experts else self.layer.ffn
        return max(self._vocab, 2 * ffn) * self.shape.hidden_size

    @property
    def _vocab(self) -> int:
        return padded_vocab(self.shape, self.tensor) // self.tensor

    @property
    def _recomputes_mlp(self) -> bool:
        return self.megatron.recomputes("moe" if self.shape.num_experts else "mlp")

    @cached_property
    def megatron(self) -> Passthrough:
        return Passthrough.of(self.config.policy.megatron)
