"""Compare the policy loss with its peers: time, memory and error, same inputs, same run, rounds interleaved.

    python benchmarks/policy_loss.py                # on a GPU: everything
    python benchmarks/policy_loss.py --short        # on a GPU: a few minutes
    python benchmarks/policy_loss.py --cpu          # what runs without one

loss_contenders.py has the losses; the gradients of hidden states and LM head are measured too. A peer that is
missing or fails is named, and out of memory is a result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from dapo_kernels import linear_logprobs, policy_loss, reference
from loss_contenders import Contender, Problem, Result, Shape, contenders, make, ours
from record import RESULTS, heading, save, spread, table
from torch._dynamo.utils import counters

try:
    import triton
    from triton.errors import TritonError

    HAS_TRITON = True
except ImportError:  # only on machines without a GPU
    HAS_TRITON, TritonError = False, RuntimeError

# a contender may raise these: its result is the error
FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, TritonError)

CHECKED_TOKENS = 512  # the error is measured on so many, against float64


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def learn(contender: Contender, problem: Problem) -> Result:
    problem.hidden.grad = problem.weight.grad = None
    result = contender(problem)
    result[0].backward()
    return result


def peak_gib(contender: Contender, problem: Problem) -> float:
    """Measure peak memory above the inputs and their gradients."""
    if not problem.hidden.is_cuda:
        return float("nan")
    problem.hidden.grad, problem.weight.grad = None, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    learn(contender, problem)
    torch.cuda.synchronize()
    gradients = problem.hidden.nbytes + problem.weight.nbytes
    return float(torch.cuda.max_memory_allocated() - before - gradients) / 2**30


def is_reproducible(contender: Contender, problem: Problem) -> bool:
    """True if two runs on the same inputs give the same loss, log-probs and gradients, to the bit."""
    runs = []
    for _ in range(2):
        loss, logprobs, _ = learn(contender, problem)
        results = (loss, logprobs.nan_to_num(), problem.hidden.grad, problem.weight.grad)
        runs.append([x.detach().clone() for x in results])
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def compilations(contender: Contender, device: torch.device, dtype: torch.dtype) -> int:
    """Count Triton kernels and torch.compile graphs that 50 further numbers of tokens compile, after the
    first two.
    """
    compiled = 0

    def count(**_: Any) -> None:
        nonlocal compiled
        compiled += 1

    others = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:50].mul(8).add(8)
    before = 0
    for number, T in enumerate([1024, 1536, *others.tolist()]):
        if number == 2:
            if HAS_TRITON:
                triton.knobs.runtime.jit_cache_hook = count
            before = counters["stats"]["unique_graphs"]
        learn(contender, make(Shape(T, 256, 4096), device, dtype, seed=number))
    if HAS_TRITON:
        triton.knobs.runtime.jit_cache_hook = None
    return compiled + counters["stats"]["unique_graphs"] - before


def errors(result: Result, problem: Problem) -> tuple[float, float]:
    """Return (max, rms) error of log-probs on the first tokens inside the mask, against float64 products of
    the same inputs.
    """
    rows = problem.mask.nonzero()[:CHECKED_TOKENS, 0]
    with torch.no_grad():
        logits = problem.hidden[rows].double() @ problem.weight.t().double()
        truth = logits.log_softmax(-1).gather(-1, problem.targets[rows, None])[:, 0]
        gap = result[1][rows].double() - truth
    return float(gap.abs().max()), float(gap.square().mean().sqrt())


def compare(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    ready, absent = contenders(device.type == "cuda")
    times: dict[str, list[float]] = {name: [] for name in ready}
    facts: dict[str, dict[str, Any]] = {name: {} for name in ready}
    for number in range(rounds + 1):  # the first round warms up: it compiles, and measures memory and error
        problem = make(shape, device, dtype, seed=number)
        for name, contender in list(ready.items()):
            try:
                if number == 0:
                    result = learn(contender, problem)
                    facts[name]["max error"], facts[name]["rms error"] = errors(result, problem)
                    facts[name]["entropy"] = result[2] is not None
                    del result
                    facts[name]["peak GiB"] = peak_gib(contender, problem)
                    facts[name]["same bits"] = is_reproducible(contender, problem)
                else:
                    times[name].append(seconds(partial(learn, contender, problem), device))
            except torch.OutOfMemoryError:
                facts[name]["failed"] = "out of memory"
                del ready[name]
                torch.cuda.empty_cache()
            except FAULTS as error:
                facts[name]["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                del ready[name]
    rows = []
    for name, fact in facts.items():
        measured = {"ms": [1e3 * t for t in times[name]]} if times[name] and "failed" not in fact else {}
        rows.append({"shape": shape.name, "contender": name, **measured, **fact})
    rows += [{"shape": shape.name, "contender": name, "failed": why} for name, why in absent.items()]
    return rows


def ceilings(device: torch.device) -> dict[str, float]:
    """Measure the machine's limits: copy (bytes/s, read and written) and one bf16 matrix product (FLOP/s)."""
    source = torch.empty(2**31, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy = statistics.median(seconds(lambda: target.copy_(source), device) for _ in range(10))
    product = statistics.median(seconds(lambda: a @ b, device) for _ in range(10))
    return {"copy B/s": 2 * source.nbytes / copy, "product FLOP/s": 2 * 8192**3 / product}


def scoring(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> list[str]:
    """Measure ms of log-probs alone, by `linear_logprobs` and by plain torch."""

    def fused(p: Problem) -> None:
        linear_logprobs(p.hidden, p.weight, p.targets, p.mask)

    def plain(p: Problem) -> None:
        reference.logprobs(p.hidden @ p.weight.t(), p.targets, p.mask)

    times: dict[Callable[[Problem], None], list[float]] = {fused: [], plain: []}
    for number in range(rounds + 1):
        problem = make(shape, device, dtype, seed=number)
        for function, done in times.items():
            try:
                with torch.no_grad():
                    done.append(1e3 * seconds(partial(function, problem), device))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
    cells = [spread(t[1:], 1) if len(t) == rounds + 1 else "out of memory" for t in times.values()]
    return [shape.name, *cells]


def chunk_sweep(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> list[list[str]]:
    """Measure linear_policy_loss by tokens a chunk: ms, and GiB above inputs and gradients."""
    rows = []
    for chunk in (256, 512, 1024, 2048, 4096, 8192, 16384):
        if chunk > shape.T:
            break
        contender = partial(ours, chunk_bytes=chunk * shape.V * dtype.itemsize)
        times = []
        for number in range(rounds + 1):
            problem = make(shape, device, dtype, seed=number)
            if number == 0:
                peak = peak_gib(contender, problem)
            times.append(1e3 * seconds(partial(learn, contender, problem), device))
        rows.append([f"{chunk}", spread(times[1:], 1), f"{peak:.2f}" if peak == peak else ""])
    return rows


def on_logits(T: int, V: int, device: torch.device, dtype: torch.dtype, copy_rate: float) -> list[str]:
    """Measure policy_loss on given logits: ms, and the fraction of copy bandwidth that two reads and one
    write use.
    """

    def call(problem: Problem, logits: torch.Tensor) -> None:
        policy_loss(logits, **problem.arguments).loss.backward()

    times = []
    for number in range(6):
        problem = make(Shape(T, 64, V), device, torch.bfloat16, number)
        logits = (problem.hidden @ problem.weight.t()).detach().to(dtype).requires_grad_()
        times.append(seconds(partial(call, problem, logits), device))
        del logits, problem
    fraction = 3 * dtype.itemsize * T * V / statistics.median(times[1:]) / copy_rate
    milliseconds = spread([1e3 * t for t in times[1:]], 2)
    return [f"{T}", f"{V}", str(dtype).split(".")[1], milliseconds, f"{fraction:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="compare what runs on a CPU, at small sizes")
    parser.add_argument("--short", action="store_true", help="a few minutes on a GPU")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.cpu:
        torch.set_num_threads(1)
        device, dtype, name = torch.device("cpu"), torch.float32, "policy_loss_cpu"
        shapes = [Shape(2048, 256, 32768), Shape(2048, 256, 32768, 0.3)]
    elif torch.cuda.is_available():
        device, dtype, name = torch.device("cuda"), torch.bfloat16, "policy_loss_gpu"
        shapes = [Shape(32768, 4096, 151936), Shape(32768, 4096, 151936, 0.3)]
        if not args.short:
            models = ((3584, 152064), (4096, 151936), (5120, 152064))
            shapes += [Shape(T, H, V) for H, V in models for T in (8192, 65536)]
            shapes += [Shape(4096, 4096, 128256)]
    else:
        print("No CUDA GPU here. `--cpu` compares the paths that run on a CPU.")
        return

    text = heading(
        "The policy loss and its peers: loss, log-probs, entropy and both gradients from hidden states"
    )
    facts: dict[str, Any] = {"rows": []}
    limit = float("nan")
    if device.type == "cuda":
        facts |= ceilings(device)
        limit = facts["product FLOP/s"]
        copy = facts["copy B/s"] / 1e12
        text += f"\nCeilings: copy {copy:.2f} TB/s, bf16 product {limit / 1e12:.0f} TFLOP/s.\n"
    text += (
        f"\nMedian (min–max) ms of {args.rounds} interleaved rounds, fresh inputs each; {dtype}.\n"
        "Of floor: time of three products at the measured product rate ÷ time taken. "
        "Peak: GiB above inputs and gradients. "
        "Error: of log-probs, against float64. Same bits: two runs on the same inputs agree to the bit. "
        "Liger GRPO returns neither log-probs nor entropy and takes one advantage a row: less work, timed "
        "and not compared.\n"
    )
    for shape in shapes:
        rows = compare(shape, device, dtype, args.rounds)
        facts["rows"] += rows
        text += f"\n## {shape.name}\n\n" + table(COLUMNS, [_cells(row, shape, limit) for row in rows])
    text += "\n## Compiled anew while 50 further numbers of tokens come by\n\n"
    rows = [row for row in facts["rows"] if row["shape"] == shapes[0].name]
    works = [row["contender"] for row in rows if "failed" not in row]
    ready, _ = contenders(device.type == "cuda")
    facts["compilations"] = {}
    for name in works:
        try:
            facts["compilations"][name] = compilations(ready[name], device, dtype)
        except FAULTS as error:
            facts["compilations"][name] = type(error).__name__
    text += table(["contender", "kernels and graphs"], list(facts["compilations"].items()))
    facts["scoring"] = [scoring(shape, device, dtype, args.rounds) for shape in shapes]
    text += "\n## Scoring alone\n\n" + table(["shape", "dapo, ms", "plain torch, ms"], facts["scoring"])
    facts["chunks"] = chunk_sweep(shapes[0], device, dtype, args.rounds)
    text += f"\n## Tokens a chunk, {shapes[0].name}\n\n"
    text += table(["tokens", "ms", "peak GiB"], facts["chunks"])
    if device.type == "cuda":
        facts["on logits"] = [
            on_logits(T, 151936 // ranks, device, dtype, facts["copy B/s"])
            for dtype in (torch.bfloat16, torch.float32)
            for T in ((32768,) if args.short else (8192, 16384, 32768))
            for ranks in (1, 2, 4, 8)
        ]
        text += (
            "\n## On logits alone\n\nA tensor-parallel rank computes a part of the vocabulary, here without "
            "the collective.\n\n"
        )
        text += table(["T", "V", "logits", "ms", "of copy bandwidth"], facts["on logits"])
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1))
    save(f"{name}.md", text)


COLUMNS = ["contender", "ms", "of floor", "peak GiB", "entropy", "same bits", "max error", "rms error"]


def _cells(row: dict[str, Any], shape: Shape, limit: float) -> list[str]:
    if "failed" in row:
        return [row["contender"], row["failed"], *[""] * 6]
    median = statistics.median(row["ms"])
    return [
        row["contender"],
        f"{median:.1f} ({min(row['ms']):.1f}–{max(row['ms']):.1f})",
        f"{shape.floor_flops / limit / (median / 1e3):.0%}" if limit == limit else "",
        f"{row['peak GiB']:.2f}" if row["peak GiB"] == row["peak GiB"] else "",
        "yes" if row["entropy"] else "no",
        "yes" if row["same bits"] else "no",
        f"{row['max error']:.1e}",
        f"{row['rms error']:.1e}",
    ]


if __name__ == "__main__":
    main()
