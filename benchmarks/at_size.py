"""What a step of the paper's size costs the main rank, without a model: packing, scatter, dump, replay.

512 groups of 16 samples, 71.6 million tokens, for 128 ranks (tensor 8, data 16), and an eighth and a half of
that: what grows faster than the tokens shows in the exponents.

python benchmarks/at_size.py [fraction …]
python benchmarks/at_size.py intake [responses]: how fast the intake process takes in answers of that length
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import numpy as np
import rollout_client as client
from record import heading, save, spread, table

from dapo import config
from dapo.config import Parallel
from dapo.learn.batch import shares, split
from dapo.learn.packing import ATTENTION_SPAN, largest_differencing, least_weight, pack, padded
from dapo.mesh import Mesh
from dapo.rollout import dump
from dapo.rollout.buffer import Buffer
from dapo.types import Group, Prompt, Sample

GROUPS, GROUP_SIZE, PROMPT, LONGEST = 512, 16, 256, 20_480
TOKENS = 71_600_000  # of the whole step, prompts included
DATA, TENSOR = 16, 8
CONCURRENT, RUNS = 300, 3  # requests outstanding, and repetitions, of the intake
# the main rank's own two ranks of its tree, and one rank of every other share
RECEIVERS = 2 + DATA - 1


def make_groups(fraction: float) -> list[Group]:
    """Responses of lognormal lengths, as many tokens as this fraction of the step has."""
    rng = np.random.default_rng(0)
    count = round(GROUPS * fraction)
    drawn = rng.lognormal(0, 0.8, count * GROUP_SIZE)
    low, high = 1.0, 1e6
    for _ in range(60):  # the scale at which the lengths, cut off, have the wanted sum
        scale = (low + high) / 2
        lengths = np.clip(drawn * scale, 1, LONGEST).astype(int)
        total = lengths.sum() + len(lengths) * PROMPT
        low, high = (scale, high) if total < TOKENS * fraction else (low, scale)
    groups = []
    for g, row in enumerate(lengths.reshape(count, GROUP_SIZE)):
        prompt = Prompt(g, rng.integers(0, 150_000, PROMPT, dtype=np.int32), "1")
        samples = [make_sample(rng, g, i, int(n)) for i, n in enumerate(row)]
        groups.append(Group(g, prompt, samples))
    return groups


def make_sample(rng: np.random.Generator, group: int, index: int, length: int) -> Sample:
    return Sample(
        group=group,
        index=index,
        tokens=rng.integers(0, 150_000, length, dtype=np.int32),
        behavior_logprobs=-rng.exponential(0.5, length).astype(np.float32),
        loss_mask=np.ones(length, bool),
        versions=((0, 0, length),),
        finish_reason="stop",
        is_correct=index % 2 == 0,
        reward=float(index % 2 == 0),
        advantage=1.0 - 2 * (index % 2),
    )


def make_config(fraction: float, directory: Path) -> config.Config:
    path = directory / "run.yaml"
    path.write_text("run: {dir: r}\ndata: {train: t}\npolicy: {model: m, tokens_per_microbatch: 32768}\n")
    groups = round(GROUPS * fraction)
    return config.load(
        path,
        [f"rollout.prompts_per_step={groups}", f"optim.prompts_per_minibatch={max(1, groups // 16)}"],
    )


class Measured:
    """Seconds, CPU seconds of all threads and bytes of memory above the level before, of a block."""

    seconds = cpu = memory = 0.0


@contextmanager
def measured() -> Iterator[Measured]:
    found, before = Measured(), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start, cpu = time.perf_counter(), time.process_time()
    yield found
    found.seconds, found.cpu = time.perf_counter() - start, time.process_time() - cpu
    found.memory = resident("VmHWM") - before


def resident(name: str) -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return float(line.split()[1]) * 1024


class Cluster(Mesh):
    """The main rank's connections in a world of 128: nobody else is there, and nobody passes anything on."""

    def __init__(self) -> None:
        super().__init__(Parallel(tensor=1))
        self.data = DATA
        self.data_rank = max(0, self.rank - 2)

    def _ranks_of(self, data_rank: int) -> list[int]:
        """As many as the main rank sends to: it is the first of its own tree, and two are below it."""
        return [0, 1, 2] if data_rank == 0 else [data_rank + 2]


def receive(mesh: Mesh) -> None:
    """Receive what the main rank sends, until it sends None."""
    while mesh.scatter(lambda: []) is not None:
        pass


