"""The policy loss on logits, fused: loss, per-token statistics and gradient in two passes, the gradient
written over the logits.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dapo_kernels import reference
from dapo_kernels.arguments import LossOptions, explain, pack
from dapo_kernels.checks import check_matrix, check_objective, check_tokens, check_vocabulary
from dapo_kernels.passes import Kernels, evaluate, kernels_for
from dapo_kernels.reference import PolicyLoss
from dapo_kernels.rows import Objective, Penalty, Rows, Shard, Tokens, Vocabulary
from dapo_kernels.sequences import Sequences
from dapo_kernels.token_losses import by_sequences


@explain(Tokens, Objective, Penalty, Vocabulary, Sequences)
def policy_loss(
    logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    **options: Unpack[LossOptions],
) -> PolicyLoss:  # fmt: skip
    """Compute `reference.policy_loss` and its gradient without a second [T, V] tensor.

    With gradients enabled it DESTROYS `logits`: their memory holds the gradient afterwards, so the product
    that made them must not need them in its own backward (a matrix product does not; autograd raises if
    another does). The backward pass can run once; a scale of 1 costs nothing. One collective over tp_group
    per call, and one wait for the device, to check targets and weights; with kind gspo two of each. Inputs
    must be contiguous. Without a GPU or Triton, and in float64, it is `reference.policy_loss` itself, which
    leaves the logits alone.

    logits: [T, V/tp], any float type; computed in float32, or float64 if given so.

    Raises:
        ValueError: an argument is not what is expected, before any launch or collective.
    """
    tokens, objective, rest = pack(targets, old_logprobs, advantages, mask, options, LossOptions)
    vocabulary = Vocabulary(**rest)
    check_matrix("logits", logits, "[T, V/tp]")
    vocab = check_vocabulary("logits", logits.shape[1], vocabulary)
    check_objective(objective, tokens)
    check_tokens(tokens, logits.shape[0], logits.device, vocab)

    kernels = kernels_for(logits.device, logits.dtype)
    if kernels is None:
        return reference.policy_loss(logits, targets, old_logprobs, advantages, mask, **options)
    shard = vocabulary.shard(logits.shape[1])
    has_gradient = torch.is_grad_enabled() and logits.requires_grad
    return PolicyLoss(*_InPlace.apply(logits, kernels, tokens, shard, objective, has_gradient))


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor,
        kernels: Kernels, tokens: Tokens, shard: Shard, objective: Objective, has_gradient: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        def rows_of(tokens: Tokens, objective: Objective | None) -> Rows:
            into = logits if has_gradient and objective else None
            return evaluate(kernels, logits, tokens, shard, objective, into)

        is_gspo = objective.kind == "gspo"
        rows = by_sequences(rows_of, tokens, objective) if is_gspo else rows_of(tokens, objective)
        if has_gradient:
            # autograd then raises if another operation saved the logits for its own backward
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
