"""The policy loss against its peers: time, memory and error, same inputs, same run, rounds interleaved.

    python benchmarks/policy_loss.py                # on a GPU: everything
    python benchmarks/policy_loss.py --short        # on a GPU: a few minutes
    python benchmarks/policy_loss.py --cpu          # what runs without one

Every contender turns hidden states and the LM head into the loss of Eq. 8, per-token log-probs and, where it
can, entropy, and the gradients of both. Peers are taken from their packages if those are installed; what is
missing or fails is said, and out of memory is a result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from dapo_kernels import linear_logprobs, linear_policy_loss, policy_loss, reference
from record import RESULTS, heading, save, spread, table
from torch import Tensor
from torch._dynamo.utils import counters

try:
    import triton
    from triton.errors import TritonError

    HAS_TRITON = True
except ImportError:  # only on machines without a GPU
    HAS_TRITON, TritonError = False, RuntimeError

# what a contender's code may raise; it is its result then
FAULTS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    TritonError,
)

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
CHECKED_TOKENS = 512  # the error is measured on so many, against float64


@dataclass
class Problem:
    """One minibatch's worth: [T, H] hidden states, [V, H] head, and what the loss needs of every token."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor

    @property
    def tokens(self) -> tuple[Tensor, ...]:
        return self.targets, self.old, self.advantages, self.mask


@dataclass(frozen=True)
class Shape:
    T: int
    H: int
    V: int
    masked: float = 0.0  # share of prompt tokens

    @property
    def name(self) -> str:
        return f"T {self.T}, H {self.H}, V {self.V}, {self.masked:.0%} masked"

    @property
    def floor_flops(self) -> float:
        """Of three matrix products over the tokens that count."""
        return 3 * 2 * self.T * (1 - self.masked) * self.H * self.V


def make(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
    """Fresh inputs with logits of σ = 3, targets drawn from the softmax, old = log-prob + noise that clips
    some tokens.
    """
    generator = torch.Generator(device).manual_seed(seed)
    randn = lambda *size: torch.randn(*size, generator=generator, device=device)  # noqa: E731
    hidden = randn(shape.T, shape.H).to(dtype)
    weight = (randn(shape.V, shape.H) * 3 / shape.H**0.5).to(dtype)
    targets, logprobs = (
        torch.empty(shape.T, dtype=torch.int64, device=device),
        torch.empty(shape.T, device=device),
    )
    for rows in torch.arange(shape.T, device=device).split(2048):
        scores = (hidden[rows] @ weight.t()).float().log_softmax(-1)
        targets[rows] = torch.multinomial(scores.exp(), 1, generator=generator)[:, 0]
        logprobs[rows] = scores.gather(-1, targets[rows, None])[:, 0]
    mask = torch.rand(shape.T, generator=generator, device=device) >= shape.masked
    weights = torch.full((shape.T,), 1 / max(int(mask.sum()), 1), device=device)
    return Problem(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        targets,
        logprobs + 0.3 * randn(shape.T),
        randn(shape.T),
        mask,
        weights,
    )


Result = tuple[Tensor, Tensor, Tensor | None]  # loss, log-probs [T], entropy [T]
Contender = Callable[[Problem], Result]


def loss_of(problem: Problem, logprobs: Tensor) -> Tensor:
    """Eq. 8 from log-probs, for peers that stop there."""
    ratio = (logprobs - problem.old).exp()
    clipped = ratio.clamp(1 - CLIP["clip_low"], 1 + CLIP["clip_high"])
    losses = torch.maximum(-ratio * problem.advantages, -clipped * problem.advantages)
    return (losses * problem.weights * problem.mask).sum()


def ours(problem: Problem) -> Result:
    out = linear_policy_loss(problem.hidden, problem.weight, *problem.tokens, weights=problem.weights, **CLIP)
    return out.loss, out.logprobs, out.entropy


def ours_fp32_logits(problem: Problem) -> Result:
    out = linear_policy_loss(
        problem.hidden, problem.weight, *problem.tokens, weights=problem.weights, fp32_logits=True, **CLIP
    )
    return out.loss, out.logprobs, out.entropy


def plain(problem: Problem) -> Result:
    out = reference.policy_loss(
        problem.hidden @ problem.weight.t(), *problem.tokens, weights=problem.weights, **CLIP
    )
    return out.loss, out.logprobs, out.entropy


def make_compiled() -> Contender:
    def step(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scores = (hidden @ weight.t()).float().log_softmax(-1)
        with torch.no_grad():
            entropy = -(scores.exp() * scores).sum(-1)
        return scores.gather(-1, targets[:, None])[:, 0], entropy

    compiled = torch.compile(step, dynamic=True)

    def contender(problem: Problem) -> Result:
        logprobs, entropy = compiled(problem.hidden, problem.weight, problem.targets)
        return loss_of(problem, logprobs), logprobs, entropy

    return contender


def make_liger_scaled_ce() -> Contender:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    def contender(problem: Problem) -> Result:
        targets = problem.targets.masked_fill(~problem.mask, -100)  # it skips ignored rows
        nll, entropy = Function.apply(problem.hidden, problem.weight, targets, 1.0, -100, 1, True)
        return loss_of(problem, -nll), -nll, entropy

    return contender


def make_liger_grpo() -> Contender:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28, loss_type="dapo", chunk_size=1
    )

    def contender(problem: Problem) -> Result:
        rows = 8  # it takes a padded batch [B, L]
        batch = lambda x: x.view(rows, -1, *x.shape[1:])  # noqa: E731
        loss, *_ = module(
            batch(problem.hidden), problem.weight, batch(problem.targets), batch(problem.mask).float(), problem.advantages[:rows],
            old_per_token_logps=batch(problem.old),
        )  # fmt: skip
        # one advantage a row, and no log-probs: timed, not compared
        return loss, torch.full_like(problem.old, torch.nan), None

    return contender


def make_verl() -> Contender:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def contender(problem: Problem) -> Result:
        logprobs, entropy = linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, 1.0, "none", None
        )
        return loss_of(problem, logprobs), logprobs, entropy

    return contender