@contextmanager
def cluster() -> Iterator[Mesh]:
    """The main rank's mesh, with a process for each rank that it sends to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ["WORLD_SIZE"] = str(RECEIVERS + 1)
    children = []
    for rank in range(1, RECEIVERS + 1):
        if (pid := os.fork()) == 0:
            os.environ["RANK"] = str(rank)
            receive(Cluster())
            os._exit(0)
        children.append(pid)
    os.environ["RANK"] = "0"
    mesh = Cluster()
    try:
        yield mesh
        mesh.scatter(lambda: [None] * DATA)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def packing(groups: list[Group], run: config.Config) -> dict[str, float]:
    """Time, bins beyond the fewest that tokens allow, and the heaviest bin's cost above what is possible.

    The fewest: of the tokens' sum, and of sequences longer than half a bin, in whole rows. What is possible:
    what Karmarkar and Karp reach without a budget, or, if that is more, a bound with it.
    """
    budget, more, worst = run.policy.tokens_per_microbatch, 0, 0.0
    minibatches = [
        [len(g.prompt.tokens) + s.length - 1 for g in minibatch for s in g.samples]
        for minibatch in split(groups, run.optim.prompts_per_minibatch)
    ]
    with measured() as cost:
        packed = [pack(lengths, budget, DATA) for lengths in minibatches]
    for lengths, bins in zip(minibatches, packed, strict=True):
        fewest = padded(max(-(-sum(lengths) // budget), sum(2 * n > budget for n in lengths)), DATA)
        more += len(bins) - fewest
        weights = [n + n**2 / ATTENTION_SPAN for n in lengths]
        heaviest, free = (
            max(sum(weights[i] for i in b) for b in each)
            for each in (bins, largest_differencing(weights, len(bins)))
        )
        least = max(free, least_weight(lengths, weights, budget, len(bins)))
        worst = max(worst, heaviest / least - 1)
    # bins that are as full at every size: whether they are hard to fill does not depend on it
    rows = [max(1, round(sum(lengths) / (DATA * budget))) for lengths in minibatches]
    budgets = [
        max(*lengths, int(sum(lengths) / (0.98 * DATA * n)))
        for lengths, n in zip(minibatches, rows, strict=True)
    ]
    with measured() as alike:
        for lengths, own in zip(minibatches, budgets, strict=True):
            pack(lengths, own, DATA)
    return {
        "packing, CPU s": cost.cpu,
        "packing where as much stays free at every size, CPU s": alike.cpu,
        "bins": sum(map(len, packed)),
        "bins above the fewest": more,
        "heaviest bin above what is possible, %": 100 * worst,
    }


def scatter(groups: list[Group], run: config.Config, mesh: Mesh) -> dict[str, float]:
    sent = 0
    pass_on = mesh._pass_on

    def counted(message: Any, ranks: list[int]) -> Any:
        nonlocal sent
        sent += len(ranks) * sum(map(len, message.parts))
        return pass_on(message, ranks)

    mesh._pass_on = counted  # type: ignore[method-assign]
    with measured() as cost:
        share = mesh.scatter(lambda: shares(groups, run, DATA, {}))
    mesh._pass_on = pass_on  # type: ignore[method-assign]
    del share
    return {
        "plan and scatter, s": cost.seconds,
        "plan and scatter, CPU s": cost.cpu,
        "sent, GB": sent / 1e9,
        "its memory, GB": cost.memory / 1e9,
    }


def dumping(groups: list[Group], directory: Path) -> dict[str, float]:
    buffer = Buffer(len(groups), is_dynamic=True)
    for group in groups:
        buffer.offer(group)
    path = dump.path_of(directory, 0)
    with dump.Writer() as writer:
        with measured() as step:
            writer.write(path, buffer, 1.0)
        with measured() as aside:
            writer.finish()
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # memory that was freed here counts as new
        again = fresh.submit(replaying, path, len(groups)).result()
    return {
        "dump in the step, s": step.seconds,
        "dump aside, s": aside.seconds,
        "dump's memory, GB": (step.memory + aside.memory) / 1e9,
    } | again


def replaying(path: Path, count: int) -> dict[str, float]:
    import pyarrow.compute  # not measured
    import pyarrow.parquet  # noqa: F401

    with measured() as cost:
        again = dump.read(path, count)
    samples = [sample for group in again.kept for sample in group.samples]
    num_bytes = sum(s.tokens.nbytes + s.behavior_logprobs.nbytes + s.loss_mask.nbytes for s in samples)
    return {
        "replay, s": cost.seconds,
        "replay's memory, of the samples' bytes": cost.memory / num_bytes,
    }


def measure(fraction: float, mesh: Mesh) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        run, groups = make_config(fraction, Path(directory)), make_groups(fraction)
        tokens = sum(len(g.prompt.tokens) + s.length for g in groups for s in g.samples)
        found = {"tokens, million": tokens / 1e6} | packing(groups, run) | scatter(groups, run, mesh)
        return found | dumping(groups, Path(directory))


def exponent(sizes: list[float], values: list[float]) -> str:
    """Slope of the values over the sizes, both as logarithms."""
    if len(sizes) < 2 or min(values) <= 0.005 or "%" in str(values):
        return ""
    return f"{np.polyfit(np.log(sizes), np.log(values), 1)[0]:.2f}"


def main(fractions: list[float]) -> None:
    with cluster() as mesh:
        found = [measure(fraction, mesh) for fraction in fractions]
    sizes = [each["tokens, million"] for each in found]
    rows = []
    for name in found[0]:
        values = [each[name] for each in found]
        grows = "" if "%" in name or "of the" in name else exponent(sizes, values)
        rows.append([name, *[f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values], grows])
    text = heading("A step of the paper's size on the main rank, without a model")
    text += f"""
{GROUPS} groups of {GROUP_SIZE} samples, 128 ranks (tensor {TENSOR}, data {DATA}). Scatter has one real
sender and a process for each rank that it sends to. Memory is the peak above the samples that were there;
replay is measured in a process of its own. Exponents: growth with the tokens.

