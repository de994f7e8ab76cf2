"""The weight of each token in the loss.

The kernel sums mask · weight · loss: every denominator is in the weights, counted per minibatch.
To add a normaliser, write its function, name it in NORMALISERS and in config.Objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dapo.config import Objective
from dapo.types import Group, Sample

if TYPE_CHECKING:
    from torch import Tensor


def token_mean(tokens: list[np.ndarray], longest: int) -> list[np.ndarray]:
    """Divide by the tokens of the minibatch: the released code's form of Eq. 8."""
    total = sum(t.sum() for t in tokens)
    return [np.full_like(t, total) for t in tokens]


def group_token_mean(tokens: list[np.ndarray], longest: int) -> list[np.ndarray]:
    """Divide by groups · tokens of the group: Eq. 8 to the letter, averaged over prompts."""
    num_groups = sum(t.any() for t in tokens)
    return [np.full_like(t, num_groups * t.sum()) for t in tokens]


def sample_mean(tokens: list[np.ndarray], longest: int) -> list[np.ndarray]:
    """Divide by samples · tokens of the sample: GRPO."""
    num_samples = sum(np.count_nonzero(t) for t in tokens)
    return [num_samples * t for t in tokens]


def constant(tokens: list[np.ndarray], longest: int) -> list[np.ndarray]:
    """Divide by samples · tokens of the longest response that there may be: Dr. GRPO (arXiv:2503.20783)."""
    num_samples = sum(np.count_nonzero(t) for t in tokens)
    return [np.full_like(t, num_samples * longest) for t in tokens]


# name → function of each group's tokens per sample, float64 [G], and of the longest response that there may
# be; it returns each sample's denominator, [G]
NORMALISERS: dict[str, Callable[[list[np.ndarray], int], list[np.ndarray]]] = {
    "token_mean": token_mean,
    "group_token_mean": group_token_mean,
    "sample_mean": sample_mean,
    "constant": constant,
}


def token_weights(groups: Sequence[Group], objective: Objective, longest: int) -> list[list[float]]:
    """Return the weight of every response token of each sample of one minibatch: [group][sample].

    `longest`: rollout.max_response_length.
    Overlong filtering: a truncated sample weighs 0. Its tokens and the sample leave the denominators too, and
    so does a group that has no other samples.
    """
    tokens = [
        np.array([_kept_tokens(sample, objective) for sample in group.samples], dtype=np.float64)
        for group in groups
    ]
    denominators_of = NORMALISERS[objective.normaliser]
    return [
        [float(1 / d) if kept else 0.0 for kept, d in zip(t, denominators, strict=True)]
        for t, denominators in zip(tokens, denominators_of(tokens, longest), strict=True)
    ]


def _kept_tokens(sample: Sample, objective: Objective) -> int:
    return 0 if objective.overlong_filtering and sample.is_truncated else int(sample.loss_mask.sum())


def importance(
    old: Tensor, behavior: Tensor, corrected: Tensor, objective: Objective, means: Callable[..., Tensor]
) -> Tensor:
    """Return each token's importance weight, [T], by objective.importance. ρ = exp(old − behavior).

    With objective.importance=none they are those of tis: the caller only logs them.
    `corrected`: the tokens that objective.importance_of names; the others weigh 1, except in a response that
    sequence_mask leaves out. A token of older weights was written from another distribution than π_θold; of
    the current ones old and behavior differ by rounding.
    `means` gives each token the mean of values [T] over its response's tokens inside a mask [T].
    """
    gap = old - behavior
    match objective.importance:
        case "tis" | "none":  # truncated importance sampling
            return gap.exp().clamp(max=objective.importance_cap).where(corrected, 1.0)
        case "band":  # IcePop, in logarithms: 0 · ∞ would be NaN
            return gap.exp().where(_is_inside(gap, objective), 0.0).where(corrected, 1.0)
        case "sequence_mask":
            has_any = means(gap.new_ones(gap.shape), corrected) > 0
            return (_is_inside(means(gap, corrected), objective) | ~has_any).to(gap.dtype)


def is_cut(importance: Tensor, objective: Objective) -> Tensor:
    """Return whether each token's importance weight is the cap, or 0, bool [T]."""
    is_truncated = objective.importance in ("tis", "none")
    return importance >= objective.importance_cap if is_truncated else importance == 0


def _is_inside(log_ratio: Tensor, objective: Objective) -> Tensor:
    low, high = objective.importance_band
    return (log_ratio >= (math.log(low) if low else -math.inf)) & (log_ratio <= math.log(high))
