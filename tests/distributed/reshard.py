"""Saves a run in one layout and continues it in another: every pair of layouts in one launch.

torchrun --nproc-per-node 4 -m tests.distributed.reshard OUT.json
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from dapo import config as configs
from dapo import verify
from dapo.mesh import Mesh
from dapo.model.families import read_shape
from dapo.policy.chunks import Reader
from dapo.policy.megatron import Policy, PolicyError
from dapo.policy.optimizer_state import without_classes
from tests.distributed import resume
from tests.distributed.launch import ROOT
from tests.distributed.moves import HUB, LAYOUTS, MOVES, is_bfloat16, model_of
from tests.distributed.ranks import prepare_rank
from tests.distributed.reference import make_hf

STEPS = 2  # before the move
OPTIONS = [
    "reward.function=tests.distributed.reshard:is_even",
    "rollout.max_response_length=24",
    "reward.overlong_cache=8",
    "rollout.dump_share=1.0",
    "rollout.prompts_per_step=4",
    "rollout.prompts_per_round=6",
    "optim.prompts_per_minibatch=2",
    # at 1e-8 the rounding of all but vanishing gradients, of key biases, would become whole steps
    "policy.megatron.adam_eps=1e-6",
]


def is_even(response: str, answer: str) -> bool:
    """True for an even number of digits: a random model is right now and then."""
    return sum(c.isdigit() for c in response) % 2 == 0


def make_models(root: Path) -> None:
    """Make random models that every layout can split, with the arithmetic example's tokenizer."""
    shutil.copytree(ROOT / "examples/arithmetic/base", root / "dense")
    config = transformers.Qwen2Config.from_pretrained(
        root / "dense", num_hidden_layers=4, num_key_value_heads=4, layer_types=["full_attention"] * 4
    )
    torch.manual_seed(1)
    transformers.Qwen2ForCausalLM(config).save_pretrained(root / "dense")
    resume.make_base("expert-parallel", root / "experts")
    for name, kind in (("DeltaNet", "qwen3_5_moe_text"), ("latent", "deepseek_v3")):
        make_hf(kind, True, root / name, vocab=config.vocab_size)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(root / "dense" / file, root / name)


def restored(source: Path, target: Path, options: list[str], is_poisoned: bool = False) -> str:
    """Load the checkpoint `source` in the layout of `options`, and save it without any arithmetic.

    In between Megatron writes its own form and we read it, which proves all offsets. Poisoned, the checkpoint
    is saved with a NaN on one rank instead, and loaded again. Returns what was said before and after.
    """
    config = configs.load(ROOT / "examples/arithmetic/config.yaml", [*resume.OPTIONS, *options])
    mesh = Mesh(config.parallel)
    policy, said = Policy(config, mesh), ""
    policy.load(source / "policy")
    if not is_poisoned:
        written = write_as_megatron(policy, mesh, target.with_name(f"{target.name}-megatron"))
        policy.load(written)
    if is_poisoned:
        if mesh.rank == mesh.world - 1:
            params = dict(policy.chunks[0].named_parameters())
            params["decoder.layers.0.mlp.linear_fc2.weight"].data[3, 5] = torch.nan
        said = refusal(policy.check_finite)
    mesh.on_main((target / "policy").mkdir, 0o777, True)
    saving = policy.save(target / "policy")
    saving.start(in_background=False)
    saving.finish()
    if is_poisoned:
        said += "; loaded: " + refusal(policy.load, target / "policy")
    resume.leave(mesh)
    return said


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    try:
        function(*arguments)
    except (configs.ConfigError, PolicyError) as error:
        return str(error)
    return "accepted"


def write_as_megatron(policy: Policy, mesh: Mesh, directory: Path) -> Path:
    """Write a checkpoint whose optimizer state Megatron gathers and cuts."""
    from megatron.core import dist_checkpointing  # after dapo.policy, which adapts it

    for model in policy.models:
        for buffer in (*model.buffers, *model.expert_parallel_buffers):
            # else it gathers without the padding, and looks up at places that count it
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()
    state, _ = policy._sharded_state()
    options = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    gathered = policy.optimizer.sharded_state_dict(state["model"], metadata=options)
    mesh.on_main((directory / "policy").mkdir, 0o777, True)
    state = {
        "model": state["model"],
        "optimizer": without_classes(gathered),
        "num_updates": policy.scheduler.num_steps,
    }
    dist_checkpointing.save(state, str(directory / "policy"))
    return directory / "policy"


