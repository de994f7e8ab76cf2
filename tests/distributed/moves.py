"""The layouts between which reshard.py moves a run."""

from __future__ import annotations

OFFLOADED = [
    "policy.dtype=bfloat16",
    "policy.megatron.optimizer_cpu_offload=true",
    "policy.megatron.optimizer_offload_fraction=1.0",
    "policy.megatron.use_precision_aware_optimizer=true",
]
LAYOUTS = {  # of four processes
    "tensor 2, pipeline 2": ["parallel.tensor=2", "parallel.pipeline=2"],
    "data 4": ["parallel.tensor=1"],
    "tensor 4": ["parallel.tensor=4"],
    "tensor 2, data 2": ["parallel.tensor=2"],
    "tensor 2, context 2": ["parallel.tensor=2", "parallel.context=2"],
    "pipeline 2, data 2, two chunks a stage": [
        "parallel.tensor=1",
        "parallel.pipeline=2",
        "parallel.virtual_pipeline=2",
    ],
    "tensor 2, pipeline 2, bfloat16": ["parallel.tensor=2", "parallel.pipeline=2", "policy.dtype=bfloat16"],
    "tensor 4, bfloat16": ["parallel.tensor=4", "policy.dtype=bfloat16"],
    "tensor 2, data 2, bfloat16": ["parallel.tensor=2", "policy.dtype=bfloat16"],
    "tensor 2, data 2, offloaded": ["parallel.tensor=2", *OFFLOADED],
    "pipeline 2, data 2, offloaded": ["parallel.tensor=1", "parallel.pipeline=2", *OFFLOADED],
    "experts whole, tensor 2, data 2": ["parallel.tensor=2"],
    "experts whole, pipeline 2, data 2": ["parallel.tensor=1", "parallel.pipeline=2"],
    "experts over 2, tensor 2, pipeline 2": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"],
    "experts over 2, data 4": ["parallel.tensor=1", "parallel.expert=2"],
    "experts over 4, data 4": ["parallel.tensor=1", "parallel.expert=4"],
    "DeltaNet, tensor 2, context 2": ["parallel.tensor=2", "parallel.context=2", "parallel.expert=2"],
    "DeltaNet, pipeline 2, data 2": ["parallel.tensor=1", "parallel.pipeline=2", "parallel.expert=2"],
    "latent, tensor 2, pipeline 2": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"],
    "latent, data 4": ["parallel.tensor=1", "parallel.expert=4"],
}
HUB = "tensor 2, pipeline 2"
RING = [  # each of them is saved, and each is gone on in
    HUB,
    "data 4",
    "pipeline 2, data 2, two chunks a stage",
    "tensor 4",
    "tensor 2, context 2",
    "tensor 2, data 2",
]
MOVES = [  # saved in → gone on in
    *zip(RING, [*RING[1:], HUB], strict=True),
    (HUB, "tensor 4"),
    ("tensor 2, pipeline 2, bfloat16", "tensor 4, bfloat16"),
    ("tensor 2, data 2, bfloat16", "tensor 2, data 2, offloaded"),
    ("tensor 2, data 2, offloaded", "tensor 2, data 2, offloaded"),
    ("tensor 2, data 2, offloaded", "pipeline 2, data 2, offloaded"),
    ("experts whole, tensor 2, data 2", "experts over 4, data 4"),
    ("experts over 4, data 4", "experts whole, pipeline 2, data 2"),
    ("experts over 4, data 4", "experts over 2, tensor 2, pipeline 2"),
    ("experts over 2, tensor 2, pipeline 2", "experts over 2, data 4"),
    ("DeltaNet, tensor 2, context 2", "DeltaNet, pipeline 2, data 2"),
    ("DeltaNet, pipeline 2, data 2", "DeltaNet, tensor 2, context 2"),
    ("latent, tensor 2, pipeline 2", "latent, data 4"),
]


def model_of(layout: str) -> str:
    return next((kind for kind in ("experts", "DeltaNet", "latent") if kind in layout), "dense")


def is_bfloat16(layout: str) -> bool:
    """True if layouts differ by 10⁻³ after a step, and then draw other tokens: one step is compared."""
    return "bfloat16" in layout or "offloaded" in layout
