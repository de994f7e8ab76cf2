"""Qwen3-Next: a Gated DeltaNet in three layers of four, gated attention in the fourth, and experts."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from dapo.config import ConfigError
from dapo.model.entries import Entry, Kind
from dapo.model.families.family import FIXED, UNDERSTOOD, Family, of_layer
from dapo.model.families.qwen3_moe import EXPERTS_FIXED, EXPERTS_UNDERSTOOD, Qwen3Moe
from dapo.model.rope import without_which
from dapo.model.shape import DeltaNet, ModelShape, read_sizes

DELTA_SIZES = {
    "linear_num_key_heads": "num_key_heads", "linear_num_value_heads": "num_value_heads",
    "linear_key_head_dim": "key_dim", "linear_value_head_dim": "value_dim",
    "linear_conv_kernel_dim": "conv_width",
}  # fmt: skip
DELTA_DEFAULTS = {
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
}  # fmt: skip
# mtp_…: of heads that guess several tokens, which are left out; mamba_ssm_dtype: of a server's state
DELTA_UNDERSTOOD = {
    *DELTA_DEFAULTS, "layer_types", "shared_expert_intermediate_size", "mamba_ssm_dtype",
    "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings",
}  # fmt: skip
DELTA_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attn_output_gate": (True,), "output_gate_type": ("swish", "silu"), "mlp_only_layers": ([], None),
}  # fmt: skip
SECTIONS = ("query", "key", "value", "z", "beta", "alpha")  # of the projection, as checkpoints name them


class Delta(Family):
    """A decoder with a Gated DeltaNet in most layers, and gated attention in the others."""

    def filled(self, raw: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        """See Family. The part that is rotated may stand among the fields of the rotary embedding."""
        found = super().filled(raw, sizes)
        if isinstance(rope := found.get("rope_parameters"), dict):
            part = "partial_rotary_factor"
            found[part] = rope.get(part, found[part])
        # of a token of text all three positions of mrope are the same, so its rotation is the usual one
        return without_which(found)

    def fields(self, path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See Family."""
        shape = super().fields(path, raw)
        filled = self.filled(raw, shape)
        delta = DeltaNet(**read_sizes(path, filled, DELTA_SIZES), period=self._period(path, filled))
        if delta.num_value_heads % delta.num_key_heads:
            both = f"linear_num_value_heads={delta.num_value_heads}"
            raise ConfigError(f"{path}: linear_num_key_heads={delta.num_key_heads} does not divide {both}")
        part = filled["partial_rotary_factor"]
        rotated = part * shape["head_dim"] if type(part) in (int, float) and math.isfinite(part) else 0
        if rotated != int(rotated) or not 0 < rotated <= shape["head_dim"] or rotated % 2:
            expected = f"expected an even number of the {shape['head_dim']} dimensions of a head"
            raise ConfigError(f"{path}: partial_rotary_factor={part!r}; {expected}")
        return shape | {
            "rotary_dim": int(rotated), "is_gated": True, "is_zero_centred": True, "delta": delta,
        }  # fmt: skip

    def _period(self, path: Path, filled: Mapping[str, Any]) -> int:
        """Return how often a layer with attention comes: config.json may list all layers."""
        count = filled["num_hidden_layers"]
        period: int = read_sizes(path, filled, {"full_attention_interval": "period"})["period"]
        listed = filled.get("layer_types")
        if listed and "full_attention" in listed:
            period = listed.index("full_attention") + 1
        kinds = ["linear_attention" if (i + 1) % period else "full_attention" for i in range(count)]
        if listed is not None and listed != kinds:
            raise ConfigError(
                f"{path}: layer_types {listed[:8]!r}… are not supported; supported: full_attention in every "
                f"n-th of {count} layers, and linear_attention in all others"
            )
        return period

    def check_field(self, path: Path, name: str, value: Any) -> None:
        """See Family."""
        if name != "layer_types":
            super().check_field(path, name, value)

    def megatron(self, shape: ModelShape) -> dict[str, Any]:
        """See Family."""
        assert shape.delta
        return super().megatron(shape) | {
            "experimental_attention_variant": "gated_delta_net",
            "linear_attention_freq": shape.delta.period,
            "linear_conv_kernel_dim": shape.delta.conv_width,
            "linear_key_head_dim": shape.delta.key_dim,
            "linear_value_head_dim": shape.delta.value_dim,
            "linear_num_key_heads": shape.delta.num_key_heads,
            "linear_num_value_heads": shape.delta.num_value_heads,
            "attention_output_gate": True,
            "layernorm_zero_centered_gamma": True,
        }

    def aside(self, shape: ModelShape, name: str, found: Container[str]) -> str | None:
        """See Family."""
        return "multi-token prediction" if name.startswith("mtp.") else None

    def attention(self, shape: ModelShape, number: int, is_fused: bool) -> list[Entry]:
        """See Family."""
        if not shape.is_delta(number):
            return super().attention(shape, number, is_fused)
        delta = shape.delta
        assert delta
        hidden, keys, values, heads = shape.hidden_size, delta.keys, delta.values, delta.num_value_heads
        kind, projections = self.projections(shape)
        conv = {"linear_attn.conv1d.weight": (2 * keys + values, 1, delta.conv_width)}
        norm = "self_attention.in_proj.layer_norm_weight" if is_fused else "input_layernorm.weight"
        return [
            of_layer(number, norm, "whole", {"input_layernorm.weight": (hidden,)}),
            of_layer(number, "self_attention.in_proj.weight", kind, projections,
                     sections=(keys, keys, values, values, heads, heads), section_names=SECTIONS),
            of_layer(number, "self_attention.conv1d.weight", "sections", conv,
                     sections=(keys, keys, values), section_names=SECTIONS[:3]),
            of_layer(number, "self_attention.A_log", "rows", {"linear_attn.A_log": (heads,)}),
            of_layer(number, "self_attention.dt_bias", "rows", {"linear_attn.dt_bias": (heads,)}),
            of_layer(number, "self_attention.out_norm.weight", "whole",
                     {"linear_attn.norm.weight": (delta.value_dim,)}),
            of_layer(number, "self_attention.out_proj.weight", "columns",
                     {"linear_attn.out_proj.weight": (hidden, values)}),
        ]  # fmt: skip

    def projections(self, shape: ModelShape) -> tuple[Kind, dict[str, tuple[int, int]]]:
        """Return how the six projections of a DeltaNet's input lie in files, with names and shapes."""
        delta = shape.delta
        assert delta
        rows = {
            "qkv": 2 * delta.keys + delta.values, "z": delta.values,
            "b": delta.num_value_heads, "a": delta.num_value_heads,
        }  # fmt: skip
        return "sections", {
            f"linear_attn.in_proj_{x}.weight": (n, shape.hidden_size) for x, n in rows.items()
        }