The fewest bins: a minibatch's tokens by the budget, or its sequences longer than half a bin, in rows of
{DATA}. What is possible for the heaviest bin: what Karmarkar and Karp reach without a budget, or, if that is
more, a bound: the longest sequences, and beside them what the other bins have no room for. How long packing
takes depends on how much of the bins stays free: at an eighth of a step most minibatches have nearly twice
the bins that their tokens need. So it is measured once more with budgets of which 2 % stay free.

"""
    text += table(["", *[f"{fraction:g} of a step" for fraction in fractions], "exponent"], rows)
    save("at_size.md", text)


def take_in(port: int, num_responses: int, is_busy: bool) -> client.Seconds:
    """Return the seconds for as many responses of LONGEST tokens, while CONCURRENT are outstanding.

    The intake process has core 0. This process, whose main thread counts if it `is_busy`, and the server
    share core 1; the server has precedence, as if it were elsewhere.
    """
    engine = client.make_engine([port], CONCURRENT)
    os.sched_setaffinity(client.intake_of(engine), {0})
    stream = engine.stream()
    times: list[client.Seconds] = []

    def take() -> None:
        for number, sample in enumerate(stream.completed()):
            assert sample.length == LONGEST
            if number in (CONCURRENT, CONCURRENT + num_responses):  # while as many are outstanding
                times.append(client.seconds(engine))

    taking = threading.Thread(target=take)
    stream.submit(client.make_request(i, LONGEST) for i in range(num_responses + 2 * CONCURRENT))
    taking.start()
    counted = 0
    while is_busy and taking.is_alive():
        for _ in range(1000):
            counted += 1
    taking.join()
    engine.close()
    return times[1] - times[0]


def intake(num_responses: int) -> None:
    os.sched_setaffinity(0, {1})
    _pipes, [port] = client.start_servers(1, LONGEST)
    forkserver.ensure_running()  # the intake process is as nice as this one is now
    os.nice(10)
    take_in(port, CONCURRENT, False)  # warm
    found: dict[bool, list[client.Seconds]] = {False: [], True: []}
    for _ in range(RUNS):
        for is_busy, runs in found.items():
            runs.append(take_in(port, num_responses, is_busy))
    millions = num_responses * LONGEST / 1e6
    rows = [
        [
            "busy in Python" if is_busy else "idle",
            spread([millions / run.wall for run in runs], 2),
            spread([millions / run.intake for run in runs], 2),
            spread([100 * run.intake / run.wall for run in runs], 0),
            "" if is_busy else spread([1000 * run.trainer / num_responses for run in runs], 2),
        ]
        for is_busy, runs in found.items()
    ]
    num_bytes = len(client.make_answer(0, LONGEST)) / LONGEST
    text = heading("The intake process at the paper's size")
    text += f"""
{num_responses} answers of {LONGEST} tokens, {num_bytes:.0f} bytes a token,
{CONCURRENT} outstanding, from one server process that sends answers made beforehand. The intake process is
pinned to one core. The trainer, its main thread idle or counting in Python, has the other one, together with
the server, which has precedence. Median (range) of {RUNS}, in turns.

"""
    columns = ["the trainer's main thread", "million tokens/s", "million tokens per CPU second of the intake",
               "the intake's share of its core, %", "the trainer's CPU ms per answer"]  # fmt: skip
    save("at_size_intake.md", text + table(columns, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["intake"]:
        intake(*map(int, sys.argv[2:] or [600]))
        sys.exit()
    main([float(argument) for argument in sys.argv[1:]] or [1 / 8, 1 / 2, 1.0])
