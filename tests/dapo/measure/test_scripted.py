"""Groups of random tokens: as many, and as long, as the config and the mean length say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dapo.measure import scripted
from tests.conftest import make_config

LENGTHS = [
    "rollout.prompts_per_step=64",
    "rollout.prompts_per_round=64",
    "rollout.group_size=16",
    "rollout.max_response_length=48",
]
VOCAB = 50


@pytest.mark.parametrize("mean_length", [8, 24, 60])
def test_samples_have_the_mean_length_and_none_is_too_long(tmp_path: Path, mean_length: int) -> None:
    groups = scripted.groups(make_config(tmp_path, *LENGTHS), VOCAB, mean_length, step=0)
    assert [len(group.samples) for group in groups] == [16] * 64
    prompts = [len(group.prompt.tokens) for group in groups]
    responses = [sample.length for group in groups for sample in group.samples]
    assert set(prompts) == {mean_length // 4}, "the longest sample has 16 tokens of prompt and 48 of response"
    assert min(responses) >= 1 and max(responses) <= 48 and len(set(responses)) > 5
    assert np.mean(prompts) + np.mean(responses) == pytest.approx(mean_length, rel=0.03)


def test_the_shortest_and_the_longest_samples_are_possible(tmp_path: Path) -> None:
    config = make_config(tmp_path, *LENGTHS)
    shortest, longest = (
        [sample.length for group in scripted.groups(config, VOCAB, length, 0) for sample in group.samples]
        for length in (1, 64)
    )
    assert set(shortest) == {1}
    assert max(longest) == 48 and np.mean(longest) > 47.5


def test_a_step_is_the_same_each_time_and_unlike_the_next(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    first, again, other = (scripted.groups(config, VOCAB, 24, step) for step in (0, 0, 1))
    tokens = [
        np.concatenate([s.tokens for g in groups for s in g.samples]) for groups in (first, again, other)
    ]
    assert np.array_equal(tokens[0], tokens[1]) and not np.array_equal(tokens[0][:20], tokens[2][:20])
    assert tokens[0].min() >= 0 and tokens[0].max() < VOCAB
    assert all(sample.advantage for group in first for sample in group.samples), "each is learnt from"
