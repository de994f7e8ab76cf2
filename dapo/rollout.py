"""Algorithm 1, lines 2–9: sample, score, keep the mixed groups, compute advantages, plan the step's updates."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from dapo import batch, config, dump
from dapo.batch import Batch
from dapo.buffer import Buffer
from dapo.clock import timed
from dapo.data import PromptStream
from dapo.reward.pool import Reward
from dapo.types import Engine, Group, Interrupted, Prompt, Request, Sample, Sampling

GROUPS_PER_STEP = 1 << 20  # group id = step × this + the place in asking order: unique in a run


class RolloutError(RuntimeError):
    """Sampling cannot go on: the data is too easy, too hard, or the reward is wrong. One line with the shares."""


class Rollouts:
    """The sampler's side of the loop: engine, prompts, reward. Lives on the main rank."""

    def __init__(self, options: config.Config, num_data_ranks: int, engine: Engine, prompts: PromptStream, reward: Reward,
                 decode: Callable[[np.ndarray], str], stop_ids: tuple[int, ...]):  # fmt: skip
        self.options, self.num_data_ranks = options, num_data_ranks
        self.engine, self.prompts, self.reward, self.decode, self.stop_ids = engine, prompts, reward, decode, stop_ids
        self.num_empty_steps = 0
        self.is_interrupted: Callable[[], bool] = lambda: False
        self.on_progress: Callable[[str], None] = lambda text: None

    @timed("sync")
    def prepare_weights(self, version: int) -> None:
        self.engine.prepare_weights(version)

    @timed("sync")
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """π_θold ← π_θ. Collective: every rank drains the generator, the main rank hands it to the engine."""
        self.engine.load_weights(weights, version)

    @timed("rollout")
    def next_batch(self, step: int) -> list[Batch]:
        """One batch per data-parallel rank: N mixed groups, or fewer at the cap (`rollout.at_cap`), scored and packed.

        Raises:
            RolloutError: the cap was reached and at_cap is "stop", or max_empty_steps steps in a row found no mixed group.
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
        dump.write(dump.path_of(self.options.run.dir / "rollouts", step), buffer, share=1.0 if options.only else options.dump_share)
        metrics = buffer.ledger() | self.reward.take_metrics()
        return batch.plan([] if options.only else buffer.kept, self.options, self.num_data_ranks, metrics)

    def collect(self, step: int) -> Buffer:
        """Ask for whole rounds of prompts until the buffer is full (lines 4–8), at most max_rounds of them."""
        options = self.options.rollout
        buffer = Buffer(options.prompts_per_step, options.dynamic_sampling)
        sampling = Sampling(options.temperature, options.max_response_length, self.stop_ids)
        taken: list[Prompt] = []
        try:
            for _ in range(options.max_rounds):
                count = options.prompts_per_round if options.dynamic_sampling else options.prompts_per_step
                prompts = self.prompts.take(count)
                first = step * GROUPS_PER_STEP + len(taken)
                taken += prompts
                told = f"step {step}: {len(buffer.kept)}/{buffer.capacity} groups"
                for group in self.sample(prompts, options.group_size, sampling, first, told):
                    buffer.offer(group)
                if buffer.is_full:
                    break
        except Interrupted:
            self.prompts.put_back(taken)
            raise
        self.prompts.put_back(buffer.unused_prompts)
        return buffer

    def sample(self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, first_group: int, told: str) -> list[Group]:
        """One scored group per prompt, in asking order. `told` introduces the progress line."""
        groups = {first_group + i: Group(first_group + i, prompt) for i, prompt in enumerate(prompts)}
        self.engine.submit(
            Request(group.id, index, group.prompt.tokens, sample_seed(self.options.run.seed, group.id, index), sampling)
            for group in groups.values()
            for index in range(group_size)
        )
        for done, sample in enumerate(self.engine.completed(), start=1):
            if self.is_interrupted():
                self.engine.abort(f"{group.id}.{index}" for group in groups.values() for index in range(group_size))
                raise Interrupted
            self._read(groups[sample.group].prompt, sample)
            groups[sample.group].samples.append(sample)
            self.on_progress(f"{told}, sample {done}/{len(prompts) * group_size}")
        for group in groups.values():
            assert len(group.samples) == group_size, f"group {group.id} has {len(group.samples)} samples of {group_size}"
            group.samples.sort(key=lambda sample: sample.index)
        self.reward.score([(group.prompt, sample) for group in groups.values() for sample in group.samples])
        return list(groups.values())

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self.prompts.state_dict(), "num_empty_steps": self.num_empty_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.prompts.load_state_dict(state["prompts"])
        self.num_empty_steps = state["num_empty_steps"]

    def close(self) -> None:
        self.engine.close()
        self.reward.close()

    def _read(self, prompt: Prompt, sample: Sample) -> None:
        if not np.isfinite(sample.behavior_logprobs).all():
            raise RolloutError(
                f"prompt {prompt.index}: the engine's log-probs are not finite: the policy is damaged; resume from a checkpoint"
            )
        sample.text = self.decode(sample.tokens)

    def _judge(self, buffer: Buffer) -> None:
        """Stop where going on would teach nothing."""
        options = self.options.rollout
        self.num_empty_steps = 0 if buffer.kept else self.num_empty_steps + 1
        asked = len(buffer.asked)
        right, wrong = len(buffer.all_correct) / asked, len(buffer.all_wrong) / asked
        shares = (
            f"{len(buffer.kept)} of {buffer.capacity} mixed groups among {asked} sampled ({right:.0%} all correct, {wrong:.0%} all wrong): "
            f"use harder or easier data, or check reward.function={self.options.reward.function}"
        )
        if not buffer.is_full and options.at_cap == "stop":
            raise RolloutError(f"rollout.max_rounds={options.max_rounds} reached with {shares}")
        if self.num_empty_steps >= options.max_empty_steps:
            raise RolloutError(f"rollout.max_empty_steps={options.max_empty_steps} steps in a row without a mixed group, now {shares}")


class RolloutsElsewhere:
    """What the other ranks hold in place of Rollouts: they take part in the weight sync and wait for their share of the batch."""

    def prepare_weights(self, version: int) -> None:
        raise AssertionError("only the main rank has an engine")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        for _ in weights:
            pass

    def next_batch(self, step: int) -> list[Batch]:
        raise AssertionError("only the main rank samples")

    def close(self) -> None: ...


def group_advantages(rewards: Sequence[float]) -> np.ndarray:
    """(R_i − mean) / (std + 1e-6) within one group (Eq. 9): [G] rewards → [G] float32. Sample standard deviation (ddof = 1).

    `group_advantages([1, 1, 1, -1])` → [0.5, 0.5, 0.5, -1.5]; equal rewards → zeros.
    """
    values = np.asarray(rewards, dtype=np.float64)
    advantages: np.ndarray = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    return advantages.astype(np.float32)


def sample_seed(run_seed: int, group: int, index: int) -> int:
    """The seed of one sample, 63 bits: a function of its names alone, so that neither order nor resuming changes what is drawn."""
    digest = hashlib.blake2b(struct.pack("<qqq", run_seed, group, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
