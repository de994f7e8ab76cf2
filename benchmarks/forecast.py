"""What a forecast of mixed groups saves, what it is worth and what it bends: the project's own sampling in
modelled worlds, with virtual samples and no model.

python benchmarks/forecast.py [worlds] [hurts] [seconds]
Without a word: all parts. A part that is run alone replaces its section of the result.
"""

from __future__ import annotations

import gc
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import RESULTS, heading, save, spread, table
from benchmarks.streaming import SimulatedServers
from dapo import config as configs
from dapo.rollout import pending
from dapo.rollout import rollouts as own
from dapo.rollout.asking import Asking
from dapo.rollout.forecast import Asked, Forecast, Odds, Rules
from dapo.rollout.pending import GroupSampler
from dapo.rollout.prompts import PromptStream, Visit
from dapo.rollout.rollouts import Rollouts
from dapo.types import Group, Prompt, Request, Sample

Array = np.ndarray
LATE = 2 / 3  # of the steps lie before the last third


@dataclass(frozen=True)
class Size:
    """A world's size, and what its prompts are like."""

    num_prompts: int
    batch: int  # groups a step, N
    group_size: int  # G
    steps: int
    per_round: int  # groups
    rounds: int
    middle: float  # logit of the middle prompt
    spread: float  # standard deviation of difficulties
    ability: float  # logits that the policy gains in the end
    slowness: float  # steps until it has gained 1 − 1/e of them
    seeds: tuple[int, ...] = (100, 101, 102)


WORLDS = {
    "a": Size(17398, 512, 16, 120, 1536, 100, -2.0, 7.70, 4.0, 80.0),
    "b": Size(17398, 512, 16, 120, 1536, 100, -1.0, 3.85, 3.0, 80.0),
    "c": Size(160, 16, 8, 48, 32, 2, -0.5, 2.0, 6.6, 20.0, tuple(range(100, 200))),
}


class World:
    """Chances of a right answer. logit p = middle − difficulty + talent · ability(step) + wandering + learnt.

    Wandering is a random walk that is drawn back to 0, and now and then a prompt is forgotten (− 4 logits);
    a prompt that was used is learnt (+ `boost`), which fades.
    """

    def __init__(self, size: Size, seed: int, wander: float = 0.15, forget: float = 5e-4, boost: float = 0.3):
        self.size, self.seed = size, seed
        self.wander, self.forget, self.boost = wander, forget, boost
        self.rng = np.random.default_rng([seed, 0])
        n = size.num_prompts
        self.start = size.middle - size.spread * self.rng.standard_normal(n)
        self.talent = 1 + 0.5 * self.rng.standard_normal(n)
        self.wandered, self.learnt = 5 * wander * self.rng.standard_normal(n), np.zeros(n)
        self.begin(0)

    def begin(self, step: int) -> None:
        """Set `rates`, [prompts], to those of a step."""
        ability = self.size.ability * (1 - np.exp(-step / self.size.slowness))
        logits = self.start + self.talent * ability + self.wandered + self.learnt
        self.rates = 1 / (1 + np.exp(-logits))
        self.draws = np.random.default_rng([self.seed, 1, step])
        self.drawn: dict[int, list[bool]] = {}  # group id → is each of its G samples right, asked for or not?

    def learn(self, used: Array) -> None:
        """End a step that learnt from these prompts."""
        n = self.size.num_prompts
        forgotten = self.rng.random(n) < self.forget
        self.wandered = 0.98 * self.wandered + self.wander * self.rng.standard_normal(n) - 4 * forgotten
        self.learnt *= 0.98
        self.learnt[used] += self.boost

    @property
    def mixed(self) -> Array:
        """True chances of a mixed group, [prompts]."""
        chances: Array = 1 - self.rates**self.size.group_size - (1 - self.rates) ** self.size.group_size
        return chances


class VirtualSampler(GroupSampler):
    """Draws right and wrong samples where the real one waits for an engine; the rest is the real one's."""

    world: World

    def __post_init__(self) -> None:
        super().__post_init__()
        self.submitted: list[tuple[Group, int]] = []

    def _submit(self, groups: Iterable[tuple[Group, int]]) -> None:
        groups = list(groups)
        new = [group for group, first in groups if not first]
        rates = self.world.rates[[group.prompt.index for group in new]]
        found = self.world.draws.random((len(new), self.group_size)) < rates[:, None]
        self.world.drawn |= zip([group.id for group in new], found.tolist(), strict=True)
        self.submitted += groups

    def wait(self) -> None:
        submitted, self.submitted = self.submitted, []
        for group, first in submitted:
            found = self.world.drawn[group.id]
            for i in range(first, self.pending.requested[group.id]):
                self.pending.receive(Sample(group.id, i, *NOTHING, "stop", is_correct=found[i]))
        self.score()


