import numpy as np
import pytest

from dapo.learn.packing import ATTENTION_SPAN, deal, fill, pack


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


def test_in_a_row_the_rank_with_the_least_work_takes_the_costliest_bin():
    costs = [9.0, 1.0, 5.0, 4.0]
    assert deal(costs, costs, num_ranks=2) == [0, 2, 1, 3]
    assert deal(costs, weights=[1.0, 2.0, 3.0, 4.0], num_ranks=2) == [2, 3, 1, 0]


def test_packing_is_deterministic():
    lengths = [5, 5, 5, 9, 9, 1] * 10
    assert pack(lengths, 20, 2) == pack(list(lengths), 20, 2)


def test_a_sequence_beyond_the_budget_is_never_packed():
    with pytest.raises(AssertionError, match="65 tokens in microbatches of 64"):
        pack([65], 64, 1)
