"""Compare memory and CPU time of linear_policy_loss with those of plain paths, which make the full logits.

    python benchmarks/loss_memory.py

Each run is a process of its own with one thread. Its memory is peak resident memory above that of the inputs.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from dapo_kernels import linear_policy_loss, reference
from record import heading, save, spread, table

ROUNDS = 3
# T, H, V
SIZES = [(4096, 256, 32_768, "float32"), (1024, 256, 151_936, "float32"), (1024, 256, 151_936, "bfloat16")]
PATHS = {
    "plain": "the full logits, then `reference.policy_loss` and autograd",
    "log_softmax": "the full logits, `torch.log_softmax`, gather, and autograd; no entropy",
    "linear": "`linear_policy_loss`, 64 MiB chunks",
}
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
MIB = 2**20


def main() -> None:
    text = heading("Memory and CPU time of the policy loss from hidden states")
    text += (
        "\nLoss, per-token statistics, gradients of hidden states and LM head; peak resident memory above "
        f"the inputs (median of {ROUNDS} processes) and CPU seconds, median (min–max). One thread; nothing "
        "masked, so that no path can skip a row.\n\n"
    )
    text += "".join(f"- {path}: {what}\n" for path, what in PATHS.items()) + "\n"
    rows = []
    for size in SIZES:
        runs: dict[str, list[dict[str, float]]] = {path: [] for path in PATHS}
        for _ in range(ROUNDS):  # interleaved: all see the same machine
            for path, done in runs.items():
                done.append(measure_in_a_process(path, *size))
        plain = [median(run[key] for run in runs["plain"]) for key in ("mib", "seconds")]
        for path, done in runs.items():
            mib, seconds = (median(run[key] for run in done) for key in ("mib", "seconds"))
            cpu = spread([run["seconds"] for run in done], 2)
            rows.append(
                [*size, path, f"{mib:.0f}", f"{mib / plain[0]:.1%}", cpu, f"{seconds / plain[1]:.2f}×"]
            )
    text += table(["T", "H", "V", "type", "path", "peak MiB", "of plain", "CPU s", "of plain"], rows)
    save("loss_memory.md", text)


def measure_in_a_process(path: str, *size: object) -> dict[str, float]:
    command = [sys.executable, __file__, path, *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measure(path: str, num_tokens: int, hidden_size: int, vocab: int, dtype: str) -> dict[str, float]:
    torch.set_num_threads(1)
    one_loss(path, *make(8, hidden_size, 64, dtype))  # torch loads and allocates once
    inputs = make(num_tokens, hidden_size, vocab, dtype)
    before, start = psutil.Process().memory_info().rss, time.process_time()
    one_loss(path, *inputs)
    seconds = time.process_time() - start
    return {"mib": (peak_bytes() - before) / MIB, "seconds": seconds}


def one_loss(path: str, hidden: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> None:
    if path == "log_softmax":
        targets, old, advantages, _ = rest  # nothing is masked
        scores = torch.log_softmax((hidden @ weight.t()).float(), -1)
        ratio = (scores.gather(-1, targets[:, None])[:, 0] - old).exp()
        loss = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.28) * advantages).sum()
    elif path == "plain":
        loss = reference.policy_loss(hidden @ weight.t(), *rest, **CLIP).loss  # type: ignore[arg-type]
    else:
        loss = linear_policy_loss(hidden, weight, *rest, **CLIP).loss  # type: ignore[arg-type]
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None and loss.isfinite()


def make(num_tokens: int, hidden_size: int, vocab: int, dtype: str) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=g, dtype=getattr(torch, dtype)).requires_grad_()
    weight = torch.randn(vocab, hidden_size, generator=g, dtype=hidden.dtype)
    # in place: a peak while the inputs are made would hide the loss's
    weight = weight.mul_(hidden_size**-0.5).requires_grad_()
    targets = torch.randint(vocab, (num_tokens,), generator=g)
    old = -torch.rand(num_tokens, generator=g) - 10.5
    advantages = torch.randn(num_tokens, generator=g)
    return hidden, weight, targets, old, advantages, torch.ones(num_tokens, dtype=torch.bool)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path, *sizes, dtype = sys.argv[1:]
        print(json.dumps(measure(path, *map(int, sizes), dtype)))  # type: ignore[call-arg, arg-type]
    else:
        main()
