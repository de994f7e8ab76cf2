"""A Hugging Face config.json → the model's sizes, and whether a layout can hold it. What is not understood is
refused by name. No torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo.config import Config, ConfigError
from dapo.model.passthrough import check_passthrough

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}  # fmt: skip

# have no default worth guessing
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# config.json fields that become part of the model
USED = {
    *SIZES, "model_type", "architectures", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "rope_theta",
    "rope_parameters", "rope_scaling",
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
    "mlp_bias": (False,),
    "attention_bias": (False,),
    "pretraining_tp": (1,),
}
# the same for a mixture of experts. The coefficient and whether router logits are returned belong to a
# training loss that is not ours; every layer has experts, so that all of them are alike
EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
EXPERTS_USED = {*EXPERT_SIZES, "num_local_experts", "norm_topk_prob"}
EXPERTS_IGNORED = {"router_aux_loss_coef", "output_router_logits"}
EXPERTS_FIXED: dict[str, tuple[Any, ...]] = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
# how each rope_type stretches the rotary embedding: its fields beside rope_theta and their defaults; `...`
# must be there
ROPE_TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": ...},
    "llama3": {"factor": ..., "low_freq_factor": ..., "high_freq_factor": ..., "original_max_position_embeddings": ...},
    "yarn": {
        "factor": ..., "original_max_position_embeddings": ..., "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
        "attention_factor": None, "mscale": None, "mscale_all_dim": None,
    },
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
    # rope_type and all of its fields in ROPE_TYPES; None: not stretched
    rope_scaling: dict[str, Any] | None = None
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
    """Raises ConfigError: no config.json, an unknown architecture, a size that is missing, or a field that is
    not understood.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"policy.model={directory}: no config.json there; expected a Hugging Face model directory"
        )
    raw = read_object(path)
    if raw.get("model_type") not in tuple(ARCHITECTURES):
        raise ConfigError(
            f"{path}: model_type {raw.get('model_type')!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    kind = raw["model_type"]
    for name, value in raw.items():
        _check_field(path, kind, name, value)
    # Hugging Face's default, and no use_sliding_window beside it
    if kind == "mistral" and raw.get("sliding_window", 4096) is not None:
        raise ConfigError(
            f"{path}: sliding_window={raw.get('sliding_window', 4096)} is not supported; supported: null"
        )
    vocab_size, hidden_size, ffn_size, num_layers, num_heads = (_size(path, raw, name) for name in SIZES)
    # as Hugging Face fills them in
    defaults = {"head_dim": 128 if kind == "qwen3" else hidden_size // num_heads}
    if kind == "llama":  # Qwen's default of 32 fits hardly any of its models: there the field must be
        defaults["num_key_value_heads"] = num_heads
    filled = defaults | {name: value for name, value in raw.items() if value is not None}
    rope_theta, rope_scaling = _rope(path, filled)
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
        rope_theta=rope_theta,
        is_tied=filled.get("tie_word_embeddings", False),
        rope_scaling=rope_scaling,
        **(_experts(path, filled) if kind == "qwen3_moe" else {}),
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file of one object, such as config.json. Raises ConfigError: it holds something else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: no JSON object; expected a Hugging Face model's fields and their values")
    return raw


def _experts(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a mixture of experts. transformers 5 writes num_experts as num_local_experts."""
    raw = {"num_experts": raw.get("num_local_experts"), **raw}
    if raw.get("num_local_experts", raw["num_experts"]) != raw["num_experts"]:
        raise ConfigError(
            f"{path}: num_experts={raw['num_experts']}, num_local_experts={raw['num_local_experts']}: remove "
            "the wrong one"
        )
    num_experts, per_token, ffn_size = (_size(path, raw, name) for name in EXPERT_SIZES)
    if per_token > num_experts:
        raise ConfigError(f"{path}: num_experts_per_tok={per_token} of num_experts={num_experts}")
    is_sum_one = raw.get("norm_topk_prob", False)
    if is_sum_one and per_token == 1:
        raise ConfigError(
            f"{path}: norm_topk_prob=True with num_experts_per_tok=1: every expert weighs 1, so the router "
            "never learns"
        )
    return dict(
        num_experts=num_experts,
        experts_per_token=per_token,
        expert_ffn_size=ffn_size,
        is_expert_sum_one=is_sum_one,
    )


def _size(path: Path, raw: dict[str, Any], name: str) -> int:
    value = raw.get(name)
    if type(value) is not int or value < 1:
        raise ConfigError(f"{path}: {name}={value!r}; expected a whole number of at least 1")
    return value


def _rope(path: Path, raw: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling) from `rope_parameters`, or from `rope_scaling` and `rope_theta` as older
    configs have them.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    # Hugging Face would forget its rope_theta
    if name == "rope_scaling" and raw.get("rope_parameters", raw[name]) != raw[name]:
        raise ConfigError(
            f"{path}: rope_scaling={raw[name]!r}, but rope_parameters={raw['rope_parameters']!r}: remove the "
            "wrong one"
        )
    if not isinstance(raw.get(name, {}), dict):
        raise ConfigError(f"{path}: {name}={raw[name]!r}; expected a rope_type and its fields")
    given = {
        field: value for field, value in raw.get(name, {}).items() if value is not None or field == "truncate"
    }
    theta, old_kind = given.pop("rope_theta", raw.get("rope_theta", 10_000.0)), given.pop("type", "default")
    if raw.get("rope_theta", theta) != theta:
        raise ConfigError(
            f"{path}: rope_theta={raw['rope_theta']!r}, but {theta!r} in {name}: remove the wrong one"
        )
    kind = given.pop("rope_type", old_kind)
    if kind not in tuple(ROPE_TYPES):
        raise ConfigError(
            f"{path}: {name}: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    if unknown := sorted(set(given) - set(ROPE_TYPES[kind])):
        raise ConfigError(
            f"{path}: {name}: rope_type {kind} has no field {unknown[0]!r}; known: "
            f"{', '.join(ROPE_TYPES[kind])}"
        )
    scaling = ROPE_TYPES[kind] | given
    for field, value in {"rope_theta": theta, **scaling}.items():
        if value is ...:
            raise ConfigError(f"{path}: {name}: rope_type {kind} wants the field {field!r}")
        is_number = value is None or (
            type(value) in (int, float) and value > 0 and (value >= 1 or field != "factor")
        )
        if not (type(value) is bool if field == "truncate" else is_number):
            wanted = {"truncate": "true or false", "factor": "a number of at least 1"}.get(
                field, "a number above 0"
            )
            raise ConfigError(f"{path}: {name}: {field}={value!r}; expected {wanted}")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ConfigError(
            f"{path}: {name}: low_freq_factor={scaling['low_freq_factor']} is not below high_freq_factor"
        )
    return float(theta), {"rope_type": kind, **scaling} if scaling else None


def _check_field(path: Path, kind: str, name: str, value: Any) -> None:
    has_experts = kind == "qwen3_moe"
    fixed = FIXED | (EXPERTS_FIXED if has_experts else {})
    if has_experts and name in EXPERTS_USED | EXPERTS_IGNORED:
        return
    if name in USED | IGNORED:
        return
    if name == "layer_types":
        kinds = sorted({str(kind) for kind in value}) if isinstance(value, list) else value
        if kinds is not None and kinds != ["full_attention"]:
            raise ConfigError(f"{path}: layer_types {kinds!r} are not supported; supported: full_attention")
    elif name == "sliding_window":
        pass  # Qwen's is in force only with use_sliding_window, which is checked
    elif name not in fixed:
        raise ConfigError(
            f"{path}: field {name!r} is not understood, so the model might be computed wrongly; remove it if "
            "it has no effect"
        )
    elif value not in fixed[name]:
        raise ConfigError(f"{path}: {name}={value!r} is not supported; supported: {fixed[name][0]!r}")


def check_layout(shape: ModelShape, config: Config) -> None:
    """Raises ConfigError, all that is wrong in one line.

    Heads, KV heads, columns, layers do not divide; layers cannot be recomputed so; policy.megatron says what
    it may not.
    """
    check_passthrough(config.policy.megatron)
    tensor, pipeline, virtual = (
        config.parallel.tensor,
        config.parallel.pipeline,
        config.parallel.virtual_pipeline,
    )
    megatron, chunks = config.policy.megatron, pipeline * virtual
    stages = f"parallel.pipeline={pipeline}" + (
        f" × parallel.virtual_pipeline={virtual}" if virtual > 1 else ""
    )
    a_stage = "a stage's layers" if virtual == 1 else "a stage's chunk of layers"
    divisions = [
        (f"parallel.tensor={tensor}", tensor, "the model's num_attention_heads", shape.num_heads),
        (f"parallel.tensor={tensor}", tensor, "the model's num_key_value_heads", shape.num_kv_heads),
        (
            f"parallel.tensor={tensor}",
            tensor,
            "the model's intermediate_size",
            0 if shape.num_experts else shape.ffn_size,
        ),
        (stages, chunks, "the model's num_hidden_layers", shape.num_layers),
    ]
    method, unit = megatron.get("recompute_method"), megatron.get("recompute_num_layers")
    if unit and method == "uniform":  # Megatron would meet the end of the layers in its first forward pass
        divisions.append(
            (f"policy.megatron.recompute_num_layers={unit}", unit, a_stage, shape.num_layers // chunks)
        )
    wrong = [
        f"{option} does not divide {what}={number}" for option, by, what, number in divisions if number % by
    ]
    if megatron.get("recompute_granularity") == "full" and (method not in ("uniform", "block") or not unit):
        wrong.append(
            "policy.megatron.recompute_granularity=full wants recompute_method=uniform or block, and "
            "recompute_num_layers"
        )
    # Megatron wants Transformer Engine, whose layers have no norm apart
    if "layernorm" in (megatron.get("recompute_modules") or []):
        wrong.append(
            "policy.megatron.recompute_modules: layernorm cannot be recomputed by itself; core_attn and mlp "
            "can"
        )
    wrong += _wrong_with_experts(shape, config)
    if wrong:
        raise ConfigError("; ".join(wrong))


def _wrong_with_experts(shape: ModelShape, config: Config) -> list[str]:
    expert, megatron, wrong = config.parallel.expert, config.policy.megatron, []
    modules = megatron.get("recompute_modules") or []
    if not shape.num_experts:
        wrong += (
            [f"parallel.expert={expert}, but {shape.model_type} has no experts: leave it 1"]
            if expert > 1
            else []
        )
        return wrong + (
            ["policy.megatron.recompute_modules: moe, but there are no experts; the other is mlp"]
            if "moe" in modules
            else []
        )
    if shape.num_experts % expert:
        wrong.append(f"parallel.expert={expert} does not divide the model's num_experts={shape.num_experts}")
    if "mlp" in modules:
        wrong.append(
            "policy.megatron.recompute_modules: mlp recomputes nothing where every layer has experts; moe "
            "does"
        )
    return wrong


def padded_vocab(shape: ModelShape, tensor: int) -> int:
    """The vocabulary rounded up so that each tensor rank's shard is a multiple of 16, which keeps its loads
    aligned.
    """
    return -(-shape.vocab_size // (16 * tensor)) * 16 * tensor