def settings(checkpoint: Path) -> Any:
    """Return the number of updates, and the settings of the optimizer's groups."""
    from megatron.core import dist_checkpointing  # after dapo.policy, which adapts it

    found = dist_checkpointing.load_common_state_dict(checkpoint / "policy")
    optimizer = found["optimizer"]
    # experts have one of their own
    parts = [optimizer] if "optimizer" in optimizer else [optimizer[i] for i in sorted(optimizer)]
    groups = [group for part in parts for group in part["optimizer"]["param_groups"]]
    return found["num_updates"], [
        {key: group[key] for key in ("step", "lr", "max_lr", "weight_decay", "wd_mult", "betas", "eps")}
        for group in groups
    ]


def padding(checkpoint: Path) -> float:
    """Return the largest value in rows that pad the vocabulary: embedding, main parameters, moments."""
    tensors = Reader(checkpoint / "policy")
    vocab = read_shape(ROOT / "examples/arithmetic/base").vocab_size
    found = [
        float(tensors.read(name)[vocab:].abs().max())
        for name in tensors.sizes
        if name.endswith("word_embeddings.weight")
    ]
    assert len(found) == (4 if any(name.startswith(verify.MAIN) for name in tensors.sizes) else 3)
    return max(found)


def main(out: str) -> None:
    prepare_rank()
    root, results = Path(out).parent, []
    mesh = Mesh(configs.Parallel(tensor=1))
    mesh.on_main(make_models, root)
    for i, (source, target) in enumerate(MOVES):
        options = [*OPTIONS, f"policy.model={root / model_of(source)}", "run.keep_checkpoints=9"]
        through, moved, again = root / source, root / f"moved-{i}", root / f"again-{i}"
        end = STEPS + (1 if is_bfloat16(source) else 2)
        if not mesh.on_main(through.exists):
            resume.run(through, f"run.steps={end}", *options, *LAYOUTS[source])
        ignored = shutil.ignore_patterns(
            *(f"step-{step + 1:06}" for step in range(STEPS, end)),
            *(f"step-{step:06}.*" for step in range(STEPS, end)),
        )
        mesh.on_main_only(lambda: shutil.copytree(through, moved, ignore=ignored))  # noqa: B023
        first = through / "checkpoints" / f"step-{STEPS:06}"
        restored(first, again, [f"run.dir={moved}", *options, *LAYOUTS[target]])
        resume.run(moved, f"run.steps={end}", *options, *LAYOUTS[target])
        if mesh.is_main:
            results.append(
                {
                    "name": f"{source} → {target}",
                    **compared(root / model_of(source), first, again, through, moved, end),
                }
            )
            Path(out).write_text(json.dumps(results))
    changed = [
        f"run.dir={root}",
        *OPTIONS,
        f"policy.model={root / 'dense'}",
        *LAYOUTS["tensor 4"],
        "optim.lr=7e-5",
        "optim.betas=[0.8, 0.9]",
    ]
    said = restored(root / HUB / f"checkpoints/step-{STEPS:06}", root / "poisoned", changed, is_poisoned=True)
    if mesh.is_main:
        groups = settings(root / "poisoned")[1]
        Path(out).write_text(json.dumps([*results, {"name": "poisoned", "said": said, "groups": groups}]))


def compared(model: Path, first: Path, again: Path, through: Path, moved: Path, end: int) -> dict[str, Any]:
    x, start, gathered = (
        resume.weights(through / "hf"),
        resume.weights(model),
        again.with_name(f"{again.name}-megatron"),
    )
    return {
        "restored": [asdict(found) for found in verify.policies(first / "policy", again / "policy")],
        "as megatron": [asdict(found) for found in verify.policies(gathered / "policy", again / "policy")],
        "padding": padding(again),
        "settings": settings(first) == settings(again),
        "went on": [asdict(found) for found in verify.runs(through, moved, STEPS, end)],
        "moved": max(float((x[name] - start[name]).abs().max()) for name in x),
    }


if __name__ == "__main__":
    main(sys.argv[1])
