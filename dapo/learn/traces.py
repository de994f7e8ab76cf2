"""Traces record what updates saw of dumped samples' tokens. n = response tokens of a sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dapo.types import Group, per_token, token_fields

Key = tuple[int, int]  # a sample's group and index


@dataclass(frozen=True)
class Trace:
    """Record of what its update saw of one sample's response tokens.

    Fields are [n]; 0 and False where loss_mask is False, and where another rank saw the token.
    """

    group: int
    index: int
    old_logprobs: np.ndarray = field(metadata=per_token(np.float32))  # log π_θold
    logprobs: np.ndarray = field(metadata=per_token(np.float32))  # log π_θ: the ratio's numerator
    clipped_low: np.ndarray = field(metadata=per_token(bool))  # A < 0, ratio < 1 − clip_low: no gradient
    clipped_high: np.ndarray = field(metadata=per_token(bool))  # A > 0, ratio > 1 + clip_high: no gradient


@dataclass(frozen=True)
class Location:
    """Location of a dumped sample: targets[tokens] are its tokens from `start` on, out of `length`."""

    group: int
    index: int
    tokens: slice
    start: int
    length: int


def record(traces: dict[Key, Trace], dumped: Iterable[Location], seen: Mapping[str, np.ndarray]) -> None:
    """Write into the samples' traces what was seen of a microbatch's tokens: field of Trace → values [T]."""
    for location in dumped:
        key, tokens = (location.group, location.index), location.tokens
        if key not in traces:
            traces[key] = blank(*key, location.length)
        here = slice(location.start, location.start + tokens.stop - tokens.start)
        for name, values in seen.items():
            getattr(traces[key], name)[here] = values[tokens]


def blank(group: int, index: int, length: int) -> Trace:
    """Return a sample's trace of zeros, to be written into."""
    return Trace(
        group, index, **{name: np.zeros(length, dtype) for name, dtype in token_fields(Trace).items()}
    )


def merged(traces: Iterable[Trace]) -> list[Trace]:
    """Return one trace a sample: each context rank saw a part of its tokens."""
    whole: dict[Key, Trace] = {}
    for trace in traces:
        known = whole.setdefault((trace.group, trace.index), trace)
        if known is not trace:
            for name in token_fields(Trace):
                np.add(getattr(known, name), getattr(trace, name), out=getattr(known, name))
    return list(whole.values())


def chosen(groups: Sequence[Group], fraction: float) -> list[Group]:
    """Return about `fraction` of the groups, spread evenly over request order, and so over a step's updates.

    Request order does not depend on the outcome.
    """
    count = round(fraction * len(groups))
    return [groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)]
