"""Can a layout hold the model? A config is checked against the model's sizes, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator

from dapo.config import Config, ConfigError, Parallel
from dapo.model.passthrough import Passthrough
from dapo.model.shape import ModelShape


def check_layout(shape: ModelShape, config: Config) -> None:
    """Check that the config's layout and its policy.megatron can hold and train the model.

    Raises:
        ConfigError: all that is wrong, in one line.
    """
    megatron = Passthrough.of(config.policy.megatron)
    wrong = [
        *_indivisible(shape, config.parallel, megatron),
        *_wrong_recompute(shape, megatron),
        *_wrong_experts(shape, config.parallel.expert),
        *_wrong_offload(megatron, config.policy.dtype),
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))


def _indivisible(shape: ModelShape, parallel: Parallel, megatron: Passthrough) -> Iterator[str]:
    """Yield a line for each of the model's numbers that a layout's option does not divide."""
    tensor = f"parallel.tensor={parallel.tensor}"
    stages, layers = f"parallel.pipeline={parallel.pipeline}", "a stage's layers"
    if parallel.virtual_pipeline > 1:
        stages += f" × parallel.virtual_pipeline={parallel.virtual_pipeline}"
        layers = "a stage's chunk of layers"
    chunks = parallel.pipeline * parallel.virtual_pipeline
    divisions = [
        (tensor, parallel.tensor, "the model's num_attention_heads", shape.num_heads),
        (tensor, parallel.tensor, "the model's num_key_value_heads", shape.num_kv_heads),
    ]
    if not shape.num_experts:  # tensor ranks do not split experts
        divisions.append((tensor, parallel.tensor, "the model's intermediate_size", shape.ffn_size))
    divisions.append((stages, chunks, "the model's num_hidden_layers", shape.num_layers))
    unit = megatron.recompute_num_layers
    if unit and megatron.recompute_method == "uniform":  # Megatron would fail in its first forward pass
        option = f"policy.megatron.recompute_num_layers={unit}"
        divisions.append((option, unit, layers, shape.num_layers // chunks))
    for option, by, what, number in divisions:
        if number % by:
            yield f"{option} does not divide {what}={number}"


def _wrong_recompute(shape: ModelShape, megatron: Passthrough) -> Iterator[str]:
    """Yield a line for each option of recomputation that is incomplete or has no effect on this model."""
    modules = megatron.recompute_modules or []
    is_method = megatron.recompute_method in ("uniform", "block")
    if megatron.recompute_granularity == "full" and not (is_method and megatron.recompute_num_layers):
        yield (
            "policy.megatron.recompute_granularity=full wants recompute_method=uniform or block, and "
            "recompute_num_layers"
        )
    prefix = "policy.megatron.recompute_modules:"
    if "layernorm" in modules:  # Megatron wants Transformer Engine for it, whose layers have no separate norm
        yield f"{prefix} layernorm cannot be recomputed by itself; core_attn and mlp can"
    if "moe" in modules and not shape.num_experts:
        yield f"{prefix} moe, but there are no experts; the other is mlp"
    if "mlp" in modules and shape.num_experts:
        yield f"{prefix} mlp recomputes nothing where every layer has experts; moe does"


def _wrong_experts(shape: ModelShape, expert: int) -> Iterator[str]:
    """Yield a line if parallel.expert does not fit the model's number of experts."""
    if not shape.num_experts and expert > 1:
        yield f"parallel.expert={expert}, but {shape.model_type} has no experts: leave it 1"
    elif shape.num_experts % expert:
        yield f"parallel.expert={expert} does not divide the model's num_experts={shape.num_experts}"


def _wrong_offload(megatron: Passthrough, dtype: str) -> Iterator[str]:
    """Yield a line if optimizer state is in main memory in a way that Megatron 0.16.1 cannot resume."""
    if not megatron.optimizer_cpu_offload:
        return
    wants = []
    if not megatron.use_precision_aware_optimizer:
        wants.append(
            "policy.megatron.use_precision_aware_optimizer=true: without it no checkpoint can be loaded"
        )
    if megatron.optimizer_offload_fraction != 1.0:
        wants.append(
            "policy.megatron.optimizer_offload_fraction=1.0: a part left on the GPU resumes with a wrong "
            "count of its steps"
        )
    if dtype != "bfloat16":
        wants.append("policy.dtype=bfloat16: 32-bit parameters cannot be offloaded")
    if wants:
        yield f"policy.megatron.optimizer_cpu_offload wants {'; '.join(wants)}"


def padded_vocab(shape: ModelShape, tensor: int) -> int:
    """Number of vocabulary rows, rounded up so that each tensor rank has a multiple of 16: aligned loads."""
    return -(-shape.vocab_size // (16 * tensor)) * 16 * tensor
