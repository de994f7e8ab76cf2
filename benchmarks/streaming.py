"""What requesting ahead saves within a step, and what it does to lengths: the real Rollouts on simulated
servers with a virtual clock.

python benchmarks/streaming.py
"""

from __future__ import annotations

import heapq
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import heading, save, spread, table
from dapo import config as configs
from dapo.reward.pool import Decoder, Reward
from dapo.rollout import pending
from dapo.rollout.pending import GroupSampler, Pending
from dapo.rollout.prompts import PromptStream
from dapo.rollout.rollouts import Rollouts
from dapo.types import Group, Prompt, Request, Sample

# the paper's ratio of round to step and its limit; an eighth of its groups
N, G, ROUND, MAX_LENGTH, SLOTS = 64, 8, 192, 20_480, 128
# of one decoding step with one sample; samples at which it takes twice as long
STEP_SECONDS, HALF_SPEED = 0.015, 128
MARGIN = pending.DEVIATIONS
NUM_PROMPTS, NUM_STEPS, WARM_UP, SEEDS = 6_000, 13, 3, range(3)


def is_right(response: str, answer: str) -> bool:
    return response == answer


class Population:
    """Pass rates of prompts from Beta(0.5, 0.7); lengths log-normal, σ = 0.7, median 1,500 tokens for the
    easiest prompts, e times more for the hardest; one sample in fifty is four times longer. What reaches the
    limit is cut off, and wrong."""

    def __init__(self, seed: int):
        self.pass_rates = np.random.default_rng([seed, 1]).beta(0.5, 0.7, NUM_PROMPTS)

    def draw(self, prompts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Lengths and correctness, one sample for each of the prompts."""
        rates = self.pass_rates[prompts]
        lengths = (
            1500
            * np.exp(1 - rates + 0.7 * rng.standard_normal(len(prompts)))
            * np.where(rng.random(len(prompts)) < 0.02, 4, 1)
        )
        lengths = np.clip(lengths, 1, MAX_LENGTH).astype(int)
        return lengths, (rng.random(len(prompts)) < rates) & (lengths < MAX_LENGTH)

    def mixed_length(self) -> float:
        """Mean length of the samples of mixed groups, whatever their length."""
        rng, prompts = np.random.default_rng(0), np.repeat(np.arange(NUM_PROMPTS), G)
        total = count = 0
        for _ in range(20):
            lengths, correct = (values.reshape(-1, G) for values in self.draw(prompts, rng))
            is_mixed = (correct.sum(1) > 0) & (correct.sum(1) < G)
            total, count = total + lengths[is_mixed].sum(), count + is_mixed.sum() * G
        return float(total / count)


class SimulatedServers:
    """An Engine. Requests wait in one line for a free slot; the samples of a server decode together, the
    slower the more there are.
    """

    def __init__(self, population: Population, num_servers: int):
        self.population = population
        self.queue: deque[Request] = deque()
        # heaps of (when done, request id, sample)
        self.servers: list[list[tuple[float, str, Sample]]] = [[] for _ in range(num_servers)]
        self.done = [0.0] * num_servers  # tokens that a sample has decoded which was there from the beginning
        self.clock = self.tokens = 0.0
        self.version = 0

    def stream(self) -> SimulatedServers:
        return self

    def submit(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        self.queue.extendleft(request for request in reversed(requests) if request.priority)
        self.queue.extend(request for request in requests if not request.priority)
        self._fill()

    def completed(self) -> Iterator[Sample]:
        while any(self.servers):
            waits = [
                (ends[0][0] - done) / speed(len(ends)) if ends else np.inf
                for ends, done in zip(self.servers, self.done, strict=True)
            ]
            first = int(np.argmin(waits))
            for i, running in enumerate(self.servers):
                self.done[i] += waits[first] * speed(len(running))
                self.tokens += waits[first] * speed(len(running)) * len(running)
            self.clock += waits[first]
            *_, sample = heapq.heappop(self.servers[first])
            self._fill()
            yield sample

    def abort(self, ids: Iterable[str] | None = None) -> None:
        gone = None if ids is None else set(ids)
        self.queue = deque(request for request in self.queue if gone and request.id not in gone)
        self.servers = [
            [entry for entry in running if gone and entry[1] not in gone] for running in self.servers
        ]
        for running in self.servers:
            heapq.heapify(running)

    def load_weights(self, weights: Iterable[object], version: int) -> None:
        self.version = version

    def waiting(self) -> str:
        return f"{len(self.queue)} queued"

    def close(self) -> None: ...

    def _fill(self) -> None:
        while self.queue:
            i = min(range(len(self.servers)), key=lambda i: len(self.servers[i]))
            if len(self.servers[i]) >= SLOTS:
                return
            request = self.queue.popleft()
            sample = self._sample(request)
            heapq.heappush(self.servers[i], (self.done[i] + sample.length, request.id, sample))

    def _sample(self, request: Request) -> Sample:
        seed = [request.seed, self.version]
        [n], [is_correct] = self.population.draw(request.prompt.tokens[:1], np.random.default_rng(seed))
        return Sample(
            group=request.group,
            index=request.index,
            tokens=np.broadcast_to(np.int32(is_correct), n),
            behavior_logprobs=np.broadcast_to(np.float32(-1), n),
            loss_mask=np.broadcast_to(np.True_, n),
            versions=((self.version, 0, n),),
            finish_reason="length" if n == MAX_LENGTH else "stop",
        )


def speed(num_samples: int) -> float:
    """Tokens per second of each of so many samples that decode together."""
    return 1 / (STEP_SECONDS * (1 + num_samples / HALF_SPEED))


class FirstFinished(Pending):
    """What must not be done: groups have their turn as they finish."""

    def ready(self) -> Iterator[Group]:
        for group in [group for group in self.groups if group.id in self.scored]:
            self.groups.remove(group)
            del self.scored[group.id]
            yield group


class FirstFinishedRollouts(Rollouts):
    @contextmanager
    def _sampling(self, group_size: int, *more: Any) -> Iterator[GroupSampler]:
        with super()._sampling(group_size, *more) as sampler:
            sampler.pending = FirstFinished(group_size)
            yield sampler


# options, class
FORMS: dict[str, tuple[list[str], type[Rollouts]]] = {
    "whole rounds": (["engine.kind=embedded"], Rollouts),
    "streaming": (["engine.kind=sglang"], Rollouts),
    **{f"streaming, {z} deviations": (["engine.kind=sglang"], Rollouts) for z in (0, 2)},
    "first finished wins (wrong)": (["engine.kind=sglang"], FirstFinishedRollouts),
}
MAIN_FORMS = ["whole rounds", "streaming", "first finished wins (wrong)"]


def run(form: str, num_servers: int, seed: int, directory: str) -> dict[str, float]:
    overrides, kind = FORMS[form]
    pending.DEVIATIONS = float(form.split()[1]) if "deviations" in form else MARGIN
    path = Path(directory) / "run.yaml"
    path.write_text(
        f"run: {{dir: {directory}, seed: {seed}}}\ndata: {{train: none}}\npolicy: {{model: none}}\n"
    )
    sizes = {
        "prompts_per_step": N,
        "group_size": G,
        "prompts_per_round": ROUND,
        "max_response_length": MAX_LENGTH,
    }
    options = [f"rollout.{name}={value}" for name, value in sizes.items()]
    reward = [
        "reward.function=benchmarks.streaming:is_right",
        "reward.workers=0",
        "reward.soft_overlong_punishment=false",
    ]
    servers = [f"engine.max_concurrent={SLOTS}"]
    if "engine.kind=sglang" in overrides:
        servers.append(f"engine.servers={num_servers}")
    config = configs.load(path, [*options, *reward, *servers, *overrides])
    population = Population(seed)
    engine = SimulatedServers(population, num_servers)
    prompts = PromptStream([Prompt(i, np.array([i, 0], np.int32), "1") for i in range(NUM_PROMPTS)], seed)
    decoder = Decoder(lambda tokens: str(tokens[-1]))
    scoring = Reward(config.reward, MAX_LENGTH, decoder=decoder)
    rollouts = kind(config, 1, engine, prompts, scoring, (1,), None)
    kept: list[Group] = []
    turns = 0
    for step in range(NUM_STEPS):
        if step == WARM_UP:
            start, made, kept, turns = engine.clock, engine.tokens, [], 0
        rollouts.load_weights([], step)
        buffer = rollouts.collect(step)
        assert len(buffer.kept) == N
        kept += buffer.kept
        turns += sum(
            sample.length
            for group in buffer.kept + buffer.all_correct + buffer.all_wrong
            for sample in group.samples
        )
    steps = NUM_STEPS - WARM_UP
    seconds, needed = (engine.clock - start) / steps, turns / steps
    least = needed / (num_servers * SLOTS * speed(SLOTS))
    length = statistics.fmean(sample.length for group in kept for sample in group.samples)
    return {
        "seconds": seconds,
        "bound": least,
        "wasted": 100 * (1 - turns / (engine.tokens - made)),
        "bias": 100 * (length / population.mixed_length() - 1),
        "batch": float(hash(tuple(group.id for group in kept))),
    }


def main() -> None:
    text = heading("Streaming, and what it does to lengths: a simulation")
    population = " ".join((Population.__doc__ or "").split())
    text += f"""
The real Rollouts.collect on simulated servers. N = {N} mixed groups a step, {G} samples a group, rounds of
{ROUND} groups. {SLOTS} slots a server; a decoding step takes {1000 * STEP_SECONDS:.0f} ms ×
(1 + samples / {HALF_SPEED}).
{population}
Limit {MAX_LENGTH:,} tokens. {NUM_STEPS - WARM_UP} steps after {WARM_UP} others, {len(SEEDS)} seeds: median
(range).

- lower bound: all slots decode nothing but tokens of groups that had their turn (kept, all right, all wrong)
- wasted: tokens decoded for groups that never had their turn
- length: mean over the kept groups against that of mixed groups in general; 0 is unbiased
- a group that is requested again is drawn anew
- deviations: margin for bad luck in what is requested ahead (pending.Chances); the default is 1

Whole rounds and streaming keep the same groups, which is checked.
"""
    for num_servers in (2, 8):
        rows, batches = [], {}
        for form in FORMS if num_servers == 2 else MAIN_FORMS:
            with tempfile.TemporaryDirectory() as directory:
                found = [run(form, num_servers, seed, directory) for seed in SEEDS]
            batches[form] = [one["batch"] for one in found]
            row: list[object] = [
                form,
                spread([one["seconds"] for one in found], 0),
                spread([one["bound"] for one in found], 0),
            ]
            row += [
                spread([one["seconds"] / one["bound"] for one in found], 2),
                spread([one["wasted"] for one in found], 1),
            ]
            rows.append([*row, spread([one["bias"] for one in found], 1)])
            print(rows[-1], flush=True)
        assert batches["streaming"] == batches["whole rounds"]
        waves = ROUND * G / (num_servers * SLOTS)
        text += f"\n{num_servers} servers: a round fills the slots {waves:.1f} times.\n\n"
        header = ["", "seconds a step", "lower bound", "ratio", "tokens wasted, %", "length, %"]
        text += table(header, rows)
    save("streaming.md", text)


if __name__ == "__main__":
    main()
