"""The policy loss from hidden states and the LM head: three matrix products, one pass, and [T, V] never
exists.

Chunk by chunk: logits = hidden · weightᵀ → loss, and its gradient over the logits → gradient of hidden,
gradient of weight. That works in the forward pass because the loss is a function of each token's own log-prob
(Eq. 8) and its normaliser is already in the weights.

T = packed tokens, H = hidden size, V/tp = this rank's shard of the vocabulary, c = tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dapo_kernels import logits_torch
from dapo_kernels.checks import check_matrix, check_options, check_tokens, check_vocabulary
from dapo_kernels.passes import evaluate, kernels_for
from dapo_kernels.reference import PolicyLoss
from dapo_kernels.rows import Objective, Rows, Shard, Tokens

# 8192 bf16 rows of 152k columns: adding up the weight's gradient then costs 3 % of a chunk
GPU_CHUNK_BYTES = 2400 << 20
CPU_CHUNK_BYTES = 64 << 20
# a chunk gathers at most this many times as many tokens as it may keep: bounds the gathered hidden states
MAX_SPAN = 2


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
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
    sequence_parallel: bool = False,
    weight_grad: Tensor | None = None,
    fp32_logits: bool = False,
    chunk_bytes: int | None = None,
) -> PolicyLoss:
    """`reference.policy_loss(hidden @ weight.T, …)`, and the gradients of hidden and weight, without the
    logits.

    The gradients are computed in this call and handed out, scaled, by `backward`, which can run once. Rows
    outside the mask cost nothing: they are removed before the first product. One wait for the device per
    call, to check values and learn how many rows are left.

    Args:
        hidden: [T, H]; under sequence_parallel this rank's [T/tp, H]. Its gradient comes summed over tp_group
            (scattered under sequence_parallel): what a column-parallel layer's backward would return.
        weight: [V/tp, H], of hidden's type.
        targets … valid_vocab: see `reference.policy_loss`; [T] on every rank.
        sequence_parallel: hidden is rank r's tokens r·T/tp … (r + 1)·T/tp; gathered and scattered chunk by
        chunk. weight_grad: [V/tp, H] float32 (Megatron's main_grad). This call ADDS weight's gradient to it,
            and backward gives weight a gradient of zeros, for hooks that insist on one. The sum is done
            before backward, so the loss must be differentiated with a factor of exactly 1: put any loss scale
            into `weights`. Without gradients enabled it is not touched.
        fp32_logits: 16-bit operands, float32 logits: exact log-probs (rms error 1e-6 instead of 2e-2 at
            logits of σ = 4).
        chunk_bytes: how much memory a chunk's logits may take. None: 2400 MiB on a GPU, 64 MiB on a CPU.

    Raises:
        ValueError: an argument is not what is expected, before any launch or collective.
    """
    objective = Objective(clip_low, clip_high, dual_clip, kl_coef)
    tokens = Tokens(targets, mask, old_logprobs, advantages, weights, ref_logprobs)
    head = _Head(weight, valid_vocab, temperature, tp_group, sequence_parallel, fp32_logits, chunk_bytes)
    vocab = head.check(hidden)
    check_options(objective, ref_logprobs is not None)
    _check_weight_grad(weight_grad, weight)
    mask = check_tokens(tokens, hidden.shape[0] * head.slices, hidden.device, vocab)
    has_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return PolicyLoss(
        *_LinearPolicyLoss.apply(hidden, weight, head, tokens, mask, objective, weight_grad, has_gradient)
    )


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    valid_vocab: int | None = None,
    sequence_parallel: bool = False,
    fp32_logits: bool = False,
    chunk_bytes: int | None = None,
) -> Tensor:
    """log π_θ(target) [T], 0 outside the mask: one matrix product, no gradients, no graph. Arguments as
    `linear_policy_loss`.

    With the same inputs the bits are those of `linear_policy_loss(…).logprobs`: same chunks, same arithmetic.
    Ratios of an unchanged policy are 1.
    """
    head = _Head(weight, valid_vocab, temperature, tp_group, sequence_parallel, fp32_logits, chunk_bytes)
    vocab = head.check(hidden)
    tokens = Tokens(targets, mask)
    mask = check_tokens(tokens, hidden.shape[0] * head.slices, hidden.device, vocab, required=())
    with torch.no_grad():
        return _run(hidden.detach(), head, tokens, mask, None, None).rows.logprobs


@dataclass(frozen=True)
class _Head:
    """The LM head and how it is applied."""

    weight: Tensor
    valid_vocab: int | None
    temperature: float
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    fp32_logits: bool
    chunk_bytes: int | None

    @property
    def slices(self) -> int:
        """How many ranks' hidden states make up all tokens."""
        return dist.get_world_size(self.group) if self.sequence_parallel and self.group is not None else 1

    @property
    def logits_dtype(self) -> torch.dtype:
        return torch.float32 if self.fp32_logits and self.weight.dtype != torch.float64 else self.weight.dtype

    @property
    def rows_per_chunk(self) -> int:
        default = GPU_CHUNK_BYTES if self.weight.is_cuda else CPU_CHUNK_BYTES
        row_bytes = self.weight.shape[0] * self.logits_dtype.itemsize
        # at least one position of every slice
        return max((self.chunk_bytes or default) // row_bytes, self.slices)

    def check(self, hidden: Tensor) -> int:
        """The number of ids that targets may have."""
        check_matrix("hidden", hidden, "[T, H]")
        check_matrix("weight", self.weight, "[V/tp, H]")
        if self.weight.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"weight has shape {list(self.weight.shape)}; expected [V/tp, {hidden.shape[1]}], as hidden "
                f"is {list(hidden.shape)}"
            )
        if self.weight.dtype != hidden.dtype:
            raise ValueError(f"weight is {self.weight.dtype}; expected {hidden.dtype}, as hidden is")
        if self.weight.device != hidden.device:
            raise ValueError(f"weight is on {self.weight.device}; expected {hidden.device}, where hidden is")
        if self.sequence_parallel and self.group is None:
            raise ValueError(
                "sequence_parallel is True and tp_group is None; expected the ranks that hold the other "
                "tokens"
            )
        if self.chunk_bytes is not None and self.chunk_bytes <= 0:
            raise ValueError(f"chunk_bytes is {self.chunk_bytes}; expected None or a number > 0")
        return check_vocabulary(
            "weight", self.weight.shape[0], self.valid_vocab, self.temperature, self.group
        )

    def project(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden [c, H] → logits [c, V/tp], written into `out`."""
        if out.dtype == hidden.dtype:
            return torch.mm(hidden, self.weight.t(), out=out)
        if hidden.is_cuda:
            return torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        return torch.mm(hidden.to(out.dtype), self.weight.to(out.dtype).t(), out=out)


class _Result(NamedTuple):
    rows: Rows  # of all T tokens
    hidden_grad: Tensor | None


def _run(
    hidden: Tensor,
    head: _Head,
    tokens: Tokens,
    mask: Tensor,
    objective: Objective | None,
    gradients: _Gradients | None,
) -> _Result:
    """All chunks, in order; `mask` on the CPU. The forward-only and the learning call differ in nothing that
    touches a log-prob.
    """
    assert tokens.mask is not None
    shard = Shard.of(head.weight.shape[0], head.valid_vocab, head.temperature, head.group)
    kernels = kernels_for(hidden.device, head.logits_dtype) or logits_torch
    spans = _spans(mask, hidden.device, head.slices, head.rows_per_chunk)
    buffer = hidden.new_empty(
        max((len(span.rows) for span in spans), default=0), shard.columns, dtype=head.logits_dtype
    )

    out = _empty_rows(
        tokens.mask, torch.float64 if hidden.dtype == torch.float64 else torch.float32, objective is not None
    )
    for span, gathered in _gathered(hidden, spans, head):
        live = gathered[span.within]  # [c, H]: masked rows end here
        logits = head.project(live, buffer[: len(live)])
        gradient = None if gradients is None else gradients.of_logits(logits)
        rows = evaluate(kernels, logits, tokens.select(span.rows), shard, objective, gradient)
        _scatter(out, rows, span.rows)
        if gradients is not None:
            assert gradient is not None
            gradients.add(span, live, gradient, num_gathered=len(gathered))
    return _Result(out, None if gradients is None else gradients.finish())


class _Span(NamedTuple):
    """One chunk: the positions `start` to `stop` of every slice."""

    start: int
    stop: int
    within: Tensor  # [c], which of the slices' rows, laid one after another, are inside the mask
    rows: Tensor  # [c], the same as indices of all T tokens


def _spans(mask: Tensor, device: torch.device, slices: int, rows_per_chunk: int) -> list[_Span]:
    """Chunks of about equal size and at most `rows_per_chunk` live rows. Chunks without any do not appear.

    Chunk i holds the same positions of every rank's slice, so that what is gathered and scattered lies in one
    piece.
    """
    table = mask.view(slices, -1)  # [slices, T / slices]
    live = table.sum(0).cumsum(0)  # [T / slices], live rows up to and including this position
    length = table.shape[1]
    total = int(live[-1]) if length else 0
    limit = -(-total // max(-(-total // rows_per_chunk), 1))  # as few chunks as there must be, of equal size
    limit = min(max(limit, slices), rows_per_chunk)
    spans, start, before = [], 0, 0
    while before < total:
        stop = int(torch.searchsorted(live, before + limit, right=True))
        if slices > 1:
            stop = min(stop, start + max(MAX_SPAN * rows_per_chunk // slices, 1))
        if int(live[stop - 1]) > before:
            within = table[:, start:stop].flatten().nonzero()[:, 0]
            rows = within // (stop - start) * length + within % (stop - start) + start
            spans.append(
                _Span(start, stop, within.to(device, non_blocking=True), rows.to(device, non_blocking=True))
            )
        start, before = stop, int(live[stop - 1])
    return spans


def _gathered(hidden: Tensor, spans: list[_Span], head: _Head) -> Iterator[tuple[_Span, Tensor]]:
    """Each chunk's hidden states, of all slices one after another. The next chunk travels while this one is
    computed with.
    """
    if head.slices == 1:
        yield from ((span, hidden[span.start : span.stop]) for span in spans)
        return

    def ask(span: _Span) -> tuple[_Span, Tensor, Any]:
        out = hidden.new_empty(head.slices * (span.stop - span.start), hidden.shape[1])
        return (
            span,
            out,
            dist.all_gather_into_tensor(out, hidden[span.start : span.stop], group=head.group, async_op=True),
        )

    coming = ask(spans[0]) if spans else None
    for following in [*spans[1:], None]:
        if coming is None:
            return
        span, out, work = coming
        work.wait()
        coming = ask(following) if following is not None else None
        yield span, out


class _Gradients:
    """The gradients of hidden and weight, built up chunk by chunk. Sums over ranks travel while the next
    chunk is computed.
    """

    def __init__(self, hidden: Tensor, head: _Head, has_hidden: bool, weight_grad: Tensor | None) -> None:
        self._head = head
        self._hidden_grad = torch.zeros_like(hidden) if has_hidden else None
        self._weight_grad = weight_grad
        # the logits' gradient in the products' type, where the logits are float32
        self._narrow: Tensor | None = None
        self._underway: tuple[Any, Any] | None = None

    def of_logits(self, logits: Tensor) -> Tensor:
        """Where this chunk's gradient of the logits goes: over the logits, if they have the products'
        type.
        """
        dtype = self._head.weight.dtype
        if logits.dtype == dtype:
            return logits
        if self._narrow is None or len(self._narrow) < len(logits):
            self._narrow = logits.new_empty(logits.shape, dtype=dtype)
        return self._narrow[: len(logits)]

    def add(self, span: _Span, live: Tensor, gradient: Tensor, num_gathered: int) -> None:
        if self._hidden_grad is not None:
            part = torch.mm(gradient, self._head.weight)  # [c, H], of this rank's columns
            self._settle()
            self._send(span, part, num_gathered)
        if self._weight_grad is not None:
            _add_product(self._weight_grad, gradient.t(), live)

    def finish(self) -> Tensor | None:
        self._settle()
        return self._hidden_grad

    def _send(self, span: _Span, part: Tensor, num_gathered: int) -> None:
        """Begin to sum this chunk's part over the ranks."""
        assert self._hidden_grad is not None
        group, own = self._head.group, self._hidden_grad[span.start : span.stop]
        if self._head.slices > 1:
            whole = part.new_zeros(num_gathered, part.shape[1]).index_copy_(0, span.within, part)
            work = dist.reduce_scatter_tensor(own, whole, group=group, async_op=True)
            self._underway = work, lambda: whole  # kept alive until it has been sent
        elif group is not None:
            work = dist.all_reduce(part, group=group, async_op=True)
            self._underway = work, lambda: own.index_copy_(0, span.within, part)
        else:
            own.index_copy_(0, span.within, part)

    def _settle(self) -> None:
        if self._underway is not None:
            work, then = self._underway
            work.wait()
            then()
            self._underway = None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total ← total + a · b, where total may be wider than the factors."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        head: _Head,
        tokens: Tokens,
        mask: Tensor,
        objective: Objective,
        weight_grad: Tensor | None,
        has_gradient: bool,
    ) -> tuple[Tensor, ...]:
        gradients = None
        if has_gradient:
            ctx.is_given, ctx.is_spent = weight_grad is not None, False
            if weight_grad is None and weight.requires_grad:
                weight_grad = torch.zeros_like(
                    weight, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32
                )
            gradients = _Gradients(hidden, head, hidden.requires_grad, weight_grad)
        rows, hidden_grad = _run(hidden, head, tokens, mask, objective, gradients)
        if has_gradient:
            ctx.hidden_grad, ctx.weight_grad = hidden_grad, None if ctx.is_given else weight_grad
            ctx.zeros = (weight.shape, weight.dtype, weight.device) if weight.requires_grad else None
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
            # zeros, not anything: a tied embedding adds its own gradient to them
            weight_grad = (
                torch.zeros(shape, dtype=dtype, device=device)
                if ctx.is_given
                else weight_grad.mul_(grad_loss).to(dtype)
            )
        return hidden_grad, weight_grad, None, None, None, None, None, None


def _require_one(grad_loss: Tensor) -> None:
    if grad_loss.is_cuda:
        torch._assert_async(
            grad_loss == 1,
            "linear_policy_loss with weight_grad was differentiated with a factor other than 1",
        )
    elif grad_loss != 1:
        raise RuntimeError(
            f"linear_policy_loss was differentiated with a factor of {grad_loss.item()}, but weight_grad "
            "already holds the gradient for 1: "
            "put the factor into weights"
        )


def _check_weight_grad(weight_grad: Tensor | None, weight: Tensor) -> None:
    if weight_grad is None:
        return
    check_matrix("weight_grad", weight_grad, "[V/tp, H]")
    expected = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if (
        weight_grad.shape != weight.shape
        or weight_grad.dtype != expected
        or weight_grad.device != weight.device
    ):
        raise ValueError(
            f"weight_grad is {list(weight_grad.shape)} {weight_grad.dtype} on {weight_grad.device}; "
            f"expected {list(weight.shape)} {expected} on {weight.device}"
        )


def _empty_rows(mask: Tensor, dtype: torch.dtype, has_loss: bool) -> Rows:
    values = torch.zeros(3 if has_loss else 2, len(mask), dtype=dtype, device=mask.device)
    return Rows(
        values[0],
        values[1],
        values[2] if has_loss else values[0, :0],
        torch.zeros_like(mask),
        torch.zeros_like(mask),
    )


def _scatter(out: Rows, rows: Rows, at: Tensor) -> None:
    """The values of live rows at their places among all T."""
    out.logprobs[at], out.entropy[at] = rows.logprobs, rows.entropy
    if len(rows.losses):
        out.losses[at], out.clipped_low[at], out.clipped_high[at] = (
            rows.losses,
            rows.clipped_low,
            rows.clipped_high,
        )
