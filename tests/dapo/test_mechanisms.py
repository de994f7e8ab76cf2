"""Each technique of DAPO by the gradient that it changes, against arithmetic by hand in float64."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from dapo_kernels.reference import logprobs, policy_loss
from torch import Tensor

from dapo.learn.advantages import set_advantages
from dapo.learn.batch import Microbatch
from dapo.learn.objective import NORMALISERS
from dapo.reward.overlong import soft_overlong_penalty
from dapo.rollout.buffer import Buffer
from dapo.rollout.pending import RolloutError
from dapo.types import Group
from tests.batches import plan
from tests.conftest import make_config, make_group
from tests.dapo.rollout.test_rollouts import ScriptedEngine, make_rollouts
from tests.gradients import (
    HIGH,
    LOW,
    VOCAB,
    advantages_of,
    ascend,
    at_ratios,
    gradient_at,
    kept_of,
    punish,
    pushes,
    steps_to,
    weights_of,
)  # fmt: skip

ROUNDED = 5e-6  # advantages are float32, and 1e-6 is added to their standard deviation


# Clip-Higher

EDGE = 1e-9  # distance of a ratio from a bound, relative
BOUNDS = [0.8, 1.2, 1.28, 10.0]
RATIOS = [0.01, *[b * side for b in BOUNDS for side in (1 - EDGE, 1 + EDGE)], 1.0, 1.24, 3.0, 50.0]


@pytest.mark.parametrize(
    ("advantage", "clip_high", "dual_clip", "num_silent"),
    [
        (1.25, 0.2, None, 8),
        (1.25, 0.28, None, 5),
        (1.25, 0.28, 10.0, 5),
        (-0.75, 0.28, None, 2),
        (-0.75, 0.28, 10.0, 4),
    ],
)
def test_a_token_has_its_whole_gradient_up_to_the_bound_and_none_beyond(
    advantage, clip_high, dual_clip, num_silent
):
    logits, targets, *_ = at_ratios(RATIOS, advantage)
    gradient = gradient_at(RATIOS, advantage, clip_high, dual_clip)
    silent = []
    for t, ratio in enumerate(RATIOS):
        if advantage > 0:
            is_silent = ratio > 1 + clip_high  # already likely enough
        else:
            is_silent = ratio < 1 - LOW or (dual_clip is not None and ratio > dual_clip)
        push = 0.0 if is_silent else ratio * advantage
        onehot = torch.eye(VOCAB, dtype=torch.float64)[targets[t]]
        expected = push * (logits[t].softmax(-1) - onehot)  # of −push · log-prob, by the logits
        torch.testing.assert_close(gradient[t], expected, rtol=1e-9, atol=1e-12)
        assert bool(gradient[t].any()) is not is_silent, (ratio, "silent tokens are exactly zero")
        silent += [ratio] * is_silent
    assert len(silent) == num_silent, "the ratios lie on either side of every bound"


def test_clip_higher_changes_only_good_tokens_between_the_two_bounds():
    for advantage, expected in ((1.0, {1.2 * (1 + EDGE), 1.24, 1.28 * (1 - EDGE)}), (-1.0, set())):
        change = gradient_at(RATIOS, advantage, 0.28) - gradient_at(RATIOS, advantage, 0.2)
        assert {ratio for ratio, row in zip(RATIOS, change, strict=True) if row.any()} == expected


@pytest.mark.parametrize(
    ("p", "clip_high", "end"), [(0.01, 0.2, 0.012), (0.01, 0.28, 0.0128), (0.5, 0.2, 0.6), (0.5, 0.28, 0.64)]
)
def test_ascent_on_one_token_ends_at_its_probability_times_one_plus_clip_high(p, clip_high, end):
    """An unlikely token gains a few thousandths in a step, a likely one more than a tenth."""
    largest = math.exp(2e-3)  # a step moves the target's logit by 1e-3 at most, and the normaliser by less
    assert end < ascend(p, clip_high) < end * largest


@pytest.mark.parametrize("clip_high", [0.2, 0.28])
def test_a_token_likelier_than_the_inverse_of_the_bound_is_never_clipped(clip_high):
    bound = 1 / (1 + clip_high)
    assert ascend(bound * 1.01, clip_high) >= 0.99
    assert ascend(bound * 0.95, clip_high) < 0.96


@pytest.mark.parametrize(("clip_high", "steps"), [(0.2, 19), (0.28, 14)])
def test_steps_from_a_rare_token_to_a_coin_s_toss_are_a_logarithm(clip_high, steps):
    assert math.ceil(math.log(0.5 / 0.016) / math.log(1 + clip_high)) == steps
    assert steps_to(0.5, 0.016, clip_high) == steps


# What every token of a minibatch is pushed with

# Token-level loss


@pytest.mark.parametrize(
    ("normaliser", "of_long", "of_all", "per_token"),
    [
        ("token_mean", 512 / 932, 1, 1),
        ("group_token_mean", 512 / 932, 1, 1),
        ("sample_mean", 2 / 16, 1, 30 / 256),
        ("constant", 512 / (16 * 256), 932 / (16 * 256), 1),
    ],
)
def test_two_long_responses_of_sixteen_weigh_their_tokens_or_their_number(
    normaliser, of_long, of_all, per_token
):
    [found] = weights_of([make_group([1] * 16, [30] * 14 + [256] * 2)], normaliser)
    assert sum(found[14:]) == pytest.approx(of_long, rel=1e-12)
    assert sum(found) == pytest.approx(of_all, rel=1e-12)
    assert (found[-1] / 256) / (found[0] / 30) == pytest.approx(per_token, rel=1e-12)


@pytest.mark.parametrize(
    ("normaliser", "of_long"),
    [("token_mean", 256 / 286), ("constant", 256 / 286), ("group_token_mean", 1 / 2), ("sample_mean", 1 / 2)],
)
def test_between_groups_eq_8_to_the_letter_and_the_released_code_differ(normaliser, of_long):
    short, long = weights_of([make_group([1] * 16, [n] * 16, id=n) for n in (30, 256)], normaliser)
    assert sum(long) / (sum(short) + sum(long)) == pytest.approx(of_long, rel=1e-12)


def shared_gradient(microbatches: Sequence[Microbatch[np.ndarray]]) -> Tensor:
    """The gradient of a table of logits that all tokens share, summed over microbatches, [VOCAB, VOCAB]."""
    theta = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theta.requires_grad_()
    for m in microbatches:
        inputs, targets = (torch.from_numpy(x) % VOCAB for x in (m.tokens, m.targets))
        mask, logits = torch.from_numpy(m.loss_mask), theta[inputs]
        moved = 0.3 * torch.sin(torch.from_numpy(m.targets).double())  # some ratios are beyond the clip
        old = logprobs(logits, targets, mask) - moved
        weights, advantages = (torch.from_numpy(x).double() for x in (m.token_weights, m.advantages))
        clip = {"clip_low": LOW, "clip_high": HIGH}
        policy_loss(logits, targets, old, advantages, mask, weights=weights, **clip).loss.backward()
    assert theta.grad is not None
    return theta.grad


@pytest.mark.parametrize("filtering", [False, True])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_one_update_s_gradient_is_the_same_on_any_ranks_in_any_microbatches(tmp_path, normaliser, filtering):
    lengths = [(1, 31), (30, 2), (17, 4), (9, 32), (26, 26)]
    groups = [
        make_group([1, 0], pair, truncated=[1] * (max(pair) > 30), id=i) for i, pair in enumerate(lengths)
    ]
    set_advantages(groups)
    gradients = []
    for num_ranks, budget in ((1, 10_000), (1, 48), (3, 48), (4, 100)):
        config = make_config(
            tmp_path,
            f"objective.normaliser={normaliser}",
            f"objective.overlong_filtering={str(filtering).lower()}",
            f"policy.tokens_per_microbatch={budget}",
            "optim.prompts_per_minibatch=5",
            "rollout.prompts_per_step=5",
        )
        batches = plan(groups, config, num_ranks, {})
        assert [len(batch.minibatches) for batch in batches] == [1] * num_ranks
        parts = [m for batch in batches for m in batch.minibatches[0]]
        assert len(parts) >= (1 if budget == 10_000 else 2)
        gradients.append(shared_gradient(parts))
    assert gradients[0].norm() > 1e-3
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-10, atol=1e-12)


# Overlong filtering


def six_four_six() -> Group:
    """Six right and four wrong responses of 30 tokens, six truncated ones of 48: A is 1.25 and −0.75."""
    group = make_group([1] * 6 + [0] * 10, [30] * 10 + [48] * 6, truncated=range(10, 16))
    set_advantages([group])
    rewards = [1.0] * 6 + [-1.0] * 10
    assert (statistics.mean(rewards), statistics.stdev(rewards)) == (-0.25, 1)
    assert [s.advantage for s in group.samples] == pytest.approx([1.25] * 6 + [-0.75] * 10, rel=ROUNDED)
    return group


@pytest.mark.parametrize(
    ("normaliser", "before", "after"),
    [
        ("sample_mean", 0, 4.5 / 10),  # 6 · 1.25 − 4 · 0.75 = 4.5, and 4.5 − 6 · 0.75 = 0
        ("token_mean", (4.5 * 30 - 4.5 * 48) / 588, 4.5 * 30 / 300),
        ("group_token_mean", (4.5 * 30 - 4.5 * 48) / 588, 4.5 * 30 / 300),
        ("constant", (4.5 * 30 - 4.5 * 48) / (16 * 256), 4.5 * 30 / (10 * 256)),
    ],
)
def test_filtering_leaves_advantages_that_are_not_centred(normaliser, before, after):
    """They were made with the truncated samples, which count in no denominator any more."""
    group = six_four_six()
    [whole], [filtered] = pushes([group], normaliser), pushes([group], normaliser, filtering=True)
    assert sum(whole) == pytest.approx(before, abs=ROUNDED)
    assert sum(filtered) == pytest.approx(after, abs=ROUNDED)
    assert all(push < 0 for push in whole[10:]), "truncated samples were pushed down"
    assert filtered[10:] == [0.0] * 6


@pytest.mark.parametrize(
    ("normaliser", "grown"),
    [
        ("sample_mean", 16 / 10),
        ("token_mean", 588 / 300),
        ("group_token_mean", 588 / 300),
        ("constant", 16 / 10),
    ],
)
def test_what_is_left_after_filtering_weighs_more(normaliser, grown):
    group = six_four_six()
    [whole], [filtered] = pushes([group], normaliser), pushes([group], normaliser, filtering=True)
    for before, after in zip(whole[:10], filtered[:10], strict=True):
        assert after / before == pytest.approx(grown, rel=1e-12)


@pytest.mark.parametrize(
    ("filtering", "num_truncated", "no_gradient"), [(True, 2, 1), (True, 1, 0), (False, 2, 0)]
)
def test_a_mixed_group_of_truncated_samples_alone_teaches_nothing_where_they_are_filtered(
    filtering, num_truncated, no_gradient
):
    buffer = Buffer(1, is_dynamic=True, filters_overlong=filtering)
    group = make_group([1, 0], truncated=range(num_truncated))
    for sample in group.samples:
        sample.reward = 1.0 if sample.is_correct else -1.0
    buffer.offer(group)
    assert buffer.kept == [group] and buffer.ledger()["rollout/no_gradient"] == no_gradient


def test_steps_of_which_filtering_leaves_nothing_count_as_empty(tmp_path):
    def rollouts(*options):
        engine = ScriptedEngine(lambda prompt: "10", length=lambda request: request.sampling.max_tokens)
        return make_rollouts(tmp_path, engine, "rollout.max_empty_steps=1", *options)

    rollouts().next_batch(0)
    with pytest.raises(RolloutError, match=r"0 of 4 .*, 4 masked by objective.overlong_filtering"):
        rollouts("objective.overlong_filtering=true").next_batch(0)


def test_a_group_whose_wrong_samples_are_all_truncated_is_kept_and_only_pushed_up():
    """Filtering comes after dynamic sampling, which counts truncated samples as what they are: wrong."""
    group = make_group([1] * 3 + [0], [30, 30, 30, 48], truncated=[3])
    buffer = Buffer(1, is_dynamic=True)
    buffer.offer(group)
    assert buffer.kept == [group]
    set_advantages(buffer.kept)
    [found] = pushes(buffer.kept, "sample_mean", filtering=True)
    assert found == pytest.approx([0.5 / 3] * 3 + [0], rel=ROUNDED)  # A is 0.5 and −1.5


# Dynamic sampling


def outcomes() -> list[Group]:
    """A mixed group, one all right, one all wrong, each of four responses of ten tokens."""
    return [make_group(correct, [10] * 4, id=i) for i, correct in enumerate(([1, 0, 0, 0], [1] * 4, [0] * 4))]


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_groups_without_a_gradient_dilute_that_of_the_others_where_they_are_kept(normaliser):
    """They count in every denominator: one mixed group of three has a third of its gradient."""
    [alone] = pushes(kept_of(outcomes(), is_dynamic=True), normaliser)
    mixed, all_right, all_wrong = pushes(kept_of(outcomes(), is_dynamic=False), normaliser)
    assert all_right == all_wrong == [0.0] * 4
    scale = 10 / 256 if normaliser == "constant" else 1
    assert alone == pytest.approx([1.5 / 4 * scale] + [-0.5 / 4 * scale] * 3, rel=ROUNDED)
    assert mixed == pytest.approx([push / 3 for push in alone], rel=1e-12)


@pytest.mark.parametrize("correct", [0, 1])
def test_a_shaped_reward_gives_a_group_a_gradient_and_does_not_save_it(correct):
    def shaped() -> Group:
        return punish(make_group([correct] * 4, [30, 40, 60, 90]))

    assert kept_of([shaped()], is_dynamic=True) == []
    [found] = pushes(kept_of([shaped()], is_dynamic=False))
    penalties = [0, 0, -12 / 48, -42 / 48]
    mean, deviation = statistics.mean(penalties), statistics.stdev(penalties)
    pairs = zip([30, 40, 60, 90], penalties, strict=True)
    expected = [n / 220 * (penalty - mean) / deviation for n, penalty in pairs]
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[0] > 0 > found[3]


# Soft overlong punishment


def test_the_penalty_of_every_length_is_eq_13_and_a_token_in_the_cache_costs_one_over_its_size():
    budget, cache = 20_480, 4_096  # a cache of a power of two: floats are exact
    last = Fraction(0)
    for length in range(budget + 2):
        expected = Fraction(0)
        if length > budget - cache:
            expected = Fraction(budget - cache - length, cache) if length <= budget else Fraction(-1)
        assert Fraction(soft_overlong_penalty(length, budget, cache)) == expected, length
        assert last - expected == (Fraction(1, cache) if budget - cache < length <= budget else 0)
        last = expected
    right, wrong = (verdict + soft_overlong_penalty(budget, budget, cache) for verdict in (1.0, -1.0))
    assert (right, wrong) == (0.0, -2.0)


@pytest.mark.parametrize("longest", [52, 96])
def test_a_hair_of_a_penalty_in_an_all_right_group_is_as_large_as_the_whole(longest):
    """Eq. 9 has no scale: one response of eight that differs has −7/√8, the others 1/√8."""
    found = advantages_of([1] * 8, [30] * 7 + [longest])
    assert found[7] == pytest.approx(-7 / 8**0.5, rel=1e-4)  # −2.475
    assert found[:7] == pytest.approx([1 / 8**0.5] * 7, rel=1e-4)  # 0.354
    assert found[7] == pytest.approx(advantages_of([1] * 7 + [0], [30] * 8)[7], rel=1e-4), "one wrong answer"


@pytest.mark.parametrize("over", [4, 48])
def test_without_the_division_by_the_deviation_a_penalty_keeps_its_size(over):
    penalty = over / 48
    found = advantages_of([1] * 8, [30] * 7 + [48 + over], "no_std")
    assert found == pytest.approx([penalty / 8] * 7 + [-7 / 8 * penalty], rel=1e-6)


def test_a_hair_of_a_penalty_in_a_mixed_group_stays_one():
    correct, lengths = [1] * 5 + [0] * 3, [30] * 8
    plain = advantages_of(correct, lengths)
    lengths[4] = 52
    found = advantages_of(correct, lengths)
    rewards = [1.0] * 4 + [1 - 4 / 48] + [-1.0] * 3
    mean, deviation = statistics.mean(rewards), statistics.stdev(rewards)
    assert found == pytest.approx([(r - mean) / deviation for r in rewards], rel=ROUNDED)
    assert 0.05 < plain[4] - found[4] < 0.1
    assert all(abs(a - b) < 0.02 for a, b in zip(plain[:4], found[:4], strict=True))
