"""It learns: the quickstart's command, cut short, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from dapo import config
from tests.distributed.launch import torchrun


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("learning") / "run"
    options = [f"run.dir={directory}", "run.steps=12", "eval.every=12", "parallel.tensor=2"]
    done = torchrun(2, "-m", "dapo", "train", "examples/arithmetic/config.yaml", *options)
    assert done.returncode == 0, done.stdout
    return directory


def test_accuracy_on_held_out_problems_rises(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracy = {row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    assert accuracy[0] <= 0.45
    assert accuracy[12] >= 0.65


def test_every_step_has_every_metric(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][:-1]
    names = """groups/asked groups/kept groups/all_correct groups/all_wrong rollout/accuracy rollout/reward rollout/truncated rollout/length
        rollout/length_max rollout/length_kept rollout/length_turned_away policy/loss policy/entropy policy/probability policy/clip_low
        policy/clip_high policy/clip_high_probability policy/grad_norm policy/lr policy/mismatch time/rollout time/update time/sync
        time/old_logprobs time/step perf/tokens_per_second perf/peak_memory_gib"""
    for row in rows:
        assert set(names.split()) <= set(row)
        assert row["policy/mismatch_max"] < 1e-4, "the sampler and the trainer disagree: a weight sync went wrong"
        assert row["groups/asked"] == sum(row[f"groups/{kind}"] for kind in ("kept", "all_correct", "all_wrong", "surplus"))


def test_the_run_directory_holds_curves_config_and_model(run: Path) -> None:
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    assert config.load(run / "config.yaml").run.dir == run
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "hf")
    assert sum(p.numel() for p in model.parameters()) == 75_904
    assert transformers.AutoTokenizer.from_pretrained(run / "hf")("1+1=")["input_ids"] == [3, 12, 3, 14]
