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
    """Pack the weights into buckets of at most `size` bytes; a larger tensor is a bucket by itself, in its
    own memory.

    Two buffers take turns: finish with a bucket before asking for the second one after it.
    """
    memory = itertools.cycle([torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)])
    flat, parts, used = next(memory), list[Part](), 0
    limit = size // FIRST
    for name, tensor in weights:
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        # the receiver views each part as its dtype: aligned
        if parts and (used + len(data) > limit or used % tensor.itemsize):
            yield Bucket(flat[:used], parts)
            flat, parts, used = next(memory), [], 0
            limit = size
        if len(data) > size:
            yield Bucket(data.to(device), [Part(name, tensor.dtype, tuple(tensor.shape), 0, len(data))])
            continue
        flat[used : used + len(data)].copy_(data)
        parts.append(Part(name, tensor.dtype, tuple(tensor.shape), used, used + len(data)))
        used += len(data)
    if parts:
        yield Bucket(flat[:used], parts)
