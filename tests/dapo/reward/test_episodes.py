"""Samples of several turns: what is judged, and what their length is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dapo.reward.pool import Reward
from dapo.types import Episode, Sample
from tests.conftest import make_config, make_prompt
from tests.dapo.reward.test_decoding import THERE
from tests.dapo.reward.test_reward import FUNCTIONS

SAID = [
    {"role": "user", "content": "1+1="},
    {"role": "assistant", "content": "call"},
    {"role": "tool", "content": "Answer: 3"},
    {"role": "assistant", "content": "Answer: 2"},
]


def make_episode(num_own: int = 4, num_foreign: int = 6) -> Sample:
    """A sample whose tokens, if they were decoded, would say something else than its last turn."""
    mask = np.array([True] * (num_own - 1) + [False] * num_foreign + [True])
    tokens, logprobs = np.full(len(mask), 3, np.int32), np.zeros(len(mask), np.float32)
    sample = Sample(0, 0, tokens, logprobs, mask, ((0, 0, 3),), "stop", "Answer: 2")
    sample.episode = Episode(SAID, num_turns=2)
    return sample


def make_reward(tmp_path: Path, *options: str, by_environment: bool = False) -> Reward:
    reward = make_config(tmp_path, *[f"reward.{option}" for option in options]).reward
    return Reward(reward, 10, tmp_path / "disputes.jsonl", decoder=THERE, by_environment=by_environment)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("function", ["dapo.reward:is_correct", f"{FUNCTIONS}:calls_once"])
def test_the_last_turn_is_judged_and_the_conversation_is_there(
    tmp_path: Path, workers: int, function: str
) -> None:
    reward = make_reward(
        tmp_path, f"function={function}", f"workers={workers}", "soft_overlong_punishment=false"
    )
    sample = make_episode()
    reward.score([(make_prompt(answer="2"), sample)])
    reward.close()
    assert (sample.is_correct, sample.reward, sample.text) == (True, 1.0, "Answer: 2")


def test_the_length_penalty_counts_what_the_policy_wrote(tmp_path: Path) -> None:
    """L_max = 10 and L_cache = 4: 4 of 10 tokens cost nothing, 8 of 10 half."""
    for num_own, expected in ((4, 1.0), (8, 0.5)):
        reward = make_reward(tmp_path, "overlong_cache=4", "workers=0")
        sample = make_episode(num_own, 10 - num_own)
        reward.score([(make_prompt(answer="2"), sample)])
        assert sample.reward == pytest.approx(expected)


def test_an_environments_own_verdict_is_kept_and_length_counts_as_ever(tmp_path: Path) -> None:
    reward = make_reward(tmp_path, "overlong_cache=4", by_environment=True)
    assert reward.workers is None
    for is_correct in (True, False):
        sample = make_episode(8, 2)
        sample.reward, sample.is_correct = 0.25, is_correct
        reward.score([(make_prompt(answer="no"), sample)])
        assert sample.is_correct is is_correct
        assert sample.reward == pytest.approx(0.25 - 0.5)


def test_a_truncated_episode_is_wrong_if_that_is_asked_for(tmp_path: Path) -> None:
    reward = make_reward(
        tmp_path, "truncated_is_wrong=true", "soft_overlong_punishment=false", by_environment=True
    )
    sample = make_episode()
    sample.reward, sample.is_correct, sample.finish_reason = 1.0, True, "length"
    reward.score([(make_prompt(), sample)])
    assert (sample.is_correct, sample.reward) == (False, -1.0)
