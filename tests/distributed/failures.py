"""Everything a user can get wrong, one after the other in one launch: what each rank printed, and its exit
status.

torchrun --nproc-per-node 2 -m tests.distributed.failures OUT.json
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import json
import os
import pickle
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dapo import files
from dapo.__main__ import main as dapo
from dapo.config import Parallel
from dapo.mesh import Mesh
from dapo.model.families import read_shape
from dapo.model.names import table
from dapo.policy import chunks
from dapo.policy.weight_files import open_weights
from dapo.policy.weights import to_shard
from tests.distributed.launch import ROOT
from tests.distributed.ranks import prepare_rank

EXAMPLE = ROOT / "examples/arithmetic"
MINE = "what a run left there\n"
RECORD = ("config.yaml", "data.json", "metrics.jsonl")  # and semantics.json, which is not there
STATE = tuple(f"optimizer.state.{part}." for part in ("param", "exp_avg", "exp_avg_sq"))
HOSTILE = "/tmp/dapo-a-checkpoint-ran-code"
LOCKS: list[io.TextIOWrapper] = []  # held to the end
# name → (a scratch directory → the overrides that make it go wrong)
CASES: dict[str, Callable[[Path], list[str]]] = {}


def case(function: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    CASES[function.__name__] = function
    return function


def broken_model(
    directory: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
) -> list[str]:
    """A copy of the base policy with its config.json and weights changed in place."""
    shutil.copytree(EXAMPLE / "base", directory)
    config, weights = (
        json.loads((directory / "config.json").read_text()),
        load_file(directory / "model.safetensors"),
    )
    change(config, weights)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors")
    return [f"policy.model={directory}"]


def data(directory: Path, text: str) -> list[str]:
    directory.mkdir(parents=True)
    (directory / "data.jsonl").write_text(text)
    return [f"data.train={directory / 'data.jsonl'}"]


@case
def world_size(directory: Path) -> list[str]:
    return ["parallel.tensor=4"]


@case
def heads_do_not_divide(directory: Path) -> list[str]:
    return [
        *broken_model(directory, lambda config, weights: config.update(num_key_value_heads=1)),
        "parallel.tensor=2",
    ]


@case
def layers_do_not_divide(directory: Path) -> list[str]:
    changed = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    return [
        *broken_model(directory, lambda config, weights: config.update(changed)),
        "parallel.tensor=1",
        "parallel.pipeline=2",
    ]


@case
def layers_do_not_divide_into_chunks(directory: Path) -> list[str]:
    return ["parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]


@case
def experts_do_not_divide(directory: Path) -> list[str]:
    experts = {
        "model_type": "qwen3_moe",
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "head_dim": 16,
    }
    return [
        *broken_model(directory, lambda config, weights: config.update(experts)),
        "parallel.tensor=1",
        "parallel.expert=2",
    ]


@case
def experts_of_a_dense_model(directory: Path) -> list[str]:
    return ["parallel.tensor=1", "parallel.expert=2"]


@case
def no_model(directory: Path) -> list[str]:
    return [f"policy.model={directory}"]


@case
def no_tokenizer(directory: Path) -> list[str]:
    options = broken_model(directory, lambda config, weights: None)
    (directory / "tokenizer.json").unlink()
    return options


@case
def no_weights(directory: Path) -> list[str]:
    options = broken_model(directory, lambda config, weights: None)
    (directory / "model.safetensors").unlink()
    return options


@case
def weights_cut_short(directory: Path) -> list[str]:
    options = broken_model(directory, lambda config, weights: None)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return options


@case
def missing_tensor(directory: Path) -> list[str]:
    return broken_model(directory, lambda config, weights: weights.pop("model.norm.weight"))


@case
def extra_tensor(directory: Path) -> list[str]:
    return broken_model(
        directory, lambda config, weights: weights.update({"model.surprise.weight": torch.ones(2)})
    )


@case
def head_of_its_own(directory: Path) -> list[str]:
    """Of a model that config.json says has none."""
    return broken_model(
        directory, lambda config, weights: weights.update({"lm_head.weight": torch.ones(25, 64)})
    )


@case
def wrong_shape(directory: Path) -> list[str]:
    return broken_model(
        directory, lambda config, weights: weights.update({"model.norm.weight": torch.ones(65)})
    )


@case
def nan_weights(directory: Path) -> list[str]:
    return broken_model(directory, lambda config, weights: weights["model.norm.weight"].fill_(torch.nan))


@case
def unsupported_architecture(directory: Path) -> list[str]:
    return broken_model(directory, lambda config, weights: config.update(model_type="mamba"))


@case
def field_not_understood(directory: Path) -> list[str]:
    return broken_model(directory, lambda config, weights: config.update(logit_softcapping=30.0))


@case
def rope_scaling(directory: Path) -> list[str]:
    return broken_model(
        directory,
        lambda config, weights: config.update(rope_parameters={"rope_type": "dynamic", "factor": 4.0}),
    )


@case
def misspelt_megatron_field(directory: Path) -> list[str]:
    return ["policy.megatron.recompute_granularit=full"]


@case
def missing_column(directory: Path) -> list[str]:
    return data(directory, '{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2="}\n')


@case
def empty_data(directory: Path) -> list[str]:
    return data(directory, "\n")


@case
def prompt_too_long(directory: Path) -> list[str]:
    return [*data(directory, '{"prompt": "' + "1+" * 50 + '1=", "answer": "51"}\n'), "data.too_long=error"]


@case
def no_run_directory(directory: Path) -> list[str]:
    directory.mkdir(parents=True)
    (directory / "file").write_text("")
    return [f"run.dir={directory / 'file' / 'run'}"]


@case
def reward_not_importable(directory: Path) -> list[str]:
    return ["reward.function=dapo.reward:is_rihgt"]


@case
def reward_returns_nan(directory: Path) -> list[str]:
    return ["reward.function=tests.distributed.failures:nan_reward"]


@case
def policy_destroyed(directory: Path) -> list[str]:
    return ["optim.lr=1e35", "run.steps=3"]


@case
def nothing_correct(directory: Path) -> list[str]:
    return [
        "reward.function=tests.distributed.failures:always_wrong",
        "rollout.max_rounds=1",
        "rollout.max_empty_steps=2",
    ]


@case
def nothing_correct_while_saving(directory: Path) -> list[str]:
    return [*nothing_correct(directory), "run.steps=3", "run.save_every=1", "run.async_save=true"]


@case
def cap_reached(directory: Path) -> list[str]:
    return [
        "reward.function=tests.distributed.failures:always_wrong",
        "rollout.max_rounds=1",
        "rollout.at_cap=stop",
    ]


@case
def run_exists(directory: Path) -> list[str]:
    (directory / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    return ["run.resume=never", f"run.dir={directory / 'run'}"]


@case
def stalls_are_a_file(directory: Path) -> list[str]:
    """Refused by every rank, after all that the main rank alone refuses."""
    (directory / "run").mkdir(parents=True)
    (directory / "run" / "stalls").write_text(MINE)
    return [f"run.dir={directory / 'run'}"]


@case
def missing_shard(directory: Path) -> list[str]:
    options = broken_model(directory, lambda config, weights: None)
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    places = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return options


def checkpoint(
    directory: Path,
    model: dict[str, Any] | None = None,
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
    others: dict[str, bytes] | None = None,
) -> list[str]:
    """A run with one whole checkpoint, of the base policy but for `model`; `change` is made to the tensors
    that it holds. `others`: more files, or others, by name.
    """
    step, shape = directory / "run" / "checkpoints" / "step-000001", read_shape(EXAMPLE / "base")
    (step / "policy").mkdir(parents=True)
    weights = open_weights(EXAMPLE / "base", shape)
    entries = {
        entry.key: to_shard(entry, weights.read(entry), shape, 0, 1)
        for entry in table(shape, is_fused=True)
        if not entry.layer
    }
    tensors = {prefix + name: tensor for prefix in ("", *STATE) for name, tensor in entries.items()}
    if change:
        change(tensors)
    writer = chunks.Writer(step / "policy", 2**30)
    for name, tensor in tensors.items():
        counts = (shape.num_layers,) if ".layers." in name else ()
        for place in product(*map(range, counts)):
            writer.write(name, tensor, place, counts)
    writer.close()
    for name, content in (others or {}).items():
        (step / name).write_bytes(content)
    files.write_manifest(step, {}, {"step": 1, "model": asdict(shape) | (model or {})})
    return [f"run.dir={directory / 'run'}"]


@case
def checkpoint_of_another_rope(directory: Path) -> list[str]:
    """Of the same tensors."""
    return checkpoint(directory, {"rope_theta": 5e5})


@case
def checkpoint_of_another_architecture(directory: Path) -> list[str]:
    return checkpoint(directory, {"model_type": "llama"})


@case
def checkpoint_of_another_vocabulary(directory: Path) -> list[str]:
    return checkpoint(directory, {"vocab_size": 30})


@case
def checkpoint_without_a_tensor(directory: Path) -> list[str]:
    return checkpoint(directory, change=lambda tensors: tensors.pop("decoder.final_layernorm.weight"))


@case
def checkpoint_with_a_wrong_shape(directory: Path) -> list[str]:
    return checkpoint(
        directory, change=lambda tensors: tensors.update({"decoder.final_layernorm.weight": torch.ones(65)})
    )


@case
def checkpoint_without_optimizer(directory: Path) -> list[str]:
    return checkpoint(
        directory,
        change=lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("optimizer.")],
    )


@case
def checkpoint_with_a_wrong_moment(directory: Path) -> list[str]:
    name = STATE[2] + "decoder.final_layernorm.weight"
    return checkpoint(directory, change=lambda tensors: tensors.update({name: torch.ones(65)}))


@case
def no_whole_checkpoint(directory: Path) -> list[str]:
    options = checkpoint(directory)
    (directory / "run/checkpoints/step-000001/policy/common.pt").unlink()
    return options


@case
def other_data(directory: Path) -> list[str]:
    state = {"prompts": {"drawn": [8], "returned": [], "data": "of other prompts"}}
    return checkpoint(directory, others={"rollouts.json": json.dumps(state).encode()})


@case
def fewer_steps_than_done(directory: Path) -> list[str]:
    return [*checkpoint(directory), "run.steps=0"]


@case
def no_such_step(directory: Path) -> list[str]:
    return [*checkpoint(directory), "run.resume=7"]


@case
def chosen_step_is_damaged(directory: Path) -> list[str]:
    return [*no_whole_checkpoint(directory), "run.resume=1"]


class Hostile:
    """A pickle of it makes a directory when it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, (HOSTILE,)


