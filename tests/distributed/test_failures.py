"""One clear line, a non-zero exit on every rank, nothing half-written: what failures.py met, and what only
whole processes show.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.failures import MINE, RECORD
from tests.distributed.launch import ROOT, measured, torchrun

HOST = socket.gethostname()

SAYS = {  # what went wrong → words that must be in the line
    "world_size": ["world size 2", "parallel.tensor=4", "launch 4"],
    "heads_do_not_divide": ["num_key_value_heads=1", "parallel.tensor=2"],
    "layers_do_not_divide": ["parallel.pipeline=2 does not divide the model's num_hidden_layers=3"],
    "layers_do_not_divide_into_chunks": [
        "parallel.pipeline=2 × parallel.virtual_pipeline=2 does not divide",
        "num_hidden_layers=2",
    ],
    "experts_do_not_divide": ["parallel.expert=2 does not divide the model's num_experts=3"],
    "experts_of_a_dense_model": ["parallel.expert=2, but qwen2 has no experts"],
    "no_model": ["policy.model=", "config.json"],
    "no_tokenizer": ["policy.model=", "no usable tokenizer"],
    "no_weights": ["no *.safetensors"],
    "weights_cut_short": ["model.safetensors", "cut short"],
    "missing_tensor": ["missing", "model.norm.weight"],
    "extra_tensor": ["no place", "model.surprise.weight"],
    "head_of_its_own": ["lm_head.weight is not model.embed_tokens.weight", "tie_word_embeddings=true"],
    "wrong_shape": ["model.norm.weight", "(65,)", "(64,)"],
    "nan_weights": ["model.norm.weight", "NaN"],
    "unsupported_architecture": ["'mamba'", "qwen2"],
    "field_not_understood": ["'logit_softcapping'", "not understood"],
    "rope_scaling": ["rope_parameters", "'dynamic'", "yarn"],
    "misspelt_megatron_field": ["did you mean recompute_granularity?"],
    "missing_column": ["line 2", "'answer'"],
    "empty_data": ["data.jsonl", "no prompts"],
    "prompt_too_long": ["line 1", "102 tokens", "data.max_prompt_length=16"],
    "no_run_directory": ["run.dir=", "cannot be written"],
    "reward_not_importable": ["reward.function=dapo.reward:is_rihgt"],
    "reward_returns_nan": ["returned nan", "prompt"],
    "policy_destroyed": ["not finite", "checkpoint"],
    "nothing_correct_while_saving": ["0 of 4 mixed groups", "100% all wrong"],
    "nothing_correct": ["0 of 4 mixed groups", "100% all wrong"],
    "cap_reached": ["rollout.max_rounds=1", "0 of 4 mixed groups"],
    "missing_shard": ["model-00002-of-00002.safetensors is missing", "model.safetensors.index.json"],
    "checkpoint_of_another_rope": [
        "step-000001 is a checkpoint of another model",
        "rope_theta=500000.0 there, 10000.0 here",
    ],
    "checkpoint_of_another_architecture": [
        "step-000001 is a checkpoint of another model",
        "model_type='llama' there, 'qwen2' here",
    ],
    "checkpoint_of_another_vocabulary": [
        "step-000001 is a checkpoint of another model",
        "vocab_size=30 there, 25 here",
    ],
    "checkpoint_without_a_tensor": [
        "step-000001",
        "1 tensors are missing, first decoder.final_layernorm.weight",
    ],
    "checkpoint_with_a_wrong_shape": [
        "step-000001",
        "decoder.final_layernorm.weight has shape (65,)",
        "(64,)",
    ],
    "checkpoint_without_optimizer": ["step-000001", "optimizer.state.exp_avg.", "missing", "policy.model="],
    "checkpoint_with_a_wrong_moment": [
        "optimizer.state.exp_avg_sq.decoder.final_layernorm.weight has shape (65,)",
        "(64,)",
    ],
    "no_whole_checkpoint": [
        "no checkpoint below",
        "is whole",
        "step-000001",
        "policy/common.pt is missing",
        "another run.dir",
    ],
    "precision_without_transformer_engine": [
        "use_precision_aware_optimizer",
        "Megatron refuses it",
        "TransformerEngine",
    ],
    "offloaded_in_another_way": [
        "use_precision_aware_optimizer=true",
        "optimizer_offload_fraction=1.0",
        "policy.dtype=bfloat16",
    ],
    "too_little_disk": ["step-000001 cannot be written", "0.0 GiB free", "GiB are needed"],
    "disk_full": ["step-000001 cannot be written", "GiB free", "those before it are whole"],
    "other_data": ["data.train is not what the checkpoint was made with", "run.dir"],
    "fewer_steps_than_done": ["has done 1 steps, more than run.steps=0", "raise it"],
    "no_such_step": ["run.resume=7", "no such checkpoint", "there are steps 1"],
    "chosen_step_is_damaged": ["run.resume=1", "policy/common.pt is missing", "choose another step"],
    "checkpoint_that_would_run_code": [".metadata names posix.mkdir", "only your own checkpoints"],
    "run_directory_in_use": ["run.dir=", "in use by process 7 on another", "choose another run.dir"],
    "wandb_is_not_installed": ["run.wandb_project=mine", "not installed", "pip install wandb"],
    "reward_path_of_a_file": ["reward.function=path.py:f", "expected module:name"],
    "reward_in_no_package": ["reward.function=rw.kwargs", "expected module:name"],
    "reward_of_the_main_module": ["reward.function=__main__:f", "expected module:name"],
    "stalls_are_a_file": ["run.dir: ", "stalls cannot be written: File exists"],
    "other_config": [
        f"optim.warmup_steps is not the same on all ranks: 0 on {HOST}, 1 on {HOST}; policy.megatron is not",
        "start all machines with the same config",
    ],
    "other_model": [
        "the hash of policy.model's weights is not the same",
        f" on {HOST}, ",
        "copy the same model",
    ],
    "other_config_json": ["the hash of policy.model's config.json is not the same", "copy the same model"],
    "no_model_on_one_machine": ["the hash of policy.model's config.json is not", f"not there on {HOST}"],
    "run_exists": ["run.resume=never", "already holds a run"],
}


BROKEN = {"policy_destroyed", "nothing_correct", "cap_reached", "too_little_disk", "disk_full"}
SAVED = {"reward_returns_nan"}
ENDED_WHILE_SAVING = "nothing_correct_while_saving"  # all ranks give the checkpoint its name before they end
BROKEN |= SAVED | {ENDED_WHILE_SAVING}


@pytest.mark.parametrize("name", SAYS)
def test_bad_input_is_one_clear_line_and_every_rank_stops(name: str) -> None:
    result = measured("tests.distributed.failures", 2)[name]
    assert [rank["status"] for rank in result["ranks"]] == [1 if name in BROKEN else 2] * 2
    lines = "".join(rank["printed"] for rank in result["ranks"]).splitlines()
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in ["error: ", *SAYS[name]]), lines[0]
    if name in SAVED:
        assert "; saved in" in lines[0] and any("step-000000" in path for path in result["left"])
        return
    if name == ENDED_WHILE_SAVING:
        assert any("step-000001/manifest.json" in path for path in result["left"]), result["left"]
        assert not any("partial" in path for path in result["left"])
        return
    assert result["left"] == [], "something was left half-written"
    assert not result["has_run_code"]


@pytest.mark.parametrize("name", sorted(set(SAYS) - BROKEN - {"no_run_directory"}))
def test_a_run_that_is_refused_leaves_the_record_of_the_one_before(name: str) -> None:
    assert measured("tests.distributed.failures", 2)[name]["record"] == dict.fromkeys(RECORD, MINE)


@pytest.mark.parametrize("argument", ["optim.lrr=1", "optim.lr=fast", "nonsense"])
def test_a_bad_config_is_refused_before_anything_is_loaded(argument: str) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "dapo",
        "train",
        "examples/arithmetic/config.yaml",
        argument,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    printed = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(printed) == 1
    assert "| torch\n" not in done.stderr, "torch was imported to say so"


def test_an_exception_on_one_rank_stops_all_and_is_told_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = torchrun(2, "-m", "tests.distributed.one_rank_fails", str(run), timeout=120)
    assert done.returncode != 0
    line = f"error: ZeroDivisionError: on rank 1; the traceback is in {run / 'traceback.txt'}"
    assert done.stdout.splitlines().count(line) == 1, done.stdout
    assert "in fail_on_rank_1" in (run / "traceback.txt").read_text()
    assert not list(run.glob("checkpoints/*"))


def test_a_run_killed_while_it_saves_leaves_no_process_and_goes_on_from_the_checkpoint_before(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    options = [
        "run.steps=3",
        "run.save_every=1",
        "run.async_save=true",
        "eval.data=null",
        "parallel.tensor=2",
        "reward.workers=1",
    ]
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.distributed.killed",
        str(run),
    ]
    agent = subprocess.Popen(
        [sys.executable, *command, *options], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while len(list(run.glob("writing-*"))) < 2 and agent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    processes = psutil.Process(agent.pid).children(recursive=True)
    for process in [
        psutil.Process(agent.pid),
        *(p for p in processes if "tests.distributed.killed" in p.cmdline()),
    ]:
        process.kill()
    agent.wait()
    _, alive = psutil.wait_procs(processes, timeout=30)
    names = [p.cmdline() for p in alive]
    for process in alive:
        process.kill()
    assert not names, "processes outlived the run"
    assert len(processes) >= 3, "two ranks and a reward worker"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        ".step-000002.partial",
        "step-000001",
    ]

    done = torchrun(2, "-m", "dapo", "train", "examples/arithmetic/config.yaml", f"run.dir={run}", *options)
    assert done.returncode == 0, done.stdout
    assert "going on from step 1 of 3" in done.stdout
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000003"]


DAPO = [sys.executable, "-m", "dapo", "train", "examples/arithmetic/config.yaml", "eval.data=null"]


def started(run: Path, *options: str) -> subprocess.Popen[str]:
    """A run of two ranks that dapo launches itself, once it has made a step."""
    command = [*DAPO, "--nproc", "2", "parallel.tensor=2", f"run.dir={run}", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    done = metrics.read_text() if metrics.exists() else ""
    while not metrics.exists() or len(metrics.read_text()) <= len(done):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    return process


def test_a_run_that_dapo_launches_says_last_how_it_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = started(run, "run.steps=8", "run.save_every=100")
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.count("interrupted") == 1, printed
    assert printed.splitlines()[-1] == f"interrupted; saved in {run}, the same command goes on from there"
    [saved] = (run / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert 1 <= step < 8

    process = started(run, "run.steps=8", "run.save_every=100")
    [launched] = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1"]
    launched.kill()
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 1
    assert printed.count("error") == 1, printed
    assert printed.splitlines()[-1].startswith("error: rank 1 was ended by SIGKILL")

    options = ["eval.data=null", "parallel.tensor=2", f"run.dir={run}", "run.steps=8"]
    done = torchrun(2, "-m", "dapo", "train", "examples/arithmetic/config.yaml", *options)
    assert done.returncode == 0, done.stdout
    assert f"going on from step {step} of 8" in done.stdout
    assert [row["step"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == list(
        range(9)
    )


def test_what_a_rank_refuses_is_the_last_line(tmp_path: Path) -> None:
    refused = [f"policy.model={tmp_path}", f"run.dir={tmp_path / 'run'}", "parallel.tensor=2"]
    done = subprocess.run([*DAPO, *refused], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: policy.model={tmp_path}: no config.json there")
    assert done.stderr.count("error") == 1, done.stderr
    assert done.stdout.count("\n") == 1 and "2 ranks" in done.stdout
