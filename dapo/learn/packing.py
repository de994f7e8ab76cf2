"""Sequence lengths → bins of like cost, one microbatch each, and bins → ranks. Nothing but numbers.

Bins come in rows of num_ranks: ranks compute a row's bins at the same time, rank r has bins[r::num_ranks].
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace
from itertools import count

ATTENTION_SPAN = 32_768  # sequence length at which attention costs as much as the rest of a layer, roughly


def pack(lengths: list[int], budget: int, num_ranks: int, by_tokens: bool = False) -> list[list[int]]:
    """Return the indices of sequences in bins of at most `budget` tokens: as few as fit, in whole rows.

    Bins are alike in cost, linear + attention; within a bin the order is kept. `by_tokens`: they are alike in
    tokens instead, and those of a row in both, for ranks that wait for the longest at every layer.
    """
    assert max(lengths) <= budget, f"a sequence of {max(lengths)} tokens in microbatches of {budget}"
    costs = [_cost(n) for n in lengths]
    # sequences longer than half a bin have one each
    fewest = max(-(-sum(lengths) // budget), sum(2 * n > budget for n in lengths), 1)
    weights = [float(n) for n in lengths] if by_tokens else costs
    numbers = count(padded(fewest, num_ranks), num_ranks)
    bins = next(bins for num_bins in numbers if (bins := fill(lengths, weights, budget, num_bins)))
    even = largest_differencing(weights, len(bins))
    if all(sum(lengths[i] for i in b) <= budget for b in even):
        bins = min(bins, even, key=lambda bins: max(sum(weights[i] for i in b) for b in bins))
    bin_costs = [sum(costs[i] for i in b) for b in bins]
    by_weight = bin_costs
    if by_tokens:
        by_weight = [cost + sum(lengths[i] for i in b) for cost, b in zip(bin_costs, bins, strict=True)]
    return [sorted(bins[b]) for b in deal(bin_costs, by_weight, num_ranks)]


def fill(lengths: list[int], weights: list[float], budget: int, num_bins: int) -> list[list[int]] | None:
    """Fill bins of like weight, the longest sequence first, each into the lightest bin with room for it.

    Returns None if a sequence finds no room.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [budget] * num_bins
    by_weight = [(0.0, b) for b in range(num_bins)]  # a heap: bins with room, the lightest first
    # a heap of (−room, weight, bin): bins without room, until the sequences are short enough
    by_room: list[tuple[int, float, int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = lengths[i]
        while by_room and -by_room[0][0] >= n:
            heappush(by_weight, heappop(by_room)[1:])
        while by_weight and room[by_weight[0][1]] < n:
            weight, b = heappop(by_weight)
            heappush(by_room, (-room[b], weight, b))
        if not by_weight:
            return None
        weight, b = by_weight[0]
        bins[b].append(i)
        room[b] -= n
        heapreplace(by_weight, (weight + weights[i], b))
    return bins


def largest_differencing(weights: list[float], num_bins: int) -> list[list[int]]:
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
        b = heappop(partitions)[2][::-1]
        first = num_bins - len(b)  # of a's bins, the heaviest ones join empty ones
        pairs = zip(a[first:], b, strict=False)
        joined = [(x + y, i + j) for (x, i), (y, j) in pairs]
        bins = sorted(a[:first] + joined + b[len(joined) :])
        lightest = bins[-1][0] if len(bins) == num_bins else 0.0
        heappush(partitions, (bins[0][0] - lightest, number, bins))
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
