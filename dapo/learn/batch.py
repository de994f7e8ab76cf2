"""Groups → minibatches (one update each) → packed microbatches (one forward-backward each), balanced over
data-parallel ranks. The main rank plans and sends each rank its share; the ranks build their microbatches.

T = tokens packed into a microbatch, S = sequences in it, C = columns of routes (model.routing). With context
parallelism every sequence is cut into 2·context chunks of equal size and rank r has chunks r and
2·context − 1 − r (zig-zag: early tokens see few keys, late ones many, so each rank attends as much); T then
counts the tokens of one context rank.

A per-token field is declared once in each class that has it. A field of Sample that Microbatch declares under
the same name is sent to its rank, packed, sharded and placed on the device without another line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from dapo.config import Config, ConfigError, Parallel
from dapo.learn.objective import token_weights
from dapo.learn.packing import pack, padded
from dapo.learn.traces import Key, Location, chosen
from dapo.model.passthrough import Passthrough
from dapo.model.routing import Routing
from dapo.types import Group, Sample, per_token, token_fields

Filler = Callable[[int], np.ndarray | None]
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
    response_starts: Array  # int32 [S]: position that predicts a sequence's first response token
    longest: int  # tokens of the longest sequence, over all context ranks
    # [T, C]: experts that are replayed, in this pipeline stage's layers; None: the routers choose
    routes: Array | None = None
    dumped: list[Location] = field(default_factory=list)  # the samples whose tokens the updates trace
    scores: Scores[Array] | None = None  # from Policy.score on, on the last pipeline stage


# bytes that a rank holds for each token of a step's batch
BYTES_PER_TOKEN = sum(d.itemsize for kind in (Microbatch, Scores) for d in token_fields(kind).values())


@dataclass
class Batch(Generic[Array]):
    """One rank's work in one step: minibatches[update][microbatch], and the rollout's metrics."""

    minibatches: list[list[Microbatch[Array]]]
    metrics: dict[str, float] = field(default_factory=dict)
    probe: list[Microbatch[Array]] = field(default_factory=list)  # scored, and not learnt from


@cache
def sent_fields() -> dict[str, np.dtype]:
    """Return name → dtype of the per-token fields of a response that its rank is sent: those of the sample
    that a microbatch has too, and whether weights were stale.
    """
    built = token_fields(Microbatch)
    return {n: d for n, d in token_fields(Sample).items() if n in built} | {"is_stale": built["is_stale"]}


@dataclass(frozen=True, eq=False)
class _Sequence:
    """A sample after its prompt."""

    prompt: np.ndarray  # int32 [p]
    response: dict[str, np.ndarray]  # one of sent_fields → [n]
    token_weight: float
    advantage: float
    dumped: Key | None
    routes: np.ndarray | None = None  # [length, C]

    @property
    def length(self) -> int:
        """Number of tokens fed to the model: the last token predicts nothing."""
        return len(self.prompt) + len(self.response["tokens"]) - 1


@dataclass
class Share:
    """One data-parallel rank's part of a step as it travels to its ranks: 8 bytes a token, routes if they are
    replayed, and nothing that they can derive.

    S = its sequences, in the order of its microbatches; P, R = tokens of their prompts, of their responses.
    """

    # minibatch → microbatch → its number of sequences, its least number of tokens; the last is the probe
    packs: list[list[tuple[int, int]]]
    lengths: np.ndarray  # int32 [S, 2]: of prompt and response
    weights: np.ndarray  # float32 [S, 2]: token weight and advantage
    prompts: np.ndarray  # int32 [P]
    responses: dict[str, np.ndarray]  # one of sent_fields → [R]; of bools the lengths of their runs
    dumped: dict[int, Key]  # number of a sequence → its sample, if that is dumped
    metrics: dict[str, float]
    routing: Routing | None = None
    routes: np.ndarray | None = None  # [tokens that are fed, C], in one pipeline stage's layers

    @classmethod
    def of(
        cls,
        minibatches: list[list[Pack]],
        metrics: dict[str, float],
        routing: Routing | None = None,
        layers: Sequence[int] = (),
    ) -> Share:
        """Make a share of packs, which are given as minibatch → microbatch. `routing`: it has the routes of
        `layers`.
        """
        sequences = [s for packs in minibatches for pack in packs for s in pack.sequences]
        fields = sent_fields()
        lengths = [(len(s.prompt), len(s.response["tokens"])) for s in sequences]
        weights = [(s.token_weight, s.advantage) for s in sequences]
        responses = {name: _joined([s.response[name] for s in sequences], d) for name, d in fields.items()}
        return cls(
            [[(len(pack.sequences), pack.least) for pack in packs] for packs in minibatches],
            np.array(lengths, np.int32).reshape(-1, 2),
            np.array(weights, np.float32).reshape(-1, 2),
            _joined([s.prompt for s in sequences], np.dtype(np.int32)),
            {name: _runs(a) if fields[name].kind == "b" else a for name, a in responses.items()},
            {i: s.dumped for i, s in enumerate(sequences) if s.dumped},
            metrics,
            routing,
            _routes(sequences, routing, layers) if routing else None,
        )

    def batch(self, parallel: Parallel, rank: int) -> Batch[np.ndarray]:
        """Return the batch of context rank `rank`."""
        sequences, fill = self._sequences(), self._filler
        minibatches = [
            [
                shard(build(list(islice(sequences, count)), parallel, least, fill), rank, parallel.context)
                for count, least in packs
            ]
            for packs in self.packs
        ]
        *minibatches, probe = minibatches
        return Batch(minibatches, self.metrics, probe)

    def _sequences(self) -> Iterator[_Sequence]:
        fields = sent_fields()
        whole = {name: _values(a) if fields[name].kind == "b" else a for name, a in self.responses.items()}
        prompt_end = end = end_fed = 0
        for i, (lengths, weights) in enumerate(
            zip(self.lengths.tolist(), self.weights.tolist(), strict=True)
        ):
            prompt_start, prompt_end = prompt_end, prompt_end + lengths[0]
            start, end = end, end + lengths[1]
            response = {name: values[start:end] for name, values in whole.items()}
            token_weight, advantage = weights
            prompt = self.prompts[prompt_start:prompt_end]
            sequence = _Sequence(prompt, response, token_weight, advantage, self.dumped.get(i))
            if self.routes is not None:
                start_fed, end_fed = end_fed, end_fed + sequence.length
                sequence = replace(sequence, routes=self.routes[start_fed:end_fed])
            yield sequence

    def _filler(self, num_rows: int) -> np.ndarray | None:
        """Return routes of padding, [rows, C], if there are routes."""
        if self.routing is None or self.routes is None:
            return None
        return self.routing.filler(num_rows, self.routes.shape[1])


def _routes(sequences: list[_Sequence], routing: Routing, layers: Sequence[int]) -> np.ndarray:
    numbers = routing.columns(layers)
    columns: Any = numbers
    if len(numbers) and (np.diff(numbers) == 1).all():  # copied several times as fast
        columns = slice(numbers[0], numbers[-1] + 1)
    size = sum(s.length for s in sequences)
    joined, end = np.empty((size, len(numbers)), routing.dtype), 0
    for s in sequences:
        assert s.routes is not None, "a sample without routes"
        start, end = end, end + s.length
        joined[start:end] = s.routes[:, columns]
    return joined


def _joined(arrays: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays])


def _runs(values: np.ndarray) -> np.ndarray:
    """Return the lengths of runs of equal values, bool [n], int64: False first, of which there may be 0."""
    edges = np.flatnonzero(values[1:] != values[:-1]) + 1
    first = [0] if len(values) and values[0] else []
    return np.diff(np.concatenate([[0], first, edges, [len(values)]]).astype(np.int64))


def _values(runs: np.ndarray) -> np.ndarray:
    """Return the values, bool [n], of `_runs`."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


