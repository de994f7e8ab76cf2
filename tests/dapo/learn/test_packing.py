import os
import subprocess
import sys

import numpy as np
import pytest

from dapo.learn.packing import ATTENTION_SPAN, deal, fill, largest_differencing, pack


def random_lengths(seed, count=60, longest=64):
    return np.random.default_rng(seed).integers(1, longest + 1, count).tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [64, 65, 130, 100_000])
def test_every_sequence_is_packed_once_within_the_budget_on_a_multiple_of_ranks(seed, num_ranks, budget):
    lengths = random_lengths(seed)
    bins = pack(lengths, budget, num_ranks)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= budget for b in bins)
    assert len(bins) % num_ranks == 0
    assert all(b == sorted(b) for b in bins)


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "num_bins"),
    [
        ([30, 30, 30, 30], 1, 2),
        ([60, 4], 1, 1),
        ([60, 5], 1, 2),
        ([64], 1, 1),
        ([64], 4, 4),
        ([40] * 5, 2, 6),
        ([1] * 64, 2, 2),
    ],
)
def test_as_few_bins_are_used_as_fit(lengths, num_ranks, num_bins):
    assert len(pack(lengths, 64, num_ranks)) == num_bins


def test_ranks_get_work_of_like_cost():
    lengths = random_lengths(0, count=200, longest=20_000)
    costs = [
        sum(lengths[i] + lengths[i] ** 2 / ATTENTION_SPAN for i in b) for b in pack(lengths, 1_000_000, 8)
    ]
    assert max(costs) < 1.02 * min(costs)


@pytest.mark.parametrize(("count", "most", "most_in_rows"), [(8192, 0.0001, 0.002), (512, 0.001, 0.004)])
def test_a_heavy_tail_leaves_sixteen_ranks_next_to_nothing_to_wait_for(count, most, most_in_rows):
    drawn = np.random.default_rng(0).lognormal(np.log(2500), 1.0, count)
    lengths = np.clip(drawn.astype(int), 1, 20_480)
    bins = pack(lengths.tolist(), 32_768, 16)
    # [row, rank]
    costs = np.array([(lengths[b] + lengths[b] ** 2 / ATTENTION_SPAN).sum() for b in bins]).reshape(-1, 16)
    # of all ranks' work, until the slowest has finished the update
    assert 1 - costs.sum() / (16 * costs.sum(axis=0).max()) < most
    # if they waited after every microbatch
    assert 1 - costs.sum() / (16 * costs.max(axis=1).sum()) < most_in_rows


def test_the_longest_sequence_goes_first_into_the_lightest_bin_with_room():
    assert fill([3, 6, 4, 5], [3.0, 6.0, 4.0, 5.0], budget=10, num_bins=2) == [[1, 0], [3, 2]]
    assert fill([6, 5, 3], [1.0, 9.0, 1.0], budget=8, num_bins=2) == [[0], [1, 2]]  # the lighter is full
    assert fill([6, 6, 6], [6.0, 6.0, 6.0], budget=10, num_bins=2) is None


@pytest.mark.parametrize(
    ("weights", "num_bins", "sums"),
    [
        ([8.0, 7, 6, 5, 4], 2, [16, 14]),  # 8−7 = 1, 6−5 = 1, 4−1 = 3, 3−1 = 2; the longest first: 17, 13
        ([8.0, 7, 6, 5, 4], 1, [30]),
        ([3.0, 3, 2, 2, 2], 2, [7, 5]),
        ([4.0, 5, 6, 7, 8], 3, [11, 11, 8]),
        ([5.0, 4], 4, [5, 4, 0, 0]),
    ],
)
def test_largest_differencing_by_hand(weights, num_bins, sums):
    bins = largest_differencing(weights, num_bins)
    assert sorted((sum(weights[i] for i in b) for b in bins), reverse=True) == sums
    assert sorted(i for b in bins for i in b) == list(range(len(weights)))


def spread(bins, lengths):
    costs = [sum(lengths[i] + lengths[i] ** 2 / ATTENTION_SPAN for i in b) for b in bins]
    return max(costs) / min(costs) - 1


@pytest.mark.parametrize(("count", "num_ranks", "factor"), [(64, 4, 4), (128, 8, 4), (256, 16, 2)])
def test_where_there_is_room_bins_are_several_times_as_even_as_the_longest_first_makes_them(
    count, num_ranks, factor
):
    ours, others = [], []
    for seed in range(10):
        lengths = random_lengths(seed, count, longest=2000)
        bins = pack(lengths, 100_000, num_ranks)
        costs = [n + n**2 / ATTENTION_SPAN for n in lengths]
        ours.append(spread(bins, lengths))
        others.append(spread(fill(lengths, costs, 100_000, len(bins)), lengths))
    assert all(our <= other for our, other in zip(ours, others, strict=True))
    assert factor * np.mean(ours) < np.mean(others)


def test_bins_that_are_even_but_hold_too_many_tokens_are_not_taken():
    """One long sequence costs as much as many short ones of more tokens: their bin would be too long."""
    lengths = [20_000] * 2 + [1_000] * 40
    even = largest_differencing([n + n**2 / ATTENTION_SPAN for n in lengths], 3)
    budget = max(sum(lengths[i] for i in b) for b in even) - 1
    bins = pack(lengths, budget, 3)
    assert len(bins) == 3 and max(sum(lengths[i] for i in b) for b in bins) <= budget


@pytest.mark.parametrize("seed", range(4))
def test_by_tokens_a_row_has_bins_alike_in_length_and_cost_and_the_heaviest_row_comes_first(seed):
    """All ranks gather as many tokens as the longest bin of the row has: the rest is padding."""
    lengths = random_lengths(seed, count=120, longest=20_000)

    bins = pack(lengths, 32_768, 4, by_tokens=True)
    tokens = np.array([sum(lengths[i] for i in b) for b in bins]).reshape(-1, 4)
    squares = np.array([sum(lengths[i] ** 2 for i in b) for b in bins]).reshape(-1, 4)
    weights = 2 * tokens + squares / ATTENTION_SPAN
    assert len(weights) > 5 and (weights.min(axis=1)[:-1] >= weights.max(axis=1)[1:] - 1e-6).all()
    assert 1 - tokens.mean() / tokens.max(axis=1).mean() < 0.013


def test_in_a_row_the_rank_with_the_least_work_takes_the_costliest_bin():
    costs = [9.0, 1.0, 5.0, 4.0]
    assert deal(costs, costs, num_ranks=2) == [0, 2, 1, 3]
    assert deal(costs, weights=[1.0, 2.0, 3.0, 4.0], num_ranks=2) == [2, 3, 1, 0]


def test_packing_is_the_same_in_another_process():
    """A step that is repeated after a resume is planned anew."""
    code = "from dapo.learn.packing import pack; print(pack([5, 5, 5, 9, 9, 1] * 10, 20, 2))"
    seeds = [os.environ | {"PYTHONHASHSEED": seed} for seed in "12"]
    planned = [subprocess.check_output([sys.executable, "-c", code], env=env, text=True) for env in seeds]
    assert planned[0] == planned[1] == f"{pack([5, 5, 5, 9, 9, 1] * 10, 20, 2)}\n"


def test_a_sequence_beyond_the_budget_is_never_packed():
    with pytest.raises(AssertionError, match="65 tokens in microbatches of 64"):
        pack([65], 64, 1)
