"""A Hugging Face config.json → the model's sizes. What is not understood is refused by name. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo.config import ConfigError
from dapo.model.rope import Linear, RopeScaling, Yarn, parse_rope

ARCHITECTURES = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral")  # by model_type
# sizes that have no default worth guessing, and their names in ModelShape
SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "ffn_size",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
}  # fmt: skip
FILLED_SIZES = {"num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"}
EXPERT_SIZES = {
    "num_experts": "num_experts", "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_ffn_size",
}  # fmt: skip
# fields that become part of the model, and fields that do not change what it computes here
UNDERSTOOD = {
    *SIZES, "model_type", "architectures", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "tie_word_embeddings", "rope_theta", "rope_parameters", "rope_scaling",
    "_name_or_path", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "max_position_embeddings", "max_window_layers", "pad_token_id", "torch_dtype", "transformers_version",
    "use_cache", "sliding_window",  # Qwen's window is in force only with use_sliding_window
}  # fmt: skip
# router_aux_loss_coef and output_router_logits belong to a training loss that is not ours
EXPERTS_UNDERSTOOD = {
    *EXPERT_SIZES, "num_local_experts", "norm_topk_prob", "router_aux_loss_coef", "output_router_logits",
}  # fmt: skip
# fields understood at these values only; the first is named where another is refused
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "use_sliding_window": (False,), "use_mrope": (False,), "mlp_bias": (False,),
    "attention_bias": (False,), "pretraining_tp": (1,),
}  # fmt: skip
EXPERTS_FIXED: dict[str, tuple[Any, ...]] = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes, in one vocabulary for all architectures. Checkpoints' manifests hold its fields."""

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
    rope_scaling: RopeScaling | None = None  # None: the rotary embedding is not stretched
    num_experts: int = 0  # of each layer; 0: a dense model
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    is_expert_sum_one: bool = False  # the weights of a token's experts are scaled to sum to 1

    @property
    def has_qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def has_qk_norm(self) -> bool:
        return self.model_type in ("qwen3", "qwen3_moe")


