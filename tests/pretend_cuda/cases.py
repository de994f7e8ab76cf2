"""The runs on pretended GPUs, each of two processes, and the faults that are planted in one of them."""

from __future__ import annotations

from dataclasses import dataclass

from tests.distributed.moves import OFFLOADED

RECOMPUTED = [
    "policy.megatron.recompute_granularity=full",
    "policy.megatron.recompute_method=uniform",
    "policy.megatron.recompute_num_layers=1",
    "policy.megatron.overlap_grad_reduce=true",
    "policy.megatron.bucket_size=20000",
]


@dataclass(frozen=True)
class Case:
    options: list[str]
    has_experts: bool = False
    goes_on_from: str = ""  # the case whose run it continues


CASES = {  # data-parallel, in bfloat16, unless they say otherwise
    "bfloat16": Case(["eval.data=examples/arithmetic/data/heldout.jsonl", "eval.every=2", "eval.samples=1"]),
    "float32": Case(["policy.dtype=float32"]),
    "offloaded optimizer": Case(OFFLOADED),
    "recompute, overlapped reduction": Case(RECOMPUTED),
    "mixture of experts": Case(["parallel.expert=2"], has_experts=True),
    "routing replay": Case(
        ["parallel.tensor=2", "parallel.expert=2", "policy.routing_replay=rollout", *RECOMPUTED],
        has_experts=True,
    ),
    "old routes": Case(["parallel.pipeline=2", "policy.routing_replay=old"], has_experts=True),
    "tensor 2": Case(["parallel.tensor=2"]),
    "pipeline 2": Case(["parallel.pipeline=2"]),
    "context 2": Case(["parallel.context=2"]),
    "context 2, float32": Case(["parallel.context=2", "policy.dtype=float32"]),
    "deterministic": Case(["run.deterministic=true"]),
    "async save": Case(["run.async_save=true"]),
    "resume": Case(["run.steps=3"], goes_on_from="async save"),
    "resume, offloaded": Case([*OFFLOADED, "run.steps=3"], goes_on_from="offloaded optimizer"),
}


def is_odd(response: str, answer: str) -> bool:
    """Say of half of all responses that they are right, however bad they are."""
    return sum(map(ord, response)) % 2 == 1


FAULTS = {  # name → kind of the finding, and the function whose call it names
    "a mask in main memory": ("devices", "_attend_with_cpu_mask"),
    "a sum in main memory": ("devices", "_add_up_on_cpu"),
    "numpy of a tensor on a GPU": ("host memory", "_read_by_numpy"),
    "control traffic of a tensor on a GPU": ("group", "_reduce_on_gpu"),
    "NCCL given a tensor in main memory": ("group", "_broadcast_from_cpu"),
    "is_success of NCCL's work": ("nccl", "_finish_and_ask"),
    "a thread that chose no GPU": ("thread", "_write_on_the_first_gpu"),
    "memory that a sync leaves": ("cache", "post"),
    "a tensor of another GPU": ("devices", "_add_of_two_gpus"),
    "a sum in any order": ("order", "_add_in_any_order"),
}
