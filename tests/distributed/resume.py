"""Compares k + m steps with k steps, a stop, damage, a resume and m steps: all layouts in one launch.

torchrun --nproc-per-node 2 -m tests.distributed.resume OUT.json
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

from dapo import config as configs
from dapo import files
from dapo.mesh import Mesh
from dapo.policy.chunks import Reader
from dapo.train import train
from dapo.types import Interrupted
from tests.distributed.launch import ROOT
from tests.distributed.ranks import prepare_rank

sys.path.insert(0, str(ROOT / "benchmarks"))
from crash_test import groups_of, newest

OPTIONS = [
    "run.save_every=1",
    "eval.data=null",
    "reward.workers=0",  # they would import this module, and torch with it
    "rollout.prompts_per_step=8",
    "rollout.prompts_per_round=8",
    "optim.warmup_steps=2",
    "optim.weight_decay=0.1",
]
LAYOUTS = {
    "data-parallel": ["parallel.tensor=1"],
    "tensor-parallel": ["parallel.tensor=2"],
    "pipeline-parallel": ["parallel.pipeline=2"],
    "surplus": ["parallel.tensor=1", "rollout.prompts_per_round=16"],
    "bfloat16": ["parallel.tensor=2", "policy.dtype=bfloat16"],
    "context-parallel": ["parallel.context=2"],
    "interleaved": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "expert-parallel": [
        "parallel.tensor=1",
        "parallel.expert=2",
        "reward.function=tests.distributed.resume:is_even",
    ],
}
ONLY_STOPPED = {  # options of the run that stops: they change nothing of the outcome
    "tensor-parallel": ["run.async_save=true"],
    "bfloat16": ["run.async_save=true", "run.keep_checkpoints=1", "run.keep_every=3"],
}


def make_base(layout: str, directory: Path) -> Path:
    """Return the model that a layout starts from: the example's, a deeper one, or random experts."""
    example = ROOT / "examples/arithmetic/base"
    if layout == "interleaved":
        deepen(directory)
        return directory
    if layout != "expert-parallel":
        return example
    sizes = dict(
        vocab_size=25,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    experts = dict(
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True
    )
    torch.manual_seed(7)
    config = transformers.Qwen3MoeConfig(
        **sizes, **experts, initializer_range=0.125, eos_token_id=1, pad_token_id=0
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(example / name, directory)
    return directory


def is_even(response: str, answer: str) -> bool:
    """A task that a random model gets right half of the time."""
    return len(response) % 2 == 0


def run(directory: Path, *options: str) -> None:
    config = configs.load(
        ROOT / "examples/arithmetic/config.yaml", [f"run.dir={directory}", *OPTIONS, *options]
    )
    mesh = Mesh(config.parallel)
    train(config, mesh)
    leave(mesh)


def leave(mesh: Mesh) -> None:
    from megatron.core import parallel_state  # after dapo.policy, which adapts it

    mesh.barrier()
    parallel_state.destroy_model_parallel()


def deepen(target: Path) -> None:
    """Give the example's model twice the layers, for two chunks a stage; at first the new ones do nothing."""
    base = ROOT / "examples/arithmetic/base"
    shutil.copytree(base, target, dirs_exist_ok=True)
    values = json.loads((base / "config.json").read_text())
    depth = values["num_hidden_layers"]
    values |= {"num_hidden_layers": 2 * depth, "layer_types": ["full_attention"] * 2 * depth}
    (target / "config.json").write_text(json.dumps(values))
    tensors = weights(base)
    for name, tensor in list(tensors.items()):
        if found := re.match(r"model\.layers\.(\d+)\.", name):
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            tensors[f"model.layers.{int(found[1]) + depth}.{name[found.end() :]}"] = (
                torch.zeros_like(tensor) if is_output else tensor.clone()
            )
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def rows(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without times."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))} for line in lines
    ]


def unscored(directory: Path) -> list[dict[str, Any]]:
    """Return the rows without what the reward counts: a replay scores nothing, and here evaluates nothing."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("reward/", "eval/"))} for row in rows(directory)
    ]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def is_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def replay(directory: Path) -> dict[str, Any]:
    """Sample now and learn later, from what was dumped; and save before anything was learnt."""
    base, few = ROOT / "examples/arithmetic", directory.parent / "few.jsonl"
    problems = (base / "data/heldout.jsonl").read_text().splitlines(keepends=True)[:8]
    Mesh(configs.Parallel(tensor=1)).on_main(files.write_text, few, "".join(problems))
    exported = ["run.export_every=1", f"eval.data={few}", "eval.every=1", "run.keep_best=eval/few/mean"]
    run(directory / "sampled", "run.steps=2", "rollout.dump_share=1.0", *exported)
    run(directory / "replayed", "run.steps=2", f"rollout.replay={directory / 'sampled' / 'rollouts'}")
    run(directory / "later", "run.steps=1", "rollout.only=true")
    first = rows(directory / "sampled")[0]
    values = [row["eval/few/mean"] for row in rows(directory / "sampled")]
    models = [base / "base", *(directory / f"sampled/{name}" for name in ("hf-step-000001", "hf"))]
    best = models[values.index(max(values))]
    return {
        "name": "replay",
        "values": values,
        "best": is_equal(weights(directory / "sampled/hf-best"), weights(best)),
        "last": is_equal(weights(directory / "sampled/hf-step-000002"), weights(models[2])),
        "first": [is_equal(weights(models[1]), weights(models[i])) for i in (0, 2)],
        "rows": unscored(directory / "sampled") == unscored(directory / "replayed"),
        "weights": is_equal(weights(directory / "sampled" / "hf"), weights(directory / "replayed" / "hf")),
        "dumped_only": [row.get("policy/loss") for row in rows(directory / "later")] == [None, None],
        "same_batch": all(
            rows(directory / "later")[0][key] == first[key]
            for key in first
            if key.startswith(("groups/", "rollout/"))
        ),
        "checkpoints": [path.name for path in (directory / "later" / "checkpoints").iterdir()],
    }


def interrupt_after(num_steps: int, path: Path) -> None:
    """Send this process SIGTERM, from a thread, when metrics.jsonl has so many more lines."""

    def num_lines() -> int:
        return len(path.read_text().splitlines()) if path.exists() else 0

    def watch() -> None:
        while num_lines() < wanted:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    wanted = num_lines() + num_steps
    threading.Thread(target=watch, daemon=True).start()


def left_running() -> list[str]:
    """Return the names of this rank's collectors, and the pids of its children."""
    threads = [thread.name for thread in threading.enumerate() if thread.name == "collector"]
    return threads + [str(child.pid) for child in psutil.Process().children()]


def ahead(directory: Path) -> dict[str, Any]:
    """Sample ahead, be interrupted at the rank that does not sample, go on, be interrupted at the one that
    does, go on, and end.
    """
    mesh = Mesh(configs.Parallel(tensor=1))
    options = ["parallel.tensor=1", "rollout.max_staleness=2", "rollout.dump_share=1.0", "run.save_every=100"]
    stops, left, num_open = [], [], []
    for rank in (1, 0):
        if mesh.rank == rank:
            interrupt_after(2, directory / "metrics.jsonl")
        try:
            run(directory, *options, "run.steps=1000")
        except Interrupted as stop:
            leave(mesh)
            stops.append([stop.signal, stop.is_saved, mesh.on_main(newest, directory)])
            groups = mesh.on_main(lambda: vars(groups_of(directory, 2)))
            num_open.append(groups["finished"] + groups["unfinished"])
            left += [each for found in mesh.gather(left_running()) for each in found]
    run(directory, *options, f"run.steps={stops[-1][-1] + 3}")
    left += [each for found in mesh.gather(left_running()) for each in found]
    groups = mesh.on_main(lambda: vars(groups_of(directory, 2)))
    return {
        "name": "ahead",
        "stops": stops,
        "left": left,
        "steps": [row["step"] for row in rows(directory)],
        "ages": [*groups["ages"]],
        "open": num_open,
    }


def main(out: str) -> None:
    prepare_rank()
    results = [replay(Path(out).parent / "replay"), ahead(Path(out).parent / "ahead")]
    for name, layout in LAYOUTS.items():
        through, stopped = Path(out).parent / name / "through", Path(out).parent / name / "stopped"
        mesh = Mesh(configs.Parallel(tensor=1))
        base = mesh.on_main(make_base, name, Path(out).parent / name / "base")
        layout = [*layout, f"policy.model={base}"]
        run(through, "run.steps=4", *layout)
        run(stopped, "run.steps=2", "run.keep_checkpoints=2", *layout)
        mesh.on_main(DAMAGE[name], stopped / "checkpoints" / "step-000002")
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            run(stopped, "run.steps=4", *layout, *ONLY_STOPPED.get(name, []))
        results.append(
            {
                "name": name,
                "rows": rows(through) == rows(stopped),
                "surplus": sum(row.get("groups/surplus", 0) for row in rows(stopped)[:2]),
                "steps": [row["step"] for row in rows(stopped)],
                "weights": is_equal(weights(through / "hf"), weights(stopped / "hf")),
                "moved": not is_equal(weights(through / "hf"), weights(base)),
                "written": sorted(
                    path.stat().st_size
                    for path in (stopped / "checkpoints/step-000004/policy").glob("*.distcp")
                ),
                "optimizer": mesh.on_main(optimizer_in, stopped / "checkpoints/step-000004"),
                "checkpoints": sorted(path.name for path in (stopped / "checkpoints").iterdir()),
                "warnings": printed.getvalue().splitlines(),
            }
        )
        if mesh.is_main:
            Path(out).write_text(json.dumps(results))


def optimizer_in(checkpoint: Path) -> dict[str, Any]:
    """Return how often the optimizer's numbers were written, their bytes by file, and if there are main
    parameters where parameters are 16-bit, equal to them, and none where they are float32.
    """
    directory = checkpoint / "policy"
    found, reader = FileSystemReader(directory).read_metadata(), Reader(directory)
    written, times = Counter[str](), set[int]()
    names = [name for name in reader.sizes if name.startswith("optimizer.")]
    for name in names:
        count = torch.zeros(reader.sizes[name], dtype=torch.int)
        for chunk in found.state_dict_metadata[name].chunks:
            count[
                tuple(
                    slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
                )
            ] += 1
            written[found.storage_data[MetadataIndex(name, chunk.offsets)].relative_path] += (
                math.prod(chunk.sizes) * 4
            )
        times |= {int(count.min()), int(count.max())}
    params = [name for name in reader.sizes if name not in names]
    return {
        "times": sorted(times),
        "bytes": sorted(written.values()),
        "wanted": sum(
            math.prod(reader.sizes[name]) * (8 if reader.dtype(name) == torch.float32 else 12)
            for name in params
        ),
        "main": all(has_right_main(reader, name) for name in params),
    }


def has_right_main(reader: Reader, name: str) -> bool:
    param, main = reader.read(name), f"optimizer.state.param.{name}"
    if param.dtype == torch.float32:
        return main not in reader.sizes
    return reader.dtype(main) == torch.float32 and torch.equal(reader.read(main).to(param.dtype), param)


def cut_short(checkpoint: Path) -> None:
    path = checkpoint / "rollouts.json"
    path.write_text(path.read_text()[:-5])


def flip_a_bit(checkpoint: Path) -> None:
    """In the middle of the second rank's largest chunk."""
    path = checkpoint / "policy" / "__1_0.distcp"
    found = FileSystemReader(checkpoint / "policy").read_metadata().storage_data.values()
    chunk = max((c for c in found if c.relative_path == path.name), key=lambda chunk: chunk.length)
    data = bytearray(path.read_bytes())
    data[chunk.offset + chunk.length // 2] ^= 1
    path.write_bytes(data)


def lose_a_shard(checkpoint: Path) -> None:
    (checkpoint / "policy" / "__1_0.distcp").unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


DAMAGE = {
    "data-parallel": cut_short,
    "tensor-parallel": flip_a_bit,
    "pipeline-parallel": lose_a_shard,
    "surplus": cut_short,
    "bfloat16": lose_the_manifest,
    "context-parallel": cut_short,
    "interleaved": lose_a_shard,
    "expert-parallel": flip_a_bit,
}


if __name__ == "__main__":
    main(sys.argv[1])
