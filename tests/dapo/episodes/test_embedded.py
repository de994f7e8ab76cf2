"""Episodes with the embedded engine: two runs are alike to the token, however long environments take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dapo import config
from dapo.engine.embedded import EmbeddedEngine
from dapo.episodes.assemble import make_setup
from dapo.episodes.stream import EpisodeEngine
from dapo.episodes.workers import Workers
from dapo.model.tokenizer import load_tokenizer
from dapo.rollout.render import Turns
from dapo.types import Prompt, Request, Sample, Sampling
from tests.dapo.episodes.stage import HERE

EXAMPLE = Path(__file__).parents[3] / "examples/game"
GAME = f"{HERE}:Slow"


@pytest.fixture(scope="module")
def engine() -> EmbeddedEngine:
    base = EXAMPLE / "base"
    made = EmbeddedEngine(base, torch.float32, torch.device("cpu"), max_concurrent=8)
    made.load_weights(load_file(base / "model.safetensors").items(), version=0)
    return made


def play(engine: EmbeddedEngine, num_workers: int) -> list[Sample]:
    made = config.load(EXAMPLE / "config.yaml")
    setup = make_setup(made, load_tokenizer(made.policy.model), Turns(environment=GAME))
    workers = Workers(setup._replace(environment=GAME), num_workers, 4.0)
    rows = [{"highest": 31, "secret": 12}, {"highest": 16, "secret": 13}, {"highest": 9, "secret": 2}]
    episodes = EpisodeEngine(
        engine,
        workers,
        made.rollout.max_turns,
        7,
        True,
        0.5,
        lambda prompt: dict(rows[prompt.index]),
        lambda prompt: [],
    )
    stream = episodes.stream()
    sampling = Sampling(1.0, made.rollout.max_response_length, setup.chat.stop_ids)
    prompts = [Prompt(i, np.zeros(0, np.int32), "") for i in range(len(rows))]
    stream.submit(Request(p.index, i, p, 100 * p.index + i, sampling) for p in prompts for i in range(4))
    found = sorted(stream.completed(), key=lambda sample: (sample.group, sample.index))
    episodes.close()
    return found


def test_two_runs_give_the_same_samples_to_the_token(engine: EmbeddedEngine) -> None:
    first, again, other = play(engine, 1), play(engine, 1), play(engine, 3)
    assert len(first) == 12 and max(s.episode.num_turns for s in first if s.episode) > 2
    for samples in (again, other):
        for a, b in zip(first, samples, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist() and a.loss_mask.tolist() == b.loss_mask.tolist()
            assert a.behavior_logprobs.tobytes() == b.behavior_logprobs.tobytes(), "to the bit"
            assert (a.reward, a.is_correct, a.text) == (b.reward, b.is_correct, b.text)
