"""Algorithm 1, lines 2–9: sample, score, keep the mixed groups, compute advantages, plan the step's
updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dapo.clock import heartbeat, timed
from dapo.config import Config
from dapo.learn import batch
from dapo.learn.advantages import set_advantages
from dapo.learn.batch import Share
from dapo.model.routing import Routing
from dapo.reward.pool import Reward
from dapo.rollout import dump, probe
from dapo.rollout.asking import Asking, Question
from dapo.rollout.buffer import Buffer
from dapo.rollout.collector import Collector, age
from dapo.rollout.collector import Limits as CollectorLimits
from dapo.rollout.forecast import Forecast, Rules
from dapo.rollout.pending import Chances, GroupSampler, RolloutError
from dapo.rollout.prompts import PromptStream
from dapo.rollout.saving import Resumable
from dapo.types import Engine, EpisodeError, Group, Interrupted, Prompt, Sampling, Stopped

if TYPE_CHECKING:
    from torch import Tensor

LEAST_MIXED = 1e-6  # of the estimate, which divides
PRIOR = 16  # groups: how much the estimate of the mixed fraction remembers of earlier steps


@dataclass(eq=False)
class Rollouts(Resumable):
    """The main rank's side of sampling: engine, prompts, reward, and groups that are open."""

    config: Config
    num_data_ranks: int  # data-parallel ranks that a step's batch is planned for
    engine: Engine
    prompts: PromptStream
    reward: Reward
    stop_ids: tuple[int, ...]
    vocab_size: int | None  # the model's; None: not known
    routing: Routing | None = None  # of samples that come with their routes
    is_interrupted: Callable[[], bool] = lambda: False  # asked after every sample; True raises Interrupted
    # called with a line, where the current step is, and the fraction of it that is done
    on_progress: Callable[[str, float], None] = lambda text, fraction: None

    def __post_init__(self) -> None:
        rollout = self.config.rollout
        self.sampling = Sampling(
            rollout.temperature,
            rollout.max_response_length,
            self.stop_ids,
            returns_routes=self.routing is not None,
        )
        self.num_empty_steps = 0
        self.carried: list[Group] = []
        self.questions: dict[int, Question] = {}
        # estimate of the fraction of groups that are mixed; before any group: as configured
        self.mixed_fraction = min(1.0, rollout.prompts_per_step / rollout.prompts_per_round)
        self.forecast = Forecast(len(self.prompts.prompts), Rules.of(rollout))
        self.collector: Collector | None = None  # from the first batch on, with rollout.max_staleness
        self._samplers: list[GroupSampler] = []  # in use
        self.dumps = dump.Writer()

    @timed("sync")
    def prepare_weights(self, version: int) -> None:
        """Have the engine refuse now what it can refuse before the weights are there."""
        self.engine.prepare_weights(version)

    @timed("sync")
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand π_θ to the engine: π_θold ← π_θ."""
        self.engine.load_weights(_with_heartbeats(weights), version)
        if self.collector:
            self.collector.note_weights(version)

    @timed("rollout")
    def next_batch(self, step: int) -> Iterator[Share]:
        """Return the step's batch in shares, as batch.shares does.

        The batch has N mixed groups, or fewer at the cap (`rollout.at_cap`), scored and packed.

        Raises:
            RolloutError: at_cap is "stop" and the cap was reached, or too many steps had no mixed group.
            Stopped: the run is to stop; prompts of an unfinished collection are back in the stream.
            StorageError: an earlier step's dump could not be written; nothing is sampled.
            ConfigError: the dump to replay cannot be used.
        """
        self.dumps.check()
        rollout = self.config.rollout
        replayed = self._replayed(step)
        asked = self.engine, self.prompts.prompts, self.sampling, self.config.run.seed
        has_probe = rollout.max_staleness and self.config.engine.is_streaming and not replayed
        probes = probe.sample(*asked) if has_probe else []
        buffer = replayed or (self.take(step) if rollout.max_staleness else self.collect(step))
        buffer.filters_overlong = self.config.objective.overlong_filtering
        fraction = 1.0 if rollout.only else rollout.dump_share
        try:
            self.engine.release_memory()
            rewarded = self.reward.take_metrics()
            self._stop_if_nothing_is_learned(buffer, rewarded)
            set_advantages(buffer.kept, self.config.objective.advantage)
            self.dumps.write(dump.path_of(self.config.run.dir / "rollouts", step), buffer, fraction)
            if rollout.only:  # the dump is the step
                self.dumps.check()
        except Stopped:
            if not replayed:  # the groups go back
                (self.collector or self.asking).put_back_batch()
            raise
        metrics = buffer.ledger() | rewarded | self._staleness(buffer, step)
        if not replayed:
            metrics |= self._learn(buffer)
        if self.collector:
            metrics |= self.collector.take_metrics()
        kept = [] if rollout.only else buffer.kept
        num_ranks, routing = self.num_data_ranks, self.routing
        return batch.shares(kept, self.config, num_ranks, metrics, step, probe=probes, routing=routing)

    def _replayed(self, step: int) -> Buffer | None:
        """Return the step's buffer as rollout.replay has it, None where nothing is replayed."""
        rollout = self.config.rollout
        if not rollout.replay:
            return None
        path, of_model = dump.path_of(rollout.replay, step), (self.vocab_size, self.routing)
        return dump.read(path, rollout.prompts_per_step, *of_model)

    def collect(self, step: int) -> Buffer:
        """Offer groups in request order until the buffer is full (lines 4–8), at most prompts_per_round ×
        max_rounds, or as many samples.

        How far ahead of their turn groups are requested decides how busy the engine is, and nothing of what
        is kept.
        """
        rollout = self.config.rollout
        self._put_back_carried()
        keeps_routes = rollout.only or rollout.dump_share > 0
        buffer = Buffer(rollout.prompts_per_step, rollout.dynamic_sampling, keeps_routes)
        self.asking = asking = Asking(self.prompts, self.forecast, self.config.run.seed, step)
        streamed = self.config.engine.is_streaming, asking
        asked = rollout.group_size, self.sampling, lambda: self._position(step, len(buffer.kept))
        with self._sampling(*asked, self.reward, *streamed) as sampler:
            try:
                self._request_more(buffer, sampler, asking)
                while not buffer.is_full and not sampler.is_empty:  # empty: at the cap
                    sampler.wait()
                    buffer.fill(sampler.ready())
                    self._request_more(buffer, sampler, asking)
            except Stopped:
                asking.put_back_recent()
                raise
            left = sampler.cancel()
        buffer.num_aborted = sum(not group.samples for group in left)
        buffer.surplus = [group for group in left if group.samples and not group.is_lost]
        buffer.lost += [group for group in left if group.is_lost]
        asking.finish_batch(buffer.decided + buffer.lost)
        asking.put_back_recent()
        self._note_mixed(buffer)
        return buffer

    def take(self, step: int) -> Buffer:
        """Take the step's batch from the collector, which is started with the first one."""
        if not self.collector:
            self.collector = self._make_collector(step)
            carried, self.carried = self.carried, []
            self.collector.start(carried)
        buffer = self.collector.take(step)
        self._note_mixed(buffer, self.collector.num_overflown)
        return buffer

    def sample(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        first_group: int,
        title: str,
        reward: Reward,
    ) -> list[Group]:
        """Return one scored group for each prompt, in order. `title` begins the progress line."""
        groups: list[Group] = []
        asked = group_size, sampling, lambda: (title, len(groups) / len(prompts))
        with self._sampling(*asked, reward) as sampler:
            sampler.request([Group(first_group + i, prompt) for i, prompt in enumerate(prompts)])
            while not sampler.is_empty:
                sampler.wait()
                groups += sampler.ready()
        return groups

    def waiting(self) -> str:
        """Say which groups and which responses are waited for."""
        return "; ".join([*(str(sampler.pending) for sampler in list(self._samplers)), self.engine.waiting()])

    def close(self) -> None:
        """Stop the engine and the reward's processes; finish the dumps."""
        with ExitStack() as closing:  # in reverse order, each also if another fails
            closing.callback(self.dumps.close)
            closing.callback(self.reward.close)
            closing.callback(self.engine.close)
            if self.collector:
                closing.callback(self.collector.close)

    @contextmanager
    def _sampling(
        self,
        group_size: int,
        sampling: Sampling,
        position: Callable[[], tuple[str, float]],
        reward: Reward,
        is_streaming: bool = False,
        asking: Asking | None = None,
    ) -> Iterator[GroupSampler]:
        """A sampler over a stream of its own. Whatever is outstanding at the end of the block is aborted."""
        sampler = self._make_sampler(group_size, sampling, position, reward, is_streaming, asking)
        try:
            yield sampler
        finally:
            sampler.cancel()
            self._samplers.remove(sampler)

    def _make_sampler(
        self,
        group_size: int,
        sampling: Sampling,
        position: Callable[[], tuple[str, float]] | None,
        reward: Reward,
        is_streaming: bool,
        asking: Asking | None,
    ) -> GroupSampler:
        def on_sample(num_outstanding: int) -> None:
            if self.is_interrupted():
                raise Interrupted
            if position:
                text, fraction = position()
                self.on_progress(f"{text}, {num_outstanding} samples to come", fraction)

        sampler = GroupSampler(
            self.engine.stream(),
            reward,
            run_seed=self.config.run.seed,
            group_size=group_size,
            sampling=sampling,
            is_streaming=is_streaming,
            on_sample=on_sample,
            first_waves=asking,
            priority=2 if asking is None else 0,  # the policy waits for evaluations
        )
        self._samplers.append(sampler)
        return sampler

    def _make_collector(self, step: int) -> Collector:
        rollout, seed = self.config.rollout, self.config.run.seed
        open_questions = {group.id: self.questions[group.id] for group in self.carried}
        self.asking = Asking(self.prompts, self.forecast, seed, step, open_questions)
        sampler = self._make_sampler(
            rollout.group_size, self.sampling, None, self.reward, is_streaming=True, asking=self.asking
        )

        def on_progress(step: int, num_kept: int) -> None:
            text, fraction = self._position(step, num_kept)
            self.on_progress(f"{text}, {sampler.pending.num_outstanding} samples to come", fraction)

        return Collector(
            sampler,
            self.asking,
            CollectorLimits.of(rollout, self.config.run.steps),
            self._estimate_mixed,
            self.engine.take_idle,
            self.config.engine.is_streaming,
            step,
            self.is_interrupted,
            on_progress,
        )

    def _position(self, step: int, num_kept: int) -> tuple[str, float]:
        wanted = self.config.rollout.prompts_per_step
        num_kept = min(num_kept, wanted)
        return f"step {step}: {num_kept}/{wanted} groups", num_kept / wanted

    def _put_back_carried(self) -> None:
        """Return to the stream what an earlier process asked for with another max_staleness."""
        visits = [self.questions[group.id].visit for group in self.carried]
        self.prompts.put_back(sorted(visits, key=lambda visit: visit.number))
        self.carried, self.questions = [], {}

    def _learn(self, buffer: Buffer) -> dict[str, float]:
        """Teach the forecast what became of the batch's groups, and let the collector ask for more. Return
        the asking's metrics.
        """
        with self.at_rest():
            self.asking.learn(buffer.decided)
            metrics = self.asking.ledger(buffer)
        if self.collector:
            self.collector.ask()
        return metrics

    def _request_more(self, buffer: Buffer, sampler: GroupSampler, asking: Asking) -> None:
        """Request as many groups as the buffer will probably lack.

        Streaming, that is asked after every group; otherwise a round at most, when all that was requested
        has come. What follows first waves is generated together with it.
        """
        rollout, pending = self.config.rollout, sampler.pending
        is_streaming = self.config.engine.is_streaming
        if buffer.is_full:
            return
        most = rollout.prompts_per_round * rollout.max_rounds * rollout.group_size  # samples
        room = (most - pending.num_samples) // rollout.group_size
        room = room if is_streaming else min(room, rollout.prompts_per_round)
        will_be_kept = pending.num_mixed if rollout.dynamic_sampling else len(pending.scored)
        lacking = buffer.capacity - len(buffer.kept) - will_be_kept
        chance = asking.chance if asking.has_forecast else self._constant(buffer)
        chances = Chances(chance(group) for group in pending.unknown)
        groups: list[Group] = []
        while len(groups) < room and not chances.is_enough(lacking):
            groups.append(asking.next())
            chances.add(chance(groups[-1]))
        sampler.request(groups)

    def _constant(self, buffer: Buffer) -> Callable[[Group], float]:
        """Return the forecast that every group is as likely mixed as the run's groups were of late."""
        found = self._estimate_mixed(len(buffer.kept), len(buffer.decided))
        return lambda group: found

    def _staleness(self, buffer: Buffer, step: int) -> dict[str, float]:
        """Return metrics of the kept groups' ages in steps, if groups may be carried at all."""
        if not self.config.rollout.max_staleness:
            return {}
        ages = [age(group, step) for group in buffer.kept]
        return {
            "rollout/staleness": float(np.mean(ages or [0])),
            "rollout/staleness_max": max(ages, default=0),
        }

    def _estimate_mixed(self, num_kept: int, num_decided: int) -> float:
        """Fraction of groups that are kept: of these, averaged with PRIOR groups of the steps before."""
        if not self.config.rollout.dynamic_sampling:
            return 1.0
        return max((num_kept + PRIOR * self.mixed_fraction) / (num_decided + PRIOR), LEAST_MIXED)

    def _note_mixed(self, buffer: Buffer, num_overflown: int = 0) -> None:
        """Learn from a batch, and from mixed groups that were too old for it, how many groups are mixed."""
        if self.config.rollout.dynamic_sampling:
            counts = len(buffer.kept) + num_overflown, len(buffer.decided) + num_overflown
            self.mixed_fraction = self._estimate_mixed(*counts)

    def _stop_if_nothing_is_learned(self, buffer: Buffer, rewarded: dict[str, float]) -> None:
        """Raise RolloutError without a group to learn from if the reward decided nothing, or after too many
        such steps; and at the cap if `at_cap` says so. `rewarded`: the reward's metrics of the step.
        """
        rollout, function = self.config.rollout, f"reward.function={self.config.reward.function}"
        if rollout.environment:
            function = f"rollout.environment={rollout.environment}"
        self.num_empty_steps = 0 if buffer.num_learnt else self.num_empty_steps + 1
        asked = len(buffer.asked)
        if not asked and buffer.lost:
            count = f"all {len(buffer.lost)} groups of the step are lost"
            raise EpisodeError(f"{count}, the last because {buffer.lost[-1].why_lost}")
        correct, wrong = buffer.num_all_correct / asked, buffer.num_all_wrong / asked
        # with max_staleness the counts are of later groups too
        if not (buffer.num_learnt or rollout.max_staleness) and rewarded.get("reward/undecided") == 1.0:
            timeouts, crashes = rewarded["reward/timeouts"], rewarded["reward/crashes"]
            raise RolloutError(
                f"{function} decided about none of the step's {asked} groups: {timeouts:.0f} calls ran past "
                f"reward.time_limit={self.config.reward.time_limit}, {crashes:.0f} ended their process: call "
                "it by hand on one response"
            )
        lost = f", {len(buffer.lost)} lost" if buffer.lost else ""
        if masked := len(buffer.kept) - len(buffer.unmasked):
            lost += f", {masked} masked by objective.overlong_filtering (all samples truncated)"
        found = (
            f"{buffer.num_learnt} of {buffer.capacity} mixed groups among {asked} sampled ({correct:.0%} all "
            f"correct, {wrong:.0%} all wrong){lost}: use harder or easier data, or check {function}"
        )
        if not buffer.is_full and rollout.at_cap == "stop":
            raise RolloutError(f"rollout.max_rounds={rollout.max_rounds} reached with {found}")
        if self.num_empty_steps >= rollout.max_empty_steps:
            steps = f"rollout.max_empty_steps={rollout.max_empty_steps} steps in a row"
            raise RolloutError(f"{steps} without a mixed group, now {found}")


def _with_heartbeats(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for weight in weights:
        heartbeat()
        yield weight
