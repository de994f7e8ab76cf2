"""Three steps of real training on one GPU: a random Qwen2.5-shaped model in bf16, embedded engine. Tokens per
second, MFU, peak memory.

    python benchmarks/train_gpu.py            # 1.5 B parameters; --size 0.5b for half a billion
    python benchmarks/train_gpu.py --tiny     # the same on a CPU, to see that it runs

The model knows nothing, so the reward is a coin thrown by the response's own hash: groups come out mixed, and
every part of a step does its work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers
from record import heading, save, table

ROOT = Path(__file__).parents[1]
# bf16, dense, from the data sheets
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
SIZES: dict[str, dict[str, Any]] = {
    "1.5b": dict(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
    ),
    "0.5b": dict(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
    ),
    "tiny": dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    ),
}
STEPS = 3


def coin(response: str, answer: str) -> bool:
    """A verdict that depends on the response alone, right half of the time."""
    return zlib.crc32(response.encode("utf-8", "replace")) % 2 == 0


def make_model(size: str, directory: Path) -> int:
    """A random model with the arithmetic example's tokenizer, whose ids are the first 25 of the vocabulary;
    its number of parameters.
    """
    shutil.copytree(
        ROOT / "examples/arithmetic/base", directory, ignore=shutil.ignore_patterns("*.safetensors")
    )
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **SIZES[size], tie_word_embeddings=True, eos_token_id=1, pad_token_id=0, bos_token_id=None
    )
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())


def options(size: str, directory: Path) -> list[str]:
    length = 32 if size == "tiny" else 512
    return [
        f"policy.model={directory / 'model'}",
        f"run.dir={directory / 'run'}",
        f"run.steps={STEPS}",
        "parallel.tensor=1",
        "policy.dtype=bfloat16",
        f"policy.tokens_per_microbatch={16 * length}",
        f"rollout.max_response_length={length}",
        f"reward.overlong_cache={length // 4}",
        "reward.function=train_gpu:coin",
        "reward.truncated_is_wrong=false",
        "rollout.prompts_per_step=16",
        "rollout.group_size=16",
        "rollout.prompts_per_round=16",
        "optim.prompts_per_minibatch=4",
        "optim.lr=1e-6",
        "engine.max_concurrent=256",
        "eval.data=null",
    ]


def main(size: str) -> None:
    from dapo import config
    from dapo.mesh import Mesh
    from dapo.train import train

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        num_parameters = make_model(size, directory / "model")
        run = config.load(ROOT / "examples/arithmetic/config.yaml", options(size, directory))
        train(run, Mesh(run.parallel))
        rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()][
            :STEPS
        ]
    text = report(num_parameters, rows)
    print(text) if size == "tiny" else save("train_gpu.md", text)


def report(num_parameters: int, rows: list[dict[str, Any]]) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), float("nan"))
    text = heading(
        f"Three training steps of a random {num_parameters / 1e9:.2f} B model, bf16, one device, embedded "
        "engine"
    )
    text += "\nMFU: 6 · parameters · kept tokens / (seconds of the updates · data-sheet bf16 peak); attention not counted.\n\n"
    cells = []
    for row in rows:
        kept = row["groups/kept"] * 16 * row["rollout/length_kept"]
        mfu = 6 * num_parameters * kept / row["time/update"] / peak
        cells.append(
            [
                row["step"],
                int(kept),
                f"{row['rollout/tokens'] / row['time/rollout']:.0f}",
                f"{kept / row['time/old_logprobs']:.0f}",
                f"{kept / row['time/update']:.0f}",
                f"{mfu:.1%}",
                f"{row['perf/peak_memory_gib']:.1f}",
                f"{row['policy/mismatch']:.1e}",
                f"{row['policy/grad_norm']:.2e}",
            ]
        )
    header = [
        "step",
        "tokens learnt from",
        "generated/s",
        "scored/s",
        "learnt/s",
        "MFU",
        "peak GiB",
        "mismatch",
        "grad norm",
    ]
    return text + table(header, cells)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="1.5b")
    parser.add_argument("--tiny", action="store_const", dest="size", const="tiny")
    main(parser.parse_args().size)
