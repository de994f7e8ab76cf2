"""What generating while the policy learns saves, and what it costs in age, length and thrown away work: the
real Rollouts and Collector on simulated servers with a virtual clock.

python benchmarks/ahead.py
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import heading, save, spread, table
from benchmarks.streaming import (
    HALF_SPEED,
    MAX_LENGTH,
    NUM_PROMPTS,
    ROUND,
    SLOTS,
    STEP_SECONDS,
    FirstFinished,
    G,
    N,
    Population,
    SimulatedServers,
    speed,
)
from dapo import config as configs
from dapo.reward.pool import Decoder, Reward
from dapo.rollout.collector import Collector, age
from dapo.rollout.pending import Chances
from dapo.rollout.prompts import PromptStream
from dapo.rollout.rollouts import Rollouts
from dapo.types import Group, Prompt, Sample

SERVERS, SYNC = 4, 5.0  # seconds in which weights travel and nothing is generated or learnt
STEPS, WARM_UP, SEEDS = 40, 8, range(3)


class Paused(Exception):
    """The policy has learnt: the servers get its weights before the next sample is done."""


class Servers(SimulatedServers):
    """Stop the clock when the policy has learnt."""

    until = math.inf

    def completed(self) -> Iterator[Sample]:
        while any(self.servers):
            waits = [
                (ends[0][0] - done) / speed(len(ends)) if ends else math.inf
                for ends, done in zip(self.servers, self.done, strict=True)
            ]
            if self.clock + min(waits) > self.until:
                self._pass(self.until - self.clock)
                raise Paused
            yield from self._one(waits)

    def _one(self, waits: list[float]) -> Iterator[Sample]:
        for sample in super().completed():
            yield sample
            return

    def _pass(self, seconds: float) -> None:
        for i, running in enumerate(self.servers):
            self.done[i] += seconds * speed(len(running))
            self.tokens += seconds * speed(len(running)) * len(running)
        self.clock += seconds

    def take_idle(self) -> list[float]:
        return []


class ByCount(Collector):
    """Counts groups that have not had their turn as if all were mixed: no group is ever too old."""

    def _chances(self) -> tuple[Callable[[Group], float], Chances]:
        return lambda group: 1.0, Chances.alike(len(self.sampler.pending.unknown), 1.0)


class Discarding(Collector):
    """What peers do: whatever finishes first is taken, servers are always full, what is too old is thrown
    away."""

    def _lacking(self) -> Iterator[Group]:
        waiting = len(self.sampler.stream.queue)  # type: ignore[attr-defined]
        for _ in range(max(0, 4 - waiting // G)):  # keeps the queue a little above the slots
            yield self.asking.next()


class Unbounded(Discarding):
    """The same, and nothing is too old."""


class Form(NamedTuple):
    kind: type[Collector]
    is_first_finished: bool


FORMS = {
    "expected mixed": Form(Collector, False),
    "count": Form(ByCount, False),
    "first finished, discard": Form(Discarding, True),
    "first finished, unbounded": Form(Unbounded, True),
}


class Case(NamedTuple):
    form: str
    staleness: int
    learning: float  # seconds of a step
    servers: int
    seed: int
    is_redrawn: bool = True


def make(case: Case, directory: str) -> tuple[Rollouts, Servers, Population]:
    path = Path(directory) / "run.yaml"
    path.write_text(
        f"run: {{dir: {directory}, seed: {case.seed}}}\ndata: {{train: none}}\npolicy: {{model: none}}\n"
    )
    options = [
        f"rollout.prompts_per_step={N}", f"rollout.group_size={G}", f"rollout.prompts_per_round={ROUND}",
        f"rollout.max_response_length={MAX_LENGTH}", "reward.function=benchmarks.streaming:is_right",
        "reward.workers=0", "reward.soft_overlong_punishment=false", "engine.kind=sglang",
        f"engine.max_concurrent={SLOTS}", f"engine.servers={case.servers}",
        f"rollout.max_staleness={case.staleness}",
    ]  # fmt: skip
    config = configs.load(path, options)
    population = Population(case.seed)
    engine = Servers(population, case.servers, case.is_redrawn)
    prompts = [Prompt(i, np.array([i, 0], np.int32), "1") for i in range(NUM_PROMPTS)]
    decoder = Decoder(lambda tokens: str(tokens[-1]))
    scoring = Reward(config.reward, MAX_LENGTH, decoder=decoder)
    stream = PromptStream(prompts, case.seed)
    return Rollouts(config, 1, engine, stream, scoring, (1,), None), engine, population


def run(case: Case) -> dict[str, float]:
    """Return seconds a step, ages, bias in length and what was thrown away, after the warm-up."""
    with tempfile.TemporaryDirectory() as directory:
        rollouts, engine, population = make(case, directory)
    collector = None
    thrown = [0]
    if case.staleness:
        form = FORMS[case.form]
        made = rollouts._make_collector(0)
        collector = form.kind(**{name: getattr(made, name) for name in FIELDS})
        if form.kind is Unbounded:
            collector.limits = replace(made.limits, max_staleness=STEPS + WARM_UP)
        if form.is_first_finished:
            collector.sampler.pending = FirstFinished(G)
        again = collector._ask_again

        def ask_again(groups: list[Group]) -> None:
            thrown[0] += sum(sample.length for group in groups for sample in group.samples)
            again(groups)

        collector._ask_again = ask_again  # type: ignore[method-assign]
        rollouts.collector = collector
        collector.start(in_thread=False)
    found: dict[str, list[float]] = {name: [] for name in ("age", "length", "waited")}
    used = overflown = kept = 0
    batches: list[tuple[int, ...]] = []
    for step in range(STEPS + WARM_UP):
        if step == WARM_UP:
            start, found = engine.clock, {name: [] for name in found}
            used = kept = overflown = thrown[0] = 0
        engine.clock += SYNC if step else 0.0
        rollouts.load_weights([], step)
        before = engine.clock
        buffer = rollouts.take(step) if collector else rollouts.collect(step)
        found["waited"].append(engine.clock - before)
        rollouts._learn(buffer)
        found["age"] += [age(group, step) for group in buffer.kept]
        found["length"] += [sample.length for group in buffer.kept for sample in group.samples]
        batches.append(tuple(group.id for group in buffer.kept))
        used += sum(sample.length for group in buffer.decided for sample in group.samples)
        kept += len(buffer.kept)
        if collector:
            overflown += int(collector.take_metrics()["groups/overflow"])
            learn(engine, collector, case.learning)
        else:
            engine.clock += case.learning
    return {
        "seconds": (engine.clock - start) / STEPS,
        "waited": statistics.fmean(found["waited"]),
        "age": statistics.fmean(found["age"]),
        "max_age": max(found["age"]),
        "bias": 100 * (statistics.fmean(found["length"]) / population.mixed_length() - 1),
        "overflow": 100 * overflown / (kept + overflown),
        "thrown": 100 * thrown[0] / (thrown[0] + used),
        "least": used / STEPS / (case.servers * SLOTS * speed(SLOTS)),
        "batches": float(hash(tuple(batches[:20])) % 10**9),
    }


FIELDS = (
    "sampler", "asking", "limits", "estimate", "take_idle", "is_streaming", "version", "is_interrupted",
)  # fmt: skip


def learn(engine: Servers, collector: Collector, seconds: float) -> None:
    """Generate for so many seconds."""
    engine.until = engine.clock + seconds
    try:
        while not collector.sampler.is_idle:
            collector.turn()
        engine.clock = engine.until
    except Paused:
        pass
    engine.until = math.inf


def main() -> None:
    text = heading("Generating while the policy learns: a simulation")
    population = " ".join((Population.__doc__ or "").split())
    text += f"""
