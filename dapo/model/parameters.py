"""Numbers of parameters, counted from the name table: of a rank, of the model, and of what one token uses."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import chain

from dapo.model.entries import Entry
from dapo.model.families import FAMILIES
from dapo.model.layout import padded_vocab
from dapo.model.names import table
from dapo.model.shape import LayerKind, ModelShape

Counted = list[tuple[Entry, int]]  # parameters, and how many layers have them


@cache
def _of_layer(shape: ModelShape, kind: LayerKind) -> list[Entry]:
    """Return the parameters of one layer of a kind, for all those layers are alike."""
    first = next(layer for layer in range(shape.num_layers) if kind in shape.kinds([layer]))
    entries = FAMILIES[shape.model_type].layer(shape, first, is_fused=True)
    return [entry for entry in entries if not entry.is_buffer]


@cache
def _outside(shape: ModelShape) -> list[Entry]:
    """Return the parameters outside the layers."""
    return table(replace(shape, num_layers=0), is_fused=True)


def _padded(shape: ModelShape, tensor: int) -> list[Entry]:
    return _outside(replace(shape, vocab_size=padded_vocab(shape, tensor)))


def _active(shape: ModelShape, kind: LayerKind) -> list[Entry]:
    """Return a layer's parameters that one token uses: of the experts, as many as it is sent to."""
    return [e for e in _of_layer(shape, kind) if e.expert is None or e.expert < shape.experts_per_token]


def _on_stage(shape: ModelShape, pipeline: int, stage: int, virtual: int) -> Counted:
    """Return the parameters of a stage's layers."""
    kinds = shape.kinds(chain(*shape.chunks(pipeline, stage, virtual)))
    return [(entry, count) for kind, count in kinds.items() for entry in _of_layer(shape, kind)]


@cache
def stage_parameters(
    shape: ModelShape, tensor: int, pipeline: int, stage: int, virtual: int = 1
) -> tuple[int, int]:
    """Return the numbers of parameters on a rank of a pipeline stage, without experts.

    (its shards of those that tensor ranks split, those that every tensor rank has whole)
    `virtual`: number of chunks of layers on a stage, which decides where layers that are not alike are.
    """
    is_last = stage == pipeline - 1
    has_table = stage == 0 or (is_last and shape.is_tied)  # a tied head is a copy of the embedding
    copies = {"first": has_table, "last": is_last}
    counted = [(entry, int(copies[entry.stage])) for entry in _padded(shape, tensor)]
    split = whole = 0
    for entry, count in counted + _on_stage(shape, pipeline, stage, virtual):
        if entry.is_split:
            split += count * entry.size
        elif entry.expert is None:
            whole += count * entry.size
    return split // tensor, whole


@cache
def expert_parameters(shape: ModelShape, pipeline: int, expert: int, stage: int, virtual: int = 1) -> int:
    """Return the number of expert parameters of a stage on one of `expert` ranks that split its experts."""
    counted = _on_stage(shape, pipeline, stage, virtual)
    return sum(count * entry.size for entry, count in counted if entry.expert is not None) // expert


@cache
def largest_parameter(shape: ModelShape, tensor: int) -> int:
    """Return the number of values of the largest parameter on a tensor rank of any stage."""
    entries = chain(_padded(shape, tensor), *(_of_layer(shape, kind) for kind in shape.kinds()))
    return max(e.size // (tensor if e.is_split else 1) for e in entries)


def num_parameters(shape: ModelShape) -> int:
    """Return the number of parameters of the model, as its authors count: no padding, a tied head once."""
    kinds = shape.kinds().items()
    return _size(_outside(shape)) + sum(count * _size(_of_layer(shape, kind)) for kind, count in kinds)


def active_parameters(shape: ModelShape) -> int:
    """Return the number of parameters that one token uses: of the experts, those that it is sent to."""
    kinds = shape.kinds().items()
    return _size(_outside(shape)) + sum(count * _size(_active(shape, kind)) for kind, count in kinds)


def _size(entries: list[Entry]) -> int:
    return sum(entry.size for entry in entries)


@cache
def layer_matrices(shape: ModelShape, kind: LayerKind) -> tuple[int, int]:
    """Return the numbers of weights that multiply one token in a layer: (of attention, of the MLP)."""
    # with experts, the MLP is the router and the experts that the token is sent to
    counts = {"self_attention": 0, "mlp": 0}
    for entry in _active(shape, kind):
        if len(entry.shapes[0]) == 2:
            counts[entry.megatron.partition(".")[0]] += entry.size
    return counts["self_attention"], counts["mlp"]