NOTHING: tuple[Any, ...] = (np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, bool), ())


class NoEngine:
    """A stream to which nothing is ever submitted."""

    def stream(self) -> NoEngine:
        return self

    def abort(self, ids: Iterable[str] | None = None) -> None: ...


class Known:
    """A Reward of samples that came with their verdict."""

    def score(self, pairs: Sequence[tuple[Prompt, Sample]]) -> None: ...


class VirtualRollouts(Rollouts):
    """The real Rollouts. Its samplers are virtual until there are servers."""

    world: World

    @contextmanager
    def _sampling(self, group_size: int, *more: Any) -> Iterator[GroupSampler]:
        with super()._sampling(group_size, *more) as sampler:
            if isinstance(self.engine, Servers):
                yield sampler
                return
            sampler.__class__, sampler.submitted = VirtualSampler, []
            sampler.world = self.world
            yield sampler


class Servers(SimulatedServers):
    """16 servers. Lengths are log-normal, wrong answers half as long again."""

    COUNT, MEDIAN, SIGMA, MOST = 16, np.exp(7.6), 0.8, 16384

    def __init__(self, world: World):
        super().__init__(world, self.COUNT, is_redrawn=True)  # type: ignore[arg-type]
        self.world = world

    def _sample(self, request: Request) -> Sample:
        rng = np.random.default_rng(request.seed)
        is_right = bool(rng.random() < self.world.rates[request.prompt.index])
        length = self.MEDIAN * np.exp(self.SIGMA * rng.standard_normal()) * (1 if is_right else 1.5)
        n = int(min(length, self.MOST))
        tokens = np.broadcast_to(np.int32(0), n), np.broadcast_to(np.float32(0), n), np.broadcast_to(True, n)
        return Sample(request.group, request.index, *tokens, (), "stop", is_correct=is_right)


# the rules of others, after their descriptions


class Greso(Forecast):
    """A prompt is asked for with chance q^(groups in a row that were all right, or all wrong). Either kind
    has its q, which from the second epoch on follows a target: a twelfth of groups all right, a sixth all
    wrong.
    """

    def __init__(self, num_prompts: int, rules: Rules):
        super().__init__(num_prompts, rules)
        self.in_a_row = np.zeros(num_prompts, int)
        self.kind = np.zeros(num_prompts, int)  # −1: all wrong, 1: all right
        self.chance = np.full(3, 0.5)  # of all wrong, –, all right

    def odds(self, prompts: Array, step: int) -> list[Odds]:
        ask = self.chance[self.kind[prompts] + 1] ** self.in_a_row[prompts]
        return [
            odds._replace(ask=q, mixed=q)
            for odds, q in zip(super().odds(prompts, step), ask.tolist(), strict=True)
        ]

    def learn(self, step: int, groups: list[Asked]) -> None:
        super().learn(step, groups)
        prompts = [group.prompt for group in groups]
        kind = np.array([(g.num_correct == g.num_samples) - (not g.num_correct) for g in groups])
        same = np.where(kind == self.kind[prompts], self.in_a_row[prompts], 0)
        self.in_a_row[prompts], self.kind[prompts] = np.where(kind, same + 1, 0), kind
        if max(group.epoch for group in groups) > 0:
            for i, target in ((2, 1 / 12), (0, 1 / 6)):
                change = -0.01 if np.mean(kind == i - 1) >= target else 0.01
                self.chance[i] = np.clip(self.chance[i] + change, 0.05, 0.95)


class Mopps(Forecast):
    """Counts from a flat prior that fade, as they are."""

    def __init__(self, num_prompts: int, rules: Rules):
        super().__init__(num_prompts, rules)
        self.prior = 1.0, 1.0

    def calibrated(self, chance: Array) -> Array:
        return chance

    def _follow(self, *found: Any) -> None: ...

    def _meet(self, *found: Any) -> None: ...


