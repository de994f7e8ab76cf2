"""Measure three training steps on one GPU: tokens per second, MFU and peak memory.

A random Qwen2.5-shaped model in bf16 is trained and sampled by the embedded engine. Nothing is saved but the
figures, each when it is measured.

    python benchmarks/train_gpu.py            # 1.5 B parameters; --size 0.5b for half a billion
    python benchmarks/train_gpu.py --tiny     # the same on a CPU, to see that it runs

The model knows nothing, and most of its tokens have no text, so every other response counts as correct:
groups come out mixed, and every part of a step does its work.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import figures
import torch
import transformers
from record import heading, keep, table

from dapo import config
from dapo.assemble import make_sampler
from dapo.measure.step import peak_memory_gib
from dapo.mesh import Mesh
from dapo.policy.megatron import Policy
from dapo.policy.metrics import step_metrics

ROOT = Path(__file__).parents[1]
# bf16, dense, from the data sheets
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
# hidden size, intermediate size, layers, heads, vocabulary
SIZES = {
    "1.5b": (1536, 8960, 28, 12, 151936),
    "0.5b": (896, 4864, 24, 14, 151936),
    "tiny": (64, 128, 2, 4, 512),
}
STEPS = 3  # the first one compiles
CALLS = itertools.count()
R = TypeVar("R")


def every_other(response: str, answer: str) -> bool:
    """Return True at every second call."""
    return next(CALLS) % 2 == 0


def make_model(size: str, directory: Path) -> int:
    """Write a random model with the arithmetic example's tokenizer, whose ids are the first 25 of the
    vocabulary. Returns its number of parameters.
    """
    without_weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(ROOT / "examples/arithmetic/base", directory, ignore=without_weights)
    torch.manual_seed(0)
    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    shape = transformers.Qwen2Config(
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
    model = transformers.Qwen2ForCausalLM(shape).to(torch.bfloat16)
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
        f"policy.tokens_per_microbatch={32 * (length + 16)}",  # 32 samples
        f"rollout.max_response_length={length}",
        f"reward.overlong_cache={length // 4}",
        "reward.function=train_gpu:every_other",
        "reward.truncated_is_wrong=false",
        "reward.workers=0",  # this process calls it
        "rollout.prompts_per_step=16",
        "rollout.group_size=16",
        "rollout.prompts_per_round=16",
        "optim.prompts_per_minibatch=4",
        "optim.lr=1e-6",
        "engine.max_concurrent=256",
        "eval.data=null",
    ]


def main(size: str) -> int:
    if size != "tiny" and not torch.cuda.is_available():
        print("No CUDA GPU here. `--tiny` shows on a CPU that it runs.", file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        num_parameters, seconds = clocked(make_model, size, directory / "model")
        figures.write("model written", seconds, "s", f"{num_parameters / 1e9:.2f} B parameters")
        run = config.load(ROOT / "examples/arithmetic/config.yaml", options(size, directory))
        mesh = Mesh(run.parallel)
        (sampler, _), seconds = clocked(make_sampler, run, mesh)
        figures.write("engine built", seconds, "s")
        policy, seconds = clocked(Policy, run, mesh)
        figures.write("policy built", seconds, "s")
        for step in range(STEPS):
            rows.append(measure(step, sampler, policy, num_parameters))
            keep(f"train_gpu_{size}.md", report(num_parameters, rows))
        sampler.close()
    print(report(num_parameters, rows))
    return 0


def measure(step: int, sampler: Any, policy: Policy, num_parameters: int) -> dict[str, Any]:
    """Take one step of Algorithm 1. Each of its parts becomes a figure when it ends."""
    note = f"step {step + 1} of {STEPS}" + (", which compiles" if step == 0 else "")
    row: dict[str, Any] = {"step": step}

    def figure(name: str, value: float, unit: str, cell: str) -> None:
        row[name] = cell.format(value)
        figures.write(name, value, unit, note)

    figure("sync", clocked(sampler.load_weights, policy, step)[1], "s", "{:.2f} s")
    batch, seconds = clocked(sampler.next_batch, step)
    kept = int(batch.metrics["groups/kept"] * 16 * batch.metrics["rollout/length_kept"])
    figure("tokens learnt from", kept, "tokens", "{}")
    figure("generated/s", batch.metrics["rollout/tokens"] / seconds, "tokens/s", "{:.0f}")
    placed = policy.place(batch)
    mismatch, seconds = clocked(policy.score, placed)
    figure("scored/s", kept / seconds, "tokens/s", "{:.0f}")
    figure("mismatch", mismatch["policy/mismatch"], "", "{:.1e}")
    updates, seconds = clocked(lambda: [policy.update(minibatch) for minibatch in placed.minibatches])
    figure("learnt/s", kept / seconds, "tokens/s", "{:.0f}")
    flops = 6 * num_parameters * kept / seconds
    figure("MFU", 100 * flops / peak_flops(), "%", "{:.1f} %")
    figure("peak memory", peak_memory_gib(), "GiB", "{:.1f} GiB")
    figure("gradient norm", step_metrics(updates)["policy/grad_norm"], "", "{:.2e}")
    return row


def clocked(function: Callable[..., R], *arguments: Any) -> tuple[R, float]:
    """Return the function's result and the seconds until the device has done its work."""
    start = time.perf_counter()
    result = function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def peak_flops() -> float:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device), float("nan"))


def report(num_parameters: int, rows: list[dict[str, Any]]) -> str:
    model = f"a random {num_parameters / 1e9:.2f} B model"
    text = heading(f"{STEPS} training steps of {model}, bf16, one device, embedded engine")
    text += (
        "\nMFU: 6 · parameters · kept tokens / (seconds of the updates · data-sheet bf16 peak); attention is "
        "not counted.\n\n"
    )
    return text + table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="1.5b")
    parser.add_argument("--tiny", action="store_const", dest="size", const="tiny")
    sys.exit(main(parser.parse_args().size))