class Pack(NamedTuple):
    """A microbatch before it is built."""

    sequences: list[_Sequence]
    least: int  # tokens


def shares(
    groups: list[Group],
    config: Config,
    num_ranks: int,
    metrics: dict[str, float],
    version: int = 0,
    probe: Sequence[Group] = (),
    routing: Routing | None = None,
) -> Iterator[Share]:
    """Plan the step's work, and return the share of each data-parallel rank, made when it is asked for.

    All have the same number of microbatches. `num_ranks`: number of data-parallel ranks; `version`: of the
    policy's weights; `probe`: groups that are scored and not learnt from. `routing`: the groups' routes are
    replayed; then each data-parallel rank has a share for each of its pipeline stages. Minibatches are whole
    groups in request order.

    Raises:
        ConfigError: routes are replayed, and a sample has none, or of another size.
    """
    if routing:
        _check_routes([*groups, *probe], routing)
    dumped = {group.id for group in chosen(groups, config.rollout.dump_share)}
    minibatches = [
        packed(_sequences(minibatch, config, version, dumped), config, num_ranks)
        for minibatch in split(groups, config.optim.prompts_per_minibatch)
    ]
    probes = packed(_sequences(probe, config, version, set()), config, num_ranks) if probe else []
    minibatches.append(probes)
    parallel = config.parallel
    stages: list[list[int]] = [[]]
    if routing:
        sizes = parallel.pipeline, parallel.virtual_pipeline
        stages = [
            [layer for chunk in routing.shape.chunks(sizes[0], stage, sizes[1]) for layer in chunk]
            for stage in range(parallel.pipeline)
        ]
    return (
        Share.of([packs[rank::num_ranks] for packs in minibatches], metrics, routing, layers)
        for rank in range(num_ranks)
        for layers in stages
    )


