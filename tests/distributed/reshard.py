"""A run saved in one layout goes on in another: what is restored, and what is learnt from there, every pair of layouts in one launch.

torchrun --nproc-per-node 4 -m tests.distributed.reshard OUT.json
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from dapo import config as configs
from dapo import dump
from dapo.mesh import Mesh
from dapo.policy.megatron import Policy
from dapo.policy.torch_dist import Reader
from tests.distributed import resume
from tests.distributed.launch import ROOT

STEPS = 2  # before the move, and after it
OPTIONS = [  # an eps of 1e-8 would turn the rounding of all but vanishing gradients (of key biases) into whole steps of Adam
    "reward.function=tests.distributed.reshard:is_even", "rollout.max_response_length=24", "reward.overlong_cache=8", "rollout.dump_share=1.0",
    "rollout.max_staleness=1", "rollout.prompts_per_round=12", "policy.megatron.adam_eps=1e-6",
]  # fmt: skip
LAYOUTS = {
    "tensor 2, pipeline 2": ["parallel.tensor=2", "parallel.pipeline=2"],
    "data 4": ["parallel.tensor=1"],
    "tensor 4": ["parallel.tensor=4"],
    "tensor 2, data 2": ["parallel.tensor=2"],
    "pipeline 2, data 2": ["parallel.tensor=1", "parallel.pipeline=2"],
}
BF16 = "policy.dtype=bfloat16"
MOVES: list[tuple[str, str, list[str]]] = [  # from, to, options of both
    *[("tensor 2, pipeline 2", other, []) for other in LAYOUTS],
    *[(other, "tensor 2, pipeline 2", []) for other in LAYOUTS if other != "tensor 2, pipeline 2"],
    ("tensor 2, pipeline 2", "tensor 4", [BF16]),
    ("tensor 2, data 2", "pipeline 2, data 2", [BF16]),
]


def name_of(move: tuple[str, str, list[str]]) -> str:
    return f"{move[0]} → {move[1]}{', bfloat16' if BF16 in move[2] else ''}"


def is_even(response: str, answer: str) -> bool:
    """What a random model can do, and fail to do: an even number of digits."""
    return sum(c.isdigit() for c in response) % 2 == 0


def make_model(directory: Path) -> None:
    """A random model that every layout can split, with the arithmetic example's tokenizer."""
    shutil.copytree(ROOT / "examples/arithmetic/base", directory)
    config = transformers.Qwen2Config.from_pretrained(
        directory, num_hidden_layers=4, num_key_value_heads=4, layer_types=["full_attention"] * 4
    )
    torch.manual_seed(1)
    transformers.Qwen2ForCausalLM(config).save_pretrained(directory)


def restored(source: Path, target: Path, options: list[str]) -> None:
    """Load the checkpoint `source` in the layout of `options`, and save it as it is: no arithmetic on the way."""
    from megatron.core import parallel_state

    config = configs.load(ROOT / "examples/arithmetic/config.yaml", [*resume.OPTIONS, *options])
    mesh = Mesh(config.parallel)
    policy = Policy(config, mesh)
    policy.load(source / "policy")
    mesh.on_main((target / "policy").mkdir, 0o777, True)
    saving = policy.save(target / "policy")
    saving.start(in_background=False)
    saving.finish()
    mesh.barrier()
    parallel_state.destroy_model_parallel()


def differences(a: Path, b: Path) -> dict[str, float]:
    """Of two checkpoints, by kind of tensor: how many there are, and the largest difference. Rows that pad a vocabulary are 0 in both."""
    here, there = Reader(a / "policy"), Reader(b / "policy")
    assert here.sizes.keys() == there.sizes.keys(), here.sizes.keys() ^ there.sizes.keys()
    found: dict[str, float] = {}
    for name in here.sizes:
        kind = name.split(".")[2] if name.startswith("optimizer.") else "model"
        x, y = here.read(name), there.read(name)
        rows = min(len(x), len(y)) if name.endswith("word_embeddings.weight") else len(x)
        worst = max(float((x[:rows] - y[:rows]).abs().max()), *(float(t[rows:].abs().sum()) for t in (x, y)))
        found[f"num {kind}"], found[kind] = found.get(f"num {kind}", 0) + 1, max(found.get(kind, 0.0), worst)
    settings = [torch.load(directory / "policy/common.pt", weights_only=False) for directory in (a, b)]
    found["settings"] = float(_plain(settings[0]) != _plain(settings[1]))
    return found


def _plain(settings: dict[str, Any]) -> Any:
    """Steps, learning rates, weight decays of the groups; not where they lie."""
    groups = settings["optimizer"]["optimizer"]["param_groups"]
    return settings["num_updates"], [{key: group[key] for key in sorted(group)} for group in groups]


def sampled(directory: Path, steps: range) -> list[Any]:
    """What the steps' batches held, sample by sample, in order."""
    columns = {name: dump.COLUMNS[name] for name in ("kind", "group", "index", "prompt_index", "tokens", "versions", "reward", "advantage")}
    return [dump.read_rows(dump.path_of(directory / "rollouts", step), columns) for step in steps]


def main(out: str) -> None:
    torch.set_num_threads(1)
    root, results = Path(out).parent, []
    mesh = Mesh(configs.Parallel(tensor=1))
    mesh.on_main(make_model, root / "model")
    options = [*OPTIONS, f"policy.model={root / 'model'}", f"run.save_every={STEPS}", "run.keep_checkpoints=9"]
    made: set[Path] = set()
    for i, move in enumerate(MOVES):
        source, target, more = move
        through, moved = root / f"{source}{more}", root / f"moved-{i}"
        if through not in made:
            resume.run(through, f"run.steps={2 * STEPS}", *options, *more, *LAYOUTS[source])
            made.add(through)
        ignored = shutil.ignore_patterns(f"step-{2 * STEPS:06}", *(f"step-{step:06}.*" for step in range(STEPS, 2 * STEPS)))
        mesh.on_main_only(lambda: shutil.copytree(through, moved, ignore=ignored))  # noqa: B023
        first = through / "checkpoints" / f"step-{STEPS:06}"
        restored(first, root / f"restored-{i}", [f"run.dir={moved}", *options, *more, *LAYOUTS[target]])
        resume.run(moved, f"run.steps={2 * STEPS}", *options, *more, *LAYOUTS[target])
        if mesh.is_main:
            results.append({"name": name_of(move), **compared(first, root / f"restored-{i}", through, moved)})
            Path(out).write_text(json.dumps(results))


def compared(first: Path, again: Path, through: Path, moved: Path) -> dict[str, Any]:
    last, after = f"checkpoints/step-{2 * STEPS:06}", range(STEPS, 2 * STEPS)
    a, b = (resume.rows(directory)[STEPS:-1] for directory in (through, moved))
    x, y = (torch.cat([w.flatten().double() for w in resume.weights(d / "hf").values()]) for d in (through, moved))
    start = torch.cat([w.flatten().double() for w in resume.weights(first.parents[2] / "model").values()])
    return {
        "restored": differences(first, again),
        "sampled": sampled(through, after) == sampled(moved, after),
        "stream": (through / last / "rollouts.json").read_text() == (moved / last / "rollouts.json").read_text(),
        "lr": [row["policy/lr"] for row in a] == [row["policy/lr"] for row in b],
        "loss": max(abs(p["policy/loss"] - q["policy/loss"]) for p, q in zip(a, b, strict=True)),
        "params": float((x - y).norm() / (x - start).norm()),
        "params_max": float((x - y).abs().max()),
        "moved": float((x - start).abs().max()),
    }


if __name__ == "__main__":
    main(sys.argv[1])
