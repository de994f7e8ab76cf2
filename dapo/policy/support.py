"""Measures which part of the distribution tokens are drawn from: a sampler with top_p leaves out the rest.

T = tokens of a microbatch, H = hidden size, V = vocabulary, c = tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    for rows, probabilities in _distributions(head, hidden, mask):
        own = probabilities.gather(1, targets[rows, None])
        found[rows] = (probabilities * (probabilities > own)).sum(1)
    return found


@torch.no_grad()
def mass_beyond(head: Head, hidden: Tensor, mask: Tensor, above: float) -> Tensor:
    """Return the probability of the tokens for which `mass_above` is larger than `above`, [T]: of drawing one
    that a sampler with such a top_p leaves out. Arguments as there.
    """
    found = torch.zeros(len(mask), device=hidden.device)
    for rows, probabilities in _distributions(head, hidden, mask):
        ordered = probabilities.sort(1, descending=True).values
        found[rows] = (ordered * (ordered.cumsum(1) - ordered > above)).sum(1)
    return found


def _distributions(head: Head, hidden: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens' numbers, [c], and their distributions over the whole vocabulary, [c, V]."""
    shard = head.shard(len(head.weight))
    spans = plan_spans(mask, hidden.device, head.slices, head.rows_per_chunk)
    for span, part in gather(hidden, spans, head.slices, head.tp_group):
        logits = (part[span.within].float() @ head.weight.float().t()) / head.temperature
        logits[:, shard.valid :] = -torch.inf
        if head.tp_group is not None:
            shards = [torch.empty_like(logits) for _ in range(dist.get_world_size(head.tp_group))]
            dist.all_gather(shards, logits, group=head.tp_group)
            logits = torch.cat(shards, dim=1)
        yield span.rows, logits.softmax(1)
