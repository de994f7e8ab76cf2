"""Sums over the tokens of each sequence of a pack. T = packed tokens, S = sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """gspo needs to know where sequences begin and end in a pack: its ratio is of a whole one.

    cu_seqlens: [S + 1], integers: sequence i is tokens cu_seqlens[i] : cu_seqlens[i + 1] of these T.
    cp_group: the ranks that hold other tokens of the same sequences (context parallelism). Default: none.
    """

    cu_seqlens: Tensor
    cp_group: dist.ProcessGroup | None = None

    def means(self, values: Tensor, mask: Tensor) -> Tensor:
        """Give each token the mean of `values` [T] over its sequence's tokens inside the mask, float64 [T]; 0
        where there are none. Collective over cp_group.
        """
        both = torch.stack([values.where(mask, 0.0), mask]).double()
        offsets = self.cu_seqlens.long().expand(2, -1).contiguous()
        # one after another: the order is the same in every run, and sums of atomics would not be
        sums: Tensor = torch.segment_reduce(both, "sum", offsets=offsets, axis=-1, initial=0)
        if self.cp_group is not None:
            dist.all_reduce(sums, group=self.cp_group)
        total, count = sums
        lengths = self.cu_seqlens.diff().long()
        means: Tensor = total / count.clamp(min=1)
        return means.repeat_interleave(lengths, output_size=len(values))
