"""Gradients of hidden states and LM head, added up chunk by chunk.

T = packed tokens, H = hidden size, V/tp = this rank's shard of the vocabulary, c = tokens of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels.chunks import Span


class _Reduction(NamedTuple):
    """A sum over the ranks that is under way."""

    work: Any
    values: Tensor  # must live until the sum is done
    span: Span | None  # the rows that receive the values. None: the collective writes them where they belong


class Gradients:
    """Sums of the gradients over chunks. A chunk is summed over the ranks while the next is computed.

    hidden_grad: [T, H], or [T/tp, H] where each rank holds a slice of the tokens; None: not wanted.
    weight_grad: [V/tp, H], receives weight's gradient in addition to what it holds; None: not wanted.
    """

    def __init__(
        self, weight: Tensor, slices: int, group: dist.ProcessGroup | None,
        hidden_grad: Tensor | None, weight_grad: Tensor | None,
    ) -> None:  # fmt: skip
        self._weight = weight
        self._slices = slices
        self._group = group
        self._hidden_grad = hidden_grad
        self._weight_grad = weight_grad
        self._narrow: Tensor | None = None  # the logits' gradient in weight's type, where logits are float32
        self._underway: _Reduction | None = None

    def of_logits(self, logits: Tensor) -> Tensor:
        """Return memory for this chunk's gradient of the logits: their own, if they have weight's type."""
        if logits.dtype == self._weight.dtype:
            return logits
        if self._narrow is None or len(self._narrow) < len(logits):
            self._narrow = logits.new_empty(logits.shape, dtype=self._weight.dtype)
        return self._narrow[: len(logits)]

    def add(self, span: Span, live: Tensor, gradient: Tensor, num_gathered: int) -> None:
        """Add a chunk: `live` [c, H] of `num_gathered` hidden states, and the logits' gradient [c, V/tp]."""
        if self._hidden_grad is not None:
            part = torch.mm(gradient, self._weight)  # [c, H], of this rank's columns
            self.finish()
            self._underway = self._reduce(self._hidden_grad[span.start : span.stop], span, part, num_gathered)
        if self._weight_grad is not None:
            _add_product(self._weight_grad, gradient.t(), live)

    def finish(self) -> None:
        """Wait for the sum under way: the gradients are whole then."""
        if self._underway is None:
            return
        work, values, span = self._underway
        work.wait()
        if span is not None:
            assert self._hidden_grad is not None
            self._hidden_grad[span.start : span.stop].index_copy_(0, span.within, values)
        self._underway = None

    def _reduce(self, own: Tensor, span: Span, part: Tensor, num_gathered: int) -> _Reduction | None:
        if self._slices > 1:
            whole = part.new_zeros(num_gathered, part.shape[1]).index_copy_(0, span.within, part)
            work = dist.reduce_scatter_tensor(own, whole, group=self._group, async_op=True)
            return _Reduction(work, whole, None)
        if self._group is not None:
            return _Reduction(dist.all_reduce(part, group=self._group, async_op=True), part, span)
        own.index_copy_(0, span.within, part)
        return None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total ← total + a · b, where total may be wider than the factors."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
