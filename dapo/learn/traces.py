"""What the updates saw of the tokens of dumped samples. n = response tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dapo.types import Group


@dataclass(frozen=True)
class Trace:
    """What the update that a sample took part in saw of its n response tokens. 0 and False where loss_mask is
    False, or others saw it.
    """

    group: int
    index: int
    old_logprobs: np.ndarray  # float32 [n], log π_θold, the policy's own
    logprobs: np.ndarray  # float32 [n], log π_θ when its minibatch came: the ratio's numerator
    clipped_low: np.ndarray  # bool [n], A < 0 and the ratio below 1 − clip_low: no gradient
    clipped_high: np.ndarray  # bool [n], A > 0 and the ratio above 1 + clip_high: no gradient


def blank(group: int, index: int, length: int) -> Trace:
    """The trace of a sample of which nothing was seen yet, to be filled in."""
    numbers, flags = np.zeros((2, length), np.float32), np.zeros((2, length), bool)
    return Trace(group, index, *numbers, *flags)


def merged(traces: Iterable[Trace]) -> list[Trace]:
    """One trace a sample: context ranks each saw a part of its tokens."""
    whole: dict[tuple[int, int], Trace] = {}
    for trace in traces:
        known = whole.setdefault((trace.group, trace.index), trace)
        if known is not trace:
            for name in ("old_logprobs", "logprobs", "clipped_low", "clipped_high"):
                np.add(getattr(known, name), getattr(trace, name), out=getattr(known, name))
    return list(whole.values())


def chosen(groups: Sequence[Group], share: float) -> list[Group]:
    """About `share` of the groups, spread evenly: over asking order, which says nothing of what came out, and
    so over a step's updates.
    """
    count = round(share * len(groups))
    return [groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)]
