"""Dumps steps with their traces, all layouts in one launch.

torchrun --nproc-per-node 2 -m tests.distributed.traces OUT.json: the main rank writes what the files say
beside what they should say.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from dapo import config as configs
from dapo.mesh import Mesh
from dapo.rollout import dump
from dapo.train import train
from tests.distributed.launch import ROOT, numbers
from tests.distributed.ranks import prepare_rank
from tests.distributed.resume import OPTIONS, deepen

CLIPPING = [
    "run.steps=1",
    "optim.lr=2e-3",
    "optim.warmup_steps=0",
    "objective.clip_low=0.02",
    "objective.clip_high=0.04",
]
LAYOUTS = {
    "data-parallel": ["parallel.tensor=1"],
    "tensor-parallel": ["parallel.tensor=2"],
    "pipeline-parallel": ["parallel.pipeline=2"],
    "context-parallel": ["parallel.tensor=1", "parallel.context=2"],
    "interleaved": ["parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "a part": [
        "parallel.tensor=2",
        "rollout.dump_share=0.25",
        "run.profile.steps=[0]",
        "run.profile.ranks=[1]",
    ],
    "nothing": ["parallel.tensor=2", "rollout.dump_share=0"],
}


def options(layout: list[str]) -> list[str]:
    return ["rollout.dump_share=1.0", *OPTIONS, *CLIPPING, *layout]


def run(directory: Path, layout: list[str]) -> configs.Config:
    from megatron.core import parallel_state  # after dapo.policy, which adapts it

    config = configs.load(
        ROOT / "examples/arithmetic/config.yaml", [f"run.dir={directory}", *options(layout)]
    )
    mesh = Mesh(config.parallel)
    if config.parallel.virtual_pipeline > 1:
        mesh.on_main(deepen, directory / "deeper")
        config = config.changed([f"policy.model={directory / 'deeper'}"])
    train(config, mesh)
    mesh.barrier()
    parallel_state.destroy_model_parallel()
    return config


def read(config: configs.Config) -> dict[str, Any]:
    """Read step 0's dump and traces, and compute Eq. 8's clipping from the log-probs, token by token."""
    rollouts = config.run.dir / "rollouts"
    traces = {
        (row["group"], row["index"]): row
        for row in pq.read_table(dump.traces_path_of(rollouts, 0)).to_pylist()
    }
    groups = dump.read(dump.path_of(rollouts, 0), config.rollout.prompts_per_step).kept
    samples = {(sample.group, sample.index): sample for group in groups for sample in group.samples}
    result: dict[str, Any] = {"same_samples": list(traces) == list(samples), "groups": len(groups)}
    mismatch, wrong = 0.0, 0
    counts = np.zeros(3)  # tokens, clipped low, clipped high
    for key, sample in samples.items():
        trace = {name: np.array(value) for name, value in traces[key].items()}
        new, old = (trace[name].astype(np.float32) for name in ("logprobs", "old_logprobs"))
        ratio = np.exp(new - old)
        low = (ratio < 1 - config.objective.clip_low) & (sample.advantage < 0)
        high = (ratio > 1 + config.objective.clip_high) & (sample.advantage > 0)
        wrong += int((low != trace["clipped_low"]).sum() + (high != trace["clipped_high"]).sum())
        gap = np.abs(trace["old_logprobs"] - sample.behavior_logprobs).max()
        mismatch = max(mismatch, float(gap))
        counts += [sample.length, low.sum(), high.sum()]
    metrics = json.loads((config.run.dir / "metrics.jsonl").read_text().splitlines()[0])
    logged = [metrics["policy/clip_low"], metrics["policy/clip_high"]]
    result["received"] = [metrics["perf/bytes_received_max"], metrics["perf/bytes_received"]]
    result["numbers"] = numbers(config.run.dir)
    result["took"] = {name: value for name, value in metrics.items() if name.startswith(("time/", "perf/"))}
    result["profile"] = {path.name: ranges(path) for path in config.run.dir.glob("profile/*")}
    return result | {
        "mismatch": mismatch,
        "wrong_flags": wrong,
        "fractions": (counts[1:] / counts[0]).tolist(),
        "logged": logged,
    }


def ranges(trace: Path) -> list[str]:
    """Return what a profiler's trace has around operations: phases, collectives."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted({event["name"] for event in events if event.get("cat") == "user_annotation"})


def main(out: str) -> None:
    prepare_rank()
    results = []
    for name, layout in LAYOUTS.items():
        config = run(Path(out).parent / name.replace(" ", "-"), layout)
        is_dumped = (config.run.dir / "rollouts").exists()
        results.append(
            {
                "name": name,
                "is_dumped": is_dumped,
                "options": options(layout),
                **(read(config) if is_dumped and Mesh(config.parallel).is_main else {}),
            }
        )
    if Mesh(configs.Parallel(tensor=1)).is_main:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
