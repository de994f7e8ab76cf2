"""Seconds of an update and of a step's scores, from the devices' data sheets."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from math import ceil

from dapo.model.parameters import layer_matrices
from dapo.model.shape import LayerKind, ModelShape
from dapo.plan.activations import DELTA_CHUNK
from dapo.plan.memory import GIB, Rank

MACHINE = 8  # GPUs of one machine, joined by NVLink


@dataclass(frozen=True)
class Hardware:
    """One device. Rates are per second, of one device, in one direction."""

    name: str
    flops: float  # dense bf16, data sheet
    mfu: float  # fraction of them that a learning step reaches; tensor-parallel traffic is in it
    memory: float  # GiB that a program can see
    runtime: float  # GiB that are gone before the first tensor: context, libraries, communication buffers
    bandwidth: float  # bytes of the memory
    link: float  # bytes between the devices of a machine
    network: float  # bytes to other machines
    fp8: tuple[str, ...] = ()  # the recipes that it has; its products are then twice as fast


MAIN_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200; H800: an H100 with 400 GB/s of NVLink;
# H20. Memory: what torch reports, as far as known, not the name's GB. Network: an InfiniBand port a GPU, 200
# Gb/s for A100, 400 Gb/s for the others. MFU and runtime are assumptions: Megatron's own reports have
# 0.40–0.48 for dense models on H100; packs of unlike sequences and short pipelines reach less.
HOPPER = ("tensorwise", "blockwise")
HARDWARE = {
    "a100": Hardware("A100 80GB", 312e12, 0.45, 79.2, 2.0, 2.04e12, 300e9, 25e9),
    "h100": Hardware("H100 80GB", 989e12, 0.35, 79.2, 2.0, 3.35e12, 450e9, 50e9, HOPPER),
    "h800": Hardware("H800 80GB", 989e12, 0.35, 79.2, 2.0, 3.35e12, 200e9, 50e9, HOPPER),
    "h20": Hardware("H20 96GB", 148e12, 0.55, 95.1, 2.0, 4.0e12, 450e9, 50e9, HOPPER),
    "h200": Hardware("H200 141GB", 989e12, 0.35, 139.8, 2.0, 4.8e12, 450e9, 50e9, HOPPER),
    "b200": Hardware("B200 180GB", 2250e12, 0.30, 178.3, 2.0, 8.0e12, 900e9, 50e9, (*HOPPER, "mxfp8")),
    # one core a process, float32; its memory is this machine's, shared by all processes
    "cpu": Hardware("CPU core", 60e9, 0.5, MAIN_MEMORY, 0.7, 8e9, 2e9, 1e9),
}


def known_gpu(name: str, memory: float) -> str | None:
    """Return the key in HARDWARE of a GPU with so many GiB; None: it is not there.

    `name`: as CUDA has it: `known_gpu("NVIDIA H200", 139.8)` → "h200". Cards of other forms are slower.
    """
    words = re.findall(r"\w+", name.lower())
    known = [key for key in words if key in HARDWARE and memory > 0.95 * HARDWARE[key].memory]
    return known[0] if known and not {"pcie", "nvl"} & set(words) else None


@dataclass(frozen=True)
class Time:
    """Seconds of a config on `world` devices. `length`: mean tokens of a sample, prompt included."""

    rank: Rank  # the fullest one
    hardware: Hardware
    world: int
    length: int

    @property
    def tokens(self) -> int:
        """Number of tokens of an update, at the mean length."""
        return self.rank.samples * self.length

    @property
    def microbatches(self) -> int:
        """Number of microbatches of an update on each data-parallel rank, at the mean length."""
        turns = self.rank.parallel.pipeline if self.rank.parallel.virtual_pipeline > 1 else 1
        tokens = self.rank.data * self.rank.config.policy.tokens_per_microbatch * turns
        return ceil(self.tokens / tokens) * turns

    @property
    def scores(self) -> float:
        """Seconds of the log-probs of a step's samples."""
        forward = forward_flops(self.rank.shape, self.length, self._faster)
        return self.rank.config.updates_per_step * self._pass(forward)

    @property
    def update(self) -> float:
        """Seconds of an update."""
        return self._pass(self._learning_flops) + self._reduction + self._optimizer

    @property
    def _faster(self) -> float:
        """Ratio of the layers' matrix products in FP8 to those in bf16, by the data sheet."""
        return 2.0 if self.rank.megatron.fp8 else 1.0

    @property
    def _learning_flops(self) -> float:
        """FLOPs, as bf16's, of a token's forward and backward pass, and of what is computed again."""
        shape, megatron = self.rank.shape, self.rank.megatron
        forward, again = forward_flops(shape, self.length, self._faster), 0.0
        if megatron.recomputes("full"):
            layers = stage = shape.num_layers // self.rank.parallel.pipeline
            if megatron.recompute_method == "block":
                layers = min(megatron.recomputed_together, stage)
            again = layers / stage * (forward - 2 * shape.vocab_size * shape.hidden_size)
        for kind, count in shape.kinds().items():
            if megatron.recomputes("moe" if kind.has_experts else "mlp"):
                _, mlp = layer_matrices(shape, kind)
                again += 2 * count * mlp / self._faster
            if megatron.recomputes("core_attn") and not kind.is_delta:
                again += 2 * count * mixing(shape, kind, self.length)
        if self.rank.config.objective.kind == "gspo":  # all log-probs come before its loss
            again += 2 * shape.vocab_size * shape.hidden_size
        return 3 * forward + again

    def _pass(self, flops: float) -> float:
        """Return the seconds of `flops` for each token of an update; pipeline stages wait at both ends."""
        bubble = (self.rank.parallel.pipeline - 1) / (self.microbatches * self.rank.parallel.virtual_pipeline)
        return self.tokens * flops / (self.world * self.hardware.flops * self.hardware.mfu) * (1 + bubble)

    @property
    def _reduction(self) -> float:
        """Seconds to sum gradients over data and context ranks, and to gather parameters."""
        rank, rate = self.rank, self.hardware.link if self.world <= MACHINE else self.hardware.network
        dense = (rank.parameters - rank.expert_parameters) * (1 - 1 / rank.copies)
        experts = rank.expert_parameters * (1 - 1 / rank.expert_copies)
        return (4 + rank.value_bytes) * (dense + experts) / rate

    @property
    def _optimizer(self) -> float:
        """Seconds to clear, norm and scale gradients, and for Adam to read and write its state."""
        return (4 * self.rank.grads + 2 * self.rank.optimizer) / self.hardware.bandwidth


