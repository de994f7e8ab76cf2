"""GLM-4.7-Flash: DeepSeek-V3's shape, of which config.json lists the layers with experts."""

from __future__ import annotations

from dataclasses import replace

from dapo.model.families.deepseek_v3 import DEEPSEEK_V3

GLM4_MOE_LITE = replace(
    DEEPSEEK_V3, model_type="glm4_moe_lite", understood=DEEPSEEK_V3.understood | {"mlp_layer_types"}
)
