"""Compare the losses on shards of the vocabulary, or of every sequence, with the float64 reference.

    torchrun --nproc-per-node WORLD -m tests.kernels.tensor_parallel OUT.json

Every rank computes case after case; rank 0 writes the errors.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dapo_kernels import PolicyLoss, linear_logprobs, linear_policy_loss, policy_loss, reference

from tests.kernels.inputs import CLIP, double, relative_error

T, H, V = 48, 12, 100  # V = valid ids: 4 · 26 columns leave padding on the last rank
CU_SEQLENS = torch.tensor([0, 16, 24, 48])  # each divides into 8 chunks: 4 context ranks have two of each
WEIGHTS = torch.arange(T) % 7 / 6  # they differ inside a sequence
OPTIONS: dict[str, dict[str, Any]] = {
    "dapo": {"temperature": 0.8, "dual_clip": 3.0},
    "cispo": {"temperature": 0.8, "kind": "cispo", "weights": WEIGHTS},
    "gspo": {"temperature": 0.8, "kind": "gspo", "weights": WEIGHTS, "cu_seqlens": CU_SEQLENS,
             "clip_low": 0.02, "clip_high": 0.01},
}  # fmt: skip
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
    results: list[dict[str, Any]] = []
    for kind in OPTIONS:
        compare(kind, results)
    hidden, weight, *rest = make()
    shard = weight.chunk(dist.get_world_size())[dist.get_rank()].contiguous()
    try:
        linear_policy_loss(hidden, shard, *rest, **CLIP, tp_group=dist.group.WORLD, valid_vocab=105)
    except ValueError as refusal:
        results.append({"name": "refusal", "message": str(refusal)})
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


def compare(kind: str, results: list[dict[str, Any]]) -> None:
    """Measure one kind of loss in every split."""
    group = dist.group.WORLD
    rank, world = dist.get_rank(), dist.get_world_size()
    hidden, weight, *rest = make()
    shard = weight.chunk(world)[rank].contiguous()
    plain = CLIP | OPTIONS[kind] | {"valid_vocab": V}
    options = plain | {"tp_group": group}
    truth, hidden_grad, weight_grad, logits_grad = truth_of(hidden, weight, rest, plain)
    assert (truth.clipped_low | truth.clipped_high).any(), "the clip has no effect"

    def report(name: str, done: PolicyLoss, gradients: list[tuple], shared: list[torch.Tensor]) -> None:
        """Add a result. `gradients` are pairs of ours and the truth's; `shared` must be the same bits on all
        ranks, as the loss and its metrics must.
        """
        values = [(getattr(done, field), getattr(truth, field)) for field in ("loss", "logprobs", "entropy")]
        errors = [relative_error(x, y) for x, y in values + gradients]
        shared = [*shared, *(x.detach() for x, _ in values)]
        same = all([is_the_same_everywhere(x) for x in shared])
        results.append({"name": f"{kind} {name}", "error": largest(errors), "is_same": same})

    for is_triton in (True, False):
        os.environ["TRITON_INTERPRET"] = "1" if is_triton else "0"
        by = "triton" if is_triton else "torch"

        logits = (hidden @ shard.t()).requires_grad_()
        mine = logits_grad.chunk(world, 1)[rank]
        done = policy_loss(logits, *rest, **options)
        done.loss.backward()
        report(f"logits {by}", done, [(logits.grad, mine)], [done.clipped_low])

        for is_parallel in (False, True):
            for chunk_bytes in CHUNKS if is_parallel or not is_triton else CHUNKS[1:]:
                own = hidden.chunk(world)[rank] if is_parallel else hidden
                leaf, head = own.clone().contiguous().requires_grad_(), shard.clone().requires_grad_()
                more = {"sequence_parallel": is_parallel, "chunk_bytes": chunk_bytes}
                main_grad = torch.zeros_like(shard) if chunk_bytes else None
                done = linear_policy_loss(leaf, head, *rest, **options, **more, weight_grad=main_grad)
                done.loss.backward()
                gradients = [
                    (leaf.grad, hidden_grad.chunk(world)[rank] if is_parallel else hidden_grad),
                    (head.grad if main_grad is None else main_grad, weight_grad.chunk(world)[rank]),
                ]
                name = f"linear {by}{' sequence' if is_parallel else ''} {chunk_bytes}"
                report(name, done, gradients, [] if is_parallel else [leaf.grad])

                more |= {"temperature": 0.8, "tp_group": group, "valid_vocab": V}
                logprobs = linear_logprobs(leaf, head, rest[0], rest[-1], **more)
                results[-1]["is_same"] &= torch.equal(logprobs, done.logprobs)
        results.append(context(kind, by, truth, hidden_grad, weight_grad))


def context(
    kind: str, by: str, truth: PolicyLoss, hidden_grad: torch.Tensor, weight_grad: torch.Tensor
) -> dict[str, Any]:
    """Measure a split of every sequence: a rank has two chunks of each, and the whole vocabulary. What ranks
    have is added up, as Megatron adds gradients up.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    chunks = [s.chunk(2 * world) for s in torch.arange(T).split(CU_SEQLENS.diff().tolist())]
    own = torch.cat([sequence[i] for sequence in chunks for i in (rank, 2 * world - 1 - rank)])
    hidden, weight, *rest = make()
    options = CLIP | OPTIONS[kind] | {"valid_vocab": V}
    if kind == "gspo":
        options |= {"cu_seqlens": CU_SEQLENS // world, "cp_group": dist.group.WORLD}
    if "weights" in options:
        options["weights"] = WEIGHTS[own]
    leaf, head = hidden[own].requires_grad_(), weight.clone().requires_grad_()
    options["chunk_bytes"] = CHUNKS[1]
    done = linear_policy_loss(leaf, head, *(x[own] for x in rest), **options)
    done.loss.backward()
    loss = done.loss.detach().clone()
    for x in (loss, head.grad):
        dist.all_reduce(x)
    pairs = [(loss, truth.loss), (leaf.grad, hidden_grad[own]), (head.grad, weight_grad)]
    pairs += [(done.clipped_low, truth.clipped_low[own]), (done.clipped_high, truth.clipped_high[own])]
    errors = [relative_error(x, y) for x, y in pairs]
    with torch.no_grad():
        again = linear_policy_loss(hidden[own], weight, *(x[own] for x in rest), **options)
    is_same = torch.equal(again.logprobs, done.logprobs) and is_the_same_everywhere(loss)
    return {"name": f"{kind} context {by}", "error": largest(errors), "is_same": is_same}


def truth_of(hidden, weight, rest, options):
    """Compute the reference on one process: (result, gradients of hidden, of weight and of the logits)."""
    hidden, weight = double(hidden).requires_grad_(), double(weight).requires_grad_()
    logits = hidden @ weight.t()
    logits.retain_grad()
    options = {name: double(x) for name, x in options.items()}
    result = reference.policy_loss(logits, *map(double, rest), **options)
    result.loss.backward()
    return result, hidden.grad, weight.grad, logits.grad


def largest(errors: list[float]) -> float:
    """Return the largest of all ranks' numbers."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, max(errors))
    return max(gathered)


def is_the_same_everywhere(x: torch.Tensor) -> bool:
    """True if all ranks hold the same bits."""
    copies = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, x.contiguous())
    return all(torch.equal(copy, copies[0]) for copy in copies)


if __name__ == "__main__":
    main(sys.argv[1])
