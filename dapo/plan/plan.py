"""What a run will take, before a GPU is allocated: memory by pipeline stage, tokens and microbatches,
seconds, and what helps. No torch.

python -m dapo plan CONFIG.yaml --gpu h200 --world-size 16
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod

from dapo.config import Config, ConfigError
from dapo.model.layout import check_layout, padded_vocab
from dapo.model.passthrough import READ
from dapo.model.shape import ModelShape, read_shape
from dapo.plan.memory import NEGLIGIBLE, Backend, Rank, active_parameters, num_parameters

GIB = 2**30
FREE_SHARE = 0.05  # of a GPU's memory: what the caching allocator cannot use between blocks of unlike size
MACHINE = 8  # GPUs of one machine, joined by NVLink


@dataclass(frozen=True)
class Hardware:
    """One device. Rates are a second, of one device, in one direction."""

    name: str
    flops: float  # dense bf16, data sheet
    # the share of them that a learning step has been seen to reach; tensor-parallel traffic is in it
    mfu: float
    memory: float  # GiB that a program can see
    runtime: float  # GiB that are gone before the first tensor: context, libraries, communication buffers
    bandwidth: float  # bytes of the memory
    link: float  # bytes between the devices of a machine
    network: float  # bytes to other machines


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200; H800: an H100 with 400 GB/s of NVLink;
# H20. Memory: what torch reports, as far as known, not the name's GB. Network: an InfiniBand port a GPU, 200
# Gb/s for A100, 400 Gb/s for the others. MFU and runtime are assumptions: Megatron's own reports have
# 0.40–0.48 for dense models on H100, packs of unlike sequences and short pipelines less.
HARDWARE = {
    "a100": Hardware("A100 80GB", 312e12, 0.45, 79.2, 2.0, 2.04e12, 300e9, 25e9),
    "h100": Hardware("H100 80GB", 989e12, 0.35, 79.2, 2.0, 3.35e12, 450e9, 50e9),
    "h800": Hardware("H800 80GB", 989e12, 0.35, 79.2, 2.0, 3.35e12, 200e9, 50e9),
    "h20": Hardware("H20 96GB", 148e12, 0.55, 95.1, 2.0, 4.0e12, 450e9, 50e9),
    "h200": Hardware("H200 141GB", 989e12, 0.35, 139.8, 2.0, 4.8e12, 450e9, 50e9),
    "b200": Hardware("B200 180GB", 2250e12, 0.30, 178.3, 2.0, 8.0e12, 900e9, 50e9),
    # one core a process, float32; its memory is this machine's, shared by all processes
    "cpu": Hardware(
        "CPU core",
        60e9,
        0.5,
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB,
        0.7,
        8e9,
        2e9,
        1e9,
    ),
}


@dataclass(frozen=True)
class Plan:
    """A config on hardware. `length`: mean tokens of a sample, prompt included, that the times are for;
    memory is for the longest.
    """

    config: Config
    shape: ModelShape
    hardware: Hardware
    world: int
    backend: Backend
    length: int

    @property
    def data(self) -> int:
        return self.config.parallel.data(self.world)

    @property
    def stages(self) -> list[Rank]:
        """A rank of each pipeline stage; on the first one, the main rank."""
        pipeline = self.config.parallel.pipeline
        return [Rank(self.config, self.shape, self.backend, self.data, stage) for stage in range(pipeline)]

    @property
    def worst(self) -> Rank:
        return max(self.stages, key=lambda rank: rank.peak)

    @property
    def room(self) -> float:
        """GiB of one rank's tensors."""
        if self.backend == "cpu":
            return self.hardware.memory / self.world - self.hardware.runtime
        return self.hardware.memory * (1 - FREE_SHARE) - self.hardware.runtime

    @property
    def fits(self) -> bool:
        return self.worst.peak / GIB <= self.room

    @property
    def tokens(self) -> int:
        """Of an update, at the mean length."""
        return self.config.optim.prompts_per_minibatch * self.config.rollout.group_size * self.length

    @property
    def microbatches(self) -> int:
        """Of an update, on each data-parallel rank, at the mean length."""
        turns = self.config.parallel.pipeline if self.config.parallel.virtual_pipeline > 1 else 1
        return ceil(self.tokens / (self.data * self.config.policy.tokens_per_microbatch * turns)) * turns

    @property
    def score_seconds(self) -> float:
        """Log-probs of a step's samples."""
        return self.config.updates_per_step * self._pass_seconds(forward_flops(self.shape, self.length))

    @property
    def update_seconds(self) -> float:
        return self._pass_seconds(self._learning_flops) + self._reduce_seconds + self._optimizer_seconds

    @property
    def _learning_flops(self) -> float:
        """A token's forward and backward pass, and what is computed twice."""
        shape, megatron = self.shape, self.worst.megatron
        forward, again = forward_flops(shape, self.length), 0.0
        if megatron.recomputes("full"):
            stage = shape.num_layers // self.config.parallel.pipeline
            layers = stage
            if megatron.recompute_method == "block":
                layers = min(megatron.recompute_num_layers or 1, stage)
            again = layers / stage * (forward - 2 * shape.vocab_size * shape.hidden_size)
        if megatron.recomputes("mlp") or megatron.recomputes("moe"):
            again += 2 * shape.num_layers * _feed_forward(shape)
        if megatron.recomputes("core_attn"):
            again += 2 * shape.num_layers * self.length * shape.num_heads * shape.head_dim
        return 3 * forward + again

    def _pass_seconds(self, flops: float) -> float:
        """All of an update's tokens; the pipeline's stages wait for each other at both ends."""
        bubble = (self.config.parallel.pipeline - 1) / (
            self.microbatches * self.config.parallel.virtual_pipeline
        )
        return self.tokens * flops / (self.world * self.hardware.flops * self.hardware.mfu) * (1 + bubble)

    @property
    def _reduce_seconds(self) -> float:
        """Gradients are summed over data and context ranks, parameters gathered."""
        rate = self.hardware.link if self.world <= MACHINE else self.hardware.network
        rank, each = self.worst, 4 + self.worst.value_bytes
        dense, experts = rank.parameters - rank.expert_parameters, rank.expert_parameters
        shared = dense * (1 - 1 / (self.data * self.config.parallel.context)) + experts * (
            1 - 1 / rank.expert_data
        )
        return each * shared / rate

    @property
    def _optimizer_seconds(self) -> float:
        """Gradients are cleared, normed and scaled; Adam reads and writes its state."""
        return (4 * self.worst.grads + 2 * self.worst.optimizer) / self.hardware.bandwidth


