"""tests.distributed.parity, with Transformer Engine's layers in the place of the plain ones; and checkpoints
of either kind of layers, in the other.

torchrun --nproc-per-node 2 -m tests.transformer_engine.parity OUT.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "standin"))
# there is a GPU for whoever decides between the layers, and for nobody else
torch.cuda.is_available = lambda: sys._getframe(1).f_code.co_name == "has_transformer_engine"

from dapo import config as configs  # noqa: E402
from dapo import verify  # noqa: E402
from dapo.mesh import Mesh  # noqa: E402
from dapo.model.families import read_shape  # noqa: E402
from dapo.model.names import table  # noqa: E402
from dapo.policy import chunks  # noqa: E402
from dapo.policy.megatron import Policy  # noqa: E402
from dapo.policy.weight_files import HFWeights  # noqa: E402
from dapo.policy.weights import from_shards  # noqa: E402
from tests.distributed import parity  # noqa: E402
from tests.distributed.launch import ROOT  # noqa: E402
from tests.distributed.reference import make_hf  # noqa: E402
from tests.distributed.resume import leave  # noqa: E402

sys.path.insert(0, str(ROOT / "tools"))
import hf_to_megatron  # noqa: E402

CASES = (  # biases, norms of q and k, a tied embedding, experts; split over ranks in every way but by context
    "tp2pp1dp1-qwen2-tied-b64-token_mean",
    "tp2pp1dp1-qwen3-bfloat16-b64-token_mean",
    "tp2pp1dp1-qwen3-b64-token_mean-filtered-stale-overlap",
    "tp1pp2dp1-qwen3-b64-token_mean",
    "tp1pp1dp2-llama-b64-sample_mean",
    "tp2pp1dp1-qwen3_moe-b40-token_mean-ep2",
    "tp1pp1dp2-qwen3_moe-unnormalised-b64-token_mean-ep2-allgather",
    "tp2pp1dp1-qwen3_moe-b64-token_mean-moe-ep2-replay-rollout",
)
PLAIN = ROOT / "tests/fixtures/0.1.0/tensor2/run/checkpoints/step-000002"  # the plain layers wrote it


def make_policy(root: Path, *options: str) -> tuple[Policy, Mesh]:
    example = ROOT / "examples/arithmetic/config.yaml"
    config = configs.load(example, [f"run.dir={root}", "parallel.tensor=2", *options])
    mesh = Mesh(config.parallel)
    return Policy(config, mesh), mesh


def save(policy: Policy, mesh: Mesh, directory: Path) -> None:
    mesh.on_main((directory / "policy").mkdir, 0o777, True)
    saving = policy.save(directory / "policy")
    saving.start(in_background=False)
    saving.finish()
    leave(mesh)


def moved(root: Path) -> list[dict[str, Any]]:
    """Load a checkpoint of the plain layers, save it again, and compare: the optimizer's state, too."""
    policy, mesh = make_policy(root, f"policy.model={PLAIN.parents[1] / 'hf'}", "optim.lr=1e-3")
    policy.load(PLAIN / "policy")
    save(policy, mesh, root)
    return [asdict(found) for found in verify.policies(PLAIN / "policy", root / "policy")]


def saved(root: Path) -> dict[str, Any]:
    """Save a model with experts, and read it as tools do; read what they write; list its kinds of layers."""
    Mesh(configs.Parallel(tensor=2)).on_main(make_hf, "qwen3_moe", False, root / "hf")
    policy, mesh = make_policy(root, f"policy.model={root / 'hf'}", "parallel.expert=2")
    kinds = {type(module) for module in policy.chunks[0].modules()}
    names = [kind.__name__ for kind in kinds if any("transformer_engine" in str(c) for c in kind.__mro__)]
    found = exported(policy, mesh, root)
    save(policy, mesh, root)
    shape = read_shape(root / "hf")
    reader, theirs = chunks.Reader(root / "policy"), HFWeights(root / "hf", shape)
    wrong = []
    for entry in table(shape, is_fused=True):
        ours = from_shards(entry, [reader.read(entry.key, entry.place)], shape)
        if not all(map(torch.equal, ours, theirs.read(entry))):
            wrong.append(entry.key)
    return {"wrong": wrong, "kinds": sorted(names), "exported": found}


def exported(policy: Policy, mesh: Mesh, root: Path) -> int:
    """Load what tools write for Megatron-LM, as it does: with the modules' states. Return the number of
    parameters; -1: one of them differs.
    """
    from megatron.core import dist_checkpointing

    mesh.on_main(hf_to_megatron.main, [str(root / "hf"), str(root / "exported"), "--megatron-lm"])
    wanted = policy.chunks[0].sharded_state_dict()
    assert sum("._extra_state" in name for name in wanted) > 20, wanted.keys()
    found = dist_checkpointing.load(wanted, str(root / "exported/release"))
    params = dict(policy.chunks[0].named_parameters())
    return len(params) if all(torch.equal(found[name], params[name]) for name in params) else -1


def main(out: str) -> None:
    parity.CASES = [case for case in parity.CASES if case.name in CASES]
    parity.FAULTS = parity.LAYER_FAULTS = []
    parity.main(out)
    mesh, root = Mesh(configs.Parallel(tensor=1)), Path(out).parent
    findings = {"name": "moved", "findings": moved(root / "moved")}
    experts = {"name": "saved", **saved(root / "saved")}
    if mesh.is_main:
        Path(out).write_text(json.dumps([*json.loads(Path(out).read_text()), findings, experts]))


if __name__ == "__main__":
    main(*sys.argv[1:])
