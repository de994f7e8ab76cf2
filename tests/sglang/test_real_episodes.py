"""Episodes on a real SGLang server: the game's example, from its first prompt to two updates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dapo import config
from dapo.episodes.assemble import make_setup, turns_of
from dapo.model.tokenizer import load_tokenizer
from dapo.rollout import dump
from tests.sglang.conftest import ROOT

pytestmark = pytest.mark.slow


def test_a_game_is_played_and_learnt_token_for_token(sglang_python: Path, tmp_path: Path) -> None:
    options = [
        f"run.dir={tmp_path / 'run'}",
        "run.steps=2",
        "rollout.dump_share=1.0",
        "rollout.prompts_per_step=4",
        "rollout.prompts_per_round=16",
        "rollout.max_rounds=4",
        "eval.data=null",
        "engine.kind=sglang",
        f"engine.python={sglang_python}",
    ]
    path = ROOT / "examples/game/config.yaml"
    command = [sys.executable, "-m", "dapo", "train", str(path), "--nproc", "1", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "policy/mismatch" in row]
    assert len(steps) == 2 and steps[0]["episode/turns"] > 1.5
    # the trainer's log-probs of the same tokens: whatever stands between the turns was fed alike
    assert all(row["policy/mismatch_max"] < 1e-4 for row in steps)
    # later turns find the conversation in the server's prefix cache
    assert steps[0]["episode/prefix_cached"] > 0.5

    made = config.load(path)
    chat = make_setup(made, load_tokenizer(made.policy.model), turns_of(made)).chat
    buffer = dump.read(dump.path_of(tmp_path / "run/rollouts", 0), 4)
    samples = [(group, sample) for group in buffer.asked for sample in group.samples]
    assert any(sample.episode and sample.episode.num_turns > 2 for _, sample in samples)
    for group, sample in samples:
        assert sample.episode
        said = iter(sample.episode.messages)
        assert chat.start([next(said)], []) == group.prompt.tokens.tolist()
        edges = np.flatnonzero(np.diff(sample.loss_mask)) + 1
        parts = np.split(sample.tokens, edges)
        assert sample.loss_mask[0] and sample.loss_mask[-1]
        for own, suffix in zip(parts[::2], [*parts[1::2], None], strict=True):
            assert next(said) == {"role": "assistant", "content": chat.text(own.tolist())}
            if suffix is not None:
                assert chat.after(int(own[-1]), [next(said)], [], 1000).tokens == suffix.tolist()
        assert not sample.behavior_logprobs[~sample.loss_mask].any()
        assert (sample.behavior_logprobs[sample.loss_mask] < 0).all()