def forward_flops(shape: ModelShape, length: float, faster: float = 1.0) -> float:
    """Return the FLOPs of one token's forward pass in a sequence of `length`: two for each weight it uses.

    Those of the layers' matrices, which are `faster`, count for less.
    """
    head = shape.vocab_size * shape.hidden_size
    layers = sum(
        count * (sum(layer_matrices(shape, kind)) / faster + mixing(shape, kind, length))
        for kind, count in shape.kinds().items()
    )
    return 2 * (layers + head)


def mixing(shape: ModelShape, kind: LayerKind, length: float) -> float:
    """Return the products of one token with others of its sequence, in one layer."""
    if not kind.is_delta:
        # with half of the sequence on average: its query with keys, its scores with values
        return length * shape.num_heads * (shape.head_dim + shape.value_dim) / 2
    delta = shape.delta
    assert delta
    k, v, chunk = delta.key_dim, delta.value_dim, DELTA_CHUNK["transformer_engine"]
    # of a token in a chunk of C, for each head (policy/delta_rule.py): the state, k × v, is read by W and by
    # the queries, and written; K Kᵀ and Q Kᵀ have C columns of k products each, Q Kᵀ times what is written C
    # of v; to solve for U and W, k + v columns, takes half of C each
    rule = 3 * k * v + chunk * (2 * k + v + (k + v) / 2)
    return delta.num_value_heads * rule + delta.conv_width * (2 * delta.keys + delta.values)
