from typing import get_args

import numpy as np
import pytest
import torch

from dapo.config import Objective
from dapo.learn import objective
from dapo.learn.objective import NORMALISERS, is_cut
from tests.conftest import make_group

LONGEST = 20


def token_weights(groups, normaliser, overlong_filtering):
    options = Objective.model_construct(normaliser=normaliser, overlong_filtering=overlong_filtering)
    return objective.token_weights(groups, options, LONGEST)


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
    if normaliser == "constant":
        return sum(sum(s) / LONGEST for s in samples) / len(samples)
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


@pytest.mark.parametrize("normaliser", [name for name in NORMALISERS if name != "constant"])
@pytest.mark.parametrize("overlong_filtering", [False, True])
def test_the_weights_of_a_minibatch_sum_to_one(normaliser, overlong_filtering):
    groups = uneven_groups()
    ones = [[[1.0] * sample.length for sample in group.samples] for group in groups]
    assert weighted_sum(groups, ones, normaliser, overlong_filtering) == pytest.approx(1, rel=1e-12)


def test_the_normalisers_by_hand():
    groups = [make_group([1, 0], [1, 3]), make_group([1, 0], [2, 4])]
    assert token_weights(groups, "token_mean", False) == [[1 / 10, 1 / 10], [1 / 10, 1 / 10]]
    assert token_weights(groups, "group_token_mean", False) == [[1 / 8, 1 / 8], [1 / 12, 1 / 12]]
    assert token_weights(groups, "sample_mean", False) == [[1 / 4, 1 / 12], [1 / 8, 1 / 16]]
    assert token_weights(groups, "constant", False) == [[1 / 80, 1 / 80], [1 / 80, 1 / 80]]


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
    assert get_args(Objective.model_fields["normaliser"].annotation) == tuple(NORMALISERS)


def test_a_normaliser_is_one_function_in_the_table(monkeypatch):
    monkeypatch.setitem(NORMALISERS, "toy", lambda tokens, longest: [np.full_like(t, 7) for t in tokens])
    weights = token_weights(uneven_groups(), "toy", overlong_filtering=True)
    assert weights == [[1 / 7, 1 / 7, 0.0], [1 / 7, 1 / 7], [0.0, 1 / 7, 0.0]]


# importance


def importance(old, behavior, corrected, bounds=((0, 2),), **options):
    """`bounds`: first and last token of each response, exclusive."""

    def means(values, mask):
        out = torch.zeros_like(values)
        for start, end in bounds:
            inside = mask[start:end]
            if inside.any():
                out[start:end] = values[start:end][inside].mean()
        return out

    return objective.importance(old, behavior, corrected, Objective(**options), means)


def test_corrected_tokens_weigh_the_truncated_ratio_and_the_others_one():
    old, behavior = torch.tensor([-1.0, -1.0, -1.0, 5.0]), torch.tensor([-1.5, -9.0, -9.0, -1.0])
    is_stale = torch.tensor([True, True, False, False])
    for kind in ("tis", "none"):  # none: measured, not applied
        weights = importance(old, behavior, is_stale, importance=kind)
        assert weights.tolist() == [pytest.approx(np.exp(0.5)), 2.0, 1.0, 1.0]
        assert weights.dtype == torch.float32
        assert is_cut(weights, Objective(importance=kind)).tolist() == [False, True, False, False]


def test_a_band_keeps_the_ratio_inside_it_and_nothing_outside():
    ratios = torch.tensor([0.49, 0.51, 1.0, 4.9, 5.1, 1e30, 9.0])
    corrected = torch.tensor([True] * 6 + [False])
    weights = importance(ratios.log(), torch.zeros(7), corrected, importance="band")
    assert weights.tolist() == pytest.approx([0, 0.51, 1, 4.9, 0, 0, 1], rel=1e-5)
    assert is_cut(weights, Objective(importance="band")).tolist() == [1, 0, 0, 0, 1, 1, 0]
    infinite = importance(torch.tensor([200.0]), torch.tensor([-200.0]), corrected[:1], importance="band")
    assert infinite.tolist() == [0.0], "0 · ∞ is NaN"
    floor = {"importance": "band", "importance_band": (0.0, 1.0)}
    assert importance(torch.tensor([-50.0]), torch.zeros(1), corrected[:1], **floor).item() > 0, (
        "no lower bound"
    )


def test_a_sequence_mask_takes_or_leaves_whole_responses_by_their_corrected_tokens():
    ratios = torch.tensor([4.0, 1.0, 2.0, 9.0, 30.0, 30.0, 0.1, 0.1])
    corrected = torch.tensor([True, True, True, False, False, False, True, False])
    bounds = ((0, 2), (2, 4), (4, 6), (6, 8))
    mask = {"importance": "sequence_mask", "importance_band": (0.5, 3.0), "bounds": bounds}
    weights = importance(ratios.log(), torch.zeros(8), corrected, **mask)
    # √4 = 2; 2, whatever the 9 is; none is corrected; 0.1
    assert weights.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    without_one = importance(
        ratios.log(), torch.zeros(8), corrected, **mask | {"importance_band": (1.5, 3.0)}
    )
    assert without_one.tolist() == [1, 1, 1, 1, 1, 1, 0, 0], "1 lies outside, but nothing was to be corrected"
    unchanged = importance(torch.zeros(2), torch.zeros(2), torch.tensor([True] * 2), **mask | {
        "importance_band": (1.5, 3.0), "bounds": ((0, 2),)
    })  # fmt: skip
    assert unchanged.tolist() == [0, 0], "a mean of exactly 1 is one, too"


def test_a_log_prob_that_is_not_finite_changes_no_token_of_the_current_weights():
    nan = torch.tensor([float("nan")] * 2)
    weights = importance(nan, torch.zeros(2), torch.tensor([False, True]))
    assert weights[0] == 1.0 and weights[1].isnan()
