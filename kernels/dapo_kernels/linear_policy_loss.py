"""The policy loss from hidden states and the LM head: three matrix products, one pass, and [T, V] never
exists.

Chunk by chunk: logits = hidden · weightᵀ → loss, and its gradient over the logits → gradient of hidden,
gradient of weight. That works in the forward pass because the loss is a function of each token's own log-prob
(Eq. 8) and its normaliser is already in the weights. A loss of whole sequences (gspo) takes a fourth product:
all log-probs first.

T = packed tokens, H = hidden size, V/tp = this rank's shard of the vocabulary, c = tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dapo_kernels import logits_torch
from dapo_kernels.arguments import HeadOptions, LinearLossOptions, explain, pack
from dapo_kernels.checks import check_matrix, check_objective, check_tokens, check_vocabulary
from dapo_kernels.chunks import CPU_CHUNK_BYTES, GPU_CHUNK_BYTES, gather, plan_spans
from dapo_kernels.gradients import Gradients
from dapo_kernels.passes import evaluate, kernels_for
from dapo_kernels.reference import PolicyLoss
from dapo_kernels.rows import Objective, Penalty, Rows, Tokens, Vocabulary
from dapo_kernels.sequences import Sequences
from dapo_kernels.token_losses import by_sequences


@dataclass(frozen=True)
class Head(Vocabulary):
    """The LM head is applied to hidden states by these settings.

    weight: [V/tp, H], of hidden's type.
    sequence_parallel: if True, hidden is rank r's tokens r·T/tp … (r + 1)·T/tp; they are gathered and their
        gradients scattered chunk by chunk.
    fp32_logits: if True, logits of 16-bit operands are float32: log-probs are exact (rms error 1e-6 instead
        of 2e-2 at logits of σ = 4).
    chunk_bytes: how much memory a chunk's logits may take. None: 2400 MiB on a GPU, 64 MiB on a CPU.
    """

    weight: Tensor
    sequence_parallel: bool = False
    fp32_logits: bool = False
    chunk_bytes: int | None = None

    def loss(
        self, hidden: Tensor, tokens: Tokens, objective: Objective, weight_grad: Tensor | None = None
    ) -> PolicyLoss:
        """Compute `linear_policy_loss` of packed arguments."""
        vocab = self._check(hidden)
        check_objective(objective, tokens)
        if weight_grad is not None:
            self._check_weight_grad(weight_grad)
        mask = check_tokens(tokens, hidden.shape[0] * self.slices, hidden.device, vocab)
        has_gradient = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        arguments = (self, tokens, mask, objective, weight_grad, has_gradient)
        return PolicyLoss(*_LinearPolicyLoss.apply(hidden, self.weight, *arguments))

    def logprobs(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """Compute `linear_logprobs` of packed arguments; only targets and mask of the tokens are read."""
        vocab = self._check(hidden)
        tokens = Tokens(tokens.targets, tokens.mask)
        mask = check_tokens(tokens, hidden.shape[0] * self.slices, hidden.device, vocab, has_loss=False)
        with torch.no_grad():
            return _run(hidden.detach(), self, tokens, mask, None, None).logprobs

    @property
    def slices(self) -> int:
        """Number of ranks whose hidden states make up all tokens."""
        has_slices = self.sequence_parallel and self.tp_group is not None
        return dist.get_world_size(self.tp_group) if has_slices else 1

    @property
    def logits_dtype(self) -> torch.dtype:
        """Type in which the logits are written."""
        return torch.float32 if self.fp32_logits and self.weight.dtype != torch.float64 else self.weight.dtype

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Type in which weight's gradient is added up."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def rows_per_chunk(self) -> int:
        """Number of logits' rows that fit into chunk_bytes; at least one position of every slice."""
        default = GPU_CHUNK_BYTES if self.weight.is_cuda else CPU_CHUNK_BYTES
        row_bytes = self.weight.shape[0] * self.logits_dtype.itemsize
        return max((self.chunk_bytes or default) // row_bytes, self.slices)

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Write the logits [c, V/tp] of hidden [c, H] into `out`."""
        if out.dtype == hidden.dtype:
            return torch.mm(hidden, self.weight.t(), out=out)
        if hidden.is_cuda:
            return torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        return torch.mm(hidden.to(out.dtype), self.weight.to(out.dtype).t(), out=out)

    def _check(self, hidden: Tensor) -> int:
        """Check hidden and the settings. Returns the number of ids that targets may have."""
        check_matrix("hidden", hidden, "[T, H]")
        weight, columns = self.weight, hidden.shape[1]
        check_matrix("weight", weight, "[V/tp, H]")
        if weight.shape[1] != columns:
            raise ValueError(
                f"weight has shape {list(weight.shape)}; expected [V/tp, {columns}], as hidden is "
                f"{list(hidden.shape)}"
            )
        if weight.dtype != hidden.dtype:
            raise ValueError(f"weight is {weight.dtype}; expected {hidden.dtype}, as hidden is")
        if weight.device != hidden.device:
            raise ValueError(f"weight is on {weight.device}; expected {hidden.device}, where hidden is")
        if self.sequence_parallel and self.tp_group is None:
            raise ValueError(
                "sequence_parallel is True and tp_group is None; expected the ranks of the other tokens"
            )
        if self.chunk_bytes is not None and self.chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes is {self.chunk_bytes}; expected None or a number > 0")
        return check_vocabulary("weight", weight.shape[0], self)

    def _check_weight_grad(self, weight_grad: Tensor) -> None:
        check_matrix("weight_grad", weight_grad, "[V/tp, H]")
        expected = self.weight.shape, self.gradient_dtype, self.weight.device
        if (weight_grad.shape, weight_grad.dtype, weight_grad.device) != expected:
            raise ValueError(
                f"weight_grad is {list(weight_grad.shape)} {weight_grad.dtype} on {weight_grad.device}; "
                f"expected {list(self.weight.shape)} {self.gradient_dtype} on {self.weight.device}"
            )


@explain(Tokens, Objective, Penalty, Vocabulary, Head, Sequences)
def linear_policy_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    *, weight_grad: Tensor | None = None, **options: Unpack[LinearLossOptions],
) -> PolicyLoss:  # fmt: skip
    """Compute `reference.policy_loss(hidden @ weight.T, …)`, and the gradients of hidden and weight, without
    the logits.

    The gradients are computed in this call and handed out, scaled, by `backward`, which can run once. Rows
    outside the mask cost nothing: they are removed before the first product. One wait for the device per
    call (with kind gspo two), to check values and learn how many rows are left.

    hidden: [T, H]; under sequence_parallel this rank's [T/tp, H]. Its gradient comes summed over tp_group
        (scattered under sequence_parallel): what a column-parallel layer's backward would return.
    weight_grad: [V/tp, H] float32 (Megatron's main_grad). This call ADDS weight's gradient to it, and
        backward gives weight a gradient of zeros, for hooks that insist on one. The sum is done before
        backward, so the loss must be differentiated with a factor of exactly 1: put any loss scale into
        `weights`. Without gradients enabled it is not touched.

    Raises:
        ValueError: an argument is not what is expected, before any launch or collective.
    """
    tokens, objective, rest = pack(targets, old_logprobs, advantages, mask, options, LinearLossOptions)
    return Head(weight, **rest).loss(hidden, tokens, objective, weight_grad)


@explain(Vocabulary, Head)
def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, **options: Unpack[HeadOptions]
) -> Tensor:
    """Return log π_θ(target) [T], 0 outside the mask: one matrix product, no gradients, no graph.

    With the same inputs the bits are those of `linear_policy_loss(…).logprobs`: same chunks, same arithmetic.
    Ratios of an unchanged policy are 1.

    hidden, targets, mask: see `linear_policy_loss`.
    """
    return Head(weight, **options).logprobs(hidden, Tokens(targets, mask))


def _run(
    hidden: Tensor, head: Head, tokens: Tokens, mask: Tensor,
    objective: Objective | None, gradients: Gradients | None,
) -> Rows:  # fmt: skip
    """Compute all T rows, one chunk after another; `mask` is on the CPU. Scoring and learning differ in
    nothing that touches a log-prob.
    """
    if objective is not None and objective.kind == "gspo":
        return by_sequences(
            lambda x, linear: _run(hidden, head, x, mask, linear, gradients if linear else None),
            tokens, objective,
        )  # fmt: skip
    assert tokens.mask is not None
    shard = head.shard(head.weight.shape[0])
    kernels = kernels_for(hidden.device, head.logits_dtype) or logits_torch
    spans = plan_spans(mask, hidden.device, head.slices, head.rows_per_chunk)
    largest = max((len(span.rows) for span in spans), default=0)
    buffer = hidden.new_empty(largest, shard.columns, dtype=head.logits_dtype)

    out = _empty_rows(tokens.mask, head.gradient_dtype, objective is not None)
    for span, gathered in gather(hidden, spans, head.slices, head.tp_group):
        live = gathered[span.within]  # [c, H]: masked rows end here
        logits = head.project(live, buffer[: len(live)])
        gradient = None if gradients is None else gradients.of_logits(logits)
        rows = evaluate(kernels, logits, tokens.select(span.rows), shard, objective, gradient)
        _scatter(out, rows, span.rows)
        if gradients is not None:
            assert gradient is not None
            gradients.add(span, live, gradient, num_gathered=len(gathered))
    if gradients is not None:
        gradients.finish()
    return out


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor,
        head: Head, tokens: Tokens, mask: Tensor, objective: Objective,
        weight_grad: Tensor | None, has_gradient: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        gradients = None
        if has_gradient:
            ctx.is_given, ctx.is_spent = weight_grad is not None, False
            if weight_grad is None and weight.requires_grad:
                weight_grad = torch.zeros_like(weight, dtype=head.gradient_dtype)
            ctx.hidden_grad = torch.zeros_like(hidden) if hidden.requires_grad else None
            ctx.weight_grad = None if ctx.is_given else weight_grad
            ctx.zeros = (weight.shape, weight.dtype, weight.device) if weight.requires_grad else None
            gradients = Gradients(weight, head.slices, head.tp_group, ctx.hidden_grad, weight_grad)
        rows = _run(hidden, head, tokens, mask, objective, gradients)
        ctx.mark_non_differentiable(rows.logprobs, rows.entropy, rows.clipped_low, rows.clipped_high)
        return rows.losses.sum(), rows.logprobs, rows.entropy, rows.clipped_low, rows.clipped_high

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_spent:
            raise RuntimeError(
                "the gradients of linear_policy_loss are already spent: its backward pass can run once"
            )
        hidden_grad, weight_grad, ctx.is_spent = ctx.hidden_grad, ctx.weight_grad, True
        ctx.hidden_grad = ctx.weight_grad = None
        if ctx.is_given:
            _require_one(grad_loss)
        if hidden_grad is not None:
            hidden_grad.mul_(grad_loss)
        if ctx.zeros is not None:
            shape, dtype, device = ctx.zeros
            if ctx.is_given:
                # zeros, not anything: a tied embedding adds its own gradient to them
                weight_grad = torch.zeros(shape, dtype=dtype, device=device)
            else:
                weight_grad = weight_grad.mul_(grad_loss).to(dtype)
        return hidden_grad, weight_grad, None, None, None, None, None, None


def _require_one(grad_loss: Tensor) -> None:
    """Raise RuntimeError unless the factor is 1; on a GPU the device asserts it, so that nothing waits."""
    if grad_loss.is_cuda:
        torch._assert_async(
            grad_loss == 1,
            "linear_policy_loss with weight_grad was differentiated with a factor other than 1",
        )
    elif grad_loss != 1:
        raise RuntimeError(
            f"linear_policy_loss was differentiated with a factor of {grad_loss.item()}, but weight_grad "
            "already holds the gradient for 1: put the factor into weights"
        )


def _empty_rows(mask: Tensor, dtype: torch.dtype, has_loss: bool) -> Rows:
    values = torch.zeros(3 if has_loss else 2, len(mask), dtype=dtype, device=mask.device)
    losses = values[2] if has_loss else values[0, :0]
    return Rows(values[0], values[1], losses, torch.zeros_like(mask), torch.zeros_like(mask))


def _scatter(out: Rows, rows: Rows, at: Tensor) -> None:
    """Put the values of the rows inside the mask at their places among all T."""
    out.logprobs[at] = rows.logprobs
    out.entropy[at] = rows.entropy
    if len(rows.losses):
        out.losses[at] = rows.losses
        out.clipped_low[at] = rows.clipped_low
        out.clipped_high[at] = rows.clipped_high
