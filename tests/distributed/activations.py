"""Tensors that autograd keeps of one microbatch, beside dapo.plan.memory's count; all cases in one launch.

torchrun --nproc-per-node WORLD -m tests.distributed.activations OUT.json: every case of that world size; the
main rank writes.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.autograd.graph import saved_tensors_hooks

from dapo import config as configs
from dapo.learn.batch import Batch, Microbatch
from dapo.mesh import Mesh
from dapo.plan.memory import Rank
from dapo.policy.megatron import Policy
from dapo.policy.rope import PackedRotary
from dapo.policy.schedule import hidden_states, on_device
from dapo.types import Group, Prompt, Sample
from tests.batches import batch_of_rank
from tests.distributed.ranks import prepare_rank

LENGTHS, PROMPT = (40, 75, 190, 60, 90, 120, 20, 200), 5
SHAPE = dict(
    vocab_size=250,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
)
EXPERTS = dict(head_dim=16, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=256)
DELTA = dict(
    head_dim=32, linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=32,
    linear_value_head_dim=32, full_attention_interval=2,
    rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25},
)  # fmt: skip
LATENT = dict(
    num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=64, q_lora_rank=96, qk_rope_head_dim=8,
    qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=4, moe_intermediate_size=128,
    n_group=4, topk_group=2, n_shared_experts=1, first_k_dense_replace=1,
)  # fmt: skip
MODELS = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 48}),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        EXPERTS | {"norm_topk_prob": True},
    ),
    "qwen3_moe-unnormalised": (
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        EXPERTS | {"norm_topk_prob": False},
    ),
    "qwen3_5_text": (transformers.Qwen3_5TextConfig, transformers.Qwen3_5ForCausalLM, DELTA),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        transformers.Qwen3NextForCausalLM,
        EXPERTS | DELTA | {"shared_expert_intermediate_size": 128},
    ),
    "deepseek_v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM, LATENT),
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Case:
    name: str
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    model: str = "qwen2"
    dtype: str = "float32"
    megatron: dict[str, Any] = field(default_factory=dict)
    expert: int = 1


CASES = [
    Case("float32"),
    Case("bfloat16", dtype="bfloat16"),
    Case("q and k norms", model="qwen3"),
    Case("q and k norms in bfloat16", model="qwen3", dtype="bfloat16"),
    Case("all layers recomputed", megatron=FULL),
    Case("recomputed in twos", megatron=FULL | {"recompute_num_layers": 2}),
    Case("one layer recomputed", model="llama", megatron=FULL | {"recompute_method": "block"}),
    Case("attention recomputed", megatron={"recompute_granularity": "selective"}),
    Case("attention and MLP recomputed", dtype="bfloat16",
         megatron={"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}),
    Case("tensor 2", tensor=2, model="qwen3"),
    Case("tensor 2 in bfloat16", tensor=2, dtype="bfloat16"),
    Case("pipeline 2", pipeline=2),
    Case("pipeline 2, recomputed", pipeline=2, dtype="bfloat16", megatron=FULL),
    Case("context 2", context=2),
    Case("context 2 in bfloat16", context=2, model="qwen3", dtype="bfloat16"),
    Case("context 2, attention recomputed", context=2, megatron={"recompute_granularity": "selective"}),
    Case("experts", model="qwen3_moe"),
    Case("experts in bfloat16", model="qwen3_moe-unnormalised", dtype="bfloat16"),
    Case("experts recomputed", model="qwen3_moe",
         megatron={"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    Case("experts on tensor ranks", tensor=2, expert=2, model="qwen3_moe", dtype="bfloat16"),
    Case("experts gathered for", tensor=2, expert=2, model="qwen3_moe-unnormalised",
         megatron={"moe_token_dispatcher_type": "allgather"}),
    Case("DeltaNet", model="qwen3_5_text"),
    Case("DeltaNet in bfloat16", model="qwen3_5_text", tensor=2, dtype="bfloat16"),
    Case("DeltaNet, context 2", model="qwen3_5_text", context=2),
    Case("DeltaNet and experts in bfloat16", model="qwen3_next", dtype="bfloat16"),
    Case("latent attention, tensor 2 in bfloat16", model="deepseek_v3", tensor=2, dtype="bfloat16"),
    Case("latent attention, context 2", model="deepseek_v3", context=2),
    Case("latent attention, pipeline 2", model="deepseek_v3", pipeline=2),
]  # fmt: skip


def run(case: Case, directory: Path) -> dict[str, Any]:
    parallel = configs.Parallel(
        tensor=case.tensor, pipeline=case.pipeline, context=case.context, expert=case.expert
    )
    mesh = Mesh(parallel)
    if mesh.is_main:
        config, cls, extra = MODELS[case.model]
        cls(config(**(SHAPE | extra))).save_pretrained(directory)
    mesh.barrier()
    multiple = parallel.sequence_multiple
    config = configs.Config(
        run=configs.Run(dir=directory / "run"),
        data=configs.Data(train=directory / "none", max_prompt_length=PROMPT),
        rollout=configs.Rollout(
            prompts_per_step=1, group_size=len(LENGTHS), max_response_length=max(LENGTHS)
        ),
        optim=configs.Optim(prompts_per_minibatch=1),
        parallel=parallel,
        policy=configs.Policy(
            model=directory,
            dtype=case.dtype,
            # all of them in one
            tokens_per_microbatch=sum(-(-(n + PROMPT - 1) // multiple) * multiple for n in LENGTHS),
            megatron=case.megatron,
        ),
    )
    policy = Policy(config, mesh)
    rank = Rank(config, policy.shape, "cpu", mesh.data, stage=mesh.rank // (case.tensor * case.context))
    batch = batch_of_rank(mesh, [make_group()], config, mesh.data, metrics={})
    [[microbatch]] = batch.minibatches
    ranks: list[Any] = [None] * mesh.world
    measured = {
        "measured": kept(policy, rank, microbatch),
        "planned": rank.kept,
        "kept by scoring": kept_by_scoring(policy, batch),
    }
    measured |= {
        "parameters": sum(p.numel() for chunk in policy.chunks for p in chunk.parameters()),
        "planned_parameters": rank.parameters,
    }
    dist.all_gather_object(ranks, measured, group=mesh.control)
    return {"name": case.name, "ranks": ranks}


def make_group() -> Group:
    rng = np.random.default_rng(3)
    samples = [
        Sample(
            0,
            i,
            rng.integers(0, 250, n).astype(np.int32),
            np.zeros(n, np.float32),
            np.ones(n, bool),
            ((0, 0, n),),
            "stop",
        )
        for i, n in enumerate(LENGTHS)
    ]
    return Group(0, Prompt(0, rng.integers(0, 250, PROMPT).astype(np.int32), "0"), samples)


def kept(policy: Policy, rank: Rank, microbatch: Microbatch) -> int:
    """Bytes of all storages that the forward pass leaves for the backward pass, and of what it takes from and
    hands to its neighbours.
    """
    placed = on_device(microbatch, policy.mesh.device)
    parameters = {p.untyped_storage().data_ptr() for chunk in policy.chunks for p in chunk.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (where := tensor.untyped_storage().data_ptr()) not in parameters:
            storages[where] = tensor.untyped_storage()
        return tensor

    if rank.stage > 0:
        dtype = getattr(torch, rank.config.policy.dtype)
        received = torch.randn(
            len(microbatch.tokens), 1, SHAPE["hidden_size"], dtype=dtype, requires_grad=True
        )
        policy.chunks[0].set_input_tensor(keep(received))

    def keep_turns(rotary: torch.nn.Module, given: Any, result: None) -> None:
        """They live with the pack, of which recomputed layers read them again."""
        for turn in given[0].turns:
            keep(turn)

    rotary = next(module for module in policy.chunks[0].modules() if isinstance(module, PackedRotary))
    hook = rotary.register_forward_hook(keep_turns)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        keep(hidden_states(policy.models[0], policy.transformer, placed))
    hook.remove()
    return sum(storage.nbytes() for storage in storages.values())


def kept_by_scoring(policy: Policy, batch: Batch) -> int:
    """How many tensors autograd keeps of the log-probs' forward pass."""
    kept: list[torch.Size] = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor.shape), tensor)[1], lambda tensor: tensor):
        policy.score(policy.place(batch))
    return len(kept)


def main(out: str) -> None:
    from megatron.core import parallel_state

    prepare_rank()
    results = []
    for number, case in enumerate(CASES):
        if case.tensor * case.pipeline * case.context == int(os.environ["WORLD_SIZE"]):
            results.append(run(case, Path(out).parent / str(number)))
            parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
