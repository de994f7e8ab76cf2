"""Qwen3-MoE: as Qwen3, with experts in place of every MLP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dapo.model.entries import Entry
from dapo.model.families import experts
from dapo.model.families.family import FIXED, UNDERSTOOD, Family
from dapo.model.shape import ModelShape

EXPERT_SIZES = {
    "num_experts": "num_experts", "num_experts_per_tok": "experts_per_token",
    "moe_intermediate_size": "expert_ffn_size",
}  # fmt: skip
EXPERTS_UNDERSTOOD = {*EXPERT_SIZES, *experts.OF_THE_LOSS, "num_local_experts", "norm_topk_prob"}
EXPERTS_FIXED: Mapping[str, tuple[Any, ...]] = {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}


class Qwen3Moe(Family):
    def fields(self, path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See Family."""
        given = self.given(raw)
        sizes = experts.read_experts(path, given, EXPERT_SIZES)
        is_sum_one = given.get("norm_topk_prob", False)
        experts.check_router(path, sizes["experts_per_token"], is_sum_one)
        return super().fields(path, raw) | sizes | {"is_expert_sum_one": is_sum_one}

    def megatron(self, shape: ModelShape) -> dict[str, Any]:
        """See Family."""
        return super().megatron(shape) | experts.megatron(shape)

    def mlp(self, shape: ModelShape, number: int, is_fused: bool) -> list[Entry]:
        """See Family."""
        return experts.entries(shape, number, "shared_expert")


QWEN3_MOE = Qwen3Moe(
    "qwen3_moe",
    has_qk_norm=True,
    understood=UNDERSTOOD | EXPERTS_UNDERSTOOD,
    fixed={**FIXED, **EXPERTS_FIXED},
)
