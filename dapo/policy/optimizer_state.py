"""The optimizer's state in a checkpoint: each rank writes what it owns, as boxes of each parameter's whole
tensor, and reads it in place.

Megatron's distributed optimizer gives each data-parallel rank a flat range of each parameter; the rank keeps
that range's main parameter and moments. A float32 parameter is its own main parameter, and is saved once.
Megatron's own form for any layout (fully_reshardable) gathers all of
them on every rank first: 12 bytes a parameter, and more on the way. Names and offsets are the same, so each
reads what the other wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from dapo.policy.chunks import MAIN, STATE, Reader

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory


class OwnState:
    """The part of an optimizer's state that this rank owns."""

    def __init__(self, optimizer: Any, model: dict[str, Any], saved: Reader | None = None):
        """`model`: the model's sharded state dict, which locates each parameter in the whole; `saved`: the
        checkpoint that is to be read, None to write one.
        """
        locations = {entry.data: entry for entry in nested_values(model) if isinstance(entry, Sharded)}
        self._parts = parts(optimizer)
        boxes: list[ShardedTensor] = []
        # (optimizer, parameter, its range of the state by name)
        self._owned: list[tuple[Any, Tensor, dict[str, Tensor]]] = []
        for part in self._parts:
            initialize(part)
            for param, start in _ranges(part):
                state, pieces = _state(part, param), _pieces(locations[param])
                prefixes = {name: f"{STATE}{name}." for name in state}
                if param.dtype == torch.float32:
                    state["param"] = param.detach().view(-1)[start:][: len(state["param"])]
                    del prefixes["param"]
                elif saved and MAIN + pieces[0].key not in saved.sizes:
                    prefixes["param"] = ""  # the parameters are float32 there
                self._owned.append((part, param, state))
                instance = part.distributed_optimizer_instance_id
                boxes += _boxes_of(param, pieces, start, state, prefixes, instance)
        self.boxes = {str(i): box for i, box in enumerate(boxes)}  # views of the state

    def take(self) -> None:
        """Hand what was read into the boxes to the optimizers: some keep it elsewhere or in another form."""
        for part, param, state in self._owned:
            part._set_main_param_and_optimizer_states(param, state)
        for part in self._parts:
            if isinstance(part.optimizer, HybridDeviceOptimizer):
                part.optimizer._sync_hdo_state_to_sub_optimizers()


def group_settings(optimizer: Any) -> dict[Any, Any]:
    """Return the rest of an optimizer's state in a checkpoint: its groups' settings and steps."""
    found = parts(optimizer)
    if len(found) == 1:
        return without_classes(found[0].state_dict())  # type: ignore[no-any-return]
    optimizer._synchronize_steps()
    return {i: without_classes(part.state_dict()) for i, part in enumerate(found)}


def boxes(start: int, end: int, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut the flat range [start, end) of a tensor into boxes (offset, size), end to end.

    `boxes(2, 8, (3, 3))` → ((0, 2), (1, 1)), the rest of row 0; ((1, 0), (1, 3)); ((2, 0), (1, 2))
    """
    row = prod(shape[1:])
    while start < end:
        i, column = divmod(start, row)
        count = (end - start) // row
        if column == 0 and count:
            yield (i, *[0] * len(shape[1:])), (count, *shape[1:])
            start += count * row
        else:
            stop = min(end, (i + 1) * row)
            for offset, size in boxes(column, stop - i * row, shape[1:]):
                yield (i, *offset), (1, *size)
            start = stop


def _pieces(whole: Sharded) -> list[ShardedTensor]:
    """Return a parameter's tensors in a checkpoint: the MLP's first matrix is two there, gate and up."""
    return [whole] if isinstance(whole, ShardedTensor) else list(nested_values(whole.build()))


def _boxes_of(
    param: Tensor,
    pieces: list[ShardedTensor],
    start: int,
    state: dict[str, Tensor],
    prefixes: dict[str, str],
    instance: int,
) -> Iterator[ShardedTensor]:
    """Cut the state from offset `start` of the flat parameter, of which `pieces` are the entries, into boxes.

    `prefixes`: by name of the state, what comes before the parameter's name in a checkpoint.
    """
    end = start + len(state["param"])
    for piece in pieces:
        assert piece.data.untyped_storage().data_ptr() == param.untyped_storage().data_ptr()
        assert piece.data.is_contiguous()
        begin = piece.data.storage_offset() - param.storage_offset()
        first = max(start, begin)
        axes = (1,) * piece.prepend_axis_num  # layers, experts
        for offset, size in boxes(first - begin, min(end - begin, piece.data.numel()), piece.local_shape):
            for name, prefix in prefixes.items():
                data = state[name][first - start :][: prod(size)].view(*axes, *size)
                begins = zip(piece.global_offset, (*[0] * len(axes), *offset), strict=True)
                yield replace(
                    piece,
                    key=prefix + piece.key,
                    data=data,
                    dtype=data.dtype,
                    local_shape=tuple(data.shape),
                    global_offset=tuple(a + b for a, b in begins),
                    axis_fragmentations=None,  # no regular grid
                    # data-parallel ranks own different numbers
                    replica_id=(*piece.replica_id[:-1], instance),
                    prepend_axis_num=0,
                )
            first += prod(size)


def _ranges(part: Any) -> Iterator[tuple[Tensor, int]]:
    """Yield the parameters of which this rank owns a range, and the range's offset."""
    buckets = [bucket for buffer in part.gbuf_ranges for of_dtype in buffer.values() for bucket in of_dtype]
    for param, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
        yield param, ranges["param"].start


def _state(part: Any, param: Tensor) -> dict[str, Tensor]:
    """Return this rank's range of the main parameter "param" and the moments "exp_avg" and "exp_avg_sq"."""
    state = part._get_main_param_and_optimizer_states(param)
    return {name: tensor.detach() for name, tensor in state.items() if name != "step"}  # the groups have it


def parts(optimizer: Any) -> list[Any]:
    """Return the optimizers that Megatron chains: experts have one of their own."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def initialize(part: Any) -> None:
    """Set moments to 0 where there are none: a checkpoint needs them before the first update too."""
    if not isinstance(part.optimizer, HybridDeviceOptimizer):
        part.init_state_fn(part.optimizer, part.config)
        return
    for inner in part.optimizer.sub_optimizers:
        for p in (p for group in inner.param_groups for p in group["params"] if not inner.state[p]):
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            inner.state[p] = {"step": torch.zeros(()), **moments}
    part.optimizer._sync_sub_optimizers_state_to_hdo()


def without_classes(state: Any) -> Any:
    """Return the state without classes, which Megatron's loading refuses."""
    # the groups of an optimizer in main memory name the classes of the optimizers that it is made of
    if isinstance(state, dict):
        return {key: without_classes(value) for key, value in state.items() if not isinstance(value, type)}
    return [without_classes(value) for value in state] if isinstance(state, list) else state
