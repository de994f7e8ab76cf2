"""Models by their published config.json, without weights; and plans of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dapo import config
from dapo.plan.plan import Plan, make_plan


def sizes(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    } | more


QWEN3 = {"model_type": "qwen3", "head_dim": 128, "attention_bias": False}
A3B = QWEN3 | {
    "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001,
    "output_router_logits": False, "max_window_layers": 48, "sliding_window": None,
}  # fmt: skip
QWEN2 = {"model_type": "qwen2", "max_window_layers": 64}
LLAMA = {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": None}
NEMO = {"model_type": "mistral", "head_dim": 128, "sliding_window": None}
NEXT = {
    "model_type": "qwen3_next", "head_dim": 256, "num_experts": 512, "num_experts_per_tok": 10,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "norm_topk_prob": True,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
}  # fmt: skip
V3 = {
    "model_type": "deepseek_v3", "n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1,
    "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "norm_topk_prob": True, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "num_nextn_predict_layers": 1,
}  # fmt: skip
MODELS = {  # config.json as published, and the number of parameters that its weights hold
    "Qwen2.5-0.5B": (
        sizes(896, 4864, 24, 14, 2, 151936, model_type="qwen2", tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen2.5-7B": (
        sizes(3584, 18944, 28, 28, 4, 152064, model_type="qwen2", use_mrope=False, sliding_window=131072),
        7_615_616_512,
    ),
    "Qwen2.5-32B": (sizes(5120, 27648, 64, 40, 8, 152064, **QWEN2), 32_763_876_352),
    "Qwen3-8B": (sizes(4096, 12288, 36, 32, 8, 151936, **QWEN3), 8_190_735_360),
    "Qwen3-30B-A3B": (sizes(2048, 6144, 48, 32, 4, 151936, **A3B), 30_532_122_624),
    "Llama-3-8B": (sizes(4096, 14336, 32, 32, 8, 128256, **LLAMA), 8_030_261_248),
    "Mistral-Nemo": (sizes(5120, 14336, 40, 32, 8, 131072, **NEMO), 12_247_782_400),
}
DIFFERING = {  # whose layers are not all alike; without those that guess several tokens
    "Qwen3-Next-80B-A3B": (sizes(2048, 5120, 48, 16, 2, 151936, **NEXT), 79_674_391_296),
    "DeepSeek-V3": (sizes(7168, 18432, 61, 128, 128, 129280, **V3), 671_026_404_352),
}


def write_model(directory: Path, name: str, **changed: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps((MODELS | DIFFERING)[name][0] | changed))
    return directory


def plan_of(
    folder: Path, model: str, *overrides: str, gpu: str = "h100", world: int | None = None, te: bool = False
) -> Plan:
    path = folder / "run.yaml"
    path.write_text(
        f"run: {{dir: r}}\ndata: {{train: t}}\npolicy: "
        f"{{model: {write_model(folder / model, model)}}}\nengine: {{kind: sglang}}\n"
    )
    return make_plan(config.load(path, list(overrides)), gpu, world, has_te=te)
