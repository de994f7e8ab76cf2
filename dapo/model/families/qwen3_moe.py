"""Qwen3-MoE: as Qwen3, with experts in place of every MLP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapo.config import ConfigError
from dapo.model.entries import Entry
from dapo.model.families.family import FIXED, UNDERSTOOD, Family, gated, of_layer
from dapo.model.shape import ModelShape, read_sizes

EXPERT_SIZES = {
    "num_experts": "num_experts", "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_ffn_size",
}  # fmt: skip
# router_aux_loss_coef and output_router_logits belong to a training loss that is not ours
EXPERTS_UNDERSTOOD = frozenset({
    *EXPERT_SIZES, "num_local_experts", "norm_topk_prob", "router_aux_loss_coef", "output_router_logits",
})  # fmt: skip
EXPERTS_FIXED: Mapping[str, tuple[Any, ...]] = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}


class Qwen3Moe(Family):
    def fields(self, path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See Family. transformers 5 writes num_experts as num_local_experts."""
        shape = super().fields(path, raw)
        raw = {name: value for name, value in raw.items() if value is not None}
        raw = {"num_experts": raw.get("num_local_experts"), **raw}
        count, count_too = raw["num_experts"], raw.get("num_local_experts", raw["num_experts"])
        if count != count_too:
            raise ConfigError(
                f"{path}: num_experts={count}, num_local_experts={count_too}: remove the wrong one"
            )
        sizes = read_sizes(path, raw, EXPERT_SIZES)
        per_token = sizes["experts_per_token"]
        if per_token > sizes["num_experts"]:
            raise ConfigError(
                f"{path}: num_experts_per_tok={per_token} of num_experts={sizes['num_experts']}"
            )
        is_sum_one = raw.get("norm_topk_prob", False)
        if is_sum_one and per_token == 1:
            both = "norm_topk_prob=True with num_experts_per_tok=1"
            raise ConfigError(f"{path}: {both}: every expert weighs 1, so the router never learns")
        return shape | sizes | {"is_expert_sum_one": is_sum_one}

    def megatron(self, shape: ModelShape) -> dict[str, Any]:
        """See Family."""
        return super().megatron(shape) | {
            "num_moe_experts": shape.num_experts,
            "moe_ffn_hidden_size": shape.expert_ffn_size,
            "moe_router_topk": shape.experts_per_token,
            # softmax over all experts; or over the chosen ones, whose weights sum to 1
            "moe_router_pre_softmax": not shape.is_expert_sum_one,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
        }

    def mlp(self, shape: ModelShape, number: int, is_fused: bool) -> list[Entry]:
        """See Family. The norm before experts stands by itself, also in Transformer Engine's layers."""
        hidden, ffn = shape.hidden_size, shape.expert_ffn_size
        norm = {"post_attention_layernorm.weight": (hidden,)}
        router = {"mlp.gate.weight": (shape.num_experts, hidden)}
        entries = [
            of_layer(number, "pre_mlp_layernorm.weight", "whole", norm),
            of_layer(number, "mlp.router.weight", "whole", router),
        ]
        for expert in range(shape.num_experts):
            names = "mlp.experts.experts.", f"mlp.experts.{expert}."
            entries += gated(number, hidden, ffn, *names, expert)
        return entries


QWEN3_MOE = Qwen3Moe(
    "qwen3_moe",
    has_qk_norm=True,
    understood=UNDERSTOOD | EXPERTS_UNDERSTOOD,
    fixed={**FIXED, **EXPERTS_FIXED},
)
