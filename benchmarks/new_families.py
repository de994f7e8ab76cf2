"""Do models with a DeltaNet, and with latent attention and experts, learn? The arithmetic example with them.

python benchmarks/new_families.py [seeds]

Each tiny model is trained as examples/arithmetic/make_base.py trains its own, then by the example's run.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from arithmetic_seeds import ROOT, run
from record import heading, save, table

sys.path.insert(0, str(ROOT / "examples/arithmetic"))
import make_base
from task import make_problem

BASES = ROOT / "runs/new_families"  # base models, once made

COMMON: dict[str, Any] = dict(
    vocab_size=len(make_base.VOCABULARY), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=512, initializer_range=0.125, tie_word_embeddings=True,
    pad_token_id=make_base.PAD, eos_token_id=make_base.EOS, bos_token_id=None,
)  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Qwen3.5 (DeltaNet, then gated attention)": (transformers.Qwen3_5TextConfig, dict(
        intermediate_size=128, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        full_attention_interval=2, rope_parameters=ROPE | {"partial_rotary_factor": 0.5},
    )),
    "DeepSeek-V3 (latent attention; 8 experts in the second layer)": (transformers.DeepseekV3Config, dict(
        intermediate_size=128, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=12,
        qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
        moe_intermediate_size=64, n_group=2, topk_group=1, first_k_dense_replace=1,
        routed_scaling_factor=1.5, rope_parameters=ROPE,
    )),
}  # fmt: skip


def make(name: str, target: Path) -> None:
    """Train a base model and save it."""
    config, own = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**COMMON, **own))
    rng = random.Random(7)
    for phase in make_base.PHASES:
        make_base.train(model, phase, rng)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=make_base.EOS, pad_token_id=make_base.PAD
    )
    model.save_pretrained(target)
    make_base.make_tokenizer().save_pretrained(target)


def main(num_seeds: int = 3) -> None:
    torch.set_num_threads(1)
    text = heading("Architectures with other layers learn the arithmetic task")
    text += "\nmean@k on held-out problems (`eval/accuracy`) after so many steps of the example's run, one "
    text += "process; the largest mismatch of any step, mean |old − behavior log-prob|; wall seconds from "
    text += "launch to end.\n"
    for name, (config, _) in MODELS.items():
        base = BASES / config.model_type
        if not base.exists():
            make(name, base)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        problems = [make_problem(random.Random(i)) for i in range(1000)]
        greedy, sampled = (make_base.accuracy(model, problems, is_greedy) for is_greedy in (True, False))
        text += f"\n## {name}\n\n{model.num_parameters():,} parameters; the base model's accuracy: greedy "
        text += f"{greedy:.3f}, sampled {sampled:.3f}.\n\n"
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(num_seeds):
                options = [f"policy.model={base}"]
                accuracy, seconds, last = run(seed, 1, Path(folder) / f"run{seed}", options)
                steps = sorted(accuracy)
                rest = f"{last['worst mismatch']:.1e}", f"{seconds:.0f}"
                rows.append([seed, *(f"{accuracy[step]:.3f}" for step in steps), *rest])
        text += table(["seed", *(f"step {step}" for step in steps), "mismatch", "seconds"], rows)
    save("new_families.md", text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
