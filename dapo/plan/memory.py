"""The bytes that a rank holds while it learns, from the config alone: nothing is allocated.

T = packed tokens of a microbatch on a context rank; sequence parallelism gives each tensor rank T/tp of them.
V = vocabulary rows of a tensor rank; b = bytes of the parameters' type. Tensor ranks do not split experts:
each sends its own tokens to the ranks that have them. Routing is taken as balanced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import ceil

from dapo.config import Config, Parallel
from dapo.model.layout import padded_vocab
from dapo.model.parameters import expert_parameters, largest_parameter, num_parameters, stage_parameters
from dapo.model.passthrough import Passthrough
from dapo.model.shape import LayerKind, ModelShape
from dapo.plan.activations import Backend, Layer

GIB = 2**30
# bytes of a chunk of logits, as in dapo_kernels.linear_policy_loss
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2400 << 20, "transformer_engine": 2400 << 20}

# a token of the step's batch: learn.batch.BYTES_PER_TOKEN, which would import numpy
BATCH_BYTES = 46

CHECKPOINT = "a checkpoint"


def mlp_modules(shape: ModelShape) -> list[str]:
    """Return which of Megatron's recompute_modules cover MLPs and experts of all layers."""
    kinds = {kind.has_experts for kind in shape.kinds()}
    return [name for has_experts, name in ((True, "moe"), (False, "mlp")) if has_experts in kinds]


