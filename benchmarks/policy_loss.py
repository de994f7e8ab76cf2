"""Compare the policy loss with its peers: time, memory and error, same inputs, same run, rounds interleaved.

    python benchmarks/policy_loss.py                # on a GPU: everything
    python benchmarks/policy_loss.py --short        # on a GPU: two minutes
    python benchmarks/policy_loss.py --first        # on a GPU: one shape, against its floors and two peers
    python benchmarks/policy_loss.py --cpu          # what runs without one
    python benchmarks/policy_loss.py --tiny         # the same in seconds, to see that it runs; also --first

The page of results is written anew after every measurement. loss_contenders.py has the losses; the gradients
of hidden states and LM head are measured too. A peer that is missing or fails is named, and out of memory is
a result.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import figures
import torch
from dapo_kernels import linear_logprobs, policy_loss, reference
from loss_contenders import Contender, Problem, Result, Shape, contenders, make, ours
from record import RESULTS, heading, keep, spread, table
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
OURS = "dapo"
CHUNKS = (256, 512, 1024, 2048, 4096, 8192, 16384)  # tokens


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


def compilations(contender: Contender, device: torch.device, dtype: torch.dtype, further: int) -> int:
    """Count Triton kernels and torch.compile graphs that so many numbers of tokens compile, after two."""
    compiled = 0

    def count(**_: Any) -> None:
        nonlocal compiled
        compiled += 1

    others = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:further].mul(8).add(8)
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


def compare(
    shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int, ready: dict[str, Contender]
) -> Iterator[dict[str, Any]]:
    """Yield a contender's row after each of its measurements, with all that is known of it by then."""
    ready = dict(ready)
    rows: dict[str, dict[str, Any]] = {name: {"contender": name, "ms": []} for name in ready}
    for number in range(rounds + 1):  # the first round warms up: it compiles, and measures memory and error
        problem = make(shape, device, dtype, seed=number)
        for name, contender in list(ready.items()):
            row = rows[name]
            try:
                if number == 0:
                    result = learn(contender, problem)
                    row["max error"], row["rms error"] = errors(result, problem)
                    row["entropy"] = result[2] is not None
                    del result
                    row["peak GiB"] = peak_gib(contender, problem)
                    row["same bits"] = is_reproducible(contender, problem)
                else:
                    row["ms"].append(1e3 * seconds(partial(learn, contender, problem), device))
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
                del ready[name]
                torch.cuda.empty_cache()
            except FAULTS as error:
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
                del ready[name]
            yield row


