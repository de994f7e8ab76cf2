"""The policy loss in plain torch: the definition that every faster implementation is tested against. Float64
inputs give the truth.

T = packed tokens, V = vocabulary, V/tp = this rank's shard of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels.arguments import LossOptions, VocabularyOptions, explain, pack
from dapo_kernels.checks import check_objective
from dapo_kernels.rows import Objective, Penalty, Tokens, Vocabulary
from dapo_kernels.sequences import Sequences

MAX_LOG_RATIO = 20.0  # beyond e^±20 a ratio says nothing; the released code clamps there too


@dataclass(frozen=True)
class PolicyLoss:
    """The loss, and metrics of every token: [T], detached, and 0 or False where the mask is False."""

    loss: Tensor  # scalar: the sum over tokens; the weights already hold the normaliser
    logprobs: Tensor  # log π_θ(target), at the given temperature
    entropy: Tensor  # of π_θ at the given temperature, in nats; a metric, never part of the loss
    # bool: A < 0 and ratio < 1 − clip_low, no gradient; cispo: ratio < 1 − clip_low, a bounded one
    clipped_low: Tensor
    # bool: A > 0 and ratio > 1 + clip_high, no gradient; cispo: ratio > 1 + clip_high, a bounded one
    clipped_high: Tensor


@explain(Tokens, Objective, Penalty, Vocabulary, Sequences)
def policy_loss(
    logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    **options: Unpack[LossOptions],
) -> PolicyLoss:  # fmt: skip
    """Compute Σ_t mask_t · w_t · l_t, with l_t = max(−r_t·A_t, −clip(r_t, 1 − clip_low, 1 + clip_high)·A_t)
    and r_t = exp(log π_θ − log π_θold)  (Eq. 8), or another `kind` of loss.

    Positive weights commute with min and clip, so one function serves every normaliser, and nothing depends
    on how tokens were split into microbatches or ranks.

    logits: [T, V/tp], any float type; computed in float32, or float64 if given so.
    """
    tokens, objective, vocabulary = pack(targets, old_logprobs, advantages, mask, options, LossOptions)
    check_objective(objective, tokens)
    logprobs, entropy = logprobs_and_entropy(logits, targets, mask, **vocabulary)
    old, advantages = old_logprobs[mask].to(logprobs.dtype), advantages[mask].to(logprobs.dtype)

    log_ratio = logprobs - old
    if objective.kind == "gspo":
        assert tokens.sequences is not None
        log_ratio = _sequence_means(log_ratio, mask, tokens.sequences)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    losses = torch.maximum(-ratio * advantages, -clipped * advantages)  # Eq. 8
    low, high = advantages < 0, advantages > 0
    if objective.kind == "cispo":
        losses = -clipped.detach() * advantages * logprobs
        low = high = advantages != 0
    if objective.dual_clip is not None:
        bounds = torch.minimum(losses, -objective.dual_clip * advantages)
        losses = torch.where(advantages < 0, bounds, losses)
    if tokens.penalty is not None:
        d = tokens.penalty.ref_logprobs[mask].to(logprobs.dtype) - logprobs
        losses = losses + tokens.penalty.kl_coef * (d.exp() - d - 1)
    if tokens.weights is not None:
        losses = losses * tokens.weights[mask].to(logprobs.dtype)

    return PolicyLoss(
        loss=losses.sum(),  # the sum, not the mean: the weights hold the minibatch's global denominator
        logprobs=_spread(logprobs.detach(), mask),
        entropy=_spread(entropy, mask),
        clipped_low=_spread(low & (ratio.detach() < 1 - objective.clip_low), mask),
        clipped_high=_spread(high & (ratio.detach() > 1 + objective.clip_high), mask),
    )


@explain(Vocabulary)
def logprobs(logits: Tensor, targets: Tensor, mask: Tensor, **options: Unpack[VocabularyOptions]) -> Tensor:
    """Return log π_θ(target) [T], 0 outside the mask, without a graph."""
    with torch.no_grad():
        return _spread(logprobs_and_entropy(logits, targets, mask, **options)[0], mask)


@explain(Vocabulary)
def logprobs_and_entropy(
    logits: Tensor, targets: Tensor, mask: Tensor, **options: Unpack[VocabularyOptions]
) -> tuple[Tensor, Tensor]:
    """Return log π_θ(target), differentiable, and the entropy, detached; both of the masked rows only:
    [mask.sum()].
    """
    shard = Vocabulary(**options).shard(logits.shape[-1])
    # compaction first: garbage in masked rows never enters the arithmetic
    logits, targets = logits[mask], targets[mask]
    z = logits if logits.dtype == torch.float64 else logits.float()
    if shard.valid < shard.columns:
        z = z[:, : shard.valid]  # padded columns have probability 0

    peak = z.detach().amax(-1) if shard.valid else z.new_full(targets.shape, torch.finfo(z.dtype).min)  # [T]
    if shard.group is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=shard.group)
    # [T, V/tp], ≤ 0; subtract first, then scale: exact at |z| ~ 1e4
    shifted = (z - peak[:, None]) / shard.temperature
    exps = shifted.exp()
    total = _Sum.apply(exps.sum(-1), shard.group)  # [T]

    local = targets - shard.start
    is_here = (local >= 0) & (local < shard.valid)
    picked = z.new_zeros(targets.shape)
    if shard.valid:
        own = shifted.gather(-1, local.clamp(0, shard.valid - 1)[:, None])[:, 0]
        picked = torch.where(is_here, own, picked)
    logprobs = _Sum.apply(picked, shard.group) - total.log()

    with torch.no_grad():
        weighted = (exps * shifted.clamp_min(-1e30)).sum(-1)  # Σ e·(z − m); 0 · −inf would be NaN
        if shard.group is not None:
            dist.all_reduce(weighted, group=shard.group)
        entropy = total.log() - weighted / total
    return logprobs, entropy


class _Sum(torch.autograd.Function):
    """Sum over the vocabulary's shards. The loss after it is the same on every rank, so each rank's own
    gradient is already whole.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        if group is None:
            return x
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def _sequence_means(log_ratio: Tensor, mask: Tensor, sequences: Sequences) -> Tensor:
    """Return for each masked row the mean of log_ratio over its sequence, [mask.sum()]: log s of GSPO, Eq. 7.

    Raises:
        ValueError: sequences are split over ranks, which only the fused losses know.
    """
    if sequences.cp_group is not None:
        raise ValueError("cp_group is given; the reference expects whole sequences: None")
    ends = sequences.cu_seqlens[1:].contiguous()
    number = torch.searchsorted(ends, torch.arange(len(mask), device=mask.device), right=True)[mask]
    sums = log_ratio.new_zeros(len(ends)).index_add(0, number, log_ratio)
    return (sums / number.bincount(minlength=len(ends)).clamp(min=1))[number]


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Put the values of the masked rows back at their places: [mask.sum()] → [T]."""
    out = values.new_zeros(mask.shape)
    out[mask] = values
    return out