def forward_flops(shape: ModelShape, length: int) -> float:
    """Of one token of a sequence of `length`, forward: a multiplication and an addition for each weight, and
    for each cell of attention.
    """
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    matrices = shape.hidden_size * (2 * heads + 2 * kv) + _feed_forward(shape)
    attention = length * heads  # a token sees half of the sequence on average, in two products
    return 2 * (shape.num_layers * (matrices + attention) + shape.vocab_size * shape.hidden_size)


def _feed_forward(shape: ModelShape) -> int:
    """Weights that a token meets in a layer's feed-forward network; or in the router and its experts."""
    if shape.num_experts:
        return shape.hidden_size * (shape.num_experts + 3 * shape.experts_per_token * shape.expert_ffn_size)
    return 3 * shape.hidden_size * shape.ffn_size


def make_plan(
    config: Config, gpu: str, world: int | None = None, length: int | None = None, has_te: bool = False
) -> Plan:
    """Raises ConfigError: the model's config.json, the layout or the world size will not do."""
    shape = read_shape(config.policy.model)
    check_layout(shape, config)
    world = config.parallel.least_world if world is None else world
    if world < 1 or config.parallel.data(world) < 1:
        raise ConfigError(f"a world of {world} processes; expected at least {config.parallel.least_world}")
    backend: Backend = "cpu" if gpu == "cpu" else "transformer_engine" if has_te else "cuda"
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    length = longest // 2 if length is None else length
    if not 1 <= length <= longest:
        raise ConfigError(f"a mean length of {length} tokens; the config allows 1 to {longest}")
    return Plan(config, shape, HARDWARE[gpu], world, backend, length)


@dataclass(frozen=True)
class Change:
    """Something to try: overrides for the command line, and how many times as many devices."""

    overrides: tuple[str, ...] = ()
    times: int = 1


def remedies(plan: Plan) -> list[tuple[str, Plan]]:
    """What makes it fit: (what to add to the command line, the plan with it), cheapest first.

    Single changes, the smallest of each kind; where none is enough, two at once, then three, … Empty: nothing
    that is known does.
    """
    kinds = _kinds(plan)
    for count in range(1, len(kinds) + 1):
        found = [
            first
            for chosen in itertools.combinations(kinds, count)
            if (first := _first_that_fits(plan, chosen))
        ]
        if found:
            return found
    return []


