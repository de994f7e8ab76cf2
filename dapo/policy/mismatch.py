"""Measures where the sampler's log-probs leave the trainer's: by position in the response, and by log-prob.

One function makes a microbatch's table. Tables are added up over microbatches and ranks, and another function
makes metrics of the sum. Tails come from a histogram, so they are those of all tokens, within a bin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dapo.learn.batch import Microbatch

POSITIONS = (0, 16, 64, 256, 1024, 4096, 16384)  # first position of each bucket; a response begins at 0
LOGPROBS = (0.0, -0.01, -0.1, -1.0, -3.0, -6.0)  # highest behavior log-prob of each bucket
ROWS = len(POSITIONS) + len(LOGPROBS)
# of the histogram's bins, four an octave; two more are open
EDGES: list[float] = [2.0 ** (quarter / 4) for quarter in range(-96, 21)]
BINS = len(EDGES) + 1
# what a gap counts in a tail, by its bin: the middle of the edges on a logarithmic scale
MIDDLES = [0.0, *(math.sqrt(low * high) for low, high in pairwise(EDGES)), EDGES[-1]]
TAIL = 0.99


def blank(device: torch.device) -> Tensor:
    """Return the table of no tokens, float64 [ROWS, 1 + BINS].

    A row for each bucket of positions, then one for each of log-probs: the sum of the gaps, and the number of
    tokens in each bin.
    """
    return torch.zeros(ROWS, 1 + BINS, dtype=torch.float64, device=device)


def response_positions(microbatch: Microbatch[Tensor], context: int) -> Tensor:
    """Return [T] the place of each target in its response, from 0; outside of responses it means nothing.

    `context`: number of context ranks, on which every sequence has equally many tokens.
    """
    sizes = microbatch.cu_seqlens.diff() // context
    starts = microbatch.response_starts.repeat_interleave(sizes, output_size=len(microbatch.positions))
    return microbatch.positions - starts


def table(gap: Tensor, behavior: Tensor, positions: Tensor) -> Tensor:
    """Return the table of a microbatch, laid out as `blank`.

    `gap`: |old − behavior| of the tokens that count; `behavior`: their log-probs at the engine; `positions`:
    their places in their responses. All [n].
    """
    by_position = _bucket(positions, POSITIONS[1:])
    by_logprob = len(POSITIONS) + _bucket(-behavior, [-bound for bound in LOGPROBS[1:]])
    rows = torch.stack([by_position, by_logprob])  # [2, n]
    counts = torch.bincount((rows * BINS + _bucket(gap, EDGES)).flatten(), minlength=ROWS * BINS)
    # not by bincount's weights: on a GPU their sum depends on the order
    is_in = (rows[..., None] == torch.arange(ROWS, device=gap.device)).any(0)  # [n, ROWS]
    sums = torch.where(is_in, gap[:, None], 0).sum(0, dtype=torch.float64)
    return torch.cat([sums[:, None], counts.view(ROWS, BINS)], dim=1)


def _bucket(values: Tensor, edges: Sequence[float]) -> Tensor:
    """Return the number of edges at or below each value."""
    bounds = torch.tensor(edges, dtype=values.dtype, device=values.device)
    return torch.bucketize(values, bounds, right=True)


def metrics(total: np.ndarray) -> dict[str, float]:
    """Return the tail of all tokens, and mean and tail of each bucket that has any. `total`: as `blank`."""
    found: dict[str, float] = {}
    positions, logprobs = np.split(total, [len(POSITIONS)])
    if positions[:, 1:].any():
        found["policy/mismatch_p99"] = tail(positions[:, 1:].sum(0))
    for first, row in zip(POSITIONS, positions, strict=True):
        if row.any():
            mean, far = _mean_and_tail(row)
            found |= {f"policy/mismatch_at_{first}": mean, f"policy/mismatch_p99_at_{first}": far}
    for bound, row in zip(LOGPROBS, logprobs, strict=True):
        if row.any():
            mean, far = _mean_and_tail(row)
            found |= {
                f"policy/mismatch_logprob_{bound:g}": mean,
                f"policy/mismatch_p99_logprob_{bound:g}": far,
            }
    return found


def _mean_and_tail(row: np.ndarray) -> tuple[float, float]:
    return float(row[0] / row[1:].sum()), tail(row[1:])


def tail(counts: np.ndarray) -> float:
    """Return the smallest gap that 99 % of the tokens do not exceed, within a bin: 9 % up or down."""
    return MIDDLES[int(np.searchsorted(counts.cumsum(), TAIL * counts.sum()))]
