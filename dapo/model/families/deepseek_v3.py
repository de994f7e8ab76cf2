"""DeepSeek-V3's shape: latent attention; after the first layers experts, some of them for every token."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from dapo.config import ConfigError
from dapo.model.entries import Entry
from dapo.model.families import experts
from dapo.model.families.family import FIXED, UNDERSTOOD, Family, of_layer
from dapo.model.rope import Yarn, without_which
from dapo.model.shape import Latent, ModelShape, SigmoidRouter, read_sizes

PART = "partial_rotary_factor"  # of the rotated part all of it
EXPERT_SIZES = {
    "n_routed_experts": "num_experts", "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_ffn_size",
}  # fmt: skip
HEAD_SIZES = {"qk_nope_head_dim": "plain", "qk_rope_head_dim": "rotated", "v_head_dim": "value_dim",
              "kv_lora_rank": "kv_rank", "q_lora_rank": "query_rank"}  # fmt: skip
# num_nextn_predict_layers: of layers that guess several tokens, which are left out
LATENT_UNDERSTOOD = {
    *EXPERT_SIZES, *HEAD_SIZES, *experts.OF_THE_LOSS, "num_local_experts", "qk_head_dim",
    "n_shared_experts", "n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace",
    "num_nextn_predict_layers", "num_mtp_layers", "ep_size", "auto_map",
}  # fmt: skip
LATENT_FIXED: Mapping[str, tuple[Any, ...]] = {
    "norm_topk_prob": (True,), "rope_interleave": (True,), "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",), "moe_layer_freq": (1,), PART: (1.0,),
}  # fmt: skip


class DeepSeekV3(Family):
    def filled(self, raw: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        """See Family. The head size of queries and keys is that of both their parts."""
        found = super().filled(raw, sizes)
        if isinstance(rope := found.get("rope_parameters"), dict) and rope.get(PART, 1.0) == 1.0:
            found = without_which(found)
        both = [found.get(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
        is_known = all(type(size) is int for size in both)
        return found | {"head_dim": sum(both) if is_known else None}  # type: ignore[arg-type]

    def fields(self, path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See Family."""
        given = self.given(raw)
        heads = read_sizes(path, given, HEAD_SIZES)
        both = heads["plain"] + heads["rotated"]
        if heads["rotated"] % 2 or given.get("qk_head_dim", both) != both:
            sizes_of = f"qk_rope_head_dim={heads['rotated']}, qk_head_dim={given.get('qk_head_dim', both)}"
            raise ConfigError(f"{path}: {sizes_of}; expected an even number, and {both}")
        shape = super().fields(path, raw)
        if shape["num_kv_heads"] != shape["num_heads"]:
            both = f"num_key_value_heads={shape['num_kv_heads']}, num_attention_heads={shape['num_heads']}"
            raise ConfigError(f"{path}: {both}: latent attention has a key for each head")
        scaling = shape["rope_scaling"]
        # else Hugging Face stretches the rotated part of queries and keys alone
        is_whole = isinstance(scaling, Yarn) and scaling.mscale and scaling.mscale == scaling.mscale_all_dim
        if isinstance(scaling, Yarn) and (scaling.attention_factor is not None or not is_whole):
            fields = f"attention_factor={scaling.attention_factor}, mscale={scaling.mscale}"
            same = f"mscale_all_dim={scaling.mscale_all_dim} are not supported with latent attention"
            raise ConfigError(f"{path}: {fields}, {same}; supported: mscale equal to mscale_all_dim")
        sizes = experts.read_experts(path, given, EXPERT_SIZES)
        shared = read_sizes(path, given, {"n_shared_experts": "count"})["count"]
        return shape | sizes | {
            "is_expert_sum_one": True,
            "num_dense_layers": self._dense_layers(path, given),
            "shared_ffn_size": shared * sizes["expert_ffn_size"],
            "sigmoid_router": _router(path, given, sizes["num_experts"]),
            "rotary_dim": heads["rotated"],
            "latent": Latent(heads["query_rank"], heads["kv_rank"], heads["value_dim"]),
        }  # fmt: skip

    def _dense_layers(self, path: Path, given: Mapping[str, Any]) -> int:
        """Return how many of the first layers have an MLP: some config.json list all layers."""
        layers, listed = given["num_hidden_layers"], given.get("mlp_layer_types")
        counted = listed.count("dense") if isinstance(listed, list) else 1
        count = given.get("first_k_dense_replace", counted)
        if type(count) is not int or not 0 <= count < layers:
            expected = f"expected a whole number below num_hidden_layers={layers}"
            raise ConfigError(f"{path}: first_k_dense_replace={count!r}; {expected}")
        if listed is not None and listed != ["dense"] * count + ["sparse"] * (layers - count):
            only = f"supported: dense in the first {count} layers, then sparse"
            raise ConfigError(f"{path}: mlp_layer_types {listed!r} are not supported; {only}")
        return count

    def megatron(self, shape: ModelShape) -> dict[str, Any]:
        """See Family."""
        assert shape.latent
        fields: dict[str, Any] = {
            "multi_latent_attention": True,
            "q_lora_rank": shape.latent.query_rank,
            "kv_lora_rank": shape.latent.kv_rank,
            "qk_head_dim": shape.head_dim - shape.num_rotated,
            "qk_pos_emb_head_dim": shape.num_rotated,
            "v_head_dim": shape.latent.value_dim,
            "rope_type": "rope",  # frequencies are set by policy/model.py, stretched or not
            "rotary_base": shape.rope_theta,
        }
        if isinstance(scaling := shape.rope_scaling, Yarn):  # Megatron makes the factor of the scores of them
            fields["rotary_scaling_factor"] = scaling.factor
            fields["mscale_all_dim"] = scaling.mscale_all_dim or 0.0
        return super().megatron(shape) | fields | experts.megatron(shape)

    def aside(self, shape: ModelShape, name: str, found: Container[str]) -> str | None:
        """See Family. Layers after the last guess several tokens, if they have what joins two of them."""
        prefix, _, rest = name.partition("layers.")
        number = rest.partition(".")[0]
        is_beyond = prefix == "model." and number.isdecimal() and int(number) >= shape.num_layers
        is_head = is_beyond and f"model.layers.{number}.eh_proj.weight" in found
        return "multi-token prediction" if is_head else None

    def attention(self, shape: ModelShape, number: int, is_fused: bool) -> list[Entry]:
        """See Family."""
        latent = shape.latent
        assert latent
        hidden, heads, kv, rotated = shape.hidden_size, shape.num_heads, latent.kv_rank, shape.num_rotated
        key_value = shape.head_dim - rotated + latent.value_dim
        ours, theirs = "self_attention.", "self_attn."

        def entry(megatron: str, kind: Any, hf: str, *dimensions: int) -> Entry:
            return of_layer(number, f"{ours}{megatron}", kind, {f"{theirs}{hf}.weight": dimensions})

        def norm(of: str, hf: str, size: int) -> Entry:
            at = f"linear_{of}_up_proj.layer_norm_weight" if is_fused else f"{of}_layernorm.weight"
            return entry(at, "whole", hf, size)

        rank, queries = latent.query_rank, heads * shape.head_dim
        return [
            of_layer(number, "input_layernorm.weight", "whole", {"input_layernorm.weight": (hidden,)}),
            entry("linear_q_down_proj.weight", "whole", "q_a_proj", rank, hidden),
            norm("q", "q_a_layernorm", rank),
            entry("linear_q_up_proj.weight", "rows", "q_b_proj", queries, rank),
            entry("linear_kv_down_proj.weight", "whole", "kv_a_proj_with_mqa", kv + rotated, hidden),
            norm("kv", "kv_a_layernorm", kv),
            entry("linear_kv_up_proj.weight", "rows", "kv_b_proj", heads * key_value, kv),
            entry("linear_proj.weight", "columns", "o_proj", hidden, heads * latent.value_dim),
        ]

    def mlp(self, shape: ModelShape, number: int, is_fused: bool) -> list[Entry]:
        """See Family."""
        if not shape.has_experts(number):
            return super().mlp(shape, number, is_fused)
        return experts.entries(shape, number, "shared_experts")


