"""Numbers of parameters, counted from the name table: of a rank, of the model, and of what one token uses."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from dapo.model.entries import Entry
from dapo.model.layout import padded_vocab
from dapo.model.names import table
from dapo.model.shape import ModelShape


@cache
def _entries(shape: ModelShape) -> list[Entry]:
    """Return the table's entries of one layer, for all layers are alike, and those outside the layers."""
    return table(replace(shape, num_layers=1), is_fused=True)


def _padded_entries(shape: ModelShape, tensor: int) -> list[Entry]:
    return _entries(replace(shape, vocab_size=padded_vocab(shape, tensor)))


def _active(shape: ModelShape) -> list[Entry]:
    """Return those of one token: of the experts, as many as it is sent to."""
    return [e for e in _entries(shape) if e.expert is None or e.expert < shape.experts_per_token]


@cache
def stage_parameters(shape: ModelShape, tensor: int, pipeline: int, stage: int) -> tuple[int, int]:
    """Return the numbers of parameters on a rank of a pipeline stage, without experts.

    (its shards of those that tensor ranks split, those that every tensor rank has whole)
    """
    is_last = stage == pipeline - 1
    has_table = stage == 0 or (is_last and shape.is_tied)  # a tied head is a copy of the embedding
    copies = {"layer": shape.num_layers // pipeline, "first": has_table, "last": is_last}
    split = whole = 0
    for entry in _padded_entries(shape, tensor):
        if entry.is_split:
            split += copies[entry.stage] * entry.size
        elif entry.expert is None:
            whole += copies[entry.stage] * entry.size
    return split // tensor, whole


@cache
def expert_parameters(shape: ModelShape, pipeline: int, expert: int) -> int:
    """Return the number of expert parameters on one of `expert` ranks that split each layer's experts."""
    of_layer = sum(entry.size for entry in _entries(shape) if entry.expert is not None)
    return shape.num_layers // pipeline * of_layer // expert


@cache
def largest_parameter(shape: ModelShape, tensor: int) -> int:
    """Return the number of values of the largest parameter on a tensor rank."""
    return max(e.size // (tensor if e.is_split else 1) for e in _padded_entries(shape, tensor))


def num_parameters(shape: ModelShape) -> int:
    """Return the number of parameters of the model, as its authors count: no padding, a tied head once."""
    return _in_all_layers(_entries(shape), shape)


def active_parameters(shape: ModelShape) -> int:
    """Return the number of parameters that one token uses: of the experts, those that it is sent to."""
    return _in_all_layers(_active(shape), shape)


def _in_all_layers(entries: list[Entry], shape: ModelShape) -> int:
    return sum(e.size * (shape.num_layers if e.stage == "layer" else 1) for e in entries)


@cache
def layer_matrices(shape: ModelShape) -> tuple[int, int]:
    """Return the numbers of weights that multiply one token in a layer: (of attention, of the MLP)."""
    # with experts, the MLP is the router and the experts that the token is sent to
    counts = {"self_attention": 0, "mlp": 0}
    for entry in _active(shape):
        if entry.stage == "layer" and len(entry.shapes[0]) == 2:
            counts[entry.megatron.partition(".")[0]] += entry.size
    return counts["self_attention"], counts["mlp"]
