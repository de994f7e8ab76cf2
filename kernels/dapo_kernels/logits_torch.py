"""The kernels of `logits_triton` in plain torch: the same two passes and results for any float type, without
autograd and without a second [T, V].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dapo_kernels.rows import Objective, Rows, Shard, Tokens
from dapo_kernels.token_losses import token_losses

_FLOOR = -1e30  # stands for −inf where 0 · −inf or −inf − −inf would give NaN
# rows are taken in blocks that stay in a core's cache through all the passes over them
_BLOCK_BYTES = 1 << 20


def row_statistics(logits: Tensor, tokens: Tokens, shard: Shard) -> Tensor:
    statistics = logits.new_zeros(4, logits.shape[0], dtype=_compute_dtype(logits))
    statistics[0], statistics[3] = _FLOOR, -torch.inf
    for rows in _blocks(logits) if shard.valid else ():
        z = logits[rows, : shard.valid].to(statistics.dtype)
        peak, total, weighted, picked = statistics[:, rows]
        peak.copy_(z.amax(-1)).clamp_(min=_FLOOR)
        shifted = _shifted(z, peak, shard.temperature)
        exps = shifted.exp()
        torch.sum(exps, -1, out=total)
        torch.sum(exps.mul_(shifted.clamp_(min=_FLOOR)), -1, out=weighted)
        target = tokens.targets[rows] - shard.start
        is_here = (target >= 0) & (target < shard.valid)
        own = z.gather(-1, target.clamp(0, shard.valid - 1)[:, None])[:, 0]
        picked.copy_(torch.where(is_here, own, -torch.inf))
    if tokens.mask is not None:
        empty = statistics.new_tensor([0.0, 1.0, 0.0, 0.0])[:, None]
        statistics = torch.where(tokens.mask, statistics, empty)
    return statistics


def loss_and_gradient(
    logits: Tensor, statistics: Tensor, tokens: Tokens,
    shard: Shard, objective: Objective | None, gradient: Tensor | None,
) -> Rows:  # fmt: skip
    peak, log_total, logprobs, entropy = _merge(statistics, shard.temperature)
    if objective is None:
        none = logprobs.new_empty(0)
        return Rows(_masked(logprobs, tokens), _masked(entropy, tokens), none, none.bool(), none.bool())
    losses, slopes, low, high = (_masked(x, tokens) for x in token_losses(logprobs, tokens, objective))
    if gradient is not None:
        _write_gradient(gradient, logits, peak, log_total, slopes / shard.temperature, tokens, shard)
    return Rows(_masked(logprobs, tokens), _masked(entropy, tokens), losses, low, high)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    if factor != 1:  # on a CPU the value is at hand
        gradient.mul_(factor)


def _merge(statistics: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge every rank's statistics [tp, 4, T] to (peak, log Σ e, log-prob, entropy)."""
    peaks, totals, weighted, picked = statistics.unbind(1)  # [tp, T] each
    peak = peaks.amax(0)
    moved = (peaks - peak) / temperature
    scales = moved.exp()
    total = (scales * totals).sum(0)
    log_total = total.log()
    entropy = log_total - (scales * (weighted + moved * totals)).sum(0) / total
    return peak, log_total, (picked.amax(0) - peak) / temperature - log_total, entropy


def _write_gradient(
    gradient: Tensor, logits: Tensor, peak: Tensor, log_total: Tensor, slopes: Tensor,
    tokens: Tokens, shard: Shard,
) -> None:  # fmt: skip
    """Write slope · (1[column = target] − p), row by row; `gradient` may be `logits`."""
    for rows in _blocks(logits):
        z = logits[rows, : shard.valid].to(slopes.dtype)
        slope = slopes[rows, None]
        value = _shifted(z, peak[rows], shard.temperature).sub_(log_total[rows, None]).exp_().mul_(-slope)
        target = tokens.targets[rows, None] - shard.start
        is_here = (target >= 0) & (target < shard.valid)
        if shard.valid:
            value.scatter_add_(-1, target.clamp(0, shard.valid - 1), torch.where(is_here, slope, 0.0))
        value.masked_fill_(slope == 0, 0.0)  # 0 · NaN of a masked row
        gradient[rows, : shard.valid] = value
    gradient[:, shard.valid :] = 0.0


def _shifted(z: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """Compute (z − peak) / temperature, in this order: exact at |z| ~ 1e4."""
    shifted = z - peak[:, None]
    return shifted if temperature == 1 else shifted.div_(temperature)


def _masked(values: Tensor, tokens: Tokens) -> Tensor:
    return values if tokens.mask is None else values.masked_fill(~tokens.mask, 0)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _blocks(logits: Tensor) -> Iterator[slice]:
    num_rows, columns = logits.shape
    size = max(_BLOCK_BYTES // (4 * max(columns, 1)), 1)
    for first in range(0, num_rows, size):
        yield slice(first, min(first + size, num_rows))