def _router(path: Path, given: Mapping[str, Any], num_experts: int) -> SigmoidRouter:
    sizes = read_sizes(path, given, {"n_group": "groups", "topk_group": "kept"})
    groups, kept = sizes["groups"], sizes["kept"]
    scale = given["routed_scaling_factor"]
    if type(scale) not in (int, float) or not scale > 0:
        raise ConfigError(f"{path}: routed_scaling_factor={scale!r}; expected a number above 0")
    if num_experts % groups or kept > groups:
        both = f"n_group={groups} with topk_group={kept}"
        raise ConfigError(f"{path}: {both} does not divide n_routed_experts={num_experts} into groups")
    per_token = given["num_experts_per_tok"]
    if per_token > kept * num_experts // groups:
        inside = f"topk_group={kept} groups of {num_experts // groups} experts"
        raise ConfigError(f"{path}: num_experts_per_tok={per_token} of {inside}")
    if groups > 1 and per_token // kept != 2:  # Megatron adds so many of a group, Hugging Face two
        raise ConfigError(
            f"{path}: num_experts_per_tok={per_token} with topk_group={kept} is not supported; supported: "
            "twice topk_group"
        )
    return SigmoidRouter(groups, kept, float(scale))


DEEPSEEK_V3 = DeepSeekV3(
    "deepseek_v3",
    has_qk_norm=True,
    has_checksums=False,
    understood=UNDERSTOOD | LATENT_UNDERSTOOD,
    fixed={**FIXED, **LATENT_FIXED},
    defaults={
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
    },
)
