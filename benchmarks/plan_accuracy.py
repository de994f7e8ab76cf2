"""Does `dapo plan` forecast the memory? The peak of real updates, rank by rank, beside the plan's.

    python benchmarks/plan_accuracy.py [NUMBER …]

On a CPU it takes about ten minutes on two cores, and at most 16 GiB; on a GPU it needs one. Numbers: these
cases only.

Each case is a torchrun of its own: Policy on random weights, the log-probs of two minibatches, two updates (a
small first one makes the optimizer's state), and a checkpoint. Compared is, on a CPU, the rise of the
process's peak resident memory above what it held after the imports, on a GPU max_memory_allocated.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import figures
import numpy as np
import psutil
import torch
from record import heading, save, table

from dapo import config as configs
from dapo.learn import batch as batches
from dapo.mesh import Mesh
from dapo.model.parameters import num_parameters
from dapo.plan.activations import Backend
from dapo.plan.memory import CHECKPOINT, Rank
from dapo.policy.cpu import has_transformer_engine
from dapo.policy.megatron import Policy
from dapo.types import Group, Prompt, Sample

GIB = 2**30
PROMPT, SMALL = 4, 128  # tokens; of the first minibatch, which is there to make the optimizer's state
# lengths of a microbatch's samples, as fractions of its tokens
SHARES = np.array([2, 3, 5, 6, 8, 10, 12, 18]) / 64
SHAPE = dict(
    hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4, vocab_size=32768
)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Case:
    tokens: int
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    dtype: str = "float32"
    recompute: str = "none"
    microbatches: int = 1  # of an update, on each data-parallel rank
    layers: int = 20

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def megatron(self) -> dict[str, Any]:
        selective = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
        return {"none": {}, "full": FULL, "mlp": selective}[self.recompute]


CASES = [
    Case(16384, dtype="bfloat16"),
    Case(32768, dtype="bfloat16", recompute="full"),
    Case(16384, dtype="bfloat16", recompute="mlp"),
] if torch.cuda.is_available() else [
    Case(1024),
    Case(1024, tensor=2),
    Case(512, pipeline=2, microbatches=3),
    Case(1024, recompute="full"),
    Case(256),
    Case(1024, recompute="mlp"),
    Case(512, pipeline=2, microbatches=3, recompute="full"),
    Case(1024, dtype="bfloat16"),
    Case(256, data=2, layers=8),
]  # fmt: skip


def main(chosen: list[int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        rows = [row for i in chosen or range(len(CASES)) for row in measured(i, Path(directory))]
    worst = max(
        abs(row["planned" + when] / row["measured" + when] - 1) for row in rows for when in ("", "_saving")
    )
    text = heading("Memory that `dapo plan` forecasts, and what was measured")
    text += (
        "\nGiB of a rank at its peak, on a CPU above what the process held after the imports; random "
        "Qwen2-shaped models, updates of packed sequences of mixed lengths, then a checkpoint. "
        f"Largest deviation: {worst:.1%}.\n\n"
    )
    header = [
        "model", "layout", "rank", "type", "tokens a microbatch", "microbatches", "recomputed",
        "planned", "measured", "off", "peak", "checkpoint planned", "measured", "off",
    ]  # fmt: skip
    text += table(header, [cells(row) for row in rows])
    save("plan_accuracy_gpu.md" if torch.cuda.is_available() else "plan_accuracy.md", text)


def cells(row: dict[str, Any]) -> list[object]:
    case = Case(**row["case"])
    off, off_saving = (row["planned" + when] / row["measured" + when] - 1 for when in ("", "_saving"))
    return [
        f"{row['parameters'] / 2**20:.0f} Mi", f"tp{case.tensor} pp{case.pipeline} dp{case.data}",
        row["rank"], case.dtype, case.tokens, case.microbatches, case.recompute,
        f"{row['planned'] / GIB:.2f}", f"{row['measured'] / GIB:.2f}", f"{off:+.1%}", row["moment"],
        f"{row['planned_saving'] / GIB:.2f}", f"{row['measured_saving'] / GIB:.2f}", f"{off_saving:+.1%}",
    ]  # fmt: skip


def measured(number: int, directory: Path) -> list[dict[str, Any]]:
    """One case's rows, a rank each."""
    case, model = CASES[number], directory / f"{CASES[number].layers}"
    if not model.exists():
        make_model(model, case.layers)
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(case.world),
        __file__,
        str(number),
        str(model),
    ]
    subprocess.run(
        [sys.executable, *command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1200
    )
    rows = [json.loads((model / f"{rank}.json").read_text()) for rank in range(case.world)]
    print(*(" ".join(map(str, cells(row))) for row in rows), sep="\n", flush=True)
    for row in rows:
        name = (
            f"peak with {case.dtype}, {case.tokens} tokens, recomputed {case.recompute}, rank {row['rank']}"
        )
        figures.write(name, row["measured"] / GIB, "GiB", f"planned {row['planned'] / GIB:.2f}")
    return rows


def make_model(directory: Path, layers: int) -> None:
    """Random weights, in a process of its own: what it leaves behind is not the case's."""
    source = (
        "import torch, transformers as t\n"
        f"config = t.Qwen2Config(**{SHAPE!r}, num_hidden_layers={layers}, tie_word_embeddings=False)\n"
        f"t.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained({str(directory)!r})\n"
    )
    subprocess.run([sys.executable, "-c", source], check=True)


def worker(case: Case, model: Path) -> None:
    torch.set_num_threads(max(1, 2 // case.world))
    config = make_config(case, model)
    mesh = Mesh(config.parallel)
    before = held()
    policy = Policy(config, mesh)
    shares = batches.shares(
        [make_group(SMALL, 1), make_group(case.tokens, case.microbatches * case.data)],
        config,
        mesh.data,
        metrics={},
    )
    share = next(islice(shares, mesh.data_rank, None))
    batch = policy.place(share.batch(config.parallel, mesh.context_rank))
    assert len(batch.minibatches[1]) == case.microbatches
    policy.score(batch)
    for minibatch in batch.minibatches:
        policy.update(minibatch)
    learning = peak() - before
    (model / f"saved{mesh.world}").mkdir(exist_ok=True)
    forget_peak()
    saving = policy.save(model / f"saved{mesh.world}")
    saving.start(in_background=False)
    saving.finish()
    saved = peak() - before
    if mesh.is_main:
        shutil.rmtree(model / f"saved{mesh.world}")
    backend: Backend = (
        "cpu" if mesh.device.type == "cpu" else "transformer_engine" if has_transformer_engine() else "cuda"
    )
    planned = Rank(config, policy.shape, backend, mesh.data, stage=mesh.rank // (mesh.tensor * mesh.data))
    moment = max(
        (moment for moment in planned.moments if moment != CHECKPOINT), key=planned.moments.__getitem__
    )
    row = {
        "case": vars(case),
        "rank": mesh.rank,
        "parameters": num_parameters(policy.shape),
        "planned": planned.at(moment),
        "moment": moment,
        "measured": learning,
        "planned_saving": planned.at(CHECKPOINT),
        "measured_saving": saved,
    }
    (model / f"{mesh.rank}.json").write_text(json.dumps(row))
    mesh.barrier()


def held() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    return (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def make_config(case: Case, model: Path) -> configs.Config:
    samples = len(SHARES) * case.microbatches * case.data
    longest = case.tokens // case.microbatches  # so that the plan, too, sees as many microbatches
    return configs.Config(
        run=configs.Run(dir=model / "run"),
        data=configs.Data(train=model / "none", max_prompt_length=PROMPT),
        rollout=configs.Rollout(prompts_per_step=2, group_size=samples, max_response_length=longest - PROMPT),
        optim=configs.Optim(prompts_per_minibatch=1),
        parallel=configs.Parallel(tensor=case.tensor, pipeline=case.pipeline),
        policy=configs.Policy(
            model=model, dtype=case.dtype, tokens_per_microbatch=case.tokens, megatron=case.megatron
        ),
        engine=configs.Engine(kind="sglang"),  # servers elsewhere: no model of the engine's here
    )


def make_group(tokens: int, microbatches: int) -> Group:
    """Samples that fill as many microbatches to 97 % or more."""
    rng = np.random.default_rng(tokens)
    lengths = np.floor(SHARES * tokens * 0.99).astype(int).tolist() * microbatches
    samples = []
    for i, length in enumerate(lengths):
        n = max(length - PROMPT + 1, 1)  # a sample's last token is not fed
        tokens_of = rng.integers(0, SHAPE["vocab_size"], n).astype(np.int32)
        samples.append(
            Sample(
                tokens, i, tokens_of, np.full(n, -10.0, np.float32), np.ones(n, bool), ((0, 0, n),), "stop"
            )
        )
        samples[-1].advantage = float(rng.normal())
    return Group(
        tokens, Prompt(0, rng.integers(0, SHAPE["vocab_size"], PROMPT).astype(np.int32), "0"), samples
    )


if __name__ == "__main__":
    if "RANK" in os.environ:
        worker(CASES[int(sys.argv[1])], Path(sys.argv[2]))
    else:
        main([int(argument) for argument in sys.argv[1:]])
