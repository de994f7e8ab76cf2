"""Groups → minibatches (one update each) → packed microbatches (one forward-backward each), balanced over
data-parallel ranks.

T = tokens packed into a microbatch, S = sequences in it. With context parallelism every sequence is cut into
2·context chunks of equal size and rank r has chunks r and 2·context − 1 − r (zig-zag: early tokens see few
keys, late ones many, so each rank attends as much); T then counts the tokens of one context rank.

A per-token field is declared once in each class that has it. A field of Sample that Microbatch declares under
the same name is packed, sharded, sent to its rank and placed on the device without another line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from dapo.config import Config, Parallel
from dapo.learn.objective import token_weights
from dapo.learn.packing import pack, padded
from dapo.learn.traces import Location, chosen
from dapo.model.passthrough import Passthrough
from dapo.types import Group, Prompt, Sample, per_token, token_fields

Array = TypeVar("Array")  # np.ndarray on the host, torch.Tensor on a rank's device


@dataclass
class Scores(Generic[Array]):
    """Old log-probs and importance weights of a microbatch, from Policy.score. Per-token fields are [T]."""

    old_logprobs: Array = field(metadata=per_token(np.float32))  # log π_θold: the ratio's denominator
    importance: Array = field(metadata=per_token(np.float32))  # see objective.importance


@dataclass
class Microbatch(Generic[Array]):
    """Sequences packed end to end. Position t predicts targets[t]; the shift to the next token stays inside
    each sequence. Per-token fields are [T].
    """

    tokens: Array = field(metadata=per_token(np.int64))
    targets: Array = field(metadata=per_token(np.int64))
    positions: Array = field(metadata=per_token(np.int64))  # within the sequence
    loss_mask: Array = field(metadata=per_token(bool))  # True where the policy wrote the target
    token_weights: Array = field(metadata=per_token(np.float32))  # see objective.token_weights
    advantages: Array = field(metadata=per_token(np.float32))
    behavior_logprobs: Array = field(metadata=per_token(np.float32))
    is_stale: Array = field(metadata=per_token(bool))  # True where older weights than π_θold wrote the target
    # int32 [S + 1]: sequence i is cu_seqlens[i] : cu_seqlens[i + 1], counted over all context ranks
    cu_seqlens: Array
    longest: int  # tokens of the longest sequence, over all context ranks
    dumped: list[Location] = field(default_factory=list)  # the samples whose tokens the updates trace
    scores: Scores[Array] | None = None  # from Policy.score on, on the last pipeline stage


# bytes that a rank holds for each token of a step's batch
BYTES_PER_TOKEN = sum(d.itemsize for kind in (Microbatch, Scores) for d in token_fields(kind).values())


@dataclass
class Batch(Generic[Array]):
    """One rank's work in one step: minibatches[update][microbatch], and the rollout's metrics."""

    minibatches: list[list[Microbatch[Array]]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sequence:
    prompt: Prompt
    sample: Sample
    token_weight: float
    is_stale: np.ndarray  # bool [n]
    is_dumped: bool

    @property
    def length(self) -> int:
        """Number of tokens fed to the model: the last token predicts nothing."""
        return len(self.prompt.tokens) + self.sample.length - 1


def plan(
    groups: list[Group], config: Config, num_ranks: int, metrics: dict[str, float], version: int = 0
) -> list[Batch[np.ndarray]]:
    """Return the step's work, one Batch per data-parallel rank and, within it, context rank.

    All have the same number of microbatches. `num_ranks`: number of data-parallel ranks; `version`: of the
    policy's weights. Minibatches are whole groups in request order.
    """
    context = config.parallel.context
    batches: list[Batch[np.ndarray]] = [Batch([], metrics) for _ in range(num_ranks * context)]
    dumped = {group.id for group in chosen(groups, config.rollout.dump_share)}
    for minibatch in split(groups, config.optim.prompts_per_minibatch):
        packs = packed(_sequences(minibatch, config, version, dumped), config, num_ranks)
        for rank in range(num_ranks * context):
            of_rank = packs[rank // context :: num_ranks]
            batches[rank].minibatches.append([shard(m, rank % context, context) for m in of_rank])
    return batches


def split(groups: list[Group], size: int) -> list[list[Group]]:
    """Split the groups into minibatches of about `size`: a short step makes fewer updates, no groups none."""
    if not groups:
        return []
    num_updates = max(1, round(len(groups) / size))
    return [[groups[i] for i in part] for part in np.array_split(np.arange(len(groups)), num_updates)]


def packed(sequences: list[_Sequence], config: Config, num_ranks: int) -> list[Microbatch[np.ndarray]]:
    """Pack a minibatch into microbatches, unsharded. Data-parallel rank r has microbatches[r::num_ranks]."""
    parallel = config.parallel
    lengths = [padded(s.length, parallel.sequence_multiple) for s in sequences]
    # the interleaved schedule needs a multiple of `pipeline` microbatches on each rank
    multiple = num_ranks * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
    megatron = Passthrough.of(config.policy.megatron)
    bins = pack(lengths, config.policy.tokens_per_microbatch, multiple, by_tokens=megatron.is_allgather)
    sizes = np.array([sum(lengths[i] for i in b) for b in bins]).reshape(-1, num_ranks)
    if megatron.is_allgather:  # as many tokens are gathered from every rank: a row is padded to its longest
        sizes[:] = sizes.max(axis=1, keepdims=True)
    unit = parallel.pack_multiple * megatron.token_multiple
    least = [padded(max(size, 1), unit) for size in sizes.ravel().tolist()]
    return [build([sequences[i] for i in b], parallel, n) for b, n in zip(bins, least, strict=True)]


def _sequences(minibatch: list[Group], config: Config, version: int, dumped: set[int]) -> list[_Sequence]:
    weights = token_weights(minibatch, config.objective.normaliser, config.objective.overlong_filtering)
    return [
        _Sequence(group.prompt, sample, weight, stale_tokens(sample, version), group.id in dumped)
        for group, group_weights in zip(minibatch, weights, strict=True)
        for sample, weight in zip(group.samples, group_weights, strict=True)
    ]


def stale_tokens(sample: Sample, version: int) -> np.ndarray:
    """Return [n] bool: True where older weights than `version` wrote the token."""
    is_stale = np.zeros(sample.length, bool)
    for written_by, start, end in sample.versions:
        is_stale[start:end] = written_by < version
    return is_stale


def build(sequences: list[_Sequence], parallel: Parallel, least: int) -> Microbatch[np.ndarray]:
    """Pack the sequences, for all context ranks, into at least `least` tokens.

    A sequence is padded at its end, where causality hides it, so that context ranks can split it. The whole
    is padded to a multiple, as one more sequence that weighs nothing: a rank without work still takes part
    in every collective.
    """
    lengths = [padded(s.length, parallel.sequence_multiple) for s in sequences]
    padding = padded(max(sum(lengths), least), parallel.pack_multiple) - sum(lengths)
    lengths += [padding] if padding else []
    zeros: Any = {name: np.zeros(sum(lengths), dtype) for name, dtype in token_fields(Microbatch).items()}
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    microbatch = Microbatch(**zeros, cu_seqlens=cu_seqlens, longest=max(lengths))
    microbatch.positions[:] = np.concatenate([np.arange(n) for n in lengths])
    sampled = token_fields(Sample).keys() & token_fields(Microbatch).keys() - {"tokens"}
    for start, sequence in zip(cu_seqlens, sequences, strict=False):
        whole = np.concatenate([sequence.prompt.tokens, sequence.sample.tokens])
        end = start + sequence.length
        microbatch.tokens[start:end] = whole[:-1]
        microbatch.targets[start:end] = whole[1:]
        # from the position that predicts the first response token
        response = slice(start + len(sequence.prompt.tokens) - 1, end)
        microbatch.token_weights[response] = sequence.token_weight
        microbatch.advantages[response] = sequence.sample.advantage
        microbatch.is_stale[response] = sequence.is_stale
        for name in sampled:
            getattr(microbatch, name)[response] = getattr(sequence.sample, name)
        if sequence.is_dumped:
            sample = sequence.sample
            microbatch.dumped.append(Location(sample.group, sample.index, response, 0, sample.length))
    return microbatch


def shard(microbatch: Microbatch[np.ndarray], rank: int, context: int) -> Microbatch[np.ndarray]:
    """Return a context rank's shard: of every sequence, in order, chunks `rank` and 2·context − 1 − `rank`.

    Targets were set before, so a chunk's last token keeps its target, which is in the next chunk.
    """
    if context == 1:
        return microbatch
    sizes = np.diff(microbatch.cu_seqlens) // (2 * context)
    chunks = (rank, 2 * context - 1 - rank)
    starts = np.stack([microbatch.cu_seqlens[:-1] + k * sizes for k in chunks], axis=1).ravel()
    sizes = sizes.repeat(2)
    here = np.cumsum(sizes) - sizes  # where each chunk begins in the shard
    order = np.repeat(starts - here, sizes) + np.arange(sizes.sum())
    return replace(
        microbatch,
        **{name: getattr(microbatch, name)[order] for name in token_fields(Microbatch)},
        dumped=[piece for whole in microbatch.dumped for piece in _pieces(whole, starts, sizes, here)],
    )


def _pieces(whole: Location, starts: np.ndarray, sizes: np.ndarray, here: np.ndarray) -> Iterator[Location]:
    """Yield the parts within chunks starts[i] : starts[i] + sizes[i], which a shard has at here[i]."""
    low, high = np.maximum(starts, whole.tokens.start), np.minimum(starts + sizes, whole.tokens.stop)
    for i in np.flatnonzero(low < high):
        begin = int(here[i] + low[i] - starts[i])
        tokens = slice(begin, begin + int(high[i] - low[i]))
        yield replace(whole, tokens=tokens, start=int(low[i]) - whole.tokens.start)