class SharedExpert(Qwen3Moe):
    """Qwen3's experts, and one that all tokens go to, whose output is gated."""

    def fields(self, path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See Family."""
        shared = read_sizes(path, raw, {"shared_expert_intermediate_size": "shared_ffn_size"})
        return super().fields(path, raw) | shared | {"is_shared_gated": True}


class Qwen3Next(Delta, SharedExpert):
    def projections(self, shape: ModelShape) -> tuple[Kind, dict[str, tuple[int, int]]]:
        """See Delta. Here they are interleaved by key head."""
        delta = shape.delta
        assert delta
        rows = {"qkvz": 2 * delta.keys + 2 * delta.values, "ba": 2 * delta.num_value_heads}
        return "key_heads", {
            f"linear_attn.in_proj_{x}.weight": (n, shape.hidden_size) for x, n in rows.items()
        }


QWEN3_NEXT = Qwen3Next(
    "qwen3_next",
    has_qk_norm=True,
    has_checksums=False,
    head_dim=256,
    understood=(UNDERSTOOD | EXPERTS_UNDERSTOOD | DELTA_UNDERSTOOD),
    fixed={**FIXED, **EXPERTS_FIXED, **DELTA_FIXED},
    defaults=DELTA_DEFAULTS | {"norm_topk_prob": True},
)
