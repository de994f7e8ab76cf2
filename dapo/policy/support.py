"""Says from how much of the distribution tokens are drawn: a sampler with top_p leaves out the tail."""

from __future__ import annotations

import torch
import torch.distributed as dist
from dapo_kernels import Head
from dapo_kernels.chunks import gather, plan_spans
from torch import Tensor


@torch.no_grad()
def mass_above(head: Head, hidden: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Return the probability of all tokens that are likelier than the target, [T]; 0 outside the mask.

    `hidden`: [T, H], or this rank's T/tp of them under sequence parallelism. Collective over tensor ranks.
    """
    found = torch.zeros(len(targets), device=hidden.device)
    shard = head.shard(len(head.weight))

    def summed(x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        if head.tp_group is not None:
            dist.all_reduce(x, op, group=head.tp_group)
        return x

    spans = plan_spans(mask, hidden.device, head.slices, head.rows_per_chunk)
    for span, part in gather(hidden, spans, head.slices, head.tp_group):
        logits = (part[span.within].float() @ head.weight.float().t()) / head.temperature
        logits[:, shard.valid :] = -torch.inf
        own = targets[span.rows] - shard.start
        is_here = (own >= 0) & (own < shard.columns)
        target = logits.gather(1, own.clamp(0, shard.columns - 1)[:, None])[:, 0]
        target = summed(torch.where(is_here, target, 0.0))
        most = summed(logits.max(1).values, dist.ReduceOp.MAX)
        mass = (logits - most[:, None]).exp()
        above = summed((mass * (logits > target[:, None])).sum(1))
        found[span.rows] = above / summed(mass.sum(1))
    return found
