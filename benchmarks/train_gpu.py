"""Measure three training steps on one GPU: tokens per second, MFU and peak memory.

A random Qwen2.5-shaped model in bf16 is trained and sampled by the embedded engine.

    python benchmarks/train_gpu.py            # 1.5 B parameters; --size 0.5b for half a billion
    python benchmarks/train_gpu.py --tiny     # the same on a CPU, to see that it runs

The model knows nothing, so a hash of the response decides whether it is correct: groups come out mixed, and
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
# hidden size, intermediate size, layers, heads, vocabulary
SIZES = {
    "1.5b": (1536, 8960, 28, 12, 151936),
    "0.5b": (896, 4864, 24, 14, 151936),
    "tiny": (64, 128, 2, 4, 512),
}
STEPS = 3


def coin(response: str, answer: str) -> bool:
    """Return a verdict that depends on the response alone and is True half of the time."""
    return zlib.crc32(response.encode("utf-8", "replace")) % 2 == 0


def make_model(size: str, directory: Path) -> int:
    """Write a random model with the arithmetic example's tokenizer, whose ids are the first 25 of the
    vocabulary. Returns its number of parameters.
    """
    without_weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(ROOT / "examples/arithmetic/base", directory, ignore=without_weights)
    torch.manual_seed(0)
    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    config = transformers.Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
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
        lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    text = report(num_parameters, [json.loads(line) for line in lines[:STEPS]])
    if size == "tiny":
        print(text)
    else:
        save("train_gpu.md", text)


def report(num_parameters: int, rows: list[dict[str, Any]]) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), float("nan"))
    model = f"a random {num_parameters / 1e9:.2f} B model"
    text = heading(f"Three training steps of {model}, bf16, one device, embedded engine")
    text += (
        "\nMFU: 6 · parameters · kept tokens / (seconds of the updates · data-sheet bf16 peak); attention is "
        "not counted.\n\n"
    )
    cells = []
    for row in rows:
        kept = row["groups/kept"] * 16 * row["rollout/length_kept"]
        mfu = 6 * num_parameters * kept / row["time/update"] / peak
        cells.append(
            {
                "step": row["step"],
                "tokens learnt from": int(kept),
                "generated/s": f"{row['rollout/tokens'] / row['time/rollout']:.0f}",
                "scored/s": f"{kept / row['time/old_logprobs']:.0f}",
                "learnt/s": f"{kept / row['time/update']:.0f}",
                "MFU": f"{mfu:.1%}",
                "peak GiB": f"{row['perf/peak_memory_gib']:.1f}",
                "mismatch": f"{row['policy/mismatch']:.1e}",
                "grad norm": f"{row['policy/grad_norm']:.2e}",
            }
        )
    return text + table(list(cells[0]), [list(line.values()) for line in cells])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="1.5b")
    parser.add_argument("--tiny", action="store_const", dest="size", const="tiny")
    main(parser.parse_args().size)
