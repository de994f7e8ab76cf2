"""Each token's loss and its derivative by the log-prob, in plain torch. T = packed tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dapo_kernels.reference import MAX_LOG_RATIO
from dapo_kernels.rows import Objective, Rows, Tokens

UNCLIPPED = Objective(clip_low=1.0, clip_high=math.inf)


def token_losses(
    logprobs: Tensor, tokens: Tokens, objective: Objective
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute (loss, its derivative by the log-prob, clipped low, clipped high) of every token, [T]."""
    assert tokens.old_logprobs is not None and tokens.advantages is not None
    old, advantages = tokens.old_logprobs.to(logprobs.dtype), tokens.advantages.to(logprobs.dtype)
    log_ratio = logprobs - old
    if objective.kind == "gspo":
        log_ratio = _sequence_means(log_ratio, tokens)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    low, high = advantages < 0, advantages > 0
    if objective.kind == "cispo":
        slopes = -clipped * advantages
        losses = slopes * logprobs
        low = high = advantages != 0
    else:
        unclipped_losses = -ratio * advantages
        losses = torch.maximum(unclipped_losses, -clipped * advantages)
        has_slope = (unclipped_losses >= losses) & (log_ratio.abs() <= MAX_LOG_RATIO)
        if objective.dual_clip is not None:
            bound = -objective.dual_clip * advantages
            is_bounded = (advantages < 0) & (losses > bound)
            losses = torch.where(is_bounded, bound, losses)
            has_slope &= ~is_bounded
        slopes = torch.where(has_slope, unclipped_losses, 0.0)
        slopes = torch.where(losses.isnan(), losses, slopes)  # a NaN must not pass as "clipped"
    weights = None if tokens.weights is None else tokens.weights.to(logprobs.dtype)
    if weights is not None:
        losses, slopes = losses * weights, slopes * weights
    if objective.kind == "gspo":  # each log-prob moves the loss of all tokens of its sequence
        slopes = _sequence_means(slopes, tokens)
    if tokens.penalty is not None:
        d = tokens.penalty.ref_logprobs.to(logprobs.dtype) - logprobs
        kl_coef = tokens.penalty.kl_coef * (1.0 if weights is None else weights)
        losses = losses + kl_coef * (d.exp() - d - 1)
        slopes = slopes + kl_coef * (1 - d.exp())
    return losses, slopes, low & (ratio < 1 - objective.clip_low), high & (ratio > 1 + objective.clip_high)


def by_sequences(
    rows_of: Callable[[Tokens, Objective | None], Rows], tokens: Tokens, objective: Objective
) -> Rows:
    """Compute the rows of a loss of whole sequences from `rows_of`, which knows losses of single tokens.

    A first pass finds all log-probs. The second takes them as the old ones, and −slopes as the advantages,
    unclipped: each loss is then slope · ratio, whose derivative by the log-prob is the slope where the ratio
    is 1.
    """
    assert tokens.mask is not None
    logprobs = rows_of(Tokens(tokens.targets, tokens.mask), None).logprobs
    values = token_losses(logprobs, tokens, objective)
    losses, slopes, low, high = (x.masked_fill(~tokens.mask, 0) for x in values)
    rows = rows_of(Tokens(tokens.targets, tokens.mask, logprobs, -slopes), UNCLIPPED)
    return replace(rows, losses=losses, clipped_low=low, clipped_high=high)


def _sequence_means(values: Tensor, tokens: Tokens) -> Tensor:
    assert tokens.sequences is not None and tokens.mask is not None
    return tokens.sequences.means(values, tokens.mask).to(values.dtype)
