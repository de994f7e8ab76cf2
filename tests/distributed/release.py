"""Compares updates with the memory that only they need released in between, and without; all cases in one
launch.

torchrun --nproc-per-node WORLD -m tests.distributed.release OUT.json: the main rank writes what was measured.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dapo import config as configs
from dapo.mesh import Mesh
from dapo.policy.chunks import Reader
from dapo.policy.megatron import Policy
from dapo.policy.optimizer_state import parts
from dapo.policy.torch_dist import Save
from tests.batches import batch_of_rank
from tests.distributed.launch import ROOT
from tests.distributed.moves import OFFLOADED
from tests.distributed.ranks import prepare_rank
from tests.distributed.reference import GROUP_SIZE, GROUPS_PER_UPDATE, LR, NUM_UPDATES, make_groups, make_hf

CASES = {
    "float32": [],
    "bfloat16": ["policy.dtype=bfloat16"],
    "tensor 2, reduced meanwhile": [
        "parallel.tensor=2",
        "policy.dtype=bfloat16",
        "policy.megatron.overlap_grad_reduce=true",
        "policy.megatron.bucket_size=20000",
    ],
    "two chunks a stage": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "experts": ["parallel.expert=2", "policy.dtype=bfloat16"],
    "offloaded": OFFLOADED,
}
ALONE = ("float32", "bfloat16")  # of one rank, on a GPU
STEPS = 2


def run(name: str, directory: Path) -> dict[str, Any]:
    from megatron.core import parallel_state  # after dapo.policy, which adapts it

    num_groups = NUM_UPDATES * GROUPS_PER_UPDATE
    options = [
        f"run.dir={directory / 'run'}",
        f"policy.model={directory / 'hf'}",
        "policy.tokens_per_microbatch=80",
        f"rollout.prompts_per_step={num_groups}",
        f"rollout.group_size={GROUP_SIZE}",
        f"optim.prompts_per_minibatch={GROUPS_PER_UPDATE}",
        f"optim.lr={LR}",
        "parallel.tensor=1",
    ]
    config = configs.load(ROOT / "examples/arithmetic/config.yaml", options + CASES[name])
    mesh = Mesh(config.parallel)
    if mesh.is_main:
        make_hf("qwen3_moe" if name == "experts" else "qwen2", False, directory / "hf")
    mesh.barrier()
    result: dict[str, Any] = {"name": name}
    for way in ("kept", "released"):
        policy = Policy(config, mesh)
        result[way] = train(policy, directory, way == "released")
        parallel_state.destroy_model_parallel()
    if mesh.is_main:
        kept, *others = (Reader(directory / name) for name in ("kept", "copied", "released"))
        result["tensors"] = len(kept.sizes)
        result["differ"] = [
            (other.directory.name, key)
            for other in others
            for key in kept.sizes | other.sizes
            if not torch.equal(kept.read(key), other.read(key))
        ]
    return result


def train(policy: Policy, directory: Path, is_released: bool) -> dict[str, Any]:
    """Take two steps, then save: in the background before a last release, and once more after it."""
    seen: dict[str, Any] = {"held": [], "norms": [], "weights": []}
    groups = make_groups(np.random.default_rng(3), is_stale=False)
    for _ in range(STEPS):
        if is_released:
            seen["held"].append(held_after_release(policy))
        seen["weights"].append(sum(float(weight.double().abs().sum()) for _, weight in policy.weights()))
        own = batch_of_rank(policy.mesh, groups, policy.config, policy.mesh.data, metrics={}, version=2)
        batch = policy.place(own)
        policy.score(batch)
        seen["norms"] += [policy.update(minibatch)["grad_norm"] for minibatch in batch.minibatches]
    if is_released:
        saving = save(policy, directory / "copied", in_background=True)
        seen["held"].append(held_after_release(policy))
        saving.finish()
    save(policy, directory / ("released" if is_released else "kept"), in_background=False).finish()
    return seen


def save(policy: Policy, checkpoint: Path, in_background: bool) -> Save:
    if policy.mesh.is_main:
        checkpoint.mkdir()
    policy.mesh.barrier()
    saving = policy.save(checkpoint)
    saving.start(in_background)
    return saving


def held_after_release(policy: Policy) -> dict[str, int]:
    """Release; return how many bytes of gradients and optimizer state are held where they were."""
    buffers = [b for model in policy.models for b in (*model.buffers, *model.expert_parallel_buffers)]
    before = sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)
    params = {p.untyped_storage().data_ptr() for chunk in policy.chunks for p in chunk.parameters()}
    state = {}
    for part in parts(policy.optimizer):
        tensors = [p for group in part.optimizer.param_groups for p in group["params"]]
        tensors += [v for values in part.optimizer.state.values() for v in values.values()]
        storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
        state |= {s.data_ptr(): (StorageWeakRef(s), s.nbytes()) for s in storages}
    del tensors, storages
    state = {where: found for where, found in state.items() if where not in params}
    policy.release_memory()
    return {
        "gradients before": before,
        "gradients": sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers),
        "state before": sum(size for _, size in state.values()),
        "state": sum(size for ref, size in state.values() if not ref.expired()),
    }


def main(out: str) -> None:
    prepare_rank()
    names = CASES if int(os.environ["WORLD_SIZE"]) > 1 else ALONE
    results = [run(name, Path(out).parent / name.replace(" ", "-")) for name in names]
    if Mesh(configs.Parallel(tensor=1)).is_main:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
