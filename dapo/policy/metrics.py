"""Metrics of the tokens that the policy scores and learns from.

One function returns a microbatch's sums by name; they are added up over microbatches and ranks, and another
function makes metrics of them. Without arguments the first returns zeros under the same names, for ranks that
report nothing.

To add a metric of an update: a sum in `update_sums`, a value in `update_metrics`, a row in the glossary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from dapo_kernels import PolicyLoss
from torch import Tensor

Sums = dict[str, float]
EMPTY = torch.zeros(0)
NO_TOKENS = torch.zeros(0, dtype=torch.bool)
NO_LOSS = PolicyLoss(
    torch.zeros(()), logprobs=EMPTY, entropy=EMPTY, clipped_low=NO_TOKENS, clipped_high=NO_TOKENS
)


def total(rows: Iterable[Sums]) -> Sums:
    """Add up the sums of several microbatches, of which there is at least one."""
    first, *others = rows
    return {name: sum((row[name] for row in others), start=first[name]) for name in first}


def score_sums(
    old: Tensor = EMPTY, gap: Tensor = EMPTY, importance: Tensor = EMPTY, cap: float = 1.0
) -> Sums:
    """Return the sums of a scored microbatch.

    `old`: log π_θold of every token; `gap`: |old − behavior| of the current weights' response tokens;
    `importance`: of the stale response tokens, at most `cap`.
    """
    sums: dict[str, Any] = {
        "broken": (~old.isfinite()).sum(),
        "current": len(gap),
        "gap": gap.sum(),
        "stale": len(importance),
        "importance": importance.sum(),
        "importance_cut": (importance >= cap).sum(),
    }
    return {name: float(value) for name, value in sums.items()}


def score_metrics(sums: Sums, largest_gap: float) -> dict[str, float]:
    """Return the mismatch if the current weights wrote tokens, and the importance if older ones did."""
    metrics: dict[str, float] = {}
    if sums["current"]:
        metrics |= {"policy/mismatch": sums["gap"] / sums["current"], "policy/mismatch_max": largest_gap}
    if sums["stale"]:
        metrics["policy/importance"] = sums["importance"] / sums["stale"]
        metrics["policy/importance_cut"] = sums["importance_cut"] / sums["stale"]
    return metrics


def update_sums(out: PolicyLoss = NO_LOSS, mask: Tensor = NO_TOKENS) -> Sums:
    """Return the sums of a microbatch's loss over its response tokens."""
    probability = out.logprobs[mask].exp()
    high = out.clipped_high[mask]
    sums = {
        "tokens": mask.sum(),
        "loss": out.loss.detach(),
        "entropy": out.entropy.sum(),
        "probability": probability.sum(),
        "clipped_low": out.clipped_low.sum(),
        "clipped_high": high.sum(),
        "clipped_high_probability": probability[high].sum(),
    }
    return {name: float(value) for name, value in sums.items()}


def update_metrics(sums: Sums) -> dict[str, float]:
    """Return a minibatch's metrics: means over its response tokens."""
    tokens = max(sums["tokens"], 1)
    return {
        "policy/loss": sums["loss"],  # the weights hold the normaliser: the sum is the loss
        "policy/entropy": sums["entropy"] / tokens,
        "policy/probability": sums["probability"] / tokens,
        "policy/clip_low": sums["clipped_low"] / tokens,
        "policy/clip_high": sums["clipped_high"] / tokens,
        "policy/clip_high_probability": sums["clipped_high_probability"] / max(sums["clipped_high"], 1),
    }
