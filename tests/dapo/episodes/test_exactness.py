"""What is learnt from is what was sampled, token for token, in thousands of episodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.dapo.episodes.families import FAMILIES, Family
from tests.dapo.episodes.scripted import faults, play, render_again

EPISODES = 2000  # of each family


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_episodes_hold_the_tokens_that_were_sampled(family: Family) -> None:
    num_turns, num_ends, wrong = [], set(), []
    for script, sample in play(family, EPISODES):
        wrong += faults(family, script, sample)
        num_turns.append(len(script.calls))
        num_ends.add(sample.finish_reason)
    assert wrong == []
    assert len(num_turns) == EPISODES and max(num_turns) == 4 and num_ends == {"stop", "length"}


def test_a_fault_in_an_episode_is_seen() -> None:
    family = FAMILIES[0]
    episodes = [(s, e) for s, e in play(family, 40) if len(s.calls) > 2]
    script, sample = episodes[0]
    assert faults(family, script, sample) == []
    first = int(sample.loss_mask.argmin())  # the first token of the environment
    own = sample.loss_mask.copy()
    own[first] = True
    assert faults(family, script, replace(sample, loss_mask=own)) == [
        "the mask is wrong",
        "the versions are wrong",
    ]
    tokens = sample.tokens.copy()
    tokens[0] += 1
    found = faults(family, script, replace(sample, tokens=tokens))
    assert "turn 0 was tokenized again" in found and "call 1 was asked for with other tokens" in found
    tokens = sample.tokens.copy()
    tokens[first] += 1
    assert "turn 0 is followed by other text" in faults(family, script, replace(sample, tokens=tokens))


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_rendering_anew_would_have_other_tokens(family: Family) -> None:
    """That is why nothing is: where the template drops thoughts, even the text is another."""
    chat = family.chat()
    again = [
        each for script, sample in play(family, 100) for each in render_again(family, chat, script, sample)
    ]
    other_text, other_tokens = map(sum, zip(*again, strict=True))
    assert other_tokens > 0.9 * len(again) and (other_text > 0.5 * len(again)) == family.thinks
