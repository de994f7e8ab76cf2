"""A Hugging Face config.json → the model's sizes, and whether a layout can hold it. What is not understood is refused by name. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo.config import Config, ConfigError

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")  # have no default worth guessing
# config.json fields that become part of the model
USED = {
    *SIZES, "model_type", "architectures", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_theta",
    "rope_parameters",
}  # fmt: skip
# fields that do not change what the model computes here
IGNORED = {
    "_name_or_path", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "max_position_embeddings",
    "max_window_layers", "pad_token_id", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# fields understood at one value only
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "rope_scaling": (None,),
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "pretraining_tp": (1,),
}


# fields of Megatron's configs that the run sets from elsewhere, or that would make it silently wrong: why, or what to set in their place
SET_BY_RUN = {
    "tensor_model_parallel_size": "set parallel.tensor",
    "sequence_parallel": "it is on whenever parallel.tensor > 1",
    "pipeline_model_parallel_size": "set parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "set parallel.virtual_pipeline",
    "microbatch_group_size_per_vp_stage": "batches are made for groups of parallel.pipeline",
    "context_parallel_size": "set parallel.context",
    "expert_model_parallel_size": "set parallel.expert",
    **dict.fromkeys(["hierarchical_context_parallel_sizes", "hybrid_context_parallel"], "sequences are shared by parallel.context ranks"),
    **dict.fromkeys(
        ["num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "account_for_embedding_in_pipeline_split",
         "account_for_loss_in_pipeline_split", "pipeline_model_parallel_layout"],
        "all pipeline stages have the same number of layers",
    ),
    **dict.fromkeys(["batch_p2p_comm", "overlap_p2p_comm"], "pipeline stages would take each other's gradients for activations"),
    "variable_seq_lengths": "packed microbatches differ in length",
    "calculate_per_token_loss": "the loss is a sum that holds its normaliser; Megatron must divide by nothing",
    "average_in_collective": "gradients are sums over ranks; the normaliser is in the loss",
    "grad_reduce_in_fp32": "gradients are summed in float32",
    "defer_embedding_wgrad_compute": "the loss itself makes the head's gradient",
    **dict.fromkeys(
        ["overlap_param_gather", "overlap_param_gather_with_optimizer_step"],
        "weights are read between updates, by the weight sync, before they would have arrived",
    ),
    **dict.fromkeys(["use_distributed_optimizer", "num_distributed_optimizer_instances"], "all data-parallel ranks share one optimizer"),
    **dict.fromkeys(["params_dtype", "pipeline_dtype", "bf16", "fp16"], "set policy.dtype"),
    "optimizer": "it is AdamW",
    "lr": "set optim.lr",
    "weight_decay": "set optim.weight_decay",
    "clip_grad": "set optim.clip_grad",
    **dict.fromkeys(["adam_beta1", "adam_beta2"], "set optim.betas"),
    **dict.fromkeys(
        ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "normalization",
         "layernorm_epsilon", "activation_func", "gated_linear_unit", "add_bias_linear", "add_qkv_bias", "qk_layernorm"],
        "the model's config.json says it",
    ),
    **dict.fromkeys(["hidden_dropout", "attention_dropout"], "a token's log-prob must not depend on chance"),
    **dict.fromkeys(["perform_initialization", "init_method", "output_layer_init_method", "embedding_init_method"], "weights are loaded"),
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """What config.json says, in one vocabulary for all architectures."""

    model_type: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    is_tied: bool

    @property
    def has_qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def has_qk_norm(self) -> bool:
        return self.model_type == "qwen3"


def read_shape(directory: Path) -> ModelShape:
    """Raises ConfigError: no config.json, an unknown architecture, a size that is missing, or a field that is not understood."""
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"policy.model={directory}: no config.json there; expected a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if raw.get("model_type") not in ARCHITECTURES:
        raise ConfigError(f"{path}: model_type {raw.get('model_type')!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    for name, value in raw.items():
        _check_field(path, name, value)

    kind = raw["model_type"]
    vocab_size, hidden_size, ffn_size, num_layers, num_heads = (_size(path, raw, name) for name in SIZES)
    defaults = {"head_dim": 128 if kind == "qwen3" else hidden_size // num_heads}  # as Hugging Face fills them in
    if kind == "llama":  # Qwen's default of 32 fits hardly any of its models: there the field must be
        defaults["num_key_value_heads"] = num_heads
    filled = defaults | {name: value for name, value in raw.items() if value is not None}
    return ModelShape(
        model_type=kind,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        ffn_size=ffn_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_size(path, filled, "num_key_value_heads"),
        head_dim=_size(path, filled, "head_dim"),
        norm_eps=filled.get("rms_norm_eps", 1e-6),
        rope_theta=filled.get("rope_parameters", {}).get("rope_theta", filled.get("rope_theta", 10_000.0)),
        is_tied=filled.get("tie_word_embeddings", False),
    )


def _size(path: Path, raw: dict[str, Any], name: str) -> int:
    value = raw.get(name)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: {name}={value!r}; expected a whole number of at least 1")
    return value


def _check_field(path: Path, name: str, value: Any) -> None:
    if name in USED | IGNORED:
        rope = value if name == "rope_parameters" and value else {}
        if rope.get("rope_type", "default") != "default" or set(rope) - {"rope_type", "rope_theta"}:
            raise ConfigError(f"{path}: rope_parameters={value} is not supported; supported: rope_type default")
        return
    if name == "layer_types":
        if set(value) != {"full_attention"}:
            raise ConfigError(f"{path}: layer_types {sorted(set(value))} are not supported; supported: full_attention")
    elif name == "sliding_window":
        pass  # in force only with use_sliding_window, which is checked
    elif name not in FIXED:
        raise ConfigError(
            f"{path}: field {name!r} is not understood, so the model might be computed wrongly; remove it if it has no effect"
        )
    elif value not in FIXED[name]:
        raise ConfigError(f"{path}: {name}={value!r} is not supported; supported: {FIXED[name][0]!r}")


def check_layout(shape: ModelShape, config: Config) -> None:
    """Raises ConfigError, all that is wrong in one line.

    Heads, KV heads, columns, layers do not divide; layers cannot be recomputed so; policy.megatron has a field that the run itself sets.
    """
    tensor, pipeline, virtual = config.parallel.tensor, config.parallel.pipeline, config.parallel.virtual_pipeline
    megatron, chunks = config.policy.megatron, pipeline * virtual
    stages = f"parallel.pipeline={pipeline}" + (f" × parallel.virtual_pipeline={virtual}" if virtual > 1 else "")
    a_stage = "a stage's layers" if virtual == 1 else "a stage's chunk of layers"
    divisions = [
        (f"parallel.tensor={tensor}", tensor, "the model's num_attention_heads", shape.num_heads),
        (f"parallel.tensor={tensor}", tensor, "the model's num_key_value_heads", shape.num_kv_heads),
        (f"parallel.tensor={tensor}", tensor, "the model's intermediate_size", shape.ffn_size),
        (stages, chunks, "the model's num_hidden_layers", shape.num_layers),
    ]
    method, unit = megatron.get("recompute_method"), megatron.get("recompute_num_layers")
    if unit and method == "uniform":  # Megatron would meet the end of the layers in its first forward pass
        divisions.append((f"policy.megatron.recompute_num_layers={unit}", unit, a_stage, shape.num_layers // chunks))
    wrong = [f"{option} does not divide {what}={number}" for option, by, what, number in divisions if number % by]
    if megatron.get("recompute_granularity") == "full" and (method not in ("uniform", "block") or not unit):
        wrong.append("policy.megatron.recompute_granularity=full wants recompute_method=uniform or block, and recompute_num_layers")
    if "layernorm" in (megatron.get("recompute_modules") or []):  # Megatron wants Transformer Engine, whose layers have no norm apart
        wrong.append("policy.megatron.recompute_modules: layernorm cannot be recomputed by itself; core_attn and mlp can")
    wrong += [f"policy.megatron.{name} is not free: {SET_BY_RUN[name]}" for name in megatron if name in SET_BY_RUN]
    if wrong:
        raise ConfigError("; ".join(wrong))


def padded_vocab(shape: ModelShape, tensor: int) -> int:
    """The vocabulary rounded up so that each tensor rank's shard is a multiple of 16, which keeps its loads aligned."""
    return -(-shape.vocab_size // (16 * tensor)) * 16 * tensor