@case
def checkpoint_that_would_run_code(directory: Path) -> list[str]:
    return checkpoint(directory, others={"policy/.metadata": pickle.dumps(Hostile())})


@case
def run_directory_in_use(directory: Path) -> list[str]:
    (directory / "run").mkdir(parents=True)
    lock = (directory / "run/lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("process 7 on another", file=lock, flush=True)
    LOCKS.append(lock)
    return [f"run.dir={directory / 'run'}"]


@case
def wandb_is_not_installed(directory: Path) -> list[str]:
    return ["run.wandb_project=mine"]


@case
def reward_path_of_a_file(directory: Path) -> list[str]:
    return ["reward.function=path.py:f"]


@case
def reward_in_no_package(directory: Path) -> list[str]:
    return ["reward.function=rw.kwargs"]


@case
def reward_of_the_main_module(directory: Path) -> list[str]:
    return ["reward.function=__main__:f"]


@case
def precision_without_transformer_engine(directory: Path) -> list[str]:
    return ["policy.megatron.use_precision_aware_optimizer=true"]


@case
def offloaded_in_another_way(directory: Path) -> list[str]:
    return ["policy.megatron.optimizer_cpu_offload=true", "policy.megatron.optimizer_offload_fraction=0.5"]


@case
def other_config(directory: Path) -> list[str]:
    return ["optim.warmup_steps={rank}", "policy.megatron.num_layers_in_first_pipeline_stage={rank}"]


@case
def other_model(directory: Path) -> list[str]:
    """The same sizes and names, other weights."""
    broken_model(directory / "0", lambda config, weights: None)
    broken_model(directory / "1", lambda config, weights: weights["model.norm.weight"].add_(1))
    return [f"policy.model={directory}/{{rank}}"]


@case
def other_config_json(directory: Path) -> list[str]:
    broken_model(directory / "0", lambda config, weights: None)
    broken_model(directory / "1", lambda config, weights: config.update(rope_theta=500000.0))
    return [f"policy.model={directory}/{{rank}}"]


@case
def no_model_on_one_machine(directory: Path) -> list[str]:
    broken_model(directory / "0", lambda config, weights: None)
    return [f"policy.model={directory}/{{rank}}"]


@case
def too_little_disk(directory: Path) -> list[str]:
    return ["run.steps=1"]  # see `attempt`: 100 kB are free


@case
def disk_full(directory: Path) -> list[str]:
    return ["run.steps=1"]  # see `attempt`: no file may be larger than 200 kB


def nan_reward(response: str, answer: str) -> float:
    return float("nan")


def always_wrong(response: str, answer: str) -> bool:
    return False


def attempt(options: list[str], run: Path) -> dict[str, Any]:
    from megatron.core import parallel_state  # after dapo.policy, which adapts it

    printed = io.StringIO()
    fast = [
        "eval.data=null",
        "reward.workers=0",
        "rollout.prompts_per_step=4",
        "rollout.prompts_per_round=4",
        f"run.dir={run}",
    ]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    usage, find_spec = shutil.disk_usage, importlib.util.find_spec
    if run.name == "disk_full-run":
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    if run.name == "too_little_disk-run":
        shutil.disk_usage = lambda path: usage(path)._replace(free=100_000)
    if run.name == "wandb_is_not_installed-run":  # it is where all is in one environment
        importlib.util.find_spec = lambda name, *rest: find_spec(name, *rest) if name != "wandb" else None
    with contextlib.redirect_stderr(printed):
        status = dapo(["train", str(EXAMPLE / "config.yaml"), *fast, *options])
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    shutil.disk_usage, importlib.util.find_spec = usage, find_spec
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return {"status": status, "printed": printed.getvalue()}


def leave_record(run: Path) -> None:
    """Write what an earlier run left there, if a run can be there."""
    if run.parent.is_dir():
        run.mkdir(exist_ok=True)
        for name in RECORD:
            (run / name).write_text(MINE)


def main(out: str) -> None:
    import dapo.policy  # noqa: F401

    prepare_rank()
    root = Path(out).parent
    mesh = Mesh(Parallel(tensor=1))
    results = []
    for name, make in CASES.items():
        options = mesh.on_main(make, root / name)
        is_own = any(option.startswith("run.dir=") for option in options)
        run = root / name / "run" if is_own else root / f"{name}-run"
        mesh.on_main(leave_record, run)
        options = [option.replace("{rank}", str(mesh.rank)) for option in options]  # they may differ
        mine = attempt(options, root / f"{name}-run")
        ranks: list[Any] = [None] * mesh.world
        torch.distributed.all_gather_object(ranks, mine)
        left = [
            str(p.relative_to(root))
            for p in (root / f"{name}-run").rglob("*")
            if "step-" in str(p) or "partial" in str(p)
        ]
        results.append(
            {
                "name": name,
                "ranks": ranks,
                "left": left,
                "record": {
                    name: (run / name).read_text()
                    for name in (*RECORD, "semantics.json")
                    if (run / name).is_file()
                },
                "has_run_code": Path(HOSTILE).exists(),
            }
        )
        if mesh.is_main:
            Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
