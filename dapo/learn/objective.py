"""What each token weighs in the loss. The kernel sums mask · weight · loss: every denominator is in the
weights, counted per minibatch.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from dapo.types import Group, Sample

Normaliser = Literal["token_mean", "group_token_mean", "sample_mean"]


def token_weights(groups: list[Group], normaliser: Normaliser, overlong_filtering: bool) -> list[list[float]]:
    """The weight of every response token of each sample of one minibatch: [group][sample].

    - token_mean: 1 / tokens of the minibatch (the released code's form of Eq. 8; default).
    - group_token_mean: 1 / (groups · tokens of the group): Eq. 8 to the letter, averaged over prompts.
    - sample_mean: 1 / (samples · tokens of the sample): GRPO.

    Overlong filtering: a truncated sample weighs 0, and its tokens, its sample and a group of nothing else
    leave the denominators too.
    """
    tokens = [
        np.array([_kept_tokens(sample, overlong_filtering) for sample in group.samples], dtype=np.float64)
        for group in groups
    ]
    total = sum(t.sum() for t in tokens)
    num_groups = sum(t.any() for t in tokens)
    num_samples = sum(np.count_nonzero(t) for t in tokens)

    weights = []
    for t in tokens:  # [G]
        if normaliser == "token_mean":
            denominators = np.full_like(t, total)
        elif normaliser == "group_token_mean":
            denominators = np.full_like(t, num_groups * t.sum())
        else:
            denominators = num_samples * t
        weights.append([float(1 / d) if kept else 0.0 for kept, d in zip(t, denominators, strict=True)])
    return weights


def _kept_tokens(sample: Sample, overlong_filtering: bool) -> int:
    return 0 if overlong_filtering and sample.is_truncated else int(sample.loss_mask.sum())
