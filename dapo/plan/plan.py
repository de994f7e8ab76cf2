"""Forecast of a run, before a GPU is allocated: memory by pipeline stage, tokens, seconds and advice.

python -m dapo plan CONFIG.yaml --gpu h200 --world-size 16
"""

from __future__ import annotations

from collections.abc import Sequence

from dapo.config import Config, ConfigError
from dapo.model.families import read_shape
from dapo.model.layout import check_layout, check_length, padded_vocab
from dapo.model.parameters import active_parameters, num_parameters
from dapo.model.passthrough import READ, Passthrough
from dapo.plan import methods
from dapo.plan.activations import Backend
from dapo.plan.advice import Plan, remedies
from dapo.plan.memory import GIB, Rank
from dapo.plan.time import HARDWARE, MACHINE, Hardware

# fields of policy.megatron that change no memory worth counting
NEGLIGIBLE = {"adam_eps", "bucket_size", "overlap_grad_reduce", "attention_backend", "log_num_zeros_in_grad"}


def make_plan(
    config: Config, gpu: str, world: int | None = None, length: int | None = None, has_te: bool = False
) -> Plan:
    """Plan a config on `world` devices, by default as few as it can run on.

    `length`: mean number of tokens of a sample, by default half of the longest; `has_te`: with Transformer
    Engine's layers.

    Raises:
        ConfigError: the model's config.json, the layout, the world size or the length is wrong.
    """
    shape = read_shape(config.policy.model)
    check_layout(shape, config)
    check_length(config)
    world = config.parallel.least_world if world is None else world
    if world < 1 or config.parallel.data(world) < 1:
        raise ConfigError(f"a world of {world} processes; expected at least {config.parallel.least_world}")
    _check_fp8(Passthrough.of(config.policy.megatron), HARDWARE[gpu], has_te)
    backend: Backend = "cpu" if gpu == "cpu" else "transformer_engine" if has_te else "cuda"
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    length = longest // 2 if length is None else length
    if not 1 <= length <= longest:
        raise ConfigError(f"a mean length of {length} tokens; the config allows 1 to {longest}")
    return Plan(config, shape, HARDWARE[gpu], world, backend, length)


def _check_fp8(megatron: Passthrough, hardware: Hardware, has_te: bool) -> None:
    """Raise ConfigError if such devices or layers cannot compute in the FP8 that is asked for."""
    recipe = f"policy.megatron.fp8_recipe={megatron.fp8_recipe}"
    if megatron.fp8 and megatron.fp8_recipe not in hardware.fp8:
        raise ConfigError(f"{recipe}: {hardware.name} has {', '.join(hardware.fp8) or 'no FP8'}")
    if megatron.fp8 and not has_te:
        raise ConfigError(f"{recipe} wants Transformer Engine's layers: plan with --transformer-engine")


def describe(plan: Plan, sampling: Sequence[str] = ()) -> list[str]:
    """Return the plan as lines of text; `sampling`: those about what a step asks for."""
    time = plan.time
    updates = plan.config.updates_per_step * time.update
    step = f"an update {time.update:.3g}, a step's scores {time.scores:.3g} and updates {updates:.3g}"
    seconds = f"seconds   {step}, at {plan.hardware.mfu:.0%} of the data sheet's FLOP/s; and the sampling"
    notes = [f"note      {note}" for note in _notes(plan)]
    return [*_summary(plan), "", *_memory(plan), "", seconds, *sampling, *notes, "", *_verdict(plan)]


def _summary(plan: Plan) -> list[str]:
    """Return the model, its layout, and the sizes of an update and of a step."""
    config, shape, parallel, rank, time = plan.config, plan.shape, plan.config.parallel, plan.worst, plan.time
    asked = config.rollout.prompts_per_round * config.rollout.group_size
    active, experts = "", ""
    if shape.num_experts:
        active = f" ({active_parameters(shape):,} for a token)"
        experts = f", {shape.num_experts // parallel.expert} of {shape.num_experts} experts"
    chunks = f" in {parallel.virtual_pipeline} chunks each" if parallel.virtual_pipeline > 1 else ""
    context = f" × context {parallel.context}" if parallel.context > 1 else ""
    return [
        f"model     {shape.model_type}, {num_parameters(shape):,} parameters{active}, {config.policy.dtype}; "
        f"vocabulary {shape.vocab_size:,}, padded to {padded_vocab(shape, parallel.tensor):,}",
        f"method    {methods.name(config)}",
        f"layout    {plan.world} × {plan.hardware.name} = tensor {parallel.tensor} × "
        f"pipeline {parallel.pipeline}{chunks}{context} × data {plan.data}; a rank has "
        f"{shape.num_heads // parallel.tensor} of {shape.num_heads} heads, "
        f"{shape.num_kv_heads // parallel.tensor} of {shape.num_kv_heads} KV heads, "
        f"{shape.num_layers // parallel.pipeline} of {shape.num_layers} layers{_kinds(rank)}{experts}",
        f"an update {rank.samples:,} samples of {plan.length:,} tokens (the longest has {rank.longest:,}) = "
        f"{time.tokens:,} tokens; {time.microbatches} microbatches of up to "
        f"{config.policy.tokens_per_microbatch:,} on each data-parallel rank, {rank.microbatches} if all are "
        "longest",
        f"a step    {config.updates_per_step} updates; a round of sampling asks for {asked:,} samples",
    ]


