"""Chunks of tokens whose logits fit into a budget of memory, and the hidden states of each chunk.

T = packed tokens, H = hidden size, c = tokens of a chunk. A slice is one rank's T / slices tokens under
sequence parallelism, otherwise all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# 8192 bf16 rows of 152k columns: adding up the weight's gradient then costs 3 % of a chunk
GPU_CHUNK_BYTES = 2400 << 20
CPU_CHUNK_BYTES = 64 << 20
# a chunk gathers at most this many times as many tokens as it may keep: bounds the gathered hidden states
MAX_SPAN = 2


class Span(NamedTuple):
    """One chunk: the positions `start` to `stop` of every slice."""

    start: int
    stop: int
    within: Tensor  # [c], rows inside the mask, as indices of the gathered slices laid one after another
    rows: Tensor  # [c], the same rows as indices of all T tokens


def plan_spans(mask: Tensor, device: torch.device, slices: int, rows_per_chunk: int) -> list[Span]:
    """Split the tokens into chunks of about equal size, each with 1 to `rows_per_chunk` rows inside the mask.

    Chunk i holds the same positions of every rank's slice, so that what is gathered and scattered lies in one
    piece.
    """
    table = mask.view(slices, -1)  # [slices, T / slices]
    live = table.sum(0).cumsum(0)  # [T / slices], rows inside the mask up to and including this position
    length = table.shape[1]
    total = int(live[-1]) if length else 0
    limit = -(-total // max(-(-total // rows_per_chunk), 1))  # as few chunks as there must be, of equal size
    limit = min(max(limit, slices), rows_per_chunk)
    spans = []
    start = before = 0
    while before < total:
        stop = int(torch.searchsorted(live, before + limit, right=True))
        if slices > 1:
            stop = min(stop, start + max(MAX_SPAN * rows_per_chunk // slices, 1))
        if int(live[stop - 1]) > before:
            within = table[:, start:stop].flatten().nonzero()[:, 0]
            rows = within // (stop - start) * length + within % (stop - start) + start
            places = (x.to(device, non_blocking=True) for x in (within, rows))
            spans.append(Span(start, stop, *places))
        start, before = stop, int(live[stop - 1])
    return spans


def gather(
    hidden: Tensor, spans: list[Span], slices: int, group: dist.ProcessGroup | None
) -> Iterator[tuple[Span, Tensor]]:
    """Yield each chunk's hidden states, those of all slices one after another. The next chunk is gathered
    while this one is in use.
    """
    if slices == 1:
        for span in spans:
            yield span, hidden[span.start : span.stop]
        return
    coming = _start_gather(hidden, spans[0], slices, group) if spans else None
    for number, span in enumerate(spans):
        assert coming is not None
        out, work = coming
        work.wait()
        if number + 1 < len(spans):
            coming = _start_gather(hidden, spans[number + 1], slices, group)
        yield span, out


def _start_gather(
    hidden: Tensor, span: Span, slices: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Any]:
    out = hidden.new_empty(slices * (span.stop - span.start), hidden.shape[1])
    own = hidden[span.start : span.stop]
    return out, dist.all_gather_into_tensor(out, own, group=group, async_op=True)
