"""The weight of each token in the loss.

The kernel sums mask · weight · loss: every denominator is in the weights, counted per minibatch.
To add a normaliser, write its function, name it in NORMALISERS and in config.Objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dapo.types import Group, Sample

if TYPE_CHECKING:
    from torch import Tensor


def token_mean(tokens: list[np.ndarray]) -> list[np.ndarray]:
    """Divide by the tokens of the minibatch: the released code's form of Eq. 8."""
    total = sum(t.sum() for t in tokens)
    return [np.full_like(t, total) for t in tokens]


def group_token_mean(tokens: list[np.ndarray]) -> list[np.ndarray]:
    """Divide by groups · tokens of the group: Eq. 8 to the letter, averaged over prompts."""
    num_groups = sum(t.any() for t in tokens)
    return [np.full_like(t, num_groups * t.sum()) for t in tokens]


def sample_mean(tokens: list[np.ndarray]) -> list[np.ndarray]:
    """Divide by samples · tokens of the sample: GRPO."""
    num_samples = sum(np.count_nonzero(t) for t in tokens)
    return [num_samples * t for t in tokens]


# name → function of each group's tokens per sample, float64 [G]; it returns each sample's denominator, [G]
NORMALISERS: dict[str, Callable[[list[np.ndarray]], list[np.ndarray]]] = {
    "token_mean": token_mean,
    "group_token_mean": group_token_mean,
    "sample_mean": sample_mean,
}


def token_weights(groups: Sequence[Group], normaliser: str, overlong_filtering: bool) -> list[list[float]]:
    """Return the weight of every response token of each sample of one minibatch: [group][sample].

    Overlong filtering: a truncated sample weighs 0. Its tokens and the sample leave the denominators too, and
    so does a group that has no other samples.
    """
    tokens = [
        np.array([_kept_tokens(sample, overlong_filtering) for sample in group.samples], dtype=np.float64)
        for group in groups
    ]
    return [
        [float(1 / d) if kept else 0.0 for kept, d in zip(t, denominators, strict=True)]
        for t, denominators in zip(tokens, NORMALISERS[normaliser](tokens), strict=True)
    ]


def _kept_tokens(sample: Sample, overlong_filtering: bool) -> int:
    return 0 if overlong_filtering and sample.is_truncated else int(sample.loss_mask.sum())


def importance(old: Tensor, behavior: Tensor, is_stale: Tensor, cap: float) -> Tensor:
    """Return each token's truncated importance weight, [T]: min(exp(old − behavior), cap) if stale, else 1.

    A stale token was written by weights older than π_θold. For the others old and behavior differ by
    rounding.
    """
    return (old - behavior).exp().clamp(max=cap).where(is_stale, 1.0)