class MoppsAsking(Asking):
    """Of a pool of 8 N random prompts those are asked for whose drawn chance is nearest to one half."""

    POOL = 8

    def _draw(self) -> tuple[Visit, Odds]:
        if not self._ahead:
            n = len(self.stream.prompts)
            rng = np.random.default_rng([self.run_seed, self.step, len(self.passed)])
            pool = rng.permutation(n)[: self.POOL * self.batch]
            drawn = rng.beta(*self.forecast.posterior(pool, self.step))
            pool = pool[np.argsort(abs(drawn - 0.5), kind="stable")]
            odds = [each._replace(ask=1.0) for each in self.forecast.odds(pool, self.step)]
            self._ahead.extend(zip([Visit(i, self.step) for i in pool.tolist()], odds, strict=True))
        return self._ahead.popleft()

    def undo(self, passed: Any = None) -> None:
        self._ahead.clear()  # nothing came from the stream


@dataclass(frozen=True)
class Setting:
    options: tuple[str, ...] = ()
    forecast: type[Forecast] = Forecast
    asking: type[Asking] = Asking


SKIP = "forecast=skip", "forecast_floor=0.2", "forecast_sharpness=0.35"
WAVE = "first_wave=4", "stop_below=0.15"
SETTINGS = {
    "plain": Setting(),
    "skip": Setting(SKIP),
    "first wave": Setting(WAVE),
    "both": Setting((*SKIP, *WAVE)),
    "gentle": Setting(("forecast=skip", "first_wave=4")),
    "GRESO": Setting(("forecast=skip",), Greso),
    "MoPPS": Setting(("forecast=skip",), Mopps, MoppsAsking),
}


def make(world: World, setting: Setting, *options: str) -> VirtualRollouts:
    """Return Rollouts of a world's prompts under a setting."""
    size = world.size
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.yaml"
        path.write_text(
            f"run: {{dir: {directory}, seed: {world.seed}}}\ndata: {{train: none}}\npolicy: {{model: none}}\n"
        )
        values = (
            f"prompts_per_step={size.batch}", f"group_size={size.group_size}",
            f"prompts_per_round={size.per_round}", f"max_rounds={size.rounds}", *setting.options,
        )  # fmt: skip
        batch = f"optim.prompts_per_minibatch={size.batch}"
        config = configs.load(path, [*(f"rollout.{value}" for value in values), batch, *options])
    prompts = [Prompt(i, np.array([i], np.int32), "1") for i in range(size.num_prompts)]
    stream = PromptStream(prompts, world.seed, data="virtual")
    rollouts = VirtualRollouts(config, 1, NoEngine(), stream, Known(), (1,), None)  # type: ignore[arg-type]
    rollouts.world = world
    rollouts.forecast = setting.forecast(size.num_prompts, Rules.of(config.rollout))
    setting.asking.batch = size.batch  # type: ignore[attr-defined]
    own.Asking = setting.asking  # type: ignore[misc]
    return rollouts


