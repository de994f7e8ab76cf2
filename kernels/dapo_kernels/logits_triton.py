# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
"""Two Triton kernels compute the policy loss on logits: row statistics, then loss and gradient. The second
may write over the logits it reads.

One program a row, each row summed in a fixed order and no atomics: results are the same in every run. All
arithmetic is in float32. The peak is subtracted first and the temperature applied then, in base 2: `(z −
m)·log2(e)/temperature` keeps logits of 1e4 exact, and 2^x is one instruction. Tiles are [BLOCK / VEC, VEC]
with the maximum over VEC taken inside a thread: one correction of the running sums per VEC elements.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from dapo_kernels.launch import launches
from dapo_kernels.reference import MAX_LOG_RATIO
from dapo_kernels.rows import Objective, Rows, Shard, Tokens

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_FLOOR = tl.constexpr(-1e30)  # stands for −inf where 0 · −inf or −inf − −inf would give NaN
_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)
_PER_ROW = ["TARGETS", "MASK", "STATISTICS", "OLD", "ADVANTAGES", "WEIGHTS", "REFERENCE", "VALUES", "FLAGS"]
# arguments that differ from call to call or rank to rank are compiled once for all values
_ONCE = {"do_not_specialize": ["num_rows", "start", "valid"], "do_not_specialize_on_alignment": _PER_ROW}


@triton.jit
def _add_tile(z, peak, total, weighted, scale):
    """Update the running (m, Σ e, Σ e·(z − m)) of each lane [R] by one more tile z [R, VEC]."""
    new_peak = tl.maximum(peak, tl.max(z, axis=1))
    shifted = z - new_peak[:, None]
    exps = tl.exp2(shifted * scale)
    moved = peak - new_peak
    decay = tl.exp2(moved * scale)
    weighted = decay * (weighted + moved * total) + tl.sum(exps * tl.maximum(shifted, _FLOOR), axis=1)
    total = decay * total + tl.sum(exps, axis=1)
    return new_peak, total, weighted


@triton.jit(**_ONCE)
def row_statistics_kernel(
    LOGITS, TARGETS, MASK, STATISTICS,
    stride, num_rows, columns, valid, start, inverse_temperature,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(num_rows, tl.int64)
    out = STATISTICS + row
    if HAS_MASK:  # noqa: SIM102  one is known to the compiler, the other is not
        if tl.load(MASK + row) == 0:  # before the row is read: it may hold NaN
            tl.store(out, 0.0)
            tl.store(out + rows, 1.0)
            tl.store(out + 2 * rows, 0.0)
            tl.store(out + 3 * rows, 0.0)
            return
    base = LOGITS + row * stride
    scale = inverse_temperature * _LOG2E

    LANES: tl.constexpr = BLOCK // VEC
    tile = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    peak = tl.full((LANES,), _FLOOR, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    whole = (valid // BLOCK) * BLOCK
    for first in range(0, whole, BLOCK):
        z = tl.load(base + first + tile).to(tl.float32)
        peak, total, weighted = _add_tile(z, peak, total, weighted, scale)
    if whole < valid:
        column = whole + tile
        # loaded up to `columns`, which is known to divide by 16 where it does: 128 bits at a time, as `valid`
        # would not allow
        z = tl.load(base + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        z = tl.where(column < valid, z, float("-inf"))
        peak, total, weighted = _add_tile(z, peak, total, weighted, scale)

    row_peak = tl.max(peak, axis=0)
    moved = peak - row_peak
    decay = tl.exp2(moved * scale)
    tl.store(out, row_peak)
    tl.store(out + rows, tl.sum(decay * total, axis=0))
    tl.store(out + 2 * rows, tl.sum(decay * (weighted + moved * total), axis=0) * inverse_temperature)
    target = tl.load(TARGETS + row) - start
    is_here = (target >= 0) & (target < valid)
    tl.store(out + 3 * rows, tl.load(base + target, mask=is_here, other=float("-inf")).to(tl.float32))


@triton.jit
def _merge(STATISTICS, row, rows, inverse_temperature, WORLD: tl.constexpr):
    """Merge all ranks' statistics of a row to (peak, log2 Σ e, log-prob, entropy), by the same operations in
    the same order on every rank.
    """
    peak = tl.load(STATISTICS + row)
    picked = tl.load(STATISTICS + 3 * rows + row)
    for rank in tl.static_range(1, WORLD):
        peak = tl.maximum(peak, tl.load(STATISTICS + 4 * rank * rows + row))
        picked = tl.maximum(picked, tl.load(STATISTICS + (4 * rank + 3) * rows + row))
    total = peak * 0.0
    weighted = peak * 0.0
    for rank in tl.static_range(0, WORLD):
        moved = (tl.load(STATISTICS + 4 * rank * rows + row) - peak) * inverse_temperature
        scale = tl.exp2(moved * _LOG2E)
        part = tl.load(STATISTICS + (4 * rank + 1) * rows + row)
        part_weighted = tl.load(STATISTICS + (4 * rank + 2) * rows + row)
        total = tl.fma(scale, part, total)
        weighted = tl.fma(scale, tl.fma(moved, part, part_weighted), weighted)
    log2_total = tl.log2(total)
    log_total = log2_total * _LN2
    logprob = tl.fma(picked - peak, inverse_temperature, -log_total)
    return peak, log2_total, logprob, log_total - weighted / total


@triton.jit
def _token_loss(
    logprob, old, advantage, clip_floor, clip_ceiling, dual_clip,
    IS_CISPO: tl.constexpr, HAS_DUAL_CLIP: tl.constexpr,
):  # fmt: skip
    """Compute (loss, its derivative by the log-prob, clipped low, clipped high) of one token: Eq. 8, or
    CISPO's.
    """
    log_ratio = logprob - old
    ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -_MAX_LOG_RATIO), _MAX_LOG_RATIO))
    clipped = tl.minimum(tl.maximum(ratio, clip_floor), clip_ceiling)
    unclipped_loss = -ratio * advantage
    loss = tl.maximum(unclipped_loss, -clipped * advantage)
    has_slope = (unclipped_loss >= loss) & (tl.abs(log_ratio) <= _MAX_LOG_RATIO)
    if HAS_DUAL_CLIP:
        is_bounded = (advantage < 0) & (loss > -dual_clip * advantage)
        loss = tl.where(is_bounded, -dual_clip * advantage, loss)
        has_slope = has_slope & (is_bounded == 0)
    slope = tl.where(has_slope, unclipped_loss, 0.0)
    is_low, is_high = advantage < 0, advantage > 0
    if IS_CISPO:
        slope = -clipped * advantage
        loss = slope * logprob
        is_low, is_high = advantage != 0, advantage != 0
    # minimum and maximum drop a NaN, and NaN compares false everywhere: it must not pass as "clipped"
    loss = tl.where(log_ratio == log_ratio, loss, log_ratio)
    slope = tl.where(loss == loss, slope, loss)
    return loss, slope, is_low & (ratio < clip_floor), is_high & (ratio > clip_ceiling)


@triton.jit(**_ONCE)
def loss_gradient_kernel(
    LOGITS, GRADIENT, TARGETS, MASK, STATISTICS, OLD, ADVANTAGES, WEIGHTS, REFERENCE, VALUES, FLAGS,
    logits_stride, gradient_stride, num_rows, columns, valid, start, inverse_temperature,
    clip_floor, clip_ceiling, dual_clip, kl_coef,
    WORLD: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WEIGHTS: tl.constexpr, IS_CISPO: tl.constexpr,
    HAS_DUAL_CLIP: tl.constexpr, HAS_REFERENCE: tl.constexpr, HAS_LOSS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(num_rows, tl.int64)
    is_live = row >= 0
    if HAS_MASK:
        is_live = tl.load(MASK + row) != 0
    peak, log2_total, logprob, entropy = _merge(STATISTICS, row, rows, inverse_temperature, WORLD)
    tl.store(VALUES + row, tl.where(is_live, logprob, 0.0))
    tl.store(VALUES + rows + row, tl.where(is_live, entropy, 0.0))
    if HAS_LOSS:
        old = tl.load(OLD + row, mask=is_live, other=0.0)
        advantage = tl.load(ADVANTAGES + row, mask=is_live, other=0.0)
        loss, slope, is_low, is_high = _token_loss(
            logprob, old, advantage, clip_floor, clip_ceiling, dual_clip, IS_CISPO, HAS_DUAL_CLIP
        )
        if HAS_REFERENCE:  # GRPO's penalty
            d = tl.load(REFERENCE + row, mask=is_live, other=0.0) - logprob
            loss += kl_coef * (tl.exp(d) - d - 1.0)
            slope += kl_coef * (1.0 - tl.exp(d))
        if HAS_WEIGHTS:
            weight = tl.load(WEIGHTS + row, mask=is_live, other=0.0)
            loss *= weight
            slope *= weight
        tl.store(VALUES + 2 * rows + row, tl.where(is_live, loss, 0.0))
        tl.store(FLAGS + row, (is_live & is_low).to(tl.uint8))
        tl.store(FLAGS + rows + row, (is_live & is_high).to(tl.uint8))

        if HAS_GRADIENT:
            slope = tl.where(is_live, slope, 0.0) * inverse_temperature
            source = LOGITS + row * logits_stride
            out = GRADIENT + row * gradient_stride
            tile = tl.arange(0, BLOCK)
            if slope == 0.0:  # masked or clipped: zeros, whatever the row holds, and nothing to read
                zeros = tl.zeros((BLOCK,), GRADIENT.dtype.element_ty)
                for first in range(0, columns, BLOCK):
                    tl.store(out + first + tile, zeros, mask=first + tile < columns)
            else:
                scale = inverse_temperature * _LOG2E
                target = (tl.load(TARGETS + row) - start).to(tl.int32)
                whole = (valid // BLOCK) * BLOCK
                for first in range(0, whole, BLOCK):
                    column = first + tile
                    z = tl.load(source + column, eviction_policy="evict_first").to(tl.float32)
                    value = -slope * tl.exp2((z - peak) * scale - log2_total)
                    value = tl.where(column == target, value + slope, value)
                    tl.store(out + column, value.to(GRADIENT.dtype.element_ty))
                for first in range(whole, columns, BLOCK):
                    column = first + tile
                    z = tl.load(source + column, mask=column < columns, other=0.0).to(tl.float32)
                    value = -slope * tl.exp2((z - peak) * scale - log2_total)
                    value = tl.where(column == target, value + slope, value)
                    value = tl.where(column < valid, value, 0.0)  # padding, even where it holds NaN
                    tl.store(out + column, value.to(GRADIENT.dtype.element_ty), mask=column < columns)


@triton.jit
def scale_kernel(GRADIENT, FACTOR, stride, columns, BLOCK: tl.constexpr):
    factor = tl.load(FACTOR).to(tl.float32)
    if factor != 1.0:
        base = GRADIENT + tl.program_id(0).to(tl.int64) * stride
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            value = tl.load(base + column, mask=column < columns, other=0.0).to(tl.float32) * factor
            tl.store(base + column, value.to(GRADIENT.dtype.element_ty), mask=column < columns)


def row_statistics(logits: Tensor, tokens: Tokens, shard: Shard) -> Tensor:
    num_rows, columns = logits.shape
    statistics = logits.new_empty(4, num_rows, dtype=torch.float32)
    if num_rows == 0:
        return statistics
    launch, _ = _launches(logits)
    with _on(logits):
        row_statistics_kernel[(num_rows,)](
            logits, tokens.targets, _bytes(tokens.mask), statistics,
            logits.stride(0), num_rows, columns, shard.valid, shard.start, 1.0 / shard.temperature,
            HAS_MASK=tokens.mask is not None, BLOCK=launch.block, num_warps=launch.warps,
            VEC=16 // logits.element_size(),  # a 128-bit load: only then is the maximum inside a thread
        )  # fmt: skip
    return statistics


def loss_and_gradient(
    logits: Tensor, statistics: Tensor, tokens: Tokens,
    shard: Shard, objective: Objective | None, gradient: Tensor | None,
) -> Rows:  # fmt: skip
    num_rows, columns = logits.shape
    values = statistics.new_empty(2 if objective is None else 3, num_rows)
    flags = statistics.new_empty(2, 0 if objective is None else num_rows, dtype=torch.uint8)
    _, launch = _launches(logits)
    bounds, penalty = objective or Objective(0.0, 0.0), tokens.penalty
    if num_rows:
        with _on(logits):
            loss_gradient_kernel[(num_rows,)](
                logits, gradient, tokens.targets, _bytes(tokens.mask), statistics,
                _float(tokens.old_logprobs), _float(tokens.advantages), _float(tokens.weights),
                None if penalty is None else _float(penalty.ref_logprobs), values, flags,
                logits.stride(0), 0 if gradient is None else gradient.stride(0),
                num_rows, columns, shard.valid, shard.start, 1.0 / shard.temperature,
                1.0 - bounds.clip_low, 1.0 + bounds.clip_high, bounds.dual_clip or 0.0,
                0.0 if penalty is None else penalty.kl_coef,
                WORLD=statistics.shape[0], HAS_MASK=tokens.mask is not None,
                HAS_WEIGHTS=tokens.weights is not None, IS_CISPO=bounds.kind == "cispo",
                HAS_DUAL_CLIP=bounds.dual_clip is not None,
                HAS_REFERENCE=penalty is not None, HAS_LOSS=objective is not None,
                HAS_GRADIENT=gradient is not None, BLOCK=launch.block, num_warps=launch.warps,
            )  # fmt: skip
    losses = values[2] if objective is not None else values.new_empty(0)
    return Rows(values[0], values[1], losses, flags[0].view(torch.bool), flags[1].view(torch.bool))


def scale_(gradient: Tensor, factor: Tensor) -> None:
    num_rows, columns = gradient.shape
    _, launch = _launches(gradient)
    if num_rows:
        with _on(gradient):
            scale_kernel[(num_rows,)](
                gradient, factor, gradient.stride(0), columns, BLOCK=launch.block, num_warps=launch.warps
            )


def _launches(logits: Tensor) -> Any:
    if not logits.is_cuda:
        return launches(90, logits.shape[1])  # interpreted
    major, minor = torch.cuda.get_device_capability(logits.device)
    return launches(10 * major + minor, logits.shape[1])


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)