def make_cce(filter_eps: str | None) -> Contender:
    from cut_cross_entropy import linear_cross_entropy

    def contender(problem: Problem) -> Result:
        nll = linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, reduction="none", filter_eps=filter_eps
        )
        return loss_of(problem, -nll), -nll, None

    return contender


def make_quack() -> Contender:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def contender(problem: Problem) -> Result:
        loss = chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="sum")
        # cross entropy and no more: what three products cost at best
        return loss, torch.full_like(problem.old, torch.nan), None

    return contender


def make_trl() -> Contender:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def contender(problem: Problem) -> Result:
        logits = problem.hidden @ problem.weight.t()
        logprobs = selective_log_softmax(logits, problem.targets)
        with torch.no_grad():
            entropy = entropy_from_logits(logits)
        return loss_of(problem, logprobs.float()), logprobs, entropy

    return contender


def contenders(on_gpu: bool) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that can run here, and why the others cannot."""
    makers: dict[str, Callable[[], Contender]] = {
        "dapo": lambda: ours,
        "dapo, fp32 logits": lambda: ours_fp32_logits,
        "plain torch": lambda: plain,
        "torch.compile": make_compiled,
        "TRL": make_trl,
        "Liger GRPO (chunked)": make_liger_grpo,
    }
    if on_gpu:
        makers |= {
            "Liger scaled CE": make_liger_scaled_ce,
            "verl linear_cross_entropy": make_verl,
            "CCE": lambda: make_cce("high"),
            "quack (cross entropy only)": make_quack,
            "CCE, exact": lambda: make_cce(None),
        }
    ready, absent = {}, {}
    for name, maker in makers.items():
        try:
            ready[name] = maker()
        except (ImportError, RuntimeError) as error:
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return ready, absent


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
    """Above the inputs and their gradients."""
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
    """Whether two runs on the same inputs give the same loss, log-probs and gradients, to the bit."""
    runs = []
    for _ in range(2):
        loss, logprobs, _ = learn(contender, problem)
        runs.append(
            [
                x.detach().clone()
                for x in (loss, logprobs.nan_to_num(), problem.hidden.grad, problem.weight.grad)
            ]
        )
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def compilations(contender: Contender, device: torch.device, dtype: torch.dtype) -> int:
    """Triton kernels and torch.compile graphs that 50 further numbers of tokens compile, after the first
    two.
    """
    compiled = 0

    def count(**_: Any) -> None:
        nonlocal compiled
        compiled += 1

    lengths = [
        1024,
        1536,
        *torch.randperm(256, generator=torch.Generator().manual_seed(0))[:50].mul(8).add(8).tolist(),
    ]
    before = 0
    for number, T in enumerate(lengths):
        if number == 2:
            if HAS_TRITON:
                triton.knobs.runtime.jit_cache_hook = count
            before = counters["stats"]["unique_graphs"]
        learn(contender, make(Shape(T, 256, 4096), device, dtype, seed=number))
    if HAS_TRITON:
        triton.knobs.runtime.jit_cache_hook = None
    return compiled + counters["stats"]["unique_graphs"] - before


def errors(result: Result, problem: Problem) -> tuple[float, float]:
    """(max, rms) error of log-probs on the first masked tokens, against float64 products of the same
    inputs.
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
                    times[name].append(seconds(lambda c=contender, p=problem: learn(c, p), device))
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
    """What the machine can do at most: copy (bytes/s, read and written) and one bf16 matrix product
    (FLOP/s).
    """
    source = torch.empty(2**31, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy = statistics.median(seconds(lambda: target.copy_(source), device) for _ in range(10))
    product = statistics.median(seconds(lambda: a @ b, device) for _ in range(10))
    return {"copy B/s": 2 * source.nbytes / copy, "product FLOP/s": 2 * 8192**3 / product}


def scoring(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> list[str]:
    """Forward only: ms of log-probs alone, by `linear_logprobs` and by plain torch."""
    ours: list[float] = []
    plainly: list[float] = []
    for number in range(rounds + 1):
        p = make(shape, device, dtype, seed=number)
        with torch.no_grad():
            ours.append(
                1e3 * seconds(lambda p=p: linear_logprobs(p.hidden, p.weight, p.targets, p.mask), device)
            )
            try:
                plainly.append(
                    1e3
                    * seconds(
                        lambda p=p: reference.logprobs(p.hidden @ p.weight.t(), p.targets, p.mask), device
                    )
                )
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
    return [
        shape.name,
        spread(ours[1:], 1),
        spread(plainly[1:], 1) if len(plainly) == len(ours) else "out of memory",
    ]


def chunk_sweep(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> list[list[str]]:
    """linear_policy_loss by tokens a chunk: ms, and GiB above inputs and gradients."""
    rows = []
    for chunk in (256, 512, 1024, 2048, 4096, 8192, 16384):
        if chunk > shape.T:
            break

        def contender(p: Problem, budget: int = chunk * shape.V * dtype.itemsize) -> Result:
            out = linear_policy_loss(
                p.hidden, p.weight, *p.tokens, weights=p.weights, chunk_bytes=budget, **CLIP
            )
            return out.loss, out.logprobs, out.entropy

        times = []
        for number in range(rounds + 1):
            problem = make(shape, device, dtype, seed=number)
            if number == 0:
                peak = peak_gib(contender, problem)
            times.append(1e3 * seconds(lambda c=contender, p=problem: learn(c, p), device))
        rows.append([f"{chunk}", spread(times[1:], 1), f"{peak:.2f}" if peak == peak else ""])
    return rows


def on_logits(T: int, V: int, device: torch.device, dtype: torch.dtype, copy_rate: float) -> list[str]:
    """policy_loss on given logits: ms, and the share of copy bandwidth, counting two reads and one write."""
    times = []
    for number in range(6):
        problem = make(Shape(T, 64, V), device, torch.bfloat16, number)
        logits = (problem.hidden @ problem.weight.t()).detach().to(dtype).requires_grad_()
        call = lambda p=problem, x=logits: policy_loss(
            x, *p.tokens, weights=p.weights, **CLIP
        ).loss.backward()  # noqa: E731
        times.append(seconds(call, device))
        del logits, problem, call
    share = 3 * dtype.itemsize * T * V / statistics.median(times[1:]) / copy_rate
    return [f"{T}", f"{V}", str(dtype).split(".")[1], spread([1e3 * t for t in times[1:]], 2), f"{share:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="compare what runs on a CPU, at small sizes")
    parser.add_argument("--short", action="store_true", help="a few minutes on a GPU")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.cpu:
        torch.set_num_threads(1)
        device, dtype, shapes, name = (
            torch.device("cpu"),
            torch.float32,
            [Shape(2048, 256, 32768), Shape(2048, 256, 32768, 0.3)],
            "policy_loss_cpu",
        )
    elif torch.cuda.is_available():
        device, dtype, name = torch.device("cuda"), torch.bfloat16, "policy_loss_gpu"
        shapes = [Shape(32768, 4096, 151936), Shape(32768, 4096, 151936, 0.3)]
        if not args.short:
            shapes += [
                Shape(T, H, V)
                for H, V in ((3584, 152064), (4096, 151936), (5120, 152064))
                for T in (8192, 65536)
            ]
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
        text += f"\nCeilings: copy {facts['copy B/s'] / 1e12:.2f} TB/s, bf16 product {limit / 1e12:.0f} TFLOP/s.\n"
    text += f"\nMedian (min–max) ms of {args.rounds} interleaved rounds, fresh inputs each; {dtype}.\n"
    text += (
        "Share of floor: three products at the measured product rate. Peak: GiB above inputs and gradients. "
    )
    text += "Error: of log-probs, against float64. Same bits: two runs on the same inputs agree to the bit. "
    text += "Liger GRPO returns neither log-probs nor entropy and takes one advantage a row: less work, timed and not compared.\n"
    for shape in shapes:
        rows = compare(shape, device, dtype, args.rounds)
        facts["rows"] += rows
        text += f"\n## {shape.name}\n\n" + table(
            [
                "contender",
                "ms",
                "share of floor",
                "peak GiB",
                "entropy",
                "same bits",
                "max error",
                "rms error",
            ],
            [_cells(row, shape, limit) for row in rows],
        )
    text += "\n## Compiled anew while 50 further numbers of tokens come by\n\n"
    works = [
        row["contender"] for row in facts["rows"] if row["shape"] == shapes[0].name and "failed" not in row
    ]
    ready, _ = contenders(device.type == "cuda")
    facts["compilations"] = {}
    for name in works:
        try:
            facts["compilations"][name] = compilations(ready[name], device, dtype)
        except FAULTS as error:
            facts["compilations"][name] = type(error).__name__
    text += table(
        ["contender", "kernels and graphs"], [[name, count] for name, count in facts["compilations"].items()]
    )
    facts["scoring"] = [scoring(shape, device, dtype, args.rounds) for shape in shapes]
    text += "\n## Scoring alone\n\n" + table(["shape", "dapo, ms", "plain torch, ms"], facts["scoring"])
    facts["chunks"] = chunk_sweep(shapes[0], device, dtype, args.rounds)
    text += f"\n## Tokens a chunk, {shapes[0].name}\n\n" + table(
        ["tokens", "ms", "peak GiB"], facts["chunks"]
    )
    if device.type == "cuda":
        sizes = [
            (T, V) for T in (8192, 16384, 32768) for V in (151936, 151936 // 2, 151936 // 4, 151936 // 8)
        ]
        sizes = [(T, V) for T, V in sizes if not args.short or T == 32768]
        facts["on logits"] = [
            on_logits(T, V, device, dtype, facts["copy B/s"])
            for dtype in (torch.bfloat16, torch.float32)
            for T, V in sizes
        ]
        text += "\n## On logits alone\n\nA part of the vocabulary is what a tensor-parallel rank computes, without the collective.\n\n"
        text += table(["T", "V", "logits", "ms", "share of copy bandwidth"], facts["on logits"])
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1))
    save(f"{name}.md", text)


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
