"""Weights packed into buckets: tensors end to end in one flat uint8 tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST = 8  # the first bucket has at most 1 / FIRST of the others' size: nothing is sent while it is filled


@dataclass(frozen=True)
class Part:
    """One tensor of a bucket: its bytes are [start, end)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Bucket:
    data: Tensor  # uint8 [n]
    parts: list[Part]


def buckets(weights: Iterable[tuple[str, Tensor]], size: int, device: torch.device) -> Iterator[Bucket]:
    """Pack the weights into buckets of at most `size` bytes; what is larger is a bucket by itself.

    Two buffers take turns: finish with a bucket before asking for the second one after it.
    """
    memory = itertools.cycle([torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)])
    flat, parts, used = next(memory), list[Part](), 0
    limit = size // FIRST
    for tensors in joined(weights):
        data = [tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in tensors]
        num_bytes = sum(map(len, data))
        # the receiver views each part as its dtype: aligned
        if parts and (used + num_bytes > limit or used % tensors[0][1].itemsize):
            yield Bucket(flat[:used], parts)
            flat, parts, used = next(memory), [], 0
            limit = size
        if num_bytes > size:
            whole = data[0] if len(data) == 1 else torch.cat(data)
            yield Bucket(whole.to(device), _parts(tensors, 0))
            continue
        added = _parts(tensors, used)
        for part, piece in zip(added, data, strict=True):
            flat[part.start : part.end].copy_(piece)
        parts += added
        used += num_bytes
    if parts:
        yield Bucket(flat[:used], parts)


def joined(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield lists of tensors that have to be in one bucket. Those of one list have the same dtype.

    SGLang makes one parameter of q_a_proj and kv_a_proj_with_mqa. It drops each, and says nothing, where a
    call has it without the other.
    """
    waiting: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in weights:
        pair = name.replace(".kv_a_proj_with_mqa.", ".q_a_proj.")
        if ".q_a_proj." not in pair:
            yield [(name, tensor)]
        elif pair in waiting:
            yield [waiting.pop(pair), (name, tensor)]
        else:
            waiting[pair] = name, tensor
    yield from ([alone] for alone in waiting.values())  # a model may have kv_a_proj_with_mqa only


def _parts(tensors: list[tuple[str, Tensor]], start: int) -> list[Part]:
    """Return the parts of tensors that lie end to end from `start` on."""
    ends = itertools.accumulate((tensor.nbytes for _, tensor in tensors), initial=start)
    return [
        Part(name, tensor.dtype, tuple(tensor.shape), *places)
        for (name, tensor), places in zip(tensors, itertools.pairwise(ends), strict=True)
    ]
