"""Numbers of parameters, counted from the name table: of a rank, of the model, and of what one token uses."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from dapo.model.layout import padded_vocab
from dapo.model.names import Entry, hf_shapes, size, table
from dapo.model.shape import ModelShape


@cache
def _entries(shape: ModelShape) -> list[Entry]:
    """Return the table's entries of one layer, for all layers are alike, and those outside the layers."""
    return table(replace(shape, num_layers=1), is_fused=True)


def _padded(shape: ModelShape, tensor: int) -> ModelShape:
    return replace(shape, vocab_size=padded_vocab(shape, tensor))


@cache
def stage_parameters(shape: ModelShape, tensor: int, pipeline: int, stage: int) -> tuple[int, int]:
    """Return the numbers of parameters on a rank of a pipeline stage, without experts.

    (its shards of those that tensor ranks split, those that every tensor rank has whole)
    """
    is_last = stage == pipeline - 1
    copies = {
        "layer": shape.num_layers // pipeline,
        "first": stage == 0 or (is_last and shape.is_tied),  # a tied head is the last stage's own embedding
        "last": is_last,
    }
    padded, split, whole = _padded(shape, tensor), 0, 0
    for entry in _entries(shape):
        number = copies[entry.stage] * size(entry, padded)
        if entry.expert is None and entry.kind == "whole":
            whole += number
        elif entry.expert is None:
            split += number
    return split // tensor, whole


@cache
def expert_parameters(shape: ModelShape, pipeline: int, expert: int) -> int:
    """Return the number of expert parameters on a rank of `expert` that share each layer's experts."""
    of_layer = sum(size(entry, shape) for entry in _entries(shape) if entry.expert is not None)
    return shape.num_layers // pipeline * of_layer // expert


def num_parameters(shape: ModelShape) -> int:
    """Return the number of parameters of the model, as its authors count: no padding, a tied head once."""
    return _sum(_entries(shape), shape)


def active_parameters(shape: ModelShape) -> int:
    """Return the number of parameters that one token uses: of the experts, those that it is sent to."""
    return _sum(_active(shape), shape)


def _active(shape: ModelShape) -> list[Entry]:
    return [e for e in _entries(shape) if e.expert is None or e.expert < shape.experts_per_token]


def _sum(entries: list[Entry], shape: ModelShape) -> int:
    return sum(size(e, shape) * (shape.num_layers if e.stage == "layer" else 1) for e in entries)


@cache
def layer_matrices(shape: ModelShape) -> tuple[int, int]:
    """Return the numbers of weights that multiply one token in a layer: (of attention, of the MLP).

    With experts, the MLP is the router and the experts that the token is sent to.
    """
    found = {"self_attention": 0, "mlp": 0}
    for entry in _active(shape):
        if entry.stage == "layer" and len(hf_shapes(entry, shape)[0]) == 2:
            found[entry.megatron.partition(".")[0]] += size(entry, shape)
    return found["self_attention"], found["mlp"]


@cache
def largest_parameter(shape: ModelShape, tensor: int) -> int:
    """Return the number of values of the largest parameter on a tensor rank."""
    padded = _padded(shape, tensor)
    is_split = {entry: entry.kind != "whole" and entry.expert is None for entry in _entries(shape)}
    return max(size(entry, padded) // (tensor if is_split[entry] else 1) for entry in is_split)