def read_config(directory: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a JSON file of a Hugging Face directory. Raise ConfigError if there is none or it is broken."""
    path = directory / name
    if not path.is_file():
        expected = "expected a Hugging Face model directory"
        raise ConfigError(f"policy.model={directory}: no {name} there; {expected}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: no JSON object; expected a Hugging Face model's fields and their values")
    return raw


def read_shape(directory: Path) -> ModelShape:
    """Read the model's sizes from the config.json of a Hugging Face directory.

    Raises:
        ConfigError: no config.json, an unknown architecture, a missing size, a field that is not understood.
    """
    raw, path = read_config(directory), directory / "config.json"
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ConfigError(f"{path}: model_type {kind!r} is not supported; supported: {supported}")
    for name, value in raw.items():
        _check_field(path, kind, name, value)
    window = raw.get("sliding_window", 4096)  # Hugging Face's default, in force without use_sliding_window
    if kind == "mistral" and window is not None:
        raise ConfigError(f"{path}: sliding_window={window} is not supported; supported: null")
    sizes = _sizes(path, raw, SIZES)
    for name in ("tie_word_embeddings", "norm_topk_prob"):
        if type(value := raw.get(name)) not in (bool, type(None)):
            raise ConfigError(f"{path}: {name}={value!r}; expected true or false")
    # as Hugging Face fills them in
    defaults = {"head_dim": 128 if kind == "qwen3" else sizes["hidden_size"] // sizes["num_heads"]}
    if kind == "llama":  # Qwen's default of 32 fits hardly any of its models: there the field is required
        defaults["num_key_value_heads"] = kv_heads(raw)
    filled: dict[str, Any] = defaults | {name: value for name, value in raw.items() if value is not None}
    rope_theta, rope_scaling = parse_rope(path, filled)
    return ModelShape(
        model_type=kind,
        norm_eps=_norm_eps(path, filled),
        rope_theta=rope_theta,
        is_tied=filled.get("tie_word_embeddings", False),
        rope_scaling=rope_scaling,
        **sizes,
        **_attention(path, filled),
        **(_experts(path, filled) if kind == "qwen3_moe" else {}),
    )


def _norm_eps(path: Path, raw: dict[str, Any]) -> float:
    value = raw.get("rms_norm_eps", 1e-6)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ConfigError(f"{path}: rms_norm_eps={value!r}; expected a number of at least 0")
    return float(value)


def _attention(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return ModelShape's fields of attention. Every KV head serves equally many heads; RoPE turns pairs."""
    sizes = _sizes(path, raw, FILLED_SIZES)
    heads, groups, size = raw["num_attention_heads"], sizes["num_kv_heads"], sizes["head_dim"]
    if heads % groups:
        raise ConfigError(f"{path}: num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    if size % 2:
        raise ConfigError(f"{path}: head_dim={size}; expected an even number")
    return sizes


def kv_heads(raw: dict[str, Any]) -> int:
    """Number of KV heads that a config.json names: without such a field, of any architecture, one a head."""
    return int(raw.get("num_key_value_heads") or raw.get("num_attention_heads") or 1)


def max_tokens(directory: Path) -> int | None:
    """Number of tokens that the model has positions for, stretched ones too; None if config.json has none."""
    raw, path = read_config(directory), directory / "config.json"
    if raw.get("max_position_embeddings") is None:
        return None
    positions: int = _sizes(path, raw, {"max_position_embeddings": "positions"})["positions"]
    _, scaling = parse_rope(path, {name: value for name, value in raw.items() if value is not None})
    if isinstance(scaling, Linear):
        return int(positions * scaling.factor)
    if isinstance(
        scaling, Yarn
    ):  # some models' files have the stretched number of positions, others the first
        return max(positions, int(scaling.original_max_position_embeddings * scaling.factor))
    return positions


def _experts(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return ModelShape's fields of experts. transformers 5 writes num_experts as num_local_experts."""
    raw = {"num_experts": raw.get("num_local_experts"), **raw}
    count, count_too = raw["num_experts"], raw.get("num_local_experts", raw["num_experts"])
    if count != count_too:
        raise ConfigError(f"{path}: num_experts={count}, num_local_experts={count_too}: remove the wrong one")
    sizes = _sizes(path, raw, EXPERT_SIZES)
    per_token = sizes["experts_per_token"]
    if per_token > sizes["num_experts"]:
        raise ConfigError(f"{path}: num_experts_per_tok={per_token} of num_experts={sizes['num_experts']}")
    is_sum_one = raw.get("norm_topk_prob", False)
    if is_sum_one and per_token == 1:
        both = "norm_topk_prob=True with num_experts_per_tok=1"
        raise ConfigError(f"{path}: {both}: every expert weighs 1, so the router never learns")
    return sizes | {"is_expert_sum_one": is_sum_one}


def _sizes(path: Path, raw: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return the named fields, by their names in ModelShape."""
    for name in names:
        if type(value := raw.get(name)) is not int or value < 1:
            raise ConfigError(f"{path}: {name}={value!r}; expected a whole number of at least 1")
    return {ours: raw[name] for name, ours in names.items()}


def _check_field(path: Path, kind: str, name: str, value: Any) -> None:
    """Raise ConfigError if a field is unknown, or has a value that would change what the model computes."""
    has_experts = kind == "qwen3_moe"
    fixed = FIXED | EXPERTS_FIXED if has_experts else FIXED
    if name in UNDERSTOOD or (has_experts and name in EXPERTS_UNDERSTOOD):
        return
    if name == "layer_types":
        kinds = sorted({str(kind) for kind in value}) if isinstance(value, list) else value
        if kinds is not None and kinds != ["full_attention"]:
            raise ConfigError(f"{path}: layer_types {kinds!r} are not supported; supported: full_attention")
    elif name not in fixed:
        wrong = f"field {name!r} is not understood, so the model might be computed wrongly"
        raise ConfigError(f"{path}: {wrong}; remove it if it has no effect")
    elif value not in fixed[name]:
        raise ConfigError(f"{path}: {name}={value!r} is not supported; supported: {fixed[name][0]!r}")
