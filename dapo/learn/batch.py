"""Groups → minibatches (one update each) → packed microbatches (one forward-backward each), balanced over
data-parallel ranks.

T = tokens packed into a microbatch, S = sequences in it. With context parallelism every sequence is cut into
2·context chunks of equal size and rank r has chunks r and 2·context − 1 − r (zig-zag: early tokens see few
keys, late ones many, so each rank attends as much); T then counts the tokens of one context rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush, heapreplace
from itertools import count

import numpy as np

from dapo.config import Config, Parallel
from dapo.learn.objective import token_weights
from dapo.learn.traces import chosen
from dapo.types import Group, Prompt, Sample

ATTENTION_SPAN = 32_768  # sequence length at which attention costs as much as the rest of a layer, roughly


@dataclass(frozen=True)
class Place:
    """Where response tokens of a dumped sample lie in a microbatch: targets[tokens] are those from `start`
    on, of `length` in all.
    """

    group: int
    index: int
    tokens: slice
    start: int
    length: int


@dataclass
class Microbatch:
    """Sequences packed end to end. Position t predicts targets[t]; the shift to the next token stays inside
    each sequence.
    """

    tokens: np.ndarray  # int64 [T]
    targets: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T], within the sequence
    # int32 [S + 1]: sequence i is cu_seqlens[i] : cu_seqlens[i + 1], counted over all context ranks
    cu_seqlens: np.ndarray
    mask: np.ndarray  # bool [T]: the target is a token the policy wrote
    weights: np.ndarray  # float32 [T]: see objective.py
    advantages: np.ndarray  # float32 [T]
    behavior_logprobs: np.ndarray  # float32 [T]
    is_stale: np.ndarray  # bool [T]: the target was written by older weights than the policy's
    # the samples whose tokens the updates trace, for the dump
    dumped: list[Place] = field(default_factory=list)


@dataclass
class Batch:
    """What one rank learns from in one step: minibatches[update][microbatch], and the rollout's metrics."""

    minibatches: list[list[Microbatch]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sequence:
    prompt: Prompt
    sample: Sample
    weight: float
    is_stale: np.ndarray  # bool [n]
    is_dumped: bool

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + self.sample.length - 1  # the last token predicts nothing


def plan(
    groups: list[Group], config: Config, num_ranks: int, metrics: dict[str, float], version: int = 0
) -> list[Batch]:
    """The step's work, one Batch per data-parallel rank and, within it, context rank; the same number of
    microbatches on each.

    `num_ranks`: data-parallel ranks; `version`: of the weights. Minibatches are whole groups in asking order.
    A short step makes fewer updates of about the same size; none for no groups.
    """
    parallel = config.parallel
    if not groups:
        return [Batch([], metrics) for _ in range(num_ranks * parallel.context)]
    dumped = {group.id for group in chosen(groups, config.rollout.dump_share)}
    num_updates = max(1, round(len(groups) / config.optim.prompts_per_minibatch))
    minibatches: list[list[list[Microbatch]]] = [[] for _ in range(num_ranks * parallel.context)]
    # chunks take turns after as many microbatches as there are stages
    turns = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    for indices in np.array_split(np.arange(len(groups)), num_updates):
        minibatch = [groups[i] for i in indices]
        weights = token_weights(minibatch, config.objective.normaliser, config.objective.overlong_filtering)
        sequences = [
            _Sequence(group.prompt, sample, weight, stale_tokens(sample, version), group.id in dumped)
            for group, group_weights in zip(minibatch, weights, strict=True)
            for sample, weight in zip(group.samples, group_weights, strict=True)
        ]
        lengths = [_padded(s.length, parallel.sequence_multiple) for s in sequences]
        is_gathered = config.policy.megatron.get("moe_token_dispatcher_type") == "allgather"
        bins = pack(lengths, config.policy.tokens_per_microbatch, num_ranks * turns, by_tokens=is_gathered)
        least = (
            _least_tokens([sum(lengths[i] for i in b) for b in bins], num_ranks)
            if is_gathered
            else [0] * len(bins)
        )
        for rank in range(num_ranks):
            packs = [
                build([sequences[i] for i in bins[b]], parallel, least[b])
                for b in range(rank, len(bins), num_ranks)
            ]
            for context_rank in range(parallel.context):
                shares = [share(pack, context_rank, parallel.context) for pack in packs]
                minibatches[rank * parallel.context + context_rank].append(shares)
    return [Batch(work, metrics) for work in minibatches]


def _least_tokens(tokens: list[int], num_ranks: int) -> list[int]:
    """What each bin is padded to where every rank's tokens are gathered for the experts: as many on all ranks
    at a time.
    """
    return [max(tokens[b - b % num_ranks :][:num_ranks]) for b in range(len(tokens))]


def stale_tokens(sample: Sample, version: int) -> np.ndarray:
    """[n] bool: which of the sample's tokens were written by weights older than `version`."""
    is_stale = np.zeros(sample.length, bool)
    for written_by, start, end in sample.versions:
        is_stale[start:end] = written_by < version
    return is_stale


def pack(lengths: list[int], budget: int, num_ranks: int, by_tokens: bool = False) -> list[list[int]]:
    """Indices of sequences in bins of at most `budget` tokens; as few bins as fit, a multiple of num_ranks.
    Rank r gets bins[r::num_ranks].

    Longest first, each to the cheapest bin with room; cost = linear + attention (n + n²/span). The costliest
    bins come first, those of like cost in one turn of the ranks, where the rank with the least work so far
    takes the costliest. Within a bin the order is kept. `by_tokens`: bins get like numbers of tokens instead,
    and those of a turn are alike in tokens and cost, for ranks that wait for the longest at every layer.
    """
    assert max(lengths) <= budget, f"a sequence of {max(lengths)} tokens in microbatches of {budget}"
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # of those above half, each has a bin of its own
    fewest = max(-(-sum(lengths) // budget), sum(2 * n > budget for n in lengths), 1)
    weights = [float(n) for n in lengths] if by_tokens else [_cost(n) for n in lengths]
    attempts = (
        _fill(lengths, weights, order, budget, num_bins)
        for num_bins in count(-(-fewest // num_ranks) * num_ranks, num_ranks)
    )
    bins = next(bins for bins in attempts if bins)
    costs = [sum(_cost(lengths[i]) for i in b) for b in bins]
    weight = [cost + sum(lengths[i] for i in b) * by_tokens for cost, b in zip(costs, bins, strict=True)]
    by_weight = sorted(range(len(bins)), key=lambda b: -weight[b])
    work, dealt = [0.0] * num_ranks, list[list[int]]()
    for turn in range(0, len(bins), num_ranks):
        costliest = sorted(by_weight[turn : turn + num_ranks], key=lambda b: -costs[b])
        taken = dict(zip(sorted(range(num_ranks), key=lambda rank: work[rank]), costliest, strict=True))
        dealt += [sorted(bins[taken[rank]]) for rank in range(num_ranks)]
        work = [work[rank] + costs[taken[rank]] for rank in range(num_ranks)]
    return dealt


def _cost(length: int) -> float:
    """Of a sequence's forward and backward pass, in tokens of a short one."""
    return length + length**2 / ATTENTION_SPAN


def _fill(
    lengths: list[int], costs: list[float], order: list[int], budget: int, num_bins: int
) -> list[list[int]] | None:
    """Bins of like cost for all sequences in this order of falling length; None if one finds no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    room = [budget] * num_bins
    by_cost = [(0.0, b) for b in range(num_bins)]  # a heap: bins with room, the cheapest first
    # a heap of (−room, cost, bin): those without, until the sequences are short enough
    by_room: list[tuple[int, float, int]] = []
    for i in order:
        n = lengths[i]
        while by_room and -by_room[0][0] >= n:
            heappush(by_cost, heappop(by_room)[1:])
        while by_cost and room[by_cost[0][1]] < n:
            cost, b = heappop(by_cost)
            heappush(by_room, (-room[b], cost, b))
        if not by_cost:
            return None
        cost, b = by_cost[0]
        bins[b].append(i)
        room[b] -= n
        heapreplace(by_cost, (cost + costs[i], b))
    return bins


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def build(sequences: list[_Sequence], parallel: Parallel, least: int = 1) -> Microbatch:
    """Pack the sequences, for all context ranks; pad the whole to a multiple, as one more sequence that
    weighs nothing.

    To at least `least` tokens: a rank without work still takes part in every collective.
    A sequence is padded at its end, where causality hides it, so that context ranks can share it.
    """
    lengths = [_padded(s.length, parallel.sequence_multiple) for s in sequences]
    padding = _padded(max(sum(lengths), least, 1), parallel.pack_multiple) - sum(lengths)
    total = sum(lengths) + padding
    microbatch = Microbatch(
        tokens=np.zeros(total, np.int64),
        targets=np.zeros(total, np.int64),
        positions=np.concatenate([np.arange(n) for n in [*lengths, padding]]),
        cu_seqlens=np.cumsum([0, *lengths, *([padding] if padding else [])], dtype=np.int32),
        mask=np.zeros(total, bool),
        weights=np.zeros(total, np.float32),
        advantages=np.zeros(total, np.float32),
        behavior_logprobs=np.zeros(total, np.float32),
        is_stale=np.zeros(total, bool),
    )
    for start, sequence in zip(microbatch.cu_seqlens, sequences, strict=False):
        whole = np.concatenate([sequence.prompt.tokens, sequence.sample.tokens])
        end = start + sequence.length
        microbatch.tokens[start:end] = whole[:-1]
        microbatch.targets[start:end] = whole[1:]
        # from the position that predicts the first response token
        response = slice(start + len(sequence.prompt.tokens) - 1, end)
        microbatch.mask[response] = sequence.sample.loss_mask
        microbatch.weights[response] = sequence.weight
        microbatch.advantages[response] = sequence.sample.advantage
        microbatch.behavior_logprobs[response] = sequence.sample.behavior_logprobs
        microbatch.is_stale[response] = sequence.is_stale
        if sequence.is_dumped:
            microbatch.dumped.append(
                Place(sequence.sample.group, sequence.sample.index, response, 0, sequence.sample.length)
            )
    return microbatch


def share(microbatch: Microbatch, rank: int, context: int) -> Microbatch:
    """Context rank `rank`'s part of a microbatch: of every sequence, in order, chunks `rank` and 2·context −
    1 − `rank`.

    What a token predicts was decided before, so a chunk's last token keeps its target in the next chunk.
    """
    if context == 1:
        return microbatch
    sizes = np.diff(microbatch.cu_seqlens) // (2 * context)
    starts = np.stack(
        [microbatch.cu_seqlens[:-1] + k * sizes for k in (rank, 2 * context - 1 - rank)], axis=1
    ).ravel()
    sizes = sizes.repeat(2)
    here = np.cumsum(sizes) - sizes  # where each chunk begins in the share
    order = np.repeat(starts - here, sizes) + np.arange(sizes.sum())
    parts = {
        name: value[order] for name, value in vars(microbatch).items() if name not in ("cu_seqlens", "dumped")
    }
    return replace(
        microbatch,
        **parts,
        dumped=[piece for place in microbatch.dumped for piece in _pieces(place, starts, sizes, here)],
    )


def _pieces(place: Place, starts: np.ndarray, sizes: np.ndarray, here: np.ndarray) -> Iterator[Place]:
    """The parts of a place that lie in chunks starts[i] : starts[i] + sizes[i], which a share has at
    here[i].
    """
    low, high = np.maximum(starts, place.tokens.start), np.minimum(starts + sizes, place.tokens.stop)
    for i in np.flatnonzero(low < high):
        begin = int(here[i] + low[i] - starts[i])
        yield replace(
            place, tokens=slice(begin, begin + int(high[i] - low[i])), start=int(low[i]) - place.tokens.start
        )
