"""All families share a decoder of grouped attention, RMS norms and gated MLPs, as Llama's; each overrides
where it differs.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dapo.config import ConfigError
from dapo.model.entries import Dimensions, Entry, Kind
from dapo.model.rope import parse_rope
from dapo.model.shape import ModelShape, read_sizes

# sizes that have no default worth guessing, and their names in ModelShape
SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "ffn_size",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
}  # fmt: skip
FILLED_SIZES = {"num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"}
# fields that become part of the model, and fields that do not change what it computes here
UNDERSTOOD = frozenset({
    *SIZES, "model_type", "architectures", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "tie_word_embeddings", "rope_theta", "rope_parameters", "rope_scaling",
    "_name_or_path", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "max_position_embeddings", "max_window_layers", "pad_token_id", "torch_dtype", "transformers_version",
    "use_cache", "sliding_window",  # Qwen's window is in force only with use_sliding_window
})  # fmt: skip
# fields understood at these values only; the first is named where another is refused
FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "use_sliding_window": (False,), "use_mrope": (False,), "mlp_bias": (False,),
    "attention_bias": (False,), "pretraining_tp": (1,),
}  # fmt: skip


PLAIN: Kind = "qkv"
GATED: Kind = "gated_qkv"


@dataclass(frozen=True)
class Family:
    """An architecture, by the model_type of its config.json."""

    model_type: str
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_checksums: bool = True  # engine/checksums.py knows what servers fuse of its tensors
    prefix: str = "model."  # of the language model's names in files
    head_dim: int | None = None  # where config.json has none; None: hidden_size / num_attention_heads
    understood: frozenset[str] = UNDERSTOOD
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: FIXED)
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # Hugging Face's, of fields that may be left out

    def check(self, path: Path, raw: Mapping[str, Any]) -> None:
        """Raise ConfigError on a field this family does not know, or a value it does not support."""
        for name, value in raw.items():
            self.check_field(path, name, value)
        for name in ("tie_word_embeddings", "norm_topk_prob"):
            if type(value := raw.get(name)) not in (bool, type(None)):
                raise ConfigError(f"{path}: {name}={value!r}; expected true or false")

    def filled(self, raw: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields with those that config.json leaves out, as Hugging Face fills them in."""
        return {"head_dim": self.head_dim or sizes["hidden_size"] // sizes["num_heads"]} | self.given(raw)

    def given(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that are not null, and the family's `defaults`."""
        return {**self.defaults, **{name: value for name, value in raw.items() if value is not None}}

    def fields(self, path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return ModelShape's fields. Raise ConfigError on one that is missing or impossible."""
        sizes = read_sizes(path, raw, SIZES)
        filled = self.filled(raw, sizes)
        rope_theta, rope_scaling = parse_rope(path, filled)
        return sizes | _attention(path, filled) | {
            "model_type": self.model_type,
            "norm_eps": _norm_eps(path, filled),
            "rope_theta": rope_theta,
            "is_tied": filled.get("tie_word_embeddings", False),
            "rope_scaling": rope_scaling,
        }  # fmt: skip

    def megatron(self, shape: ModelShape) -> dict[str, Any]:
        """Return the fields of Megatron's TransformerConfig that are this family's own."""
        return {"add_qkv_bias": self.has_qkv_bias, "qk_layernorm": self.has_qk_norm}

    def aside(self, shape: ModelShape, name: str, found: Container[str]) -> str | None:
        """Return what a tensor in files belongs to that is no part of the language model; None: it is one.

        `found`: the names of all tensors there.
        """
        return None

    def layer(self, shape: ModelShape, number: int, is_fused: bool) -> list[Entry]:
        """Return a layer's entries. `is_fused`: the linear after a norm holds it."""
        return [*self.attention(shape, number, is_fused), *self.mlp(shape, number, is_fused)]

    def attention(self, shape: ModelShape, number: int, is_fused: bool) -> list[Entry]:
        """Return the entries of a layer's attention, the norm before it included."""
        hidden, q, kv = (
            shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        )  # fmt: skip
        norm = "self_attention.linear_qkv.layer_norm_weight" if is_fused else "input_layernorm.weight"
        q_rows, kind = 2 * q if shape.is_gated else q, GATED if shape.is_gated else PLAIN
        qkv = {f"self_attn.{x}_proj": rows for x, rows in (("q", q_rows), ("k", kv), ("v", kv))}
        weights = {f"{name}.weight": (rows, hidden) for name, rows in qkv.items()}
        entries = [
            of_layer(number, norm, "whole", {"input_layernorm.weight": (hidden,)}),
            of_layer(number, "self_attention.linear_qkv.weight", kind, weights),
            of_layer(
                number,
                "self_attention.linear_proj.weight",
                "columns",
                {"self_attn.o_proj.weight": (hidden, q)},
            ),
        ]
        if self.has_qkv_bias:
            biases = {f"{name}.bias": (rows,) for name, rows in qkv.items()}
            entries.append(of_layer(number, "self_attention.linear_qkv.bias", "qkv", biases))
        if self.has_qk_norm:
            for x in ("q", "k"):
                of_heads = {f"self_attn.{x}_norm.weight": (shape.head_dim,)}
                entries.append(of_layer(number, f"self_attention.{x}_layernorm.weight", "whole", of_heads))
        return entries

    def mlp(self, shape: ModelShape, number: int, is_fused: bool) -> list[Entry]:
        """Return the entries of a layer's MLP, the norm before it included."""
        norm = "mlp.linear_fc1.layer_norm_weight" if is_fused else "pre_mlp_layernorm.weight"
        return [
            of_layer(number, norm, "whole", {"post_attention_layernorm.weight": (shape.hidden_size,)}),
            *gated(number, shape.hidden_size, shape.ffn_size, "mlp.", "mlp."),
        ]

    def check_field(self, path: Path, name: str, value: Any) -> None:
        """Raise ConfigError on a field this family does not know, or a value it does not support."""
        if name in self.understood:
            return
        if name == "layer_types":
            kinds = sorted({str(kind) for kind in value}) if isinstance(value, list) else value
            if kinds is not None and kinds != ["full_attention"]:
                raise ConfigError(
                    f"{path}: layer_types {kinds!r} are not supported; supported: full_attention"
                )
        elif name not in self.fixed:
            wrong = f"field {name!r} is not understood, so the model might be computed wrongly"
            raise ConfigError(f"{path}: {wrong}; remove it if it has no effect")
        elif value not in self.fixed[name]:
            raise ConfigError(
                f"{path}: {name}={value!r} is not supported; supported: {self.fixed[name][0]!r}"
            )


def of_layer(
    number: int,
    megatron: str,
    kind: Kind,
    hf: Mapping[str, Dimensions],
    expert: int | None = None,
    **more: Any,
) -> Entry:
    """Return a layer's entry; `hf` has names and shapes below `model.layers.N.`. `more`: fields of Entry."""
    names = tuple(f"model.layers.{number}.{name}" for name in hf)
    return Entry(megatron, names, tuple(hf.values()), kind, number, expert=expert, **more)


def gated(
    number: int, hidden: int, ffn: int, ours: str, theirs: str, expert: int | None = None
) -> list[Entry]:
    """Return the entries of a gated MLP, whose names begin with `ours` in Megatron and `theirs` in files."""
    gate_up = {f"{theirs}gate_proj.weight": (ffn, hidden), f"{theirs}up_proj.weight": (ffn, hidden)}
    down = {f"{theirs}down_proj.weight": (hidden, ffn)}
    return [
        of_layer(number, f"{ours}linear_fc1.weight", "sections", gate_up, expert),
        of_layer(number, f"{ours}linear_fc2.weight", "columns", down, expert),
    ]


def _norm_eps(path: Path, raw: Mapping[str, Any]) -> float:
    value = raw.get("rms_norm_eps", 1e-6)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ConfigError(f"{path}: rms_norm_eps={value!r}; expected a number of at least 0")
    return float(value)


def _attention(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return ModelShape's fields of attention. Every KV head serves equally many heads; RoPE turns pairs."""
    sizes = read_sizes(path, raw, FILLED_SIZES)
    heads, groups, size = raw["num_attention_heads"], sizes["num_kv_heads"], sizes["head_dim"]
    if heads % groups:
        raise ConfigError(f"{path}: num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    if size % 2:
        raise ConfigError(f"{path}: head_dim={size}; expected an even number")
    return sizes
