"""A checkpoint that Megatron-core's own classes write as Megatron-LM does → Hugging Face, and our Megatron
directory → one that they load.

torchrun --nproc-per-node 2 -m tests.distributed.megatron_lm OUT.json
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from dapo import config as configs
from dapo.mesh import Mesh
from dapo.model.families import FAMILIES, read_shape
from dapo.model.shape import ModelShape
from dapo.policy import chunks, megatron_lm
from dapo.policy.layout import initialize_megatron
from tests.distributed import reference
from tests.distributed.launch import ROOT
from tests.distributed.ranks import prepare_rank

sys.path.insert(0, str(ROOT / "tools"))
import check_checkpoint
import hf_to_megatron
import megatron_to_hf

MODELS = [
    ("qwen2", True, 2),
    ("qwen3", False, 1),
    ("qwen3_moe", False, 1),
]  # name, whether tied, tensor ranks
VOCAB = 512  # Megatron-LM pads to a multiple of 128 × tensor ranks, or as it is asked to


class Odd:
    """An argument of a class that no other process knows."""


def gpt_model(shape: ModelShape, tensor: int) -> Any:
    """Make a GPTModel of Megatron's own layers, with a random value in every place."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts: dict[str, Any] = {}
    if shape.num_experts:
        experts = dict(
            num_moe_experts=shape.num_experts,
            moe_ffn_hidden_size=shape.expert_ffn_size,
            moe_router_topk=shape.experts_per_token,
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type="alltoall",
        )
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=FAMILIES[shape.model_type].has_qkv_bias,
        qk_layernorm=FAMILIES[shape.model_type].has_qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        **experts,
    )
    num_experts = shape.num_experts or None
    layer = get_gpt_layer_local_spec(
        num_experts, False, qk_layernorm=FAMILIES[shape.model_type].has_qk_norm, normalization="RMSNorm"
    )
    if num_experts:  # the name that Transformer Engine's layers give to this norm
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    model = GPTModel(
        config, layer, VOCAB, 64, parallel_output=False, position_embedding_type="rope",
        rotary_base=shape.rope_theta, share_embeddings_and_output_weights=shape.is_tied,
    )  # fmt: skip
    for name, param in model.named_parameters():
        rank = int(torch.distributed.get_rank()) % tensor if getattr(param, "partition_dim", -1) >= 0 else 0
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + rank)
        param.data.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


def save(model: Any, shape: ModelShape, folder: Path) -> None:
    """Write iteration 100 as Megatron-LM does: with optimizer, random state and the arguments."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
    from megatron.core.transformer.enums import AttnBackend

    others = {"attention_backend": AttnBackend.auto, "params_dtype": torch.float32, "odd": Odd()}
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.x", torch.ones(2), (0, rank, world))
    state = {
        "model": model.sharded_state_dict(),
        "optimizer": {"x": moment},
        "rng_state": ShardedObject("rng_state", [{"seed": rank}], (world,), (rank,)),
        "args": argparse.Namespace(**megatron_lm.arguments(shape), **others),
        "checkpoint_version": 3.0,
        "iteration": 100,
        "opt_param_scheduler": {"max_lr": 1e-6, "num_steps": 100},
    }
    dist_checkpointing.save(state, str(folder / "iter_0000100"))


def unequal(a: Any, b: Any, tensor: int) -> list[str]:
    """Return the names of this rank's parameters that differ, without the rows that pad the vocabulary."""
    found = []
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        rows = len(x)
        if "embedding" in name or "output_layer" in name:
            first = torch.distributed.get_rank() % tensor * rows
            rows = min(max(reference.VOCAB - first, 0), rows)
        if not torch.equal(x[:rows], y[:rows]):
            found.append(name)
    return found


def run(name: str, is_tied: bool, tensor: int, directory: Path, mesh: Mesh) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    hf, theirs, back, ours, exported = (directory / x for x in ("hf", "theirs", "back", "ours", "exported"))

    def prepare() -> None:
        reference.make_hf(name, is_tied, hf)
        (theirs / "iter_0000100").mkdir(parents=True)
        (theirs / megatron_lm.TRACKER).write_text("100")

    mesh.on_main(prepare)
    shape = read_shape(hf)
    model = gpt_model(shape, tensor)
    save(model, shape, theirs)

    def convert() -> list[int]:
        return [
            megatron_to_hf.main([str(theirs / "iter_0000100"), str(back), "--model", str(hf)]),
            hf_to_megatron.main([str(theirs), str(ours), "--model", str(hf)]),
            hf_to_megatron.main([str(ours), str(exported), "--megatron-lm", "--shard-size", "300KiB"]),
            check_checkpoint.main([str(back), str(theirs), "--model", str(hf)]),
            check_checkpoint.main([str(back), str(exported)]),
        ]

    status = mesh.on_main(convert)
    other = gpt_model(shape, tensor)
    for param in other.parameters():
        param.data.zero_()
    state = dist_checkpointing.load({"model": other.sharded_state_dict()}, str(exported / "release"))
    other.load_state_dict(state["model"])
    tokens = torch.arange(24)[None] * 10 % reference.VOCAB
    mask = torch.ones(1, 1, 24, 24).tril() < 0.5
    with torch.no_grad():
        logits = other(tokens, torch.arange(24)[None], mask)[..., : reference.VOCAB]
        wanted = transformers.AutoModelForCausalLM.from_pretrained(back)(tokens).logits
    arguments = megatron_lm.read_arguments(chunks.Reader(theirs / "iter_0000100"))
    return {
        "status": status,
        "arguments": arguments["num_layers"],
        "unequal": int(mesh.max(len(unequal(model, other, tensor)))),
        "logits": float((logits - wanted).abs().max() / wanted.abs().max()),
        "iteration": state["iteration"],
        "heads": state["args"].num_attention_heads,
    }


def main(out: str) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    prepare_rank()
    results = []
    for name, is_tied, tensor in MODELS:
        parallel = configs.Parallel(tensor=tensor)
        mesh = Mesh(parallel)
        initialize_megatron(parallel)
        model_parallel_cuda_manual_seed(0)
        results.append({"name": name, **run(name, is_tied, tensor, Path(out).parent / name, mesh)})
        parallel_state.destroy_model_parallel()
        if mesh.is_main:
            Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
