"""Groups → minibatches (one update each) → packed microbatches (one forward-backward each), balanced over data-parallel ranks.

T = tokens packed into a microbatch, S = sequences in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import numpy as np

from dapo.config import Config
from dapo.dump import chosen
from dapo.objective import token_weights
from dapo.types import Group, Prompt, Sample

ATTENTION_SPAN = 32_768  # sequence length at which attention costs as much as the rest of a layer, roughly


@dataclass(frozen=True)
class Place:
    """Where the response tokens of a dumped sample lie in a microbatch: they are targets[tokens]."""

    group: int
    index: int
    tokens: slice


@dataclass
class Microbatch:
    """Sequences packed end to end. Position t predicts targets[t]; the shift to the next token stays inside each sequence."""

    tokens: np.ndarray  # int64 [T]
    targets: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T], within the sequence
    cu_seqlens: np.ndarray  # int32 [S + 1]: sequence i is cu_seqlens[i] : cu_seqlens[i + 1]
    mask: np.ndarray  # bool [T]: the target is a token the policy wrote
    weights: np.ndarray  # float32 [T]: see objective.py
    advantages: np.ndarray  # float32 [T]
    behavior_logprobs: np.ndarray  # float32 [T]
    is_stale: np.ndarray  # bool [T]: the target was written by older weights than the policy's
    dumped: list[Place] = field(default_factory=list)  # the samples whose tokens the updates trace, for the dump


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


def plan(groups: list[Group], config: Config, num_ranks: int, metrics: dict[str, float], version: int = 0) -> list[Batch]:
    """The step's work, one Batch per data-parallel rank, the same number of microbatches on each. `version` is that of the weights.

    Minibatches are whole groups in asking order. A short step makes fewer updates of about the same size; none for no groups.
    """
    if not groups:
        return [Batch([], metrics) for _ in range(num_ranks)]
    dumped = {group.id for group in chosen(groups, config.rollout.dump_share)}
    num_updates = max(1, round(len(groups) / config.optim.prompts_per_minibatch))
    minibatches: list[list[list[Microbatch]]] = [[] for _ in range(num_ranks)]
    for indices in np.array_split(np.arange(len(groups)), num_updates):
        minibatch = [groups[i] for i in indices]
        weights = token_weights(minibatch, config.objective.normaliser, config.objective.overlong_filtering)
        sequences = [
            _Sequence(group.prompt, sample, weight, stale_tokens(sample, version), group.id in dumped)
            for group, group_weights in zip(minibatch, weights, strict=True)
            for sample, weight in zip(group.samples, group_weights, strict=True)
        ]
        bins = pack([s.length for s in sequences], config.policy.tokens_per_microbatch, num_ranks)
        least = _least_tokens([sum(sequences[i].length for i in b) for b in bins], config, num_ranks)
        for rank in range(num_ranks):
            mine = range(rank, len(bins), num_ranks)
            minibatches[rank].append([build([sequences[i] for i in bins[b]], config.parallel.tensor, least[b]) for b in mine])
    return [Batch(work, metrics) for work in minibatches]


def _least_tokens(tokens: list[int], config: Config, num_ranks: int) -> list[int]:
    """What each bin is padded to at least: as many on all ranks at a time, where every rank's tokens are gathered for the experts."""
    if config.policy.megatron.get("moe_token_dispatcher_type") != "allgather":
        return [0] * len(tokens)
    return [max(tokens[b - b % num_ranks :][:num_ranks]) for b in range(len(tokens))]


def stale_tokens(sample: Sample, version: int) -> np.ndarray:
    """[n] bool: which of the sample's tokens were written by weights older than `version`."""
    is_stale = np.zeros(sample.length, bool)
    for written_by, start, end in sample.versions:
        is_stale[start:end] = written_by < version
    return is_stale


def pack(lengths: list[int], budget: int, num_ranks: int) -> list[list[int]]:
    """Indices of sequences in bins of at most `budget` tokens; as few bins as fit, a multiple of num_ranks, of like cost.

    Longest first, each to the cheapest bin with room; cost = linear + attention (n + n²/span). Within a bin the order is kept.
    """
    assert max(lengths) <= budget, f"a sequence of {max(lengths)} tokens in microbatches of {budget}"
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for num_bins in count(num_ranks * max(1, -(-sum(lengths) // (budget * num_ranks))), num_ranks):
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        tokens, costs = np.zeros(num_bins, dtype=np.int64), np.zeros(num_bins)
        for i in order:
            room = tokens + lengths[i] <= budget
            if not room.any():
                break
            b = int(np.where(room, costs, np.inf).argmin())
            bins[b].append(i)
            tokens[b] += lengths[i]
            costs[b] += lengths[i] + lengths[i] ** 2 / ATTENTION_SPAN
        else:
            return [sorted(b) for b in bins]
    raise AssertionError("unreachable: one sequence a bin always fits")


def build(sequences: list[_Sequence], multiple: int, least: int = 1) -> Microbatch:
    """Pack the sequences; pad the whole to a multiple (sequence parallelism splits it), as one more sequence that weighs nothing.

    To at least `least` tokens: a rank without work still takes part in every collective.
    """
    lengths = [s.length for s in sequences]
    padding = -(-max(sum(lengths), least, 1) // multiple) * multiple - sum(lengths)
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
        response = slice(start + len(sequence.prompt.tokens) - 1, end)  # from the position that predicts the first response token
        microbatch.mask[response] = sequence.sample.loss_mask
        microbatch.weights[response] = sequence.weight
        microbatch.advantages[response] = sequence.sample.advantage
        microbatch.behavior_logprobs[response] = sequence.sample.behavior_logprobs
        microbatch.is_stale[response] = sequence.is_stale
        if sequence.is_dumped:
            microbatch.dumped.append(Place(sequence.sample.group, sequence.sample.index, response))
    return microbatch