@dataclass(frozen=True)
class Rank:
    """A rank of one pipeline stage. Memory is in bytes, at the largest batch that the config allows."""

    config: Config
    shape: ModelShape
    backend: Backend
    data: int  # number of data-parallel ranks
    stage: int = 0

    @property
    def parallel(self) -> Parallel:
        return self.config.parallel

    @cached_property
    def megatron(self) -> Passthrough:
        return Passthrough.of(self.config.policy.megatron)

    @property
    def is_last(self) -> bool:
        return self.stage == self.parallel.pipeline - 1

    @property
    def value_bytes(self) -> int:
        return 2 if self.config.policy.dtype == "bfloat16" else 4

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sample."""
        return self.config.data.max_prompt_length + self.config.rollout.max_response_length

    @property
    def samples(self) -> int:
        """Number of samples of an update."""
        return self.config.optim.prompts_per_minibatch * self.config.rollout.group_size

    @property
    def tokens(self) -> int:
        """Number of packed tokens of a microbatch on a context rank, T."""
        multiple = self.parallel.pack_multiple * self.megatron.token_multiple
        return ceil(self.config.policy.tokens_per_microbatch / multiple) * multiple // self.parallel.context

    @property
    def microbatches(self) -> int:
        """Number of microbatches of an update on each data-parallel rank, if every sample is the longest."""
        multiple = self.parallel.sequence_multiple
        together = self.config.policy.tokens_per_microbatch // (ceil(self.longest / multiple) * multiple)
        turns = self.parallel.pipeline if self.parallel.virtual_pipeline > 1 else 1
        return ceil(self.samples / (self.data * together * turns)) * turns

    @property
    def in_flight(self) -> int:
        """Number of microbatches, of one chunk each, whose activations are held together (1F1B schedule)."""
        behind = self.parallel.pipeline - self.stage - 1
        most = behind + 1
        if self.parallel.virtual_pipeline > 1:
            most = 2 * behind + (self.parallel.virtual_pipeline - 1) * self.parallel.pipeline + 1
        return min(self.microbatches * self.parallel.virtual_pipeline, most)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, experts included."""
        parallel = self.parallel
        stage = parallel.pipeline, self.stage, parallel.virtual_pipeline
        return sum(stage_parameters(self.shape, parallel.tensor, *stage)) + self.expert_parameters

    @cached_property
    def expert_parameters(self) -> int:
        """Number of expert parameters."""
        parallel = self.parallel
        where = self.stage, parallel.virtual_pipeline
        return expert_parameters(self.shape, parallel.pipeline, parallel.expert, *where)

    @property
    def copies(self) -> int:
        """Number of ranks that have the same parameters, apart from experts."""
        return self.data * self.parallel.context

    @property
    def expert_copies(self) -> int:
        """Number of ranks that have the same experts."""
        return self.parallel.tensor * self.copies // self.parallel.expert

    @property
    def owned_parameters(self) -> int:
        """Number of parameters whose optimizer state is here: ranks with the same parameters split it."""
        dense = self.parameters - self.expert_parameters
        return dense // self.copies + self.expert_parameters // self.expert_copies

    # Memory that is held all the time

    @property
    def params(self) -> int:
        """Bytes of the parameters; with FP8 also of its copies of matrices, as they are and transposed."""
        held = self.value_bytes * self.parameters
        if self.megatron.fp8:
            tables = (self.stage == 0) + self.is_last - self._is_one_table
            held += 2 * (self.parameters - tables * self.shape.hidden_size * self._vocab)
        return held

    @property
    def grads(self) -> int:
        """Bytes of Megatron's main_grad: float32, whole on every data-parallel rank."""
        return 4 * self.parameters

    @property
    def optimizer(self) -> int:
        """Bytes of Adam's two moments, and of the float32 parameters if the model's are 16-bit."""
        if self.megatron.optimizer_cpu_offload:  # in main memory, with a copy of the gradients
            return 16 * self.owned_parameters if self.backend == "cpu" else 0
        return (8 if self.value_bytes == 4 else 12) * self.owned_parameters

    @property
    def batch(self) -> int:
        """Bytes of the step's batch."""
        samples = self.config.rollout.prompts_per_step * self.config.rollout.group_size
        tokens = ceil(samples / self.data) * ceil(self.longest / self.parallel.context)
        return BATCH_BYTES * tokens + self._route_bytes(chain(*self.chunks)) * tokens // self.parallel.tensor

    def _route_bytes(self, layers: Iterable[int]) -> int:
        """Return the bytes of a token's routes in these layers, if they are replayed."""
        if self.config.policy.routing_replay == "off":
            return 0
        each = self.shape.experts_per_token * (1 if self.shape.num_experts <= 256 else 2)
        return each * sum(map(self.shape.has_experts, layers))

    @property
    def sampled_routes(self) -> int:
        """Bytes of main memory that the routes of a step's samples take on the main rank."""
        if self.config.policy.routing_replay != "rollout":
            return 0
        samples = self.config.rollout.prompts_per_step * self.config.rollout.group_size
        return samples * self.longest * self._route_bytes(range(self.shape.num_layers))

    @property
    def engine(self) -> int:
        """Bytes of the embedded engine's own copy of the model, on the main rank."""
        is_here = self.config.engine.kind == "embedded" and self.stage == 0
        return self.value_bytes * num_parameters(self.shape) if is_here else 0

    # Memory that comes and goes

    @cached_property
    def chunks(self) -> list[range]:
        """Layers of each of the stage's chunks."""
        return self.shape.chunks(self.parallel.pipeline, self.stage, self.parallel.virtual_pipeline)

    @cached_property
    def layers(self) -> dict[LayerKind, Layer]:
        """A layer of each kind that the stage has."""
        sizes = self.parallel.tensor, self.value_bytes, self.backend, self.longest / 2
        more = self.parallel.context, bool(self.megatron.fp8)
        return {
            kind: Layer(self.shape, kind, *sizes, *more) for kind in self.shape.kinds(chain(*self.chunks))
        }

    @property
    def layer(self) -> Layer:
        """Any layer: of what all kinds have in common."""
        return next(iter(self.layers.values()))

    @property
    def kept(self) -> int:
        """Bytes that a microbatch's forward pass leaves on this stage; of several chunks, in the last one."""
        # the final norm and the hidden states; or what was sent on, which is held until its gradient comes
        end = self.layer.norm + self.layer.stream if self.is_last else self.layer.stream
        return round(self._kept_by_layers + end * self.tokens)

    @property
    def _kept_by_layers(self) -> float:
        # a mean over chunks, whose layers may be of other kinds
        kept = sum(map(self._kept_by, self.chunks)) / len(self.chunks)
        return (kept + self.layer.turns) * self.tokens

    def _kept_by(self, chunk: Sequence[int]) -> float:
        """Return the bytes that one token's forward pass leaves in these layers."""
        kept, whole, stream = 0.0, chunk, self.layer.stream
        if self.megatron.recomputes("full"):
            unit = min(self.megatron.recomputed_together, len(chunk))
            if self.megatron.recompute_method == "block":  # the first layers, each by itself
                kept, whole = unit * stream, chunk[unit:]
            else:
                kept, whole = len(chunk) / unit * stream, ()
        for kind, count in self.shape.kinds(whole).items():
            layer = self.layers[kind]
            kept += count * layer.everything
            if self._recomputes_mlp(layer):
                kept -= count * layer.mlp
            if self._recomputes_attention(layer):
                kept -= count * (layer.core_attention - layer.core_attention_inputs)
        return kept

    def _recomputes_mlp(self, layer: Layer) -> bool:
        return self.megatron.recomputes("moe" if layer.kind.has_experts else "mlp")

    def _recomputes_attention(self, layer: Layer) -> bool:
        return self.megatron.recomputes("core_attn") and not layer.kind.is_delta

    @property
    def activations(self) -> int:
        """Bytes of activations in flight; one chunk also holds the final norm."""
        others = (self.in_flight - 1) * (self._kept_by_layers + self.layer.stream * self.tokens)
        return self.kept + round(others)

    @property
    def working(self) -> int:
        """Bytes of one layer's backward pass beyond what was kept for it: recomputed values and gradients."""
        return max(map(self._working, self.layers.values()))

    def _working(self, layer: Layer) -> int:
        b, hidden, T = self.value_bytes, self.shape.hidden_size, self.tokens
        recomputed = self._recomputed_with(layer)
        recomputed += layer.mlp if self._recomputes_mlp(layer) else 0
        recomputed += layer.core_attention if self._recomputes_attention(layer) else 0
        gathered = b * T * hidden if self.parallel.tensor > 1 else 0  # the stream of all tensor ranks
        if layer.kind.has_experts:
            mlp = self._experts_working
        else:
            gated = 2 * b * T * layer.ffn  # the gradients of gate and up, while the product's own is there
            # through the last matrix, and that matrix's own gradient
            mlp = max(gated, b * T * layer.ffn + b * hidden * layer.ffn + 2 * gathered)
        mixer = 0.0
        if layer.kind.is_delta:
            mixer = layer.delta_working * T
        elif not layer.kind.has_experts and self.parallel.context > 1:
            # gradients of keys and values, before they are sent to their ranks
            mixer = 2 * b * T * layer.kv * (layer.keys + self.parallel.context)
        return round(recomputed * T + max(mlp, mixer) + 2 * layer.stream * T + gathered)

    def _recomputed_with(self, layer: Layer) -> float:
        """Return the bytes that one token leaves in the layers that are recomputed together with this one."""
        if not self.megatron.recomputes("full"):
            return 0.0
        unit, end = self.megatron.recomputed_together, len(self.chunks[0])
        if self.megatron.recompute_method == "block":
            unit, end = 1, min(unit, end)
        together = [
            self.shape.kinds(chunk[i : i + unit]) for chunk in self.chunks for i in range(0, end, unit)
        ]
        return max(
            (
                sum(count * self.layers[kind].everything for kind, count in kinds.items())
                for kinds in together
                if layer.kind in kinds
            ),
            default=0.0,
        )

    @property
    def _experts_working(self) -> int:
        """Bytes of gradients of the sent and the returned tokens, of gate and up; and of gathered tokens."""
        shape, b, tokens = self.shape, self.value_bytes, self.tokens // self.parallel.tensor
        sent = tokens * shape.experts_per_token * b * (2 * shape.hidden_size + 2 * shape.expert_ffn_size)
        if self.megatron.is_allgather:
            sent += tokens * self.parallel.expert * (b + 4) * shape.hidden_size
        return sent

    @property
    def _vocab(self) -> int:
        """Number of vocabulary rows, V."""
        return padded_vocab(self.shape, self.parallel.tensor) // self.parallel.tensor

    @property
    def _is_one_table(self) -> bool:
        """True if embedding and head are one."""
        return self.shape.is_tied and self.parallel.pipeline == 1

    @property
    def table(self) -> int:
        """Bytes of this rank's rows of the embedding, or of the head."""
        return self.value_bytes * self._vocab * self.shape.hidden_size

    @property
    def logits(self) -> int:
        """Bytes of the fused loss: a chunk of logits, its hidden states, its gradient if of another type."""
        if not self.is_last:
            return 0
        b, hidden, columns = self.value_bytes, self.shape.hidden_size, self._vocab
        wide = 2 if self.config.policy.logits_dtype == "bfloat16" else 4
        most = max(CHUNK_BYTES[self.backend] // (wide * columns), self.parallel.tensor)
        rows = ceil(self.tokens / ceil(self.tokens / most))  # chunks are of equal size
        chunk = rows * columns * (wide if b == wide else wide + b)
        if self.parallel.tensor > 1:
            # two gathered chunks, of which the next one is underway; the live rows, their gradient, its copy
            chunk += 5 * b * rows * hidden
        if self.backend == "cpu" and b == 2:  # 16-bit factors are widened
            chunk += 4 * columns * (hidden + rows)
        return chunk

    @property
    def written_tensor(self) -> int:
        """Bytes of main memory while a checkpoint is written: a float32 copy of one tensor."""
        return 4 * largest_parameter(self.shape, self.parallel.tensor)

    @property
    def copied_state(self) -> int:
        """Bytes of main memory while a checkpoint is written in the background: this rank's shard of it."""
        if not self.config.run.async_save:
            return 0
        own = 8 if self.value_bytes == 4 else 12  # float32 parameters are their own main parameters
        return own * self.owned_parameters + self.value_bytes * self.parameters // self.copies

    @property
    def main_memory(self) -> int:
        """Bytes of main memory that a checkpoint takes, beside what else is there."""
        return max(self.written_tensor, self.copied_state)

    @cached_property
    def moments(self) -> dict[str, int]:
        """Bytes at each possible peak, beyond parameters, gradients, optimizer, batch and engine."""
        # the head's gradient goes to main_grad; autograd wants one too and gets zeros, to which a tied
        # embedding's gradient is added
        zeros = self.table if self._is_one_table else 0
        moments = {"a layer's backward pass": self.activations + self.working + zeros}
        if self.is_last:
            loss = self.layer.stream * self.tokens + max(self.logits, self.table)
            moments["the loss"] = round(self.activations + loss)
        if self.stage == 0:
            moments["the embedding's gradient"] = self.activations - self.kept + self.table + zeros
        # clipping writes each scaled gradient beside the old one; gloo, even with one rank, reduces a copy of
        # all gradients
        is_cpu = self.backend == "cpu"
        moments["the optimizer's step"] = self.grads if is_cpu else self.written_tensor // self.copies
        if is_cpu:
            moments = {moment: held + self.copied_state for moment, held in moments.items()}
        return moments | {CHECKPOINT: self.main_memory if is_cpu else 0}

    @property
    def peak(self) -> int:
        return self.at(self.peak_moment)

    def at(self, moment: str) -> int:
        """Return all bytes that are held at one of the moments."""
        return self.params + self.grads + self.optimizer + self.batch + self.engine + self.moments[moment]

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=self.moments.__getitem__)