def _kinds(plan: Plan) -> list[list[Change]]:
    """Changes by kind, from the cheapest to the dearest; of each, the smallest first."""
    policy, parallel = plan.config.policy, plan.config.parallel
    smaller = {max(policy.tokens_per_microbatch >> halvings, plan.worst.longest) for halvings in range(1, 6)}
    module = "moe" if plan.shape.num_experts else "mlp"
    gated = "policy.megatron.recompute_granularity=selective", f"policy.megatron.recompute_modules=[{module}]"
    full = tuple(
        f"policy.megatron.recompute_{field}"
        for field in ("granularity=full", "method=uniform", "num_layers=1")
    )
    recompute = {None: [Change(gated), Change(full)], "selective": [Change(full)]}
    offload = tuple(
        f"policy.megatron.{field}"
        for field in (
            "optimizer_cpu_offload=true",
            "optimizer_offload_fraction=1.0",
            "use_precision_aware_optimizer=true",
        )
    )
    can_offload = (
        plan.backend != "cpu"
        and policy.dtype == "bfloat16"
        and not plan.worst.megatron.optimizer_cpu_offload
    )
    return [
        [
            Change((f"policy.tokens_per_microbatch={n}",))
            for n in sorted(smaller - {policy.tokens_per_microbatch}, reverse=True)
        ],
        recompute.get(plan.worst.megatron.recompute_granularity, []),
        [Change((f"parallel.tensor={n}",)) for n in (2, 4, 8) if n > parallel.tensor],
        [Change((f"parallel.pipeline={n}",)) for n in (2, 4, 8, 16) if n > parallel.pipeline],
        [Change((f"parallel.context={n}",)) for n in (2, 4, 8) if n > parallel.context],
        [
            Change((f"parallel.expert={n}",))
            for n in (2, 4, 8, 16, 32)
            if plan.shape.num_experts and n > parallel.expert
        ],
        [Change(times=n) for n in (2, 4, 8)],
        [Change(offload)] if can_offload else [],
    ]


def _first_that_fits(plan: Plan, kinds: tuple[list[Change], ...]) -> tuple[str, Plan] | None:
    for changes in itertools.product(*kinds):
        changed = _changed(plan, changes)
        if changed is not None and changed.fits:
            overrides = [override for change in changes for override in change.overrides]
            size = [f"--world-size {changed.world}"] if changed.world != plan.world else []
            return " ".join(overrides + size), changed
    return None


def _changed(plan: Plan, changes: tuple[Change, ...]) -> Plan | None:
    """The plan with the changes, on as many devices as they need; None where the model cannot be split so."""
    try:
        config = plan.config.changed([override for change in changes for override in change.overrides])
        check_layout(plan.shape, config)
    except ConfigError:
        return None
    least = config.parallel.least_world
    world = ceil(plan.world / least) * least * prod(change.times for change in changes)
    return replace(plan, config=config, world=world)


def describe(plan: Plan) -> list[str]:
    """The plan as lines of text."""
    config, shape, parallel, rank = plan.config, plan.shape, plan.config.parallel, plan.worst
    samples = config.optim.prompts_per_minibatch * config.rollout.group_size
    asked = config.rollout.prompts_per_round * config.rollout.group_size
    active = f" ({active_parameters(shape):,} for a token)" if shape.num_experts else ""
    experts = (
        f", {shape.num_experts // parallel.expert} of {shape.num_experts} experts"
        if shape.num_experts
        else ""
    )
    return [
        f"model     {shape.model_type}, {num_parameters(shape):,} parameters{active}, {config.policy.dtype}; "
        f"vocabulary {shape.vocab_size:,}, padded to {padded_vocab(shape, parallel.tensor):,}",
        f"layout    {plan.world} × {plan.hardware.name} = tensor {parallel.tensor} × pipeline "
        f"{parallel.pipeline}{_more(plan)} "
        f"× data {plan.data}; "
        f"a rank has {shape.num_heads // parallel.tensor} of {shape.num_heads} heads, "
        f"{shape.num_kv_heads // parallel.tensor} of "
        f"{shape.num_kv_heads} KV heads, {shape.num_layers // parallel.pipeline} of {shape.num_layers} "
        f"layers{experts}",
        f"an update {samples:,} samples of {plan.length:,} tokens (the longest has {rank.longest:,}) = "
        f"{plan.tokens:,} tokens; "
        f"{plan.microbatches} microbatches of up to {config.policy.tokens_per_microbatch:,} on each "
        "data-parallel rank, "
        f"{rank.microbatches} if all are longest",
        f"a step    {config.updates_per_step} updates; a round of sampling asks for {asked:,} samples",
        "",
        *_memory_table(plan),
        f"peak on stage {rank.stage}, during {rank.peak_moment}: {rank.peak / GIB:.1f} of {plan.room:.1f} "
        "GiB that are free for tensors",
        *_main_memory(plan),
        "",
        f"seconds   an update {plan.update_seconds:.3g}, a step's scores {plan.score_seconds:.3g} and "
        "updates "
        f"{config.updates_per_step * plan.update_seconds:.3g}, at {plan.hardware.mfu:.0%} of the data "
        "sheet's FLOP/s; and the sampling",
        *[f"note      {note}" for note in _notes(plan)],
        "",
        *_verdict(plan),
    ]  # fmt: skip


