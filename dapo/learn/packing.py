"""Sequence lengths → bins of like cost, one microbatch each, and bins → ranks. Nothing but numbers.

Bins come in rows of num_ranks: ranks compute a row's bins at the same time, rank r has bins[r::num_ranks].
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from heapq import heapify, heappop, heapreplace
from itertools import count

import numpy as np

Bins = list[list[int]]  # indices of sequences

ATTENTION_SPAN = 32_768  # sequence length at which attention costs as much as the rest of a layer, roughly
FREE = 3  # sequences of a bin, its shortest, that an exchange may move
NEAR = 64  # bins, the least full, that the fullest tries first
CHOICES = np.arange(2**FREE) >> np.arange(FREE)[:, None] & 1  # [sequence, choice]: 1 if it moves


def pack(lengths: list[int], budget: int, num_ranks: int, by_tokens: bool = False) -> Bins:
    """Return the indices of sequences in bins of at most `budget` tokens: as few as fit, in whole rows.

    Bins are alike in cost, linear + attention; within a bin the order is kept. `by_tokens`: they are alike in
    tokens instead, and those of a row in both, for ranks that wait for the longest at every layer.
    """
    assert max(lengths) <= budget, f"a sequence of {max(lengths)} tokens in microbatches of {budget}"
    costs = [_cost(n) for n in lengths]
    weights = [float(n) for n in lengths] if by_tokens else costs
    numbers = count(padded(fewest(lengths, budget), num_ranks), num_ranks)
    bins = next(bins for num_bins in numbers if (bins := fit(lengths, weights, budget, num_bins)))
    bin_costs = [sum(costs[i] for i in b) for b in bins]
    by_weight = bin_costs
    if by_tokens:
        by_weight = [cost + sum(lengths[i] for i in b) for cost, b in zip(bin_costs, bins, strict=True)]
    return [sorted(bins[b]) for b in deal(bin_costs, by_weight, num_ranks)]


def fewest(lengths: list[int], budget: int) -> int:
    """Return a number of bins below which the sequences do not fit.

    For every k a bin has at most k points, if a sequence has one for each 1/(k + 1) of the budget that it is
    longer than. So with k = 1 sequences longer than half a bin have one each.
    """
    k = np.arange(1, 16)
    points = ((k[:, None] + 1) * lengths - 1) // budget
    return max(-(-sum(lengths) // budget), int((-(-points.sum(1) // k)).max()))


def fit(lengths: list[int], weights: list[float], budget: int, num_bins: int) -> Bins | None:
    """Return bins of at most `budget` tokens, as even in weight as that allows, or None if none are found."""
    bins = largest_differencing(weights, num_bins)
    if max(sum(lengths[i] for i in b) for b in bins) <= budget:
        return bins
    least = least_weight(lengths, weights, budget, num_bins)
    for above in (0.01, 0.015, 0.02, 0.05, np.inf):
        if exchange(bins, np.array([lengths, weights]), np.array([budget, least * (1 + above)])):
            return bins
    return None


def least_weight(lengths: list[int], weights: list[float], budget: int, num_bins: int) -> float:
    """Return a weight that the heaviest bin cannot be below.

    Of sequences longer than half a bin the j longest have j bins. There is also what the other bins have no
    room for: of the shorter sequences, no less than the shortest, whose tokens are the lightest.
    """
    order = np.argsort(lengths)
    tokens, weight = (np.cumsum([0.0, *np.array(x)[order]]) for x in (lengths, weights))
    j = np.arange(1, sum(2 * n > budget for n in lengths) + 1)
    beside = np.interp(tokens[-1 - j] - (num_bins - j) * budget, tokens, weight)
    return float(max(weight[-1] / num_bins, *((weight[-1] - weight[-1 - j] + beside) / j), 0))


def exchange(bins: Bins, sizes: np.ndarray, limits: np.ndarray) -> bool:
    """Exchange sequences until all bins are within the limits, or no exchange makes the fullest less full.

    `sizes` [2, sequence] and `limits` [2] are tokens and weight; the larger of a bin's two fractions of the
    limits is how full it is. Return whether all are within the limit of tokens.
    """
    parts = np.zeros((2, 2, len(bins), 2**FREE))  # [moved or kept, tokens or weight, bin, choice]: fractions
    lengths, held = sizes[0].tolist(), parts[1, :, :, 0]

    def put(b: int, indices: Iterable[int]) -> None:
        bins[b] = sorted(indices, key=lambda i: (lengths[i], i))
        free = bins[b][:FREE]
        moved = sizes[:, free] @ CHOICES[: len(free)]
        parts[:, :, b] = np.array([moved, sizes[:, bins[b]].sum(1, keepdims=True) - moved]) / limits[:, None]

    for b, indices in enumerate(bins):
        put(b, indices)
    while (full := held.max()) > 1:
        order = held.max(0).argsort(kind="stable")
        fullest, others = int(order[-1]), order[:-1]
        for first in range(0, len(others), NEAR):
            partners = others[first : first + NEAR]
            both = parts[::-1, :, fullest, :, None] + parts[:, :, partners].reshape(2, 2, 1, -1)
            after = both.max((0, 1))  # [choice of the fullest, partner and its choice]
            if after.min() < full - 1e-5:
                break
        else:
            break
        x, p, y = np.unravel_index(after.argmin(), (2**FREE, len(partners), 2**FREE))
        pair = (fullest, CHOICES[:, x]), (int(partners[p]), CHOICES[:, y])
        moved = {i for b, choice in pair for i, moves in zip(bins[b], choice, strict=False) if moves}
        for b, _ in pair:
            put(b, moved.symmetric_difference(bins[b]))
    return bool(held[0].max() <= 1)


def largest_differencing(weights: list[float], num_bins: int) -> Bins:
    """Return bins of like weight by Karmarkar and Karp's method, however many tokens they hold.

    At first each sequence is a partition of its own, all bins but one empty. The two partitions with the
    largest difference between heaviest and lightest bin become one: the heaviest of one joins the lightest
    of the other, and so on.
    """
    # a partition: (−difference, number, bins); a bin: (−weight, indices), the heaviest first, no empty ones
    partitions = [(-w, i, [(-w, [i])]) for i, w in enumerate(weights)]
    heapify(partitions)
    for number in count(len(weights)):
        a = heappop(partitions)[2]
        if not partitions:
            return [indices for _, indices in a] + [[] for _ in range(num_bins - len(a))]
        b = partitions[0][2][::-1]
        first = num_bins - len(b)  # of a's bins, the heaviest ones join empty ones
        joined = [(x + y, i + j) for (x, i), (y, j) in zip(a[first:], b, strict=False)]
        bins = a[:first]
        for changed in joined + b[len(joined) :]:
            insort(bins, changed)
        lightest = bins[-1][0] if len(bins) == num_bins else 0.0
        heapreplace(partitions, (bins[0][0] - lightest, number, bins))
    raise AssertionError("the partitions become one")


def deal(costs: list[float], weights: list[float], num_ranks: int) -> list[int]:
    """Return the bins in rows of num_ranks, one for each rank: the heaviest row first.

    A row has bins of like weight; the rank with the least work so far takes its costliest.
    """
    by_weight = sorted(range(len(costs)), key=lambda b: -weights[b])
    work, dealt = [0.0] * num_ranks, list[int]()
    for first in range(0, len(costs), num_ranks):
        costliest = sorted(by_weight[first : first + num_ranks], key=lambda b: -costs[b])
        taken = dict(zip(sorted(range(num_ranks), key=lambda rank: work[rank]), costliest, strict=True))
        dealt += [taken[rank] for rank in range(num_ranks)]
        work = [work[rank] + costs[taken[rank]] for rank in range(num_ranks)]
    return dealt


def padded(number: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


def _cost(length: int) -> float:
    """Return the cost of a sequence's forward and backward pass, in tokens of a short one."""
    return length + length**2 / ATTENTION_SPAN