The real Rollouts and Collector on simulated servers with a virtual clock. N = {N} mixed groups a step, {G}
samples a group. {SERVERS} servers of {SLOTS} slots; a decoding step takes {1000 * STEP_SECONDS:.0f} ms ×
(1 + samples / {HALF_SPEED}). {population}
Limit {MAX_LENGTH:,} tokens. Weights travel {SYNC:.0f} s, in which nothing is generated or learnt; what is
being generated goes on under the new ones. {STEPS} steps after {WARM_UP} others, {len(SEEDS)} seeds: median
(range).

- *least*: seconds in which full servers decode the tokens of the groups that had their turn
- *best*: the larger of least and the seconds of learning, and the weights' seconds
- *bias*: mean length of what is learnt from against that of mixed groups in general
- *overflow*: groups that were too old at their turn, of those that had one; *thrown away*: their tokens
- in turns: η = 0. colocated: in turns with twice the devices, all of which generate and then learn
- expected mixed: the Collector. count: it counts every group as mixed, so that none is ever too old. first
  finished: what finishes first is taken first, and servers are kept full; discard: what is older than η steps
  is thrown away and asked for anew
"""
    with ProcessPoolExecutor(2) as pool:

        def several(
            form: str, staleness: int, learning: float, servers: int = SERVERS
        ) -> list[dict[str, float]]:
            return list(pool.map(run, [Case(form, staleness, learning, servers, seed) for seed in SEEDS]))

        together = several("", 0, 0.0)
        generating = statistics.median(one["seconds"] - SYNC for one in together)
        text += f"\nGenerating in turns (η = 0) takes {generating:.0f} s a step, with a long tail.\n"
        names = ["", "η", "seconds a step", "η = 0 / this", "this / best", "age", "oldest", "bias, %"]
        names += ["overflow, %", "thrown away, %"]
        for title, learning in (("1 : 2", 2.0), ("1 : 1", 1.0), ("3 : 1", 1 / 3)):
            learning *= generating
            plain = several("", 0, learning)
            forms = [("in turns", 0), ("colocated", 0)] + [("expected mixed", eta) for eta in (1, 2, 4, 8)]
            if title == "1 : 1":
                forms += [("count", eta) for eta in (1, 2, 4, 8)]
                forms += [("first finished, discard", eta) for eta in (1, 2, 4)]
                forms += [("first finished, unbounded", 4)]
            rows = []
            for form, eta in forms:
                if form == "colocated":
                    found = several(form, 0, learning / 2, 2 * SERVERS)
                else:
                    found = several(form, eta, learning) if eta else plain
                best = [max(one["least"], learning) + SYNC for one in found]
                ratios = [p["seconds"] / one["seconds"] for p, one in zip(plain, found, strict=True)]
                over = [one["seconds"] / b for one, b in zip(found, best, strict=True)]
                rows.append([
                    form, eta, spread([one["seconds"] for one in found], 0), spread(ratios, 2),
                    spread(over, 2), spread([one["age"] for one in found], 1),
                    int(max(one["max_age"] for one in found)), spread([one["bias"] for one in found], 1),
                    spread([one["overflow"] for one in found], 1),
                    spread([one["thrown"] for one in found], 1),
                ])  # fmt: skip
                print(title, *rows[-1], flush=True)
            text += f"\n## Generating : learning = {title}, {learning:.0f} s of learning\n\n" + table(
                names, rows
            )
        text += "\n## Does what is learnt from depend on how fast the policy learns?\n\n"
        text += "Where verdicts do not depend on the weights, η = 4, learning for 130 and for 430 s:\n\n"
        for form in FORMS:
            slow, fast = pool.map(
                run, [Case(form, 4, seconds, SERVERS, 1, False) for seconds in (130.0, 430.0)]
            )
            same = "the same" if slow["batches"] == fast["batches"] else "not the same"
            text += f"- {form}: the first 20 batches are {same}\n"
    save("ahead.md", text)


if __name__ == "__main__":
    main()