def _check_routes(groups: Sequence[Group], routing: Routing) -> None:
    """Raise ConfigError if a sample has no routes, or of another size. What they say was checked before."""
    for group in groups:
        for sample in group.samples:
            sized = len(group.prompt.tokens) + sample.length - 1, routing.num_columns
            if sample.routes is not None and sample.routes.shape == sized:
                continue
            why = "it was sampled without; set policy.routing_replay=off or old"
            found = f"no routes: {why}"
            if sample.routes is not None:
                found = f"routes of shape {[*sample.routes.shape]}, where {[*sized]} is expected"
            which = f"sample {sample.index} of group {group.id}"
            raise ConfigError(f"policy.routing_replay=rollout: {which} has {found}")


def split(groups: list[Group], size: int) -> list[list[Group]]:
    """Split the groups into minibatches of about `size`: a short step makes fewer updates, no groups none."""
    if not groups:
        return []
    num_updates = max(1, round(len(groups) / size))
    return [[groups[i] for i in part] for part in np.array_split(np.arange(len(groups)), num_updates)]


def packed(sequences: list[_Sequence], config: Config, num_ranks: int) -> list[Pack]:
    """Pack a minibatch into microbatches. Data-parallel rank r has packs[r::num_ranks]."""
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
    return [Pack([sequences[i] for i in b], n) for b, n in zip(bins, least, strict=True)]


def _sequences(minibatch: Sequence[Group], config: Config, version: int, dumped: set[int]) -> list[_Sequence]:
    weights = token_weights(minibatch, config.objective, config.rollout.max_response_length)
    own = sent_fields().keys() - {"is_stale"}
    return [
        _Sequence(
            group.prompt.tokens,
            {name: getattr(sample, name) for name in own} | {"is_stale": stale_tokens(sample, version)},
            weight,
            sample.advantage,
            (sample.group, sample.index) if group.id in dumped else None,
            sample.routes,
        )
        for group, group_weights in zip(minibatch, weights, strict=True)
        for sample, weight in zip(group.samples, group_weights, strict=True)
    ]


def stale_tokens(sample: Sample, version: int) -> np.ndarray:
    """Return [n] bool: True where older weights than `version` wrote the token."""
    is_stale = np.zeros(sample.length, bool)
    for written_by, start, end in sample.versions:
        is_stale[start:end] = written_by < version
    return is_stale


def build(
    sequences: list[_Sequence], parallel: Parallel, least: int, filler: Filler = lambda num_rows: None
) -> Microbatch[np.ndarray]:
    """Pack the sequences, for all context ranks, into at least `least` tokens. `filler`: makes routes of
    padding, if there are any.

    A sequence is padded at its end, where causality hides it, so that context ranks can split it. The whole
    is padded to a multiple, as one more sequence that weighs nothing: a rank without work still takes part
    in every collective.
    """
    lengths = [padded(s.length, parallel.sequence_multiple) for s in sequences]
    padding = padded(max(sum(lengths), least), parallel.pack_multiple) - sum(lengths)
    lengths += [padding] if padding else []
    zeros: Any = {name: np.zeros(sum(lengths), dtype) for name, dtype in token_fields(Microbatch).items()}
    cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
    starts = np.zeros(len(lengths), np.int32)
    starts[: len(sequences)] = [len(s.prompt) - 1 for s in sequences]
    routes = filler(sum(lengths))
    microbatch = Microbatch(
        **zeros, cu_seqlens=cu_seqlens, response_starts=starts, longest=max(lengths), routes=routes
    )
    microbatch.positions[:] = np.concatenate([np.arange(n) for n in lengths])
    for start, sequence in zip(cu_seqlens, sequences, strict=False):
        whole = np.concatenate([sequence.prompt, sequence.response["tokens"]])
        end = start + sequence.length
        microbatch.tokens[start:end] = whole[:-1]
        microbatch.targets[start:end] = whole[1:]
        # from the position that predicts the first response token
        response = slice(start + len(sequence.prompt) - 1, end)
        microbatch.token_weights[response] = sequence.token_weight
        microbatch.advantages[response] = sequence.advantage
        for name in sent_fields().keys() - {"tokens"}:
            getattr(microbatch, name)[response] = sequence.response[name]
        if routes is not None:
            routes[start:end] = sequence.routes
        if sequence.dumped:
            length = len(sequence.response["tokens"])
            microbatch.dumped.append(Location(*sequence.dumped, response, 0, length))
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
        routes=None if microbatch.routes is None else microbatch.routes[order],
        dumped=[piece for whole in microbatch.dumped for piece in _pieces(whole, starts, sizes, here)],
    )


def _pieces(whole: Location, starts: np.ndarray, sizes: np.ndarray, here: np.ndarray) -> Iterator[Location]:
    """Yield the parts within chunks starts[i] : starts[i] + sizes[i], which a shard has at here[i]."""
    low, high = np.maximum(starts, whole.tokens.start), np.minimum(starts + sizes, whole.tokens.stop)
    for i in np.flatnonzero(low < high):
        begin = int(here[i] + low[i] - starts[i])
        tokens = slice(begin, begin + int(high[i] - low[i]))
        yield replace(whole, tokens=tokens, start=int(low[i]) - whole.tokens.start)
