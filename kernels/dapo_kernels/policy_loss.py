"""The policy loss on logits, fused: loss, per-token statistics and gradient in two passes, the gradient
written over the logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dapo_kernels import reference
from dapo_kernels.checks import check_matrix, check_options, check_tokens, check_vocabulary
from dapo_kernels.passes import Kernels, evaluate, kernels_for
from dapo_kernels.reference import PolicyLoss
from dapo_kernels.rows import Objective, Shard, Tokens


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
    """`reference.policy_loss`, with the same arguments, values and gradient, without a second [T, V] tensor.

    With gradients enabled it DESTROYS `logits`: their memory holds the gradient afterwards, so the product
    that made them must not need them in its own backward (a matrix product does not; autograd raises if
    another does). The backward pass can run once; a scale of 1 costs nothing. One collective over tp_group
    per call, and one wait for the device, to check targets and weights. Inputs must be contiguous. Without a
    GPU or Triton, and in float64, it is `reference.policy_loss` itself, which leaves the logits alone.

    Raises:
        ValueError: an argument is not what is expected, before any launch or collective.
    """
    objective = Objective(clip_low, clip_high, dual_clip, kl_coef)
    tokens = Tokens(targets, mask, old_logprobs, advantages, weights, ref_logprobs)
    check_matrix("logits", logits, "[T, V/tp]")
    vocab = check_vocabulary("logits", logits.shape[1], valid_vocab, temperature, tp_group)
    check_options(objective, ref_logprobs is not None)
    check_tokens(tokens, logits.shape[0], logits.device, vocab)

    kernels = kernels_for(logits.device, logits.dtype)
    if kernels is None:
        return reference.policy_loss(
            logits,
            targets,
            old_logprobs,
            advantages,
            mask,
            clip_low=clip_low,
            clip_high=clip_high,
            weights=weights,
            dual_clip=dual_clip,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            temperature=temperature,
            tp_group=tp_group,
            valid_vocab=valid_vocab,
        )
    shard = Shard.of(logits.shape[1], valid_vocab, temperature, tp_group)
    has_gradient = torch.is_grad_enabled() and logits.requires_grad
    return PolicyLoss(*_InPlace.apply(logits, kernels, tokens, shard, objective, has_gradient))


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        kernels: Kernels,
        tokens: Tokens,
        shard: Shard,
        objective: Objective,
        has_gradient: bool,
    ) -> tuple[Tensor, ...]:
        rows = evaluate(kernels, logits, tokens, shard, objective, logits if has_gradient else None)
        if has_gradient:
            # so that whoever saved the logits for its own backward is told
            torch.autograd.graph.increment_version(logits)
            ctx.save_for_backward(logits)
            ctx.kernels, ctx.is_spent = kernels, False
        ctx.mark_non_differentiable(rows.logprobs, rows.entropy, rows.clipped_low, rows.clipped_high)
        return rows.losses.sum(), rows.logprobs, rows.entropy, rows.clipped_low, rows.clipped_high

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_spent:
            raise RuntimeError("the gradient of policy_loss is already spent: its backward pass can run once")
        ctx.is_spent = True
        [gradient] = ctx.saved_tensors
        gradient = gradient.detach()
        ctx.kernels.scale_(gradient, grad_loss)
        return gradient, None, None, None, None, None