@dataclass
class Tally:
    """What a run's steps came to; sums over steps, of which `late` are the last third's."""

    rows: list[dict[str, float]] = field(default_factory=list)
    bins: Array = field(default_factory=lambda: np.zeros((10, 3)))
    uses: Array = field(default_factory=lambda: np.zeros(0))

    def figures(self) -> dict[str, float]:
        names = self.rows[0]
        every = {name: sum(row[name] for row in self.rows) for name in names}
        rows = self.rows[int(len(self.rows) * LATE) :]
        late = {name: sum(row[name] for row in rows) for name in names}
        first = self.rows[: len(self.rows) // 12]
        top = np.sort(self.uses)[::-1][: len(self.uses) // 10].sum() / self.uses.sum()
        mean = {name: value / len(rows) for name, value in late.items()}
        return {
            "cost": every["groups"] / every["used"],
            "first": sum(row["groups"] for row in first) / sum(row["used"] for row in first),
            "late": late["groups"] / late["used"],
            "fill": late["used"] / late["wanted"],
            "edge": late["edge"] / late["used"],
            "lost": mean["lost"],
            "top": float(top),
            "stopped": late["stopped"] / late["asked"],
            "missed": late["missed"] / max(late["stopped"], 1),
            "ece": float(abs(self.bins[:, 1] - self.bins[:, 2]).sum() / self.bins[:, 0].sum()),
            "brier": every["brier"] / every["passed"],
            "said ece": mean["said ece"],
            "said missed": mean["said missed"],
            "saved": 1 - late["groups"] / late["plain"],
            "said saved": late["said saved"] / (late["said saved"] + late["groups"]),
            "edge plain": mean["edge plain"],
            "said edge plain": mean["said edge plain"],
            "right plain": mean["right plain"],
            "said right plain": mean["said right plain"],
            "seconds": every["seconds"] / len(self.rows),
        }


class Binomial:
    """E[min(c, G − c) / G] of a group of G, by its chance of a right sample."""

    def __init__(self, group_size: int):
        self.grid = np.linspace(0, 1, 2001)
        rows = np.ones((1, len(self.grid)))  # P(c = row) after no sample
        for _ in range(group_size):
            none = np.zeros((1, len(self.grid)))
            rows = np.concatenate([rows, none]) * (1 - self.grid) + np.concatenate([none, rows]) * self.grid
        count = np.arange(group_size + 1)
        self.edges = (np.minimum(count, group_size - count) / group_size) @ rows

    def __call__(self, rates: Array) -> Array:
        return np.interp(rates, self.grid, self.edges)


def simulate(
    world: World, setting: Setting, steps: int | None = None, *options: str
) -> tuple[Tally, VirtualRollouts]:
    """Run a world under a setting."""
    size = world.size
    rollouts = make(world, setting, *options)
    tally, expected_edge = Tally(uses=np.zeros(size.num_prompts)), Binomial(size.group_size)
    for step in range(size.steps if steps is None else steps):
        world.begin(step)
        lost = 0.0
        if step >= size.steps * LATE and setting.asking is Asking:
            ask = np.array([odds.ask for odds in rollouts.forecast.odds(np.arange(size.num_prompts), step)])
            lost = float(((1 - ask) * (world.mixed > 0.5)).sum() / max((world.mixed > 0.5).sum(), 1))
        start = time.process_time()
        buffer = rollouts.collect(step)
        rollouts.forecast.learn(step, rollouts.asking.outcomes(buffer.decided))
        said = rollouts.asking.ledger(buffer)
        seconds = time.process_time() - start
        used = np.array([group.prompt.index for group in buffer.kept], int)
        visits = np.array([visit.index for visit, *_ in rollouts.asking.passed], int)
        chance, truth = np.array([odds.mixed for _, odds, _ in rollouts.asking.passed]), world.mixed[visits]
        found = np.stack([np.ones(len(visits)), chance, truth], 1)
        np.add.at(tally.bins, np.minimum((chance * 10).astype(int), 9), found)
        np.add.at(tally.uses, used, 1)
        decided, rates = buffer.decided, world.rates
        stopped = [group for group in decided if len(group.samples) < size.group_size]
        would = [0 < sum(world.drawn[group.id]) < size.group_size for group in stopped]
        tally.rows.append(
            {
                "groups": sum(len(group.samples) for group in decided) / size.group_size,
                "asked": len(decided),
                "used": len(used),
                "wanted": size.batch,
                "passed": len(visits),
                "edge": float(np.minimum(rates[used], 1 - rates[used]).sum()),
                "lost": lost,
                "stopped": len(stopped),
                "missed": sum(would),
                "brier": float(((chance - truth) ** 2 + truth * (1 - truth)).sum()),
                "said ece": said.get("forecast/ece", 0.0),
                "said missed": said.get("forecast/stopped_mixed", 0.0),
                "plain": len(used) / float(truth.mean()),
                "said saved": said.get("forecast/samples_saved", 0.0) / size.group_size,
                "edge plain": float(expected_edge(rates[visits]).sum() / truth.sum()),
                "said edge plain": said.get("forecast/edge_plain", 0.0),
                "right plain": float(rates[visits].mean()),
                "said right plain": said.get("forecast/accuracy_plain", 0.0),
                "seconds": seconds,
            }
        )
        world.learn(used)
    return tally, rollouts


def run(name: str, setting: str, seeds: Sequence[int] = (), **more: Any) -> dict[str, float]:
    """Return the mean figures of a setting in a world over its seeds, and the standard error of `late`."""
    size = WORLDS[name]
    size = Size(**{**vars(size), **more.pop("size", {})})
    found = [
        simulate(World(size, seed, **more), SETTINGS[setting])[0].figures() for seed in seeds or size.seeds
    ]
    figures = {key: statistics.fmean(each[key] for each in found) for key in found[0]}
    return figures | {"±": statistics.stdev(each["late"] for each in found) / len(found) ** 0.5}


COST = ["cost", "first", "late", "±", "fill", "edge", "lost", "top", "stopped", "missed", "ece", "brier"]
LEDGER = [
    "saved", "said saved", "edge plain", "said edge plain", "right plain", "said right plain", "ece",
    "said ece", "missed", "said missed",
]  # fmt: skip
DIGITS = {"cost": 2, "first": 2, "late": 2, "±": 2, "top": 2, "fill": 2, "lost": 2, "stopped": 2}


def row(name: str, figures: dict[str, float], columns: Sequence[str]) -> list[str]:
    return [name, *(f"{figures[column]:.{DIGITS.get(column, 3)}f}" for column in columns)]


def logged(name: str, world: str, setting: str, **more: Any) -> list[str]:
    """Return a row of COST; print it, too: all take minutes."""
    start = time.process_time()
    cells = row(name, run(world, setting, **more), COST)
    print(*cells, f"{time.process_time() - start:.0f} s", flush=True)
    return cells


WORDS = """
- cost: samples of groups that had their turn / (G × used groups); first, late: in the first twelfth and the
  last third of the steps; ±: standard error of late
- fill: used groups / N, late
- edge: mean min(p, 1 − p) of used groups, late, p being the true chance of a right sample
- lost: chance that a prompt whose group would be mixed with more than ½ is passed over, late
- top: share of the uses that the tenth of prompts has that is used most
- stopped: share of the groups that ended with their first wave, late; missed: share of these that would have
  been mixed
- ece, brier: of the forecast, against the true chances of every prompt that came by, over the whole run.
  GRESO's forecast is its chance of asking, MoPPS's that of its posterior
"""


def worlds() -> str:
    text = heading("Predictive dynamic sampling in modelled worlds")
    described = " ".join((World.__doc__ or "").split())
    text += f"""
The real Rollouts, Asking, Forecast, Pending and Buffer, in whole rounds; samples are right by chance.
{described}
World a has the paper's size; b is the same, easier; c has few prompts, most of which are soon solved, and at
most {WORLDS["c"].per_round * WORLDS["c"].rounds} groups' worth of samples a step.
skip, first wave and both have {", ".join((*SKIP, *WAVE))}; gentle has forecast=skip,
first_wave=4 and the other options' defaults. GRESO and MoPPS are rules of others, after their descriptions.
Sums over a run's steps; means over seeds.
"""
    text += WORDS
    honest = """
## Is the run's own ledger right?

In the last third of the steps. saved: share of the samples that plain sampling would have needed with the
prompts that came by; edge plain: mean min(c, G − c) / G of the groups that it would have used; right plain:
share of right samples that it would have found. "said": the metrics forecast/samples_saved, edge_plain,
accuracy_plain, ece and stopped_mixed; the column before is the truth.
"""
    for world, size in WORLDS.items():
        found = {setting: run(world, setting) for setting in SETTINGS}
        rows = [row(setting, figures, COST) for setting, figures in found.items()]
        print(*rows, sep="\n", flush=True)
        text += (
            f"\n## World {world}\n\n{size.num_prompts:,} prompts, N = {size.batch}, G = {size.group_size}, "
        )
        text += f"{size.steps} steps; {len(size.seeds)} seeds\n\n" + table(["", *COST], rows)
        ours = [setting for setting in found if SETTINGS[setting].forecast is Forecast and setting != "plain"]
        honest += f"\nWorld {world}\n\n"
        honest += table(["", *LEDGER], [row(setting, found[setting], LEDGER) for setting in ours])
        seconds = [f"{setting} {each['seconds']:.3f}" for setting, each in found.items()]
        text += f"\nCPU seconds a step, all of sampling with virtual samples: {', '.join(seconds)}\n"
    return text + honest


HURTS: dict[str, dict[str, Any]] = {
    "wandering × 3": {"wander": 0.45},
    "forgetting × 20": {"forget": 0.01},
    "learning of used prompts × 4": {"boost": 1.2},
}


def hurts() -> str:
    text = heading("Predictive dynamic sampling: where it hurts")
    text += "\nColumns as above. Two seeds in worlds a and b.\n"
    names = ("plain", "both", "gentle")
    for what, change in HURTS.items():
        rows = []
        for world in WORLDS:
            seeds = WORLDS[world].seeds if world == "c" else WORLDS[world].seeds[:2]
            rows += [logged(f"{world} {name}", world, name, seeds=seeds, **change) for name in names]
        text += f"\n## {what}\n\n" + table(["", *COST], rows)
    rows = [logged(f"c {name}", "c", name, size={"num_prompts": 40}) for name in names]
    return text + "\n## World c with 40 prompts\n\n" + table(["", *COST], rows)


SPAN = range(95, 105)  # steps whose seconds are measured


def timed_run(name: str, setting: str, seed: int) -> dict[str, float]:
    """Return seconds, tokens and groups of a step late in a run, on servers."""
    world = World(WORLDS[name], seed)
    streaming = "engine.kind=sglang", f"engine.servers={Servers.COUNT}"
    _, rollouts = simulate(world, SETTINGS[setting], SPAN[0], *streaming)
    rollouts.engine = servers = Servers(world)  # type: ignore[assignment]
    groups = turns = 0.0
    start = time.process_time()
    for step in SPAN:
        world.begin(step)
        buffer = rollouts.collect(step)
        rollouts.forecast.learn(step, rollouts.asking.outcomes(buffer.decided))
        groups += len(buffer.decided)
        turns += sum(sample.length for group in buffer.decided for sample in group.samples)
        world.learn(np.array([group.prompt.index for group in buffer.kept], int))
    return {
        "seconds": servers.clock / len(SPAN),
        "tokens": servers.tokens / len(SPAN),
        "wasted": 100 * (1 - turns / servers.tokens),
        "groups": groups / len(SPAN),
        "CPU": (time.process_time() - start) / len(SPAN),
    }


def seconds() -> str:
    """Measure steps on servers."""
    pending.BRIEF = float("inf")  # else what is scored when depends on this machine
    text = heading("Predictive dynamic sampling on simulated servers")
    described = " ".join((Servers.__doc__ or "").split())
    text += f"""
{described} A token takes 30 ms on a full server and half as long on an empty one. Steps {SPAN[0] + 1} to
{SPAN[-1] + 1} of a run that before was simulated without servers; groups have their turn in asking order, and
what is unfinished when the batch is full is aborted. "of plain": the same seed's; 3 seeds: median (range).

- wasted: tokens of samples that had no turn
- CPU: seconds a step of this process, the simulated servers included
"""
    for world in ("a", "b"):
        found = {
            setting: [timed_run(world, setting, seed) for seed in WORLDS[world].seeds]
            for setting in ("plain", "skip", "first wave", "both", "gentle")
        }
        rows: list[list[object]] = []
        for setting, runs in found.items():
            ratios = {
                name: spread([a[name] / b[name] for a, b in zip(runs, found["plain"], strict=True)], 2)
                for name in ("seconds", "tokens")
            }
            mean = {name: statistics.fmean(each[name] for each in runs) for name in runs[0]}
            rows.append(
                [setting, f"{mean['seconds']:,.0f}", ratios["seconds"], ratios["tokens"],
                 f"{mean['wasted']:.1f}", f"{mean['groups']:,.0f}", f"{mean['CPU']:.1f}"]
            )  # fmt: skip
            print(world, *rows[-1], flush=True)
        header = ["", "seconds a step", "of plain", "tokens of plain", "wasted, %", "groups", "CPU"]
        text += f"\n## World {world}\n\n" + table(header, rows)
    return text


PARTS: dict[str, Callable[[], str]] = {"worlds": worlds, "hurts": hurts, "seconds": seconds}


def main(parts: Sequence[str]) -> None:
    """Measure parts; keep those of the last result that are not measured now."""
    path = RESULTS / "forecast.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = dict(zip(PARTS, re.split(r"^(?=# )", text, flags=re.MULTILINE)[1:], strict=False))
    for part in parts or PARTS:
        sections[part] = PARTS[part]().rstrip() + "\n\n"
        whole = "".join(sections.get(part, f"# {part}: not measured\n\n") for part in PARTS)
        save("forecast.md", whole.rstrip() + "\n")


if __name__ == "__main__":
    gc.disable()  # nothing here is a cycle
    main(sys.argv[1:])
