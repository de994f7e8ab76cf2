"""Samples a few short responses to the same prompts after each weight sync: a batch may hold no token of the
current weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dapo.rollout.pending import sample_seed
from dapo.types import Engine, Group, Prompt, Request, Sampling

NUM_PROMPTS, MAX_TOKENS = 4, 32
FIRST_GROUP = 1 << 59  # group id, far from training's and evaluation's


def sample(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, run_seed: int) -> list[Group]:
    """Return groups of one short response to each of the first prompts."""
    short = replace(sampling, max_tokens=min(MAX_TOKENS, sampling.max_tokens))
    return responses(engine, prompts[:NUM_PROMPTS], short, run_seed)


def responses(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, run_seed: int) -> list[Group]:
    """Return groups of one response to each prompt, without those that are lost."""
    groups = [Group(FIRST_GROUP + i, prompt) for i, prompt in enumerate(prompts)]
    stream = engine.stream()
    stream.submit(
        Request(g.id, 0, g.prompt, sample_seed(run_seed, g.id, 0), sampling, priority=2) for g in groups
    )
    try:
        for found in stream.completed():
            groups[found.group - FIRST_GROUP].add(found)
    finally:
        stream.abort()
    return [group for group in groups if not group.is_lost]
