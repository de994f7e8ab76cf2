"""A Hugging Face config.json → the model's sizes, and whether a layout can hold it. What is not understood is refused by name. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo.config import Config, ConfigError

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "llama": "LlamaForCausalLM",
}  # fmt: skip

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
# the same for a mixture of experts. The coefficient and whether router logits are returned belong to a training loss that is not ours;
# every layer has experts, so that all of them are alike
EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
EXPERTS_USED = {*EXPERT_SIZES, "num_local_experts", "norm_topk_prob"}
EXPERTS_IGNORED = {"router_aux_loss_coef", "output_router_logits"}
EXPERTS_FIXED: dict[str, tuple[Any, ...]] = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
# fields of policy.megatron that add a loss of the router's, and what is refused of them
AUXILIARY_LOSSES = ("moe_aux_loss_coeff", "moe_z_loss_coeff")


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
    num_experts: int = 0  # of each layer; 0: a dense model
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    is_expert_sum_one: bool = False  # whether the weights of a token's experts are scaled to sum to 1

    @property
    def has_qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def has_qk_norm(self) -> bool:
        return self.model_type in ("qwen3", "qwen3_moe")


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
    kind = raw["model_type"]
    for name, value in raw.items():
        _check_field(path, kind, name, value)

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
        **(_experts(path, filled) if kind == "qwen3_moe" else {}),
    )


def _experts(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a mixture of experts. transformers 5 writes num_experts as num_local_experts."""
    raw = {"num_experts": raw.get("num_local_experts"), **raw}
    if raw.get("num_local_experts", raw["num_experts"]) != raw["num_experts"]:
        raise ConfigError(f"{path}: num_experts={raw['num_experts']}, num_local_experts={raw['num_local_experts']}: remove the wrong one")
    num_experts, per_token, ffn_size = (_size(path, raw, name) for name in EXPERT_SIZES)
    if per_token > num_experts:
        raise ConfigError(f"{path}: num_experts_per_tok={per_token} of num_experts={num_experts}")
    is_sum_one = raw.get("norm_topk_prob", False)
    if is_sum_one and per_token == 1:
        raise ConfigError(f"{path}: norm_topk_prob=True with num_experts_per_tok=1: every expert weighs 1, so the router never learns")
    return dict(num_experts=num_experts, experts_per_token=per_token, expert_ffn_size=ffn_size, is_expert_sum_one=is_sum_one)


def _size(path: Path, raw: dict[str, Any], name: str) -> int:
    value = raw.get(name)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: {name}={value!r}; expected a whole number of at least 1")
    return value


def _check_field(path: Path, kind: str, name: str, value: Any) -> None:
    has_experts = kind == "qwen3_moe"
    fixed = FIXED | (EXPERTS_FIXED if has_experts else {})
    if has_experts and name in EXPERTS_USED | EXPERTS_IGNORED:
        return
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
    elif name not in fixed:
        raise ConfigError(
            f"{path}: field {name!r} is not understood, so the model might be computed wrongly; remove it if it has no effect"
        )
    elif value not in fixed[name]:
        raise ConfigError(f"{path}: {name}={value!r} is not supported; supported: {fixed[name][0]!r}")


def check_layout(shape: ModelShape, config: Config) -> None:
    """Raises ConfigError, all that is wrong in one line: heads, KV heads, columns, layers do not divide; layers cannot be recomputed so."""
    tensor, pipeline, megatron = config.parallel.tensor, config.parallel.pipeline, config.policy.megatron
    divisions = [
        (f"parallel.tensor={tensor}", tensor, "the model's num_attention_heads", shape.num_heads),
        (f"parallel.tensor={tensor}", tensor, "the model's num_key_value_heads", shape.num_kv_heads),
        (f"parallel.tensor={tensor}", tensor, "the model's intermediate_size", 0 if shape.num_experts else shape.ffn_size),
        (f"parallel.pipeline={pipeline}", pipeline, "the model's num_hidden_layers", shape.num_layers),
    ]
    method, unit = megatron.get("recompute_method"), megatron.get("recompute_num_layers")
    if unit and method == "uniform":  # Megatron would meet the end of the layers in its first forward pass
        divisions.append((f"policy.megatron.recompute_num_layers={unit}", unit, "a stage's layers", shape.num_layers // pipeline))
    wrong = [f"{option} does not divide {what}={number}" for option, by, what, number in divisions if number % by]
    if megatron.get("recompute_granularity") == "full" and (method not in ("uniform", "block") or not unit):
        wrong.append("policy.megatron.recompute_granularity=full wants recompute_method=uniform or block, and recompute_num_layers")
    if "layernorm" in (megatron.get("recompute_modules") or []):  # Megatron wants Transformer Engine, whose layers have no norm apart
        wrong.append("policy.megatron.recompute_modules: layernorm cannot be recomputed by itself; core_attn and mlp can")
    wrong += _wrong_with_experts(shape, config)
    if wrong:
        raise ConfigError("; ".join(wrong))


def _wrong_with_experts(shape: ModelShape, config: Config) -> list[str]:
    expert, megatron, wrong = config.parallel.expert, config.policy.megatron, []
    modules = megatron.get("recompute_modules") or []
    if not shape.num_experts:
        wrong += [f"parallel.expert={expert}, but {shape.model_type} has no experts: leave it 1"] if expert > 1 else []
        return wrong + (["policy.megatron.recompute_modules: moe, but there are no experts; the other is mlp"] if "moe" in modules else [])
    if shape.num_experts % expert:
        wrong.append(f"parallel.expert={expert} does not divide the model's num_experts={shape.num_experts}")
    if "mlp" in modules:
        wrong.append("policy.megatron.recompute_modules: mlp recomputes nothing where every layer has experts; moe does")
    for field in AUXILIARY_LOSSES:  # Megatron multiplies it by a microbatch's tokens, and expects to divide all gradients by the update's
        if megatron.get(field):
            wrong.append(f"policy.megatron.{field}={megatron[field]} is not supported: only 0, for our loss is a sum over tokens")
    return wrong


def padded_vocab(shape: ModelShape, tensor: int) -> int:
    """The vocabulary rounded up so that each tensor rank's shard is a multiple of 16, which keeps its loads aligned."""
    return -(-shape.vocab_size // (16 * tensor)) * 16 * tensor
