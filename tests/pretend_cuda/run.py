"""Runs every case on two pretended GPUs, in one launch, and one run more with faults planted into it.

torchrun --nproc-per-node 2 -m tests.pretend_cuda.run OUT.json [PATTERN]: the main rank writes what was found,
of every case or of those with the pattern in their name. What a whole run does comes from dapo.train: sample,
score, update, save, export. Its engine brings the weights through a transport for each step: see servers.py.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from tests.pretend_cuda import gpu
from tests.pretend_cuda.cases import CASES, FAULTS, Case
from tests.pretend_cuda.pretence import MEMORY
from tests.pretend_cuda.report import REPORT, Finding, is_found

# ask for CUDA while they are imported, so this comes before it is pretended
DISTRIBUTED = (f"torch.distributed.{name}" for name in ("checkpoint", "fsdp", "tensor"))
EARLY = ("transformers", "torch._dynamo", *DISTRIBUTED)
LEFT: list[bool] = []  # after each sync: is there memory that torch keeps from servers?
OPTIONS = [
    "run.steps=2",  # three syncs: one by each transport
    "run.save_every=1",
    "data.train=examples/arithmetic/data/heldout.jsonl",
    "rollout.prompts_per_step=4",
    "rollout.prompts_per_round=4",
    "rollout.group_size=4",
    "rollout.max_response_length=12",
    "rollout.dump_share=1.0",
    "rollout.dynamic_sampling=false",
    "optim.prompts_per_minibatch=2",
    "reward.function=tests.pretend_cuda.cases:is_odd",
    "reward.truncated_is_wrong=false",
    "reward.workers=0",
    "reward.soft_overlong_punishment=false",
    "policy.dtype=bfloat16",
    "policy.tokens_per_microbatch=128",
    "parallel.tensor=1",
    "eval.data=null",
]


def run(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """Train as the case says. Return what was found, on both ranks."""
    from megatron.core import parallel_state  # after dapo.policy, which adapts it

    from dapo import config as configs
    from dapo.mesh import Mesh
    from dapo.train import train
    from tests.distributed.launch import ROOT
    from tests.distributed.resume import make_base
    from tests.pretend_cuda.servers import SyncedEngine

    directory = folder / (case.goes_on_from or name)
    options = [*OPTIONS, *case.options, f"run.dir={directory}"]
    config = configs.load(ROOT / "examples/arithmetic/config.yaml", options)
    mesh = Mesh(config.parallel)
    if case.has_experts:
        mesh.on_main(make_base, "expert-parallel", folder / "experts")
        config = config.changed([f"policy.model={folder / 'experts'}"])
    SyncedEngine.run = directory
    torch.use_deterministic_algorithms(False)  # a case before may have asked for it
    gc.collect()
    MEMORY.give_back()  # what it has left
    REPORT.clear()
    LEFT.clear()
    train(config, mesh)
    if all(LEFT) and not mesh.is_main:  # gloo's threads may hold a tensor a moment longer, once
        REPORT.find("cache", "every sync left memory on a GPU whose servers need it")
    operations = mesh.gather(REPORT.operations)
    found = mesh.gather(list(REPORT.found.items()))
    mesh.barrier()
    parallel_state.destroy_model_parallel()
    rows = [json.loads(row) for row in (directory / "metrics.jsonl").read_text().splitlines()]
    return {
        "name": name,
        "operations": operations,
        "findings": [(*finding, times) for each in found for finding, times in each],
        "saved": sorted(path.name for path in (directory / "checkpoints").iterdir()),
        "mismatch": max(row.get("policy/mismatch", 0.0) for row in rows),
        "updates": sum("policy/loss" in row for row in rows),
    }


@contextmanager
def watched() -> Iterator[None]:
    """Let runs sample through servers.py, and note whether a sync leaves memory on a rank's GPU."""
    from unittest import mock

    from dapo import assemble
    from dapo.report import curves
    from dapo.sampler import Sampler
    from tests.pretend_cuda.servers import SyncedEngine

    load = Sampler.load_weights

    def load_weights(sampler: Sampler, policy: Any, version: int) -> None:
        gc.disable()  # what else it would free meanwhile is not the sync's
        load(sampler, policy, version)
        gc.enable()
        LEFT.append(MEMORY.reserved > MEMORY.allocated)

    with (
        mock.patch.object(assemble, "EmbeddedEngine", SyncedEngine),
        mock.patch.object(Sampler, "load_weights", load_weights),
        mock.patch.object(curves, "plot", lambda *_: None),  # takes long, and knows no tensors
    ):
        yield


def main(out: str, only: str = "") -> None:
    # GPU 0 is nobody's: a thread that has not chosen its GPU is found on every rank
    os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) + 1)
    for name in EARLY:
        importlib.import_module(name)
    gpu.install()
    from tests.distributed.ranks import prepare_rank

    prepare_rank()
    import dapo.policy  # noqa: F401  # before megatron
    from tests.pretend_cuda.faults import planted

    results = []
    with watched():
        for name, case in (CASES | {"faults": Case(["run.deterministic=true"])}).items():
            if re.search(only, name):
                with planted() if name == "faults" else nullcontext():
                    results.append(run(name, case, Path(out).parent))
                if os.environ["RANK"] == "0":
                    Path(out).write_text(json.dumps(results))
                    print_result(results[-1])


def print_result(result: dict[str, Any]) -> None:
    operations = " + ".join(map(str, result["operations"]))
    print(f"{result['name']}: {operations} operations, {len(result['findings'])} findings", flush=True)
    found = [Finding(*finding[:3]) for finding in result["findings"]]
    for finding in found:
        print(f"  {finding.kind}: {finding.what}\n    {finding.where}", flush=True)
    if result["name"] == "faults":
        missed = [name for name, (kind, place) in FAULTS.items() if not is_found(found, kind, place)]
        print(
            f"  {len(FAULTS) - len(missed)} of {len(FAULTS)} planted faults found; missed: {missed}",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