def ceilings(device: torch.device) -> dict[str, float]:
    """Measure the machine's limits: copy (bytes/s, read and written) and one bf16 matrix product (FLOP/s)."""
    source = torch.empty(2**31, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy = statistics.median(seconds(lambda: target.copy_(source), device) for _ in range(10))
    product = statistics.median(seconds(lambda: a @ b, device) for _ in range(10))
    return {"copy B/s": 2 * source.nbytes / copy, "product FLOP/s": 2 * 8192**3 / product}


def scoring(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> list[list[float]]:
    """Measure ms of log-probs alone, by `linear_logprobs` and by plain torch; fewer if memory runs out."""

    def fused(p: Problem) -> None:
        linear_logprobs(p.hidden, p.weight, p.targets, p.mask)

    def plain(p: Problem) -> None:
        reference.logprobs(p.hidden @ p.weight.t(), p.targets, p.mask)

    times: dict[Callable[[Problem], None], list[float]] = {fused: [], plain: []}
    problem = make(shape, device, dtype, seed=0)
    for _ in range(rounds + 1):
        for function, done in times.items():
            try:
                with torch.no_grad():
                    done.append(1e3 * seconds(partial(function, problem), device))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
    return [done[1:] for done in times.values()]


def chunked(problem: Problem, chunk: int, rounds: int) -> tuple[list[float], float]:
    """Measure linear_policy_loss with chunks of so many tokens: ms, and GiB above inputs and gradients."""
    weight = problem.weight
    contender = partial(ours, chunk_bytes=chunk * weight.shape[0] * weight.dtype.itemsize)
    peak = peak_gib(contender, problem)
    return [1e3 * seconds(partial(learn, contender, problem), weight.device) for _ in range(rounds)], peak


def on_logits(T: int, V: int, device: torch.device, dtype: torch.dtype, rounds: int) -> list[float]:
    """Measure ms of policy_loss on given logits: it reads them twice and writes them once."""
    problem = make(Shape(T, 64, V), device, torch.bfloat16, seed=0)
    logits = (problem.hidden @ problem.weight.t()).detach().to(dtype).requires_grad_()

    def call() -> None:
        policy_loss(logits, **problem.arguments).loss.backward()

    times = []
    for _ in range(rounds + 1):
        logits.grad = None
        times.append(1e3 * seconds(call, device))
    return times[1:]


@dataclass
class Page:
    """All that was measured so far: tables in a Markdown file, which each measurement writes anew."""

    name: str
    device: torch.device
    dtype: torch.dtype
    rounds: int
    text: str
    product: float = float("nan")  # FLOP/s of a matrix product
    copy: float = float("nan")  # bytes/s of a copy, read and written
    shapes: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # cells by shape and contender
    failed: set[str] = field(default_factory=set)  # contenders
    tables: dict[str, list[list[str]]] = field(default_factory=dict)

    def measure_ceilings(self) -> None:
        """Measure the machine's limits: copy, and one bf16 matrix product."""
        source = torch.empty(2**31, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        copy = statistics.median(seconds(lambda: target.copy_(source), self.device) for _ in range(10))
        product = statistics.median(seconds(lambda: a @ b, self.device) for _ in range(10))
        self.copy, self.product = 2 * source.nbytes / copy, 2 * 8192**3 / product
        figures.write("copy", self.copy / 1e12, "TB/s", "read and written")
        figures.write("bf16 matrix product", self.product / 1e12, "TFLOP/s", "8192 × 8192 × 8192")
        ceilings = f"copy {self.copy / 1e12:.2f} TB/s, bf16 product {self.product / 1e12:.0f} TFLOP/s"
        self.text += f"\nCeilings: {ceilings}.\n"

    def compare(self, shape: Shape, ready: dict[str, Contender], absent: dict[str, str]) -> None:
        """Compare contenders at one shape. What a peer cannot do is a result; ours must not fail."""
        for row in compare(shape, self.device, self.dtype, self.rounds, ready):
            name, why = row["contender"], row.get("failed", "")
            cells = _cells(row, shape, self.product)
            self.shapes.setdefault(shape.name, {})[name] = cells
            self.write()
            if why:
                self.failed.add(name)
                figures.write(f"{name}: {shape.name}", note=why, failed=name.startswith(OURS))
            elif row["ms"]:
                figures.write(f"{name}: {shape.name}", statistics.median(row["ms"]), "ms", _note(row, cells))
        for name, why in absent.items():
            self.shapes[shape.name][name] = [name, why, *[""] * 6]
        self.write()

    def add(self, title: str, cells: list[str], median: float | None = None, unit: str = "ms") -> None:
        """Add a line to one of the tables below the comparisons."""
        self.tables.setdefault(title, []).append(cells)
        self.write()
        named = [f"{cell} {name}" for name, cell in zip(TABLES[title][1:], cells[1:], strict=True) if cell]
        figures.write(f"{title}: {cells[0]}", median, unit, ", ".join(named))

    def write(self) -> None:
        text = self.text
        for name, rows in self.shapes.items():
            text += f"\n## {name}\n\n" + table(COLUMNS, list(rows.values()))
        for title, rows in self.tables.items():
            text += f"\n## {title}\n\n" + table(TABLES[title], rows)
        keep(f"{self.name}.md", text)

    def add_on_logits(self, T: int, V: int, dtype: torch.dtype) -> None:
        times = on_logits(T, V, self.device, dtype, self.rounds)
        median = statistics.median(times)
        fraction = 3 * dtype.itemsize * T * V / (median / 1e3) / self.copy
        of_copy = f"{fraction:.0%}" if fraction == fraction else ""
        shape = f"{T} × {V}, {str(dtype).split('.')[1]}"
        self.add(ON_LOGITS, [shape, spread(times, 2), of_copy], median)

    def add_compilations(self, ready: dict[str, Contender], further: int) -> None:
        for name, contender in ready.items():
            try:
                compiled = compilations(contender, self.device, self.dtype, further)
            except FAULTS as error:
                self.add(COMPILED, [name, type(error).__name__])
            else:
                self.add(COMPILED, [name, f"{compiled}"], compiled, "")

    def add_scoring(self, shape: Shape) -> None:
        both = scoring(shape, self.device, self.dtype, self.rounds)
        cells = [spread(t, 1) if len(t) == self.rounds else "out of memory" for t in both]
        self.add(SCORING, [shape.name, *cells], statistics.median(both[0]) if both[0] else None)

    def add_chunks(self, shape: Shape) -> None:
        problem = make(shape, self.device, self.dtype, seed=0)
        for chunk in (chunk for chunk in CHUNKS if chunk <= shape.T):
            times, peak = chunked(problem, chunk, self.rounds)
            cells = [f"{chunk}", spread(times, 1), f"{peak:.2f}" if peak == peak else ""]
            self.add(CHUNKED, cells, statistics.median(times))


COLUMNS = ["contender", "ms", "of floor", "peak GiB", "entropy", "same bits", "max error", "rms error"]
COMPILED = "Compiled anew while further numbers of tokens come by"
SCORING = "Scoring alone"
CHUNKED = "Tokens a chunk, of the first shape"
ON_LOGITS = "On logits alone"
TABLES = {
    COMPILED: ["contender", "kernels and graphs"],
    SCORING: ["shape", "dapo, ms", "plain torch, ms"],
    CHUNKED: ["tokens", "ms", "peak GiB"],
    # a tensor-parallel rank computes a part of the vocabulary, here without the collective
    ON_LOGITS: ["T × V, logits", "ms", "of copy bandwidth"],
}


def _cells(row: dict[str, Any], shape: Shape, product: float) -> list[str]:
    name, times = row["contender"], row["ms"]
    if "failed" in row:
        return [name, row["failed"], *[""] * 6]
    floor = shape.floor_flops / product / (statistics.median(times) / 1e3) if times else float("nan")
    return [
        name,
        spread(times, 1) if times else "",
        f"{floor:.0%}" if floor == floor else "",
        f"{row['peak GiB']:.2f}" if row["peak GiB"] == row["peak GiB"] else "",
        "yes" if row["entropy"] else "no",
        "yes" if row["same bits"] else "no",
        f"{row['max error']:.1e}",
        f"{row['rms error']:.1e}",
    ]


def _note(row: dict[str, Any], cells: list[str]) -> str:
    """Say what a summary needs beside the milliseconds: `2.6 peak GiB, 88% of floor, …`."""
    named = dict(zip(COLUMNS, cells, strict=True))
    parts = [f"{named[name]} {name}" for name in ("of floor", "peak GiB", "max error") if named[name]]
    return ", ".join([*parts, f"{len(row['ms'])} rounds"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="compare what runs on a CPU, at small sizes")
    parser.add_argument("--tiny", action="store_true", help="the same in seconds, to see that it runs")
    parser.add_argument("--short", action="store_true", help="two minutes on a GPU")
    parser.add_argument("--first", action="store_true", help="one shape, against its floors and two peers")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device, dtype, machine = torch.device("cuda"), torch.bfloat16, "gpu"
    if args.cpu or args.tiny:
        torch.set_num_threads(1)
        device, dtype, machine = torch.device("cpu"), torch.float32, "tiny" if args.tiny else "cpu"
    elif not torch.cuda.is_available():
        print("No CUDA GPU here. `--cpu` compares the paths that run on a CPU.", file=sys.stderr)
        return 1
    title = "The policy loss and its peers: loss, log-probs, entropy and both gradients from hidden states"
    text = heading(title) + (
        f"\nMedian (min–max) ms of {args.rounds} interleaved rounds, fresh inputs each; {dtype}.\n"
        "Of floor: time of three products at the measured product rate ÷ time taken. "
        "Peak: GiB above inputs and gradients. "
        "Error: of log-probs, against float64. Same bits: two runs on the same inputs agree to the bit. "
        "Of copy bandwidth: two reads and one write of the logits. "
        "Liger GRPO returns neither log-probs nor entropy and takes one advantage a row: less work, timed "
        "and not compared.\n"
    )
    name = f"policy_loss_first_{machine}" if args.first else f"policy_loss_{machine}"
    page = Page(name, device, dtype, args.rounds, text)
    sizes = {"gpu": (32768, 4096, 151936), "cpu": (2048, 256, 32768), "tiny": (256, 64, 2048)}
    shape = Shape(*sizes[machine])
    is_gpu = device.type == "cuda"
    if is_gpu:
        page.measure_ceilings()
    # torch.compile takes long on a CPU
    peers = ["plain torch"] if args.tiny else ["plain torch", "torch.compile"]
    if args.first:
        measure_first(page, shape, peers)
    else:
        shapes = [shape, replace(shape, masked=0.3)]
        if is_gpu and not args.short:
            models = ((3584, 152064), (4096, 151936), (5120, 152064))
            shapes += [Shape(T, H, V) for H, V in models for T in (8192, 65536)]
            shapes += [Shape(4096, 4096, 128256)]
        measure_all(page, shapes, [OURS, *peers] if args.tiny else None)
        if is_gpu:
            for T in (32768,) if args.short else (8192, 16384, 32768):
                for logits in (torch.bfloat16, torch.float32):
                    for ranks in (1, 2, 4, 8):
                        page.add_on_logits(T, shape.V // ranks, logits)
    print(f"kept in {RESULTS / page.name}.md")
    return int(any(name.startswith(OURS) for name in page.failed))


def measure_first(page: Page, shape: Shape, peers: list[str]) -> None:
    """Ours alone, on hidden states and on logits, then beside each peer: the next one may take long."""
    page.compare(shape, *contenders(False, [OURS]))
    page.add_on_logits(shape.T, shape.V, page.dtype)
    for peer in peers:
        page.compare(shape, *contenders(False, [OURS, peer]))


def measure_all(page: Page, shapes: list[Shape], names: list[str] | None) -> None:
    """Compare all contenders, or those that are named, at every shape; then the tables below."""
    ready, absent = contenders(page.device.type == "cuda", names)
    for shape in shapes:
        page.compare(shape, ready, absent)
    works = {name: contender for name, contender in ready.items() if name not in page.failed}
    page.add_compilations(works, 2 if names else 50)
    for shape in shapes:
        page.add_scoring(shape)
    page.add_chunks(shapes[0])


if __name__ == "__main__":
    sys.exit(main())
