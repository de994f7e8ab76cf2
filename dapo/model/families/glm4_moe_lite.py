"""GLM-4.7-Flash: DeepSeek-V3's shape, of which config.json lists the layers with experts.

Megatron's norms of the latent vectors, and SGLang's, have config.json's rms_norm_eps, here 1e-5; Hugging
Face's have 1e-6 whatever it says, so that log-probs differ from its by up to some 5e-5 in float32.
"""

from __future__ import annotations

from dataclasses import replace

from dapo.model.families.deepseek_v3 import DEEPSEEK_V3

GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe_lite",
    understood=DEEPSEEK_V3.understood | {"mlp_layer_types"},
    defaults={
        "routed_scaling_factor": 1.8,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "rms_norm_eps": 1e-5,
    },
)