def _kinds(rank: Rank) -> str:
    """Return how many layers of which kind a rank has, if those of the model differ."""
    shape, layers = rank.shape, [layer for chunk in rank.chunks for layer in chunk]
    if shape.are_layers_alike:
        return ""
    num_delta, num_sparse = sum(map(shape.is_delta, layers)), sum(map(shape.has_experts, layers))
    counts = []
    if shape.delta:
        counts += [f"{num_delta} with a DeltaNet", f"{len(layers) - num_delta} with attention"]
    if shape.num_dense_layers:
        counts += [f"{len(layers) - num_sparse} with an MLP", f"{num_sparse} with experts"]
    stage = f" on stage {rank.stage}" if rank.parallel.pipeline > 1 else ""
    return f" ({', '.join(counts)}{stage})"


def _memory(plan: Plan) -> list[str]:
    """Return a table of GiB of a rank, by pipeline stage; the peak; and the main memory of a checkpoint."""
    columns = ("params", "grads", "optimizer", "batch", "engine", "activations", "logits", "peak")
    unit = "microbatches in flight" + (" (of a chunk)" if plan.config.parallel.virtual_pipeline > 1 else "")
    lines = ["GiB a rank " + "".join(f"{name:>13}" for name in columns) + f"  {unit}"]
    for rank in plan.stages:
        values = "".join(f"{getattr(rank, name) / GIB:13.2f}" for name in columns)
        lines.append(f"stage {rank.stage:<5}{values}  {rank.in_flight}")
    worst = plan.worst
    held = f"{worst.peak / GIB:.1f} of {plan.room:.1f} GiB that are free for tensors"
    lines.append(f"peak on stage {worst.stage}, during {worst.peak_moment}: {held}")
    if plan.backend != "cpu":  # on a CPU it is in the peak
        ranks = min(plan.world, MACHINE)
        total = ranks * max(rank.main_memory for rank in plan.stages) / GIB
        machine = f"the main memory of a machine with {ranks} devices"
        lines.append(f"writing a checkpoint takes {total:.0f} GiB of {machine}")
    if routes := worst.sampled_routes:
        each = routes / worst.config.rollout.prompts_per_step / worst.config.rollout.group_size / 2**20
        lines.append(
            f"the routes of a step's samples take {routes / GIB:.1f} GiB of the main rank's main memory, "
            f"{each:.1f} MiB each, if all are longest; groups that wait for their turn come on top"
        )
    if plan.servers:
        lines.append(plan.servers.describe(min(plan.world, MACHINE)))
    return lines


def _notes(plan: Plan) -> list[str]:
    """Return what the numbers leave out, and what is allowed and seldom meant."""
    config, parallel, is_gpu = plan.config, plan.config.parallel, plan.backend != "cpu"
    uncounted = sorted(set(plan.worst.megatron.verbatim) - READ - NEGLIGIBLE)
    notes = [
        (is_gpu and config.policy.dtype == "float32",
         "float32 on a GPU: attention keeps its scores, length² a head, and the times are bfloat16's; "
         "neither is counted: use bfloat16"),
        (plan.backend == "cuda" and plan.shape.delta is not None,
         "a DeltaNet is counted in plain torch, which keeps several times as much as flash-linear-attention: "
         "that is counted with --transformer-engine"),
        (is_gpu and parallel.tensor > MACHINE,
         f"parallel.tensor={parallel.tensor} reaches past a machine's {MACHINE} devices: its traffic goes "
         "over the slow network"),
        (plan.shape.num_experts > 0,
         "experts are taken to get as many tokens each, and as large a share of the FLOP/s as a dense model; "
         "neither is so at first"),
        (parallel.expert > 1, "the tokens' way to other ranks' experts and back is not in the seconds"),
        (is_gpu and parallel.expert > MACHINE,
         f"parallel.expert={parallel.expert} reaches past a machine's {MACHINE} devices: tokens travel over "
         "the slow network"),
        (plan.time.microbatches < parallel.pipeline,
         f"{plan.time.microbatches} microbatches for {parallel.pipeline} pipeline stages: some are idle; "
         "lower policy.tokens_per_microbatch"),
        (parallel.context > 1,
         "keys and values are sent to all context ranks in every layer: no time is counted for that"),
        (plan.worst.samples < plan.data,
         f"an update has {plan.worst.samples} samples for {plan.data} data-parallel ranks: some learn from "
         "nothing"),
        (bool(config.engine.urls), "servers in engine.urls are taken to be on other devices"),
        (plan.servers is not None,
         "the optimizer's state goes to main memory and back in every step: that is not in the seconds"),
        (is_gpu and config.run.deterministic,
         "run.deterministic takes slower kernels: that is not in the seconds; another layout, other devices "
         "or another tp-size give other last bits all the same"),
        (not is_gpu and config.run.deterministic and config.engine.kind == "sglang",
         "run.deterministic: SGLang cannot be deterministic on a CPU"),
        (is_gpu and config.engine.kind == "embedded",
         "the embedded engine's KV cache is not counted: it is there while nothing is learnt"),
    ]  # fmt: skip
    passed = [f"policy.megatron.{field} is not counted" for field in uncounted]
    return passed + [text for is_true, text in notes if is_true]


def _verdict(plan: Plan) -> list[str]:
    """Return that it fits; or what is missing, and the remedies."""
    lines = plan.problems
    if not lines:
        return [f"fits: {plan.room - plan.worst.peak / GIB:.1f} GiB to spare"]
    found = remedies(plan)
    for text, changed in found:
        memory = f"{changed.worst.peak / GIB:.1f} GiB on {changed.world} devices"
        lines.append(f"fits with {text}: {memory}, an update {changed.time.update:.3g} s")
    if not found:
        lines.append("nothing known makes it fit: another device, or a smaller model")
    return lines
