"""The policy loss in plain torch: the definition that every faster implementation is tested against. Float64
inputs give the truth.

T = packed tokens, V = vocabulary, V/tp = this rank's shard of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_LOG_RATIO = 20.0  # beyond e^±20 a ratio says nothing; the released code clamps there too


@dataclass(frozen=True)
class PolicyLoss:
    """What one call returns. Per-token tensors are [T], detached, and 0 or False where the mask is False."""

    loss: Tensor  # scalar: the sum over tokens; the weights already hold the normaliser
    logprobs: Tensor  # log π_θ(target), at the given temperature
    entropy: Tensor  # of π_θ at the given temperature, in nats; a metric, never part of the loss
    clipped_low: Tensor  # bool: A < 0 and ratio < 1 − clip_low, no gradient
    clipped_high: Tensor  # bool: A > 0 and ratio > 1 + clip_high, no gradient


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights: Tensor | None = None,
    dual_clip: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
) -> PolicyLoss:
    """Σ_t mask_t · w_t · l_t, l_t = max(−r_t·A_t, −clip(r_t, 1 − clip_low, 1 + clip_high)·A_t), r_t = exp(log
    π_θ − log π_θold)  (Eq. 8).

    Positive weights commute with min and clip, so one function serves every normaliser, and nothing depends
    on how tokens were split into microbatches or ranks.

    Args:
        logits: [T, V/tp], any float type; computed in float32, or float64 if given so.
        targets: [T] int64, ids in the whole vocabulary.
        old_logprobs: [T], log π_θold of the targets.
        advantages: [T] (Eq. 9).
        mask: [T] bool, response tokens. Rows outside it may hold anything, NaN included.
        clip_low, clip_high: ε_low and ε_high.
        weights: [T], ≥ 0: the normaliser and whatever else scales a token's loss. None: 1.
        dual_clip: where A < 0, l_t is at most −dual_clip · A_t.
        ref_logprobs, kl_coef: adds kl_coef · (e^d − d − 1) per token, d = ref − log π_θ (the GRPO baseline).
        temperature: logits are divided by it, as the sampler did.
        tp_group: the ranks that hold the vocabulary's shards, in order. The loss is then the same on all of
            them.
        valid_vocab: the vocabulary's true size where V is padded; padded columns have probability 0.
    """
    stats = logprobs_and_entropy(
        logits, targets, mask, temperature=temperature, tp_group=tp_group, valid_vocab=valid_vocab
    )
    logprobs, entropy = stats
    old, advantages = old_logprobs[mask].to(logprobs.dtype), advantages[mask].to(logprobs.dtype)

    ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(-ratio * advantages, -clipped * advantages)  # Eq. 8
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    if ref_logprobs is not None:
        d = ref_logprobs[mask].to(logprobs.dtype) - logprobs
        losses = losses + kl_coef * (d.exp() - d - 1)
    if weights is not None:
        losses = losses * weights[mask].to(logprobs.dtype)

    return PolicyLoss(
        loss=losses.sum(),  # the sum, not the mean: the weights hold the minibatch's global denominator
        logprobs=_spread(logprobs.detach(), mask),
        entropy=_spread(entropy, mask),
        clipped_low=_spread((advantages < 0) & (ratio.detach() < 1 - clip_low), mask),
        clipped_high=_spread((advantages > 0) & (ratio.detach() > 1 + clip_high), mask),
    )


def logprobs(logits: Tensor, targets: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """log π_θ(target) [T], 0 outside the mask, without a graph. Options as `policy_loss`: temperature,
    tp_group, valid_vocab.
    """
    with torch.no_grad():
        return _spread(logprobs_and_entropy(logits, targets, mask, **options)[0], mask)


def logprobs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log π_θ(target), differentiable, and the entropy, detached; both of the masked rows only:
    [mask.sum()].
    """
    shard = logits.shape[-1]
    start = shard * (dist.get_rank(tp_group) if tp_group is not None else 0)
    # compaction first: garbage in masked rows never enters the arithmetic
    logits, targets = logits[mask], targets[mask]
    z = logits if logits.dtype == torch.float64 else logits.float()
    if valid_vocab is not None and start + shard > valid_vocab:
        z = z[:, : max(valid_vocab - start, 0)]  # padded columns have probability 0

    peak = z.detach().amax(-1) if z.shape[-1] else z.new_full(targets.shape, torch.finfo(z.dtype).min)  # [T]
    if tp_group is not None:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=tp_group)
    # [T, V/tp], ≤ 0; subtract first, then scale: exact at |z| ~ 1e4
    shifted = (z - peak[:, None]) / temperature
    exps = shifted.exp()
    total = _Sum.apply(exps.sum(-1), tp_group)  # [T]

    local = targets - start
    is_here = (local >= 0) & (local < z.shape[-1])
    picked = z.new_zeros(targets.shape)
    if z.shape[-1]:
        picked = torch.where(
            is_here, shifted.gather(-1, local.clamp(0, z.shape[-1] - 1)[:, None])[:, 0], picked
        )
    logprobs = _Sum.apply(picked, tp_group) - total.log()

    with torch.no_grad():
        weighted = (exps * shifted.clamp_min(-1e30)).sum(-1)  # Σ e·(z − m); 0 · −inf would be NaN
        if tp_group is not None:
            dist.all_reduce(weighted, group=tp_group)
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


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the masked rows back at their places: [mask.sum()] → [T]."""
    out = values.new_zeros(mask.shape)
    out[mask] = values
    return out