def _more(plan: Plan) -> str:
    chunks, context = plan.config.parallel.virtual_pipeline, plan.config.parallel.context
    return (f" in {chunks} chunks each" if chunks > 1 else "") + (
        f" × context {context}" if context > 1 else ""
    )


def _memory_table(plan: Plan) -> list[str]:
    """GiB of a rank, by pipeline stage."""
    columns = ("params", "grads", "optimizer", "batch", "engine", "activations", "logits", "peak")
    of_what = " (of a chunk)" if plan.config.parallel.virtual_pipeline > 1 else ""
    lines = [
        "GiB a rank " + "".join(f"{name:>13}" for name in columns) + "  microbatches in flight" + of_what
    ]
    for rank in plan.stages:
        values = "".join(f"{getattr(rank, name) / GIB:13.2f}" for name in columns)
        lines.append(f"stage {rank.stage:<5}{values}  {rank.in_flight}")
    return lines


def _main_memory(plan: Plan) -> list[str]:
    """What a checkpoint takes beside the devices; on a CPU it is in the peak."""
    if plan.backend == "cpu":
        return []
    most = max(rank.main_memory for rank in plan.stages)
    ranks = min(plan.world, MACHINE)
    return [
        f"writing a checkpoint takes {ranks * most / GIB:.0f} GiB of the main memory of a machine with "
        f"{ranks} devices"
    ]


def _notes(plan: Plan) -> Iterator[str]:
    """What the numbers leave out, and what is allowed and seldom meant."""
    config, parallel = plan.config, plan.config.parallel
    for field in sorted(set(config.policy.megatron) - READ - NEGLIGIBLE):
        yield f"policy.megatron.{field} is not counted"
    if plan.backend != "cpu" and config.policy.dtype == "float32":
        yield "float32 on a GPU: attention keeps its scores, length² a head, and the times are bfloat16's; neither is counted: use bfloat16"
    if plan.backend != "cpu" and parallel.tensor > MACHINE:
        yield f"parallel.tensor={parallel.tensor} reaches past a machine's {MACHINE} devices: its traffic goes over the slow network"
    if plan.shape.num_experts:
        yield "experts are taken to get as many tokens each, and as large a share of the FLOP/s as a dense model; neither is so at first"
    if parallel.expert > 1:
        yield "the tokens' way to other ranks' experts and back is not in the seconds"
    if plan.backend != "cpu" and parallel.expert > MACHINE:
        yield f"parallel.expert={parallel.expert} reaches past a machine's {MACHINE} devices: tokens travel over the slow network"
    if plan.microbatches < parallel.pipeline:
        yield f"{plan.microbatches} microbatches for {parallel.pipeline} pipeline stages: some are idle; lower policy.tokens_per_microbatch"
    if parallel.context > 1:
        yield "keys and values are sent to all context ranks in every layer: no time is counted for that"
    samples = config.optim.prompts_per_minibatch * config.rollout.group_size
    if samples < plan.data:
        yield f"an update has {samples} samples for {plan.data} data-parallel ranks: some learn from nothing"
    if config.engine.kind == "embedded" and plan.backend != "cpu":
        yield "the embedded engine's KV cache is not counted: it is there while nothing is learnt"


def _verdict(plan: Plan) -> list[str]:
    """It fits; or each single change, what it brings, and the first one, or the smallest number at once, that
    makes it fit.
    """
    if plan.fits:
        return [f"fits: {plan.room - plan.worst.peak / GIB:.1f} GiB to spare"]
    too_much = plan.worst.peak / GIB - plan.room
    found = remedies(plan)
    return [
        f"out of memory during {plan.worst.peak_moment} on stage {plan.worst.stage}: {too_much:.1f} GiB too "
        "much",
        *[
            f"fits with {text}: {p.worst.peak / GIB:.1f} GiB on {p.world} devices, an update "
            f"{p.update_seconds:.3g} s"
            for text, p in found
        ],
        *([] if found else ["nothing known makes it fit: another device, or a smaller model"]),
    ]
