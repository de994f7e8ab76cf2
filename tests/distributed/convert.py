"""Hugging Face → Megatron → a run's checkpoint → Hugging Face, for every architecture, in one launch of TP 2
× PP 2.

A mixture of experts has them split over the tensor ranks. torchrun --nproc-per-node 4 -m
tests.distributed.convert OUT.json
"""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from dapo import config as configs
from dapo import files
from dapo.mesh import Mesh
from dapo.policy import chunks
from dapo.policy.megatron import Policy
from tests.distributed.launch import ROOT
from tests.distributed.ranks import prepare_rank
from tests.distributed.reference import make_hf

sys.path.insert(0, str(ROOT / "tools"))
import hf_to_megatron
import megatron_to_hf

MODELS = [  # name, whether tied, dtype
    *[
        ("qwen2", True, "float32"),
        ("qwen2", False, "float32"),
        ("qwen3", False, "float32"),
        ("qwen3", True, "float32"),
    ],
    *[
        ("llama", False, "float32"),
        ("llama", True, "float32"),
        ("mistral", False, "float32"),
        ("qwen3_moe", False, "float32"),
    ],
    *[("qwen2", False, "bfloat16"), ("qwen3", True, "bfloat16"), ("qwen3_moe", False, "bfloat16")],
    *[("qwen3_5_text", True, "float32"), ("qwen3_5_moe_text", False, "bfloat16")],
    *[("qwen3_next", False, "float32"), ("glm4_moe_lite", False, "float32")],
    ("deepseek_v3", False, "bfloat16"),  # but for the router's bias
]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()
    }


def is_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def layout(model: str) -> configs.Parallel:
    has_experts = "moe" in model or model in ("qwen3_next", "deepseek_v3")
    return configs.Parallel(tensor=2, pipeline=2, expert=2 if has_experts else 1)


def run(model: str, is_tied: bool, dtype: str, directory: Path, mesh: Mesh) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    hf, megatron, checkpoint, back = (directory / name for name in ("hf", "megatron", "checkpoint", "back"))

    def to_megatron() -> int:
        make_hf(model, is_tied, hf)
        transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=getattr(torch, dtype)).save_pretrained(hf)
        if model == "deepseek_v3":  # transformers keeps the router float32, published files do not
            file = hf / "model.safetensors"
            tensors = {
                name: tensor if "correction_bias" in name else tensor.to(getattr(torch, dtype))
                for name, tensor in load_file(file).items()
            }
            save_file(tensors, file, {"format": "pt"})
        (checkpoint / "policy").mkdir(parents=True)
        return hf_to_megatron.main([str(hf), str(megatron), "--shard-size", "200KiB"])

    status = mesh.on_main(to_megatron)
    config = configs.Config(
        run=configs.Run(dir=directory / "run"),
        data=configs.Data(train=directory / "none"),
        parallel=layout(model),
        policy=configs.Policy(model=megatron, dtype=dtype),
    )
    policy = Policy(config, mesh)  # loads `megatron`
    ours = {name: param.detach().clone() for name, param in policy.chunks[0].named_parameters()}
    wanted = {
        name: part
        for name, part in policy.chunks[0].sharded_state_dict().items()
        if "_extra_state" not in name
    }
    theirs = dist_checkpointing.load(wanted, str(megatron / "policy"))
    is_read_alike = all(torch.equal(theirs[name], ours[name]) for name in ours if name in theirs)

    gate, write = threading.Event(), files.ChunkFile.write
    files.ChunkFile.write = lambda self, data: gate.wait() and write(self, data)  # type: ignore[method-assign, assignment]
    saving = policy.save(checkpoint / "policy")
    saving.start(in_background=True)
    saving.detach()
    is_early = saving.is_written()
    with torch.no_grad():
        for param in policy.chunks[0].parameters():
            param.zero_()  # training goes on
    gate.set()
    sums = mesh.gather(saving.finish())
    files.ChunkFile.write = write  # type: ignore[method-assign]

    def to_hf() -> int:
        files.write_manifest(
            checkpoint,
            {name: s for of_rank in sums for name, s in of_rank.items()},
            {"model": asdict(policy.shape)},
        )
        return megatron_to_hf.main([str(checkpoint), str(back), "--model", str(hf)])

    return {
        "status": [status, mesh.on_main(to_hf)],
        "files": len(list((megatron / "policy").glob("*.distcp"))),
        "read_alike": mesh.max(not is_read_alike) == 0 and len(theirs) >= len(ours),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored(back).values()}),
        "back": is_equal(stored(hf), stored(back)),
        "early": bool(mesh.max(is_early)),
        "damage": files.damage(checkpoint) or chunks.Reader(checkpoint / "policy").damage(),
        "left": [path.name for path in directory.iterdir() if path.name.startswith(".")],
    }


def main(out: str) -> None:
    from megatron.core import parallel_state

    prepare_rank()
    results = []
    for model, is_tied, dtype in MODELS:
        mesh = Mesh(layout(model))
        name = f"{model}{'-tied' if is_tied else ''}{'-bfloat16' if dtype == 'bfloat16' else ''}"
        results.append({"name": name, **run(model, is_tied, dtype, Path(out).parent / name, mesh)})
        parallel_state.destroy_model_parallel()
        if mesh.is_main:
            Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
