"""Makes groups that nobody has sampled, of random tokens and lengths, for measurements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dapo.config import Config
from dapo.model.routing import Routing
from dapo.types import Group, Prompt, Sample

SPREAD = 0.8  # σ of the logarithm of responses' lengths


def groups(config: Config, vocab_size: int, mean_length: int, step: int) -> list[Group]:
    """Return a step's groups, as many as it learns from. The same step has the same groups.

    `mean_length`: mean number of tokens of a sample, of which prompts take their part of the longest sample.
    """
    rng = np.random.default_rng([config.run.seed, step])
    longest_prompt, longest = config.data.max_prompt_length, config.rollout.max_response_length
    prompt = max(1, mean_length * longest_prompt // (longest_prompt + longest))
    size = config.rollout.group_size
    lengths = response_lengths(config.rollout.prompts_per_step * size, mean_length - prompt, longest, rng)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(0, vocab_size, count, dtype=np.int32)

    def sample(group: int, index: int) -> Sample:
        n = int(lengths[group * size + index])
        return Sample(
            group=group,
            index=index,
            tokens=tokens(n),
            behavior_logprobs=np.full(n, -np.log(vocab_size), np.float32),
            loss_mask=np.ones(n, bool),
            versions=((step, 0, n),),
            finish_reason="stop",
            advantage=float(rng.normal()),
        )

    return [
        Group(i, Prompt(i, tokens(prompt), ""), [sample(i, j) for j in range(size)])
        for i in range(config.rollout.prompts_per_step)
    ]


def route(groups: Sequence[Group], routing: Routing) -> None:
    """Give each sample routes: as many tokens to each expert."""
    for group in groups:
        for sample in group.samples:
            sample.routes = routing.filler(len(group.prompt.tokens) + sample.length - 1, routing.num_columns)


def response_lengths(count: int, mean: float, longest: int, rng: np.random.Generator) -> np.ndarray:
    """Draw so many lengths, int64 [count]: lognormal, at most `longest`, with this mean but for rounding."""
    drawn = rng.lognormal(0.0, SPREAD, count)
    for _ in range(100):  # what is cut off is made up for by the others
        drawn *= mean / np.clip(drawn, 1, longest).mean()
    return np.clip(drawn, 1, longest).round().astype(np.int64)
