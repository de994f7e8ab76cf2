from typing import get_args

import numpy as np
import pytest
import torch

from dapo import config
from dapo.learn.objective import NORMALISERS, importance, token_weights
from tests.conftest import make_group


def brute_force(values, normaliser):
    """The objective of one minibatch from its per-token values [group][sample][token], as the formulas are
    written.
    """
    if normaliser == "token_mean":
        tokens = [v for group in values for sample in group for v in sample]
        return sum(tokens) / len(tokens)
    if normaliser == "group_token_mean":  # Eq. 8, averaged over prompts
        groups = [[v for sample in group for v in sample] for group in values]
        return sum(sum(g) / len(g) for g in groups if g) / sum(1 for g in groups if g)
    samples = [sample for group in values for sample in group if sample]
    return sum(sum(s) / len(s) for s in samples) / len(samples)


def weighted_sum(groups, values, normaliser, overlong_filtering=False):
    weights = token_weights(groups, normaliser, overlong_filtering)
    return sum(
        w * v
        for group, ws in zip(values, weights, strict=True)
        for sample, w in zip(group, ws, strict=True)
        for v in sample
    )


def random_values(groups, seed=0):
    rng = np.random.default_rng(seed)
    return [[rng.normal(size=sample.length).tolist() for sample in group.samples] for group in groups]


def uneven_groups():
    return [
        make_group([1, 0, 0], [1, 7, 300], truncated=[2], id=0),
        make_group([1, 0], [12, 2], id=1),
        make_group([1, 0, 1], [5, 9, 31], truncated=[0, 2], id=2),
    ]


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_the_weighted_sum_is_the_formula_on_uneven_lengths(normaliser):
    groups = uneven_groups()
    values = random_values(groups)
    assert weighted_sum(groups, values, normaliser) == pytest.approx(
        brute_force(values, normaliser), rel=1e-12
    )


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_filtered_samples_leave_numerator_and_denominator(normaliser):
    groups = uneven_groups()
    values = random_values(groups)
    kept = [
        [[] if s.is_truncated else v for s, v in zip(group.samples, vs, strict=True)]
        for group, vs in zip(groups, values, strict=True)
    ]
    assert weighted_sum(groups, values, normaliser, overlong_filtering=True) == pytest.approx(
        brute_force(kept, normaliser), rel=1e-12
    )


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("overlong_filtering", [False, True])
def test_the_weights_of_a_minibatch_sum_to_one(normaliser, overlong_filtering):
    groups = uneven_groups()
    ones = [[[1.0] * sample.length for sample in group.samples] for group in groups]
    assert weighted_sum(groups, ones, normaliser, overlong_filtering) == pytest.approx(1, rel=1e-12)


def test_the_three_normalisers_by_hand():
    groups = [make_group([1, 0], [1, 3]), make_group([1, 0], [2, 4])]
    assert token_weights(groups, "token_mean", False) == [[1 / 10, 1 / 10], [1 / 10, 1 / 10]]
    assert token_weights(groups, "group_token_mean", False) == [[1 / 8, 1 / 8], [1 / 12, 1 / 12]]
    assert token_weights(groups, "sample_mean", False) == [[1 / 4, 1 / 12], [1 / 8, 1 / 16]]


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_a_group_of_only_truncated_samples_leaves_the_denominators_too(normaliser):
    whole, cut = make_group([1, 0], [3, 5]), make_group([1, 0], [32, 32], truncated=[0, 1])
    assert token_weights([whole, cut], normaliser, True) == [
        *token_weights([whole], normaliser, False),
        [0.0, 0.0],
    ]


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_when_everything_is_truncated_every_weight_is_zero(normaliser):
    assert token_weights([make_group([1, 0], truncated=[0, 1])] * 2, normaliser, True) == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_only_tokens_that_the_policy_wrote_are_counted(normaliser):
    groups = [make_group([1, 0], [6, 9]), make_group([1, 0], [4, 5])]
    groups[0].samples[1].loss_mask[2:5] = False
    groups[1].samples[0].loss_mask[:] = False
    shorter = [make_group([1, 0], [6, 6]), make_group([0], [5])]
    expected = token_weights(shorter, normaliser, False)
    assert token_weights(groups, normaliser, False) == [expected[0], [0.0, *expected[1]]]


# how to add one


def test_the_normalisers_are_those_that_the_config_allows():
    assert get_args(config.Objective.model_fields["normaliser"].annotation) == tuple(NORMALISERS)


def test_a_normaliser_is_one_function_in_the_table(monkeypatch):
    monkeypatch.setitem(NORMALISERS, "toy", lambda tokens: [np.full_like(t, 7) for t in tokens])
    weights = token_weights(uneven_groups(), "toy", overlong_filtering=True)
    assert weights == [[1 / 7, 1 / 7, 0.0], [1 / 7, 1 / 7], [0.0, 1 / 7, 0.0]]


# importance


def test_stale_tokens_weigh_the_truncated_ratio_and_the_others_one():
    old, behavior = torch.tensor([-1.0, -1.0, -1.0, 5.0]), torch.tensor([-1.5, -9.0, -9.0, -1.0])
    is_stale = torch.tensor([True, True, False, False])
    weights = importance(old, behavior, is_stale, cap=2.0)
    assert weights.tolist() == [pytest.approx(np.exp(0.5)), 2.0, 1.0, 1.0]
    assert weights.dtype == torch.float32


def test_a_log_prob_that_is_not_finite_changes_no_token_of_the_current_weights():
    nan = torch.tensor([float("nan")] * 2)
    weights = importance(nan, torch.zeros(2), torch.tensor([False, True]), cap=2.0)
    assert weights[0] == 1.0 and weights[1].isnan()
