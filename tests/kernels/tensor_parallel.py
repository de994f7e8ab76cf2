"""Compare the losses on shards of the vocabulary with the float64 reference on the whole.

    torchrun --nproc-per-node WORLD -m tests.kernels.tensor_parallel OUT.json

Every rank computes case after case; rank 0 writes the errors.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from dapo_kernels import PolicyLoss, linear_logprobs, linear_policy_loss, policy_loss, reference

from tests.kernels.inputs import CLIP, double, relative_error

T, H, V = 48, 12, 100  # V = valid ids: 4 · 26 columns leave padding on the last rank
OPTIONS = {"dual_clip": 3.0, "temperature": 0.8}
CHUNKS = [1, 4 * 26 * 9, None]  # bytes: as small as possible; several; one


def make():
    """Return hidden, weight [104, H] and the per-token arguments. So many neighbours are masked that whole
    chunks are.
    """
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, H, generator=g), torch.randn(104, H, generator=g)
    targets, mask = torch.randint(V, (T,), generator=g), torch.rand(T, generator=g) < 0.7
    mask[20:30] = False
    everything = torch.ones_like(mask)
    own = reference.logprobs(hidden @ weight.t(), targets, everything, temperature=0.8, valid_vocab=V)
    return hidden, weight, targets, own + 0.4 * torch.randn(T, generator=g), torch.randn(T, generator=g), mask


def main(out: str) -> None:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    rank, world = dist.get_rank(), dist.get_world_size()
    hidden, weight, *rest = make()
    shard = weight.chunk(world)[rank].contiguous()
    options = {**OPTIONS, "tp_group": group, "valid_vocab": V}
    truth, hidden_grad, weight_grad, logits_grad = truth_of(hidden, weight, rest)
    results = []

    def report(name: str, done: PolicyLoss, gradients: list[tuple], shared: list[torch.Tensor]) -> None:
        """Add a result. `gradients` are pairs of ours and the truth's; `shared` must be the same bits on all
        ranks, as the loss and its metrics must.
        """
        values = [(getattr(done, field), getattr(truth, field)) for field in ("loss", "logprobs", "entropy")]
        errors = [relative_error(x, y) for x, y in values + gradients]
        shared = [*shared, *(x.detach() for x, _ in values)]
        same = all([is_the_same_everywhere(x) for x in shared])
        gathered: list = [None] * world
        dist.all_gather_object(gathered, max(errors))
        results.append({"name": name, "error": max(gathered), "is_same": same})

    for is_triton in (True, False):
        os.environ["TRITON_INTERPRET"] = "1" if is_triton else "0"
        kind = "triton" if is_triton else "torch"

        logits = (hidden @ shard.t()).requires_grad_()
        mine = logits_grad.chunk(world, 1)[rank]
        done = policy_loss(logits, *rest, **CLIP, **options)
        done.loss.backward()
        report(f"logits {kind}", done, [(logits.grad, mine)], [done.clipped_low])

        for is_parallel in (False, True):
            for chunk_bytes in CHUNKS if is_parallel or not is_triton else CHUNKS[1:]:
                own = hidden.chunk(world)[rank] if is_parallel else hidden
                leaf, head = own.clone().contiguous().requires_grad_(), shard.clone().requires_grad_()
                more = {**options, "sequence_parallel": is_parallel, "chunk_bytes": chunk_bytes}
                main_grad = torch.zeros_like(shard) if chunk_bytes else None
                done = linear_policy_loss(leaf, head, *rest, **CLIP, **more, weight_grad=main_grad)
                done.loss.backward()
                gradients = [
                    (leaf.grad, hidden_grad.chunk(world)[rank] if is_parallel else hidden_grad),
                    (head.grad if main_grad is None else main_grad, weight_grad.chunk(world)[rank]),
                ]
                name = f"linear {kind}{' sequence' if is_parallel else ''} {chunk_bytes}"
                report(name, done, gradients, [] if is_parallel else [leaf.grad])

                more.pop("dual_clip")
                logprobs = linear_logprobs(leaf, head, rest[0], rest[-1], **more)
                results[-1]["is_same"] &= torch.equal(logprobs, done.logprobs)

    try:
        linear_policy_loss(hidden, shard, *rest, **CLIP, tp_group=group, valid_vocab=105)
    except ValueError as refusal:
        results.append({"name": "refusal", "message": str(refusal)})
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


def truth_of(hidden, weight, rest):
    """Compute the reference on one process: (result, gradients of hidden, of weight and of the logits)."""
    hidden, weight = double(hidden).requires_grad_(), double(weight).requires_grad_()
    logits = hidden @ weight.t()
    logits.retain_grad()
    result = reference.policy_loss(logits, *map(double, rest), **CLIP, **OPTIONS, valid_vocab=V)
    result.loss.backward()
    return result, hidden.grad, weight.grad, logits.grad


def is_the_same_everywhere(x: torch.Tensor) -> bool:
    """True if all ranks hold the same bits."""
    copies = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, x.contiguous())
    return all(torch.equal(copy, copies[0]) for copy in copies)


if __name__ == "__main__":
    main(sys.argv[1])
