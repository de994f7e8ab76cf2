"""Qwen3.5 and Qwen3.6, with MLPs or with experts: the language model, also of files with a vision tower.

As Qwen3-Next, but a DeltaNet's projections are separate tensors.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dapo.model.families.family import FIXED, UNDERSTOOD
from dapo.model.families.qwen3_moe import EXPERTS_FIXED, EXPERTS_UNDERSTOOD
from dapo.model.families.qwen3_next import DELTA_DEFAULTS, DELTA_FIXED, DELTA_UNDERSTOOD, Delta, SharedExpert
from dapo.model.shape import ModelShape

# fields beside text_config
OUTER = {
    "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "language_model_only",
}  # fmt: skip
NESTED = "model.language_model."  # prefix in the files of a model with a vision tower


class Qwen35(Delta):
    def aside(self, shape: ModelShape, name: str, found: Container[str]) -> str | None:
        """See Family."""
        is_vision = name.startswith(("model.visual.", "visual."))
        return "the vision tower" if is_vision else super().aside(shape, name, found)


class Qwen35Moe(Qwen35, SharedExpert):
    def fields(self, path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See Family. The weights of a token's experts always sum to 1, and no layer has an MLP."""
        return super().fields(path, {"intermediate_size": raw.get("moe_intermediate_size"), **raw})


QWEN3_5_TEXT = Qwen35(
    "qwen3_5_text",
    has_qk_norm=True,
    has_checksums=False,
    head_dim=256,
    understood=UNDERSTOOD | DELTA_UNDERSTOOD,
    fixed={**FIXED, **DELTA_FIXED},
    defaults=DELTA_DEFAULTS,
)
QWEN3_5 = replace(
    QWEN3_5_TEXT, model_type="qwen3_5", prefix=NESTED, understood=QWEN3_5_TEXT.understood | OUTER
)
QWEN3_5_MOE_TEXT = Qwen35Moe(
    "qwen3_5_moe_text",
    has_qk_norm=True,
    has_checksums=False,
    head_dim=256,
    understood=(UNDERSTOOD | EXPERTS_UNDERSTOOD | DELTA_UNDERSTOOD) - {"norm_topk_prob"},
    fixed={**FIXED, **EXPERTS_FIXED, **DELTA_FIXED, "norm_topk_prob": (True,)},
    defaults=DELTA_DEFAULTS | {"norm_topk_prob": True},
)
QWEN3_5_MOE = replace(
    QWEN3_5_MOE_TEXT, model_type="qwen3_5_moe", prefix=NESTED, understood=QWEN3_5_MOE_TEXT.understood | OUTER
)
