"""Algorithm 1, lines 2–9: sample, score, keep the mixed groups, compute advantages, plan the step's
updates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dapo import config
from dapo.clock import heartbeat, timed
from dapo.learn import batch
from dapo.learn.advantages import group_advantages
from dapo.learn.batch import Batch
from dapo.reward.pool import Reward
from dapo.rollout import dump
from dapo.rollout.buffer import Buffer
from dapo.rollout.pending import Pending, enough
from dapo.rollout.prompts import PromptStream
from dapo.types import Engine, Group, Interrupted, Prompt, Sample, Sampling

GROUPS_PER_STEP = 1 << 20  # group id = step × this + the place in asking order: unique in a run
PRIOR = 16  # groups: what the estimate of the mixed share remembers of earlier steps


class RolloutError(RuntimeError):
    """Sampling cannot go on: the data is too easy, too hard, or the reward is wrong. One line with the
    shares.
    """


class Rollouts:
    """The sampler's side of the loop: engine, prompts, reward. Lives on the main rank."""

    def __init__(self, options: config.Config, num_data_ranks: int, engine: Engine, prompts: PromptStream, reward: Reward,
                 decode: Callable[[np.ndarray], str], stop_ids: tuple[int, ...]):  # fmt: skip
        self.options, self.num_data_ranks = options, num_data_ranks
        self.engine, self.prompts, self.reward, self.decode, self.stop_ids = (
            engine,
            prompts,
            reward,
            decode,
            stop_ids,
        )
        self.sampling = Sampling(options.rollout.temperature, options.rollout.max_response_length, stop_ids)
        self.num_empty_steps = 0
        # asked for in earlier steps and left over, in asking order; without samples if unfinished
        self.carried: list[Group] = []
        # before any group: as configured
        self.mixed_share = min(1.0, options.rollout.prompts_per_step / options.rollout.prompts_per_round)
        self.pending = self._pending(options.rollout.group_size, self.sampling, is_streaming=False)
        self.told: Callable[[], str] = lambda: ""
        self.is_interrupted: Callable[[], bool] = lambda: False
        self.on_progress: Callable[[str], None] = lambda text: None

    @timed("sync")
    def prepare_weights(self, version: int) -> None:
        self.engine.prepare_weights(version)

    @timed("sync")
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """π_θold ← π_θ. Collective: every rank drains the generator, the main rank hands it to the engine."""
        self.engine.load_weights(_beating(weights), version)

    @timed("rollout")
    def next_batch(self, step: int) -> list[Batch]:
        """One batch per data-parallel rank: N mixed groups, or fewer at the cap (`rollout.at_cap`), scored
        and packed.

        Raises:
            RolloutError: the cap was reached and at_cap is "stop", or max_empty_steps steps in a row found no
                mixed group.
            Interrupted: the prompts are back in the stream; the step can be made anew.
        """
        options = self.options.rollout
        replayed = options.replay and dump.read(dump.path_of(options.replay, step), options.prompts_per_step)
        buffer = replayed or self.collect(step)
        self.engine.release_memory()
        self._judge(buffer)
        for group in buffer.kept:
            rewards = [sample.reward for sample in group.samples]
            for sample, advantage in zip(group.samples, group_advantages(rewards), strict=True):
                sample.advantage = float(advantage)
        dump.write(
            dump.path_of(self.options.run.dir / "rollouts", step),
            buffer,
            share=1.0 if options.only else options.dump_share,
        )
        metrics = buffer.ledger() | self.reward.take_metrics() | self._staleness(buffer, step)
        return batch.plan(
            [] if options.only else buffer.kept, self.options, self.num_data_ranks, metrics, version=step
        )

    def collect(self, step: int) -> Buffer:
        """Offer groups in asking order until the buffer is full (lines 4–8), of at most prompts_per_round ×
        max_rounds.

        How far ahead of their turn groups are asked for decides how busy the engine is, and nothing of what
        is kept.
        """
        options = self.options.rollout
        buffer = Buffer(options.prompts_per_step, options.dynamic_sampling)
        self.told = lambda: f"step {step}: {len(buffer.kept)}/{buffer.capacity} groups"
        self.pending = pending = self._pending(
            options.group_size, self.sampling, self.options.engine.is_streaming
        )
        fresh: list[Prompt] = []

        def wanted() -> list[Group]:
            prompts = self.prompts.take(self._num_wanted(buffer, pending))
            first = step * GROUPS_PER_STEP + len(fresh)
            fresh.extend(prompts)
            return [Group(first + i, prompt) for i, prompt in enumerate(prompts)]

        try:
            pending.ask([self._renewed(group, step) for group in self.carried])
            for group in pending.out(wanted):
                buffer.offer(group)
                if buffer.is_full:
                    break
            if options.max_staleness:
                pending.score()
        except Interrupted:
            pending.give_up()
            self.prompts.put_back(fresh)
            raise
        left = pending.give_up()
        buffer.num_aborted = sum(not group.samples for group in left)
        if options.max_staleness:
            self.carried = left
        else:
            buffer.surplus = [group for group in left if group.samples]
            self.prompts.put_back(group.prompt for group in left)
        self.mixed_share = self._mixed_share(buffer)
        return buffer

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, first_group: int, told: str
    ) -> list[Group]:
        """One scored group per prompt, in asking order. `told` introduces the progress line."""
        self.told = lambda: told
        self.pending = self._pending(group_size, sampling, is_streaming=False)
        asked = iter([[Group(first_group + i, prompt) for i, prompt in enumerate(prompts)]])
        try:
            return list(self.pending.out(lambda: next(asked, [])))
        except Interrupted:
            self.pending.give_up()
            raise

    def waiting(self) -> str:
        """Who is waited for, in words."""
        return f"{self.pending}; {self.engine.waiting()}"

    def save(self, directory: Path) -> None:
        """Everything that the next step depends on, as files in `directory`."""
        (directory / "rollouts.json").write_text(json.dumps(self.state_dict()))
        dump.write_groups(directory / "carried.parquet", self.carried)

    def load(self, directory: Path) -> None:
        """What `save` wrote. Raises ConfigError if the data has changed under the run."""
        self.load_state_dict(json.loads((directory / "rollouts.json").read_text()))
        whole = {group.id: group for group in dump.read_groups(directory / "carried.parquet")}
        self.carried = [whole.get(group.id, group) for group in self.carried]

    def state_dict(self) -> dict[str, Any]:
        return {
            "prompts": self.prompts.state_dict(),
            "num_empty_steps": self.num_empty_steps,
            "mixed_share": self.mixed_share,
            "carried": [[group.id, group.prompt.index] for group in self.carried],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts.load_state_dict(state["prompts"])
        self.num_empty_steps, self.mixed_share = state["num_empty_steps"], state["mixed_share"]
        self.carried = [Group(id, self.prompts.prompts[index]) for id, index in state["carried"]]

    def close(self) -> None:
        self.engine.close()
        self.reward.close()

    def _pending(self, group_size: int, sampling: Sampling, is_streaming: bool) -> Pending:
        return Pending(
            self.engine, self.reward, self._read, self.options.run.seed, group_size, sampling, is_streaming
        )

    def _renewed(self, group: Group, step: int) -> Group:
        """A group carried over as it is, if it is whole and young enough; else to be asked for again, under
        its id and so its seeds.
        """
        is_usable = group.samples and _age(group, step) <= self.options.rollout.max_staleness
        return group if is_usable else Group(group.id, group.prompt)

    def _num_wanted(self, buffer: Buffer, pending: Pending) -> int:
        """How many more groups to ask for: a round when there is none; streaming, what the buffer probably
        lacks, before it is missed.
        """
        options = self.options.rollout
        if not options.dynamic_sampling:
            return options.prompts_per_step - pending.num_asked
        if self.options.engine.is_streaming:
            lacking = buffer.capacity - len(buffer.kept) - pending.num_mixed
            count = max(0, enough(lacking, self._mixed_share(buffer)) - pending.num_unknown)
        else:
            count = 0 if pending.groups else options.prompts_per_round
        return min(count, options.prompts_per_round * options.max_rounds - pending.num_asked)

    def _staleness(self, buffer: Buffer, step: int) -> dict[str, float]:
        if not self.options.rollout.max_staleness:
            return {}
        ages = [_age(group, step) for group in buffer.kept]
        return {
            "rollout/staleness": float(np.mean(ages or [0])),
            "rollout/staleness_max": max(ages, default=0),
        }

    def _mixed_share(self, buffer: Buffer) -> float:
        """The running estimate of the share of mixed groups: this step's, mixed with PRIOR groups of the
        steps before.
        """
        num_decided = len(buffer.kept) + len(buffer.all_correct) + len(buffer.all_wrong)
        return (len(buffer.kept) + PRIOR * self.mixed_share) / (num_decided + PRIOR)

    def _read(self, group: Group, sample: Sample) -> None:
        if self.is_interrupted():
            raise Interrupted
        heartbeat()
        if not np.isfinite(sample.behavior_logprobs).all():
            raise RolloutError(
                f"prompt {group.prompt.index}: the engine's log-probs are not finite: the policy is damaged; "
                "resume from a checkpoint"
            )
        sample.text = self.decode(sample.tokens)
        self.on_progress(f"{self.told()}, {self.pending.num_outstanding} samples to come")

    def _judge(self, buffer: Buffer) -> None:
        """Stop where going on would teach nothing."""
        options = self.options.rollout
        self.num_empty_steps = 0 if buffer.kept else self.num_empty_steps + 1
        asked = len(buffer.asked)
        right, wrong = len(buffer.all_correct) / asked, len(buffer.all_wrong) / asked
        shares = (
            f"{len(buffer.kept)} of {buffer.capacity} mixed groups among {asked} sampled ({right:.0%} all "
            f"correct, {wrong:.0%} all wrong): "
            f"use harder or easier data, or check reward.function={self.options.reward.function}"
        )
        if not buffer.is_full and options.at_cap == "stop":
            raise RolloutError(f"rollout.max_rounds={options.max_rounds} reached with {shares}")
        if self.num_empty_steps >= options.max_empty_steps:
            raise RolloutError(
                f"rollout.max_empty_steps={options.max_empty_steps} steps in a row without a mixed group, "
                f"now {shares}"
            )


class RolloutsElsewhere:
    """What the other ranks hold in place of Rollouts: they take part in the weight sync and wait for their
    share of the batch.
    """

    def prepare_weights(self, version: int) -> None:
        raise AssertionError("only the main rank has an engine")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        for _ in _beating(weights):
            pass

    def next_batch(self, step: int) -> list[Batch]:
        raise AssertionError("only the main rank samples")

    def waiting(self) -> str:
        return "the main rank"

    def close(self) -> None: ...


def _age(group: Group, step: int) -> int:
    """Steps since the oldest weights that wrote a token of the group."""
    return step - min(version for sample in group.samples for version, _, _ in sample.versions)


def _beating(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for weight in weights:
        heartbeat()
        yield weight
