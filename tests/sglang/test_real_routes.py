"""The real server of a mixture of experts: the routes that it returns, and what it scores."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dapo.config import Limits
from dapo.engine.fleet import make_servers
from dapo.engine.route_watch import RouteWatch
from dapo.engine.routes import check_routes
from dapo.engine.sglang import SGLangEngine
from dapo.model.families import read_shape
from dapo.model.routing import Routing
from dapo.types import Group, Prompt, Request, Sampling
from tests.sglang.conftest import make_model, server_config
from tests.sglang.test_real_client import VOCAB, Alone

EXPERTS, LENGTH = 8, 48


@pytest.fixture(scope="module")
def run(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server that the run starts because routes are to be replayed."""
    folder = tmp_path_factory.mktemp("routes")
    model = make_model(folder / "model", num_experts=EXPERTS)
    config = server_config(folder, model, replay="rollout", python=str(sglang_python))
    servers = make_servers(config, say=lambda text: print(text, file=sys.stderr))
    try:
        servers.wait()
        yield SimpleNamespace(servers=servers, model=model, routing=Routing(read_shape(model)), config=config)
    finally:
        servers.close()


@pytest.fixture(scope="module")
def groups(run: SimpleNamespace) -> list[Group]:
    """40 responses, to prompts that come twice each: the second time they are in the server's cache."""
    alone: Any = Alone(run.servers.workers[0])
    engine = SGLangEngine(alone, alone, 64, Limits(300.0), VOCAB, routing=run.routing)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, int(rng.integers(1, 60))).astype(np.int32) for _ in range(20)]
    made = [Group(i, Prompt(i % 20, prompts[i % 20], "")) for i in range(40)]
    sampling = Sampling(1.0, LENGTH, (1,), returns_routes=True)
    stream = engine.stream()
    try:
        for half in (made[:20], made[20:]):
            stream.submit(Request(g.id, 0, g.prompt, g.id, sampling) for g in half)
            for sample in stream.completed():
                made[sample.group].samples.append(sample)
        return made
    finally:
        engine.close()


def test_a_server_of_the_run_returns_routes(run: SimpleNamespace) -> None:
    check_routes(run.servers.workers, run.routing)


def test_routes_are_the_models_in_every_row(run: SimpleNamespace, groups: list[Group]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32).eval()
    watch, num_rows, num_other = RouteWatch(model, run.routing), 0, 0
    with watch, torch.no_grad():
        for group in groups:
            [sample] = group.samples
            whole = np.concatenate([group.prompt.tokens, sample.tokens[:-1]])
            model(torch.from_numpy(whole).long()[None])
            expected = watch._take().numpy()
            assert sample.routes is not None and sample.routes.shape == expected.shape
            assert sample.routes.dtype == np.uint8
            num_rows += len(expected)
            found, wanted = (np.sort(x.reshape(-1, 2, 2)) for x in (sample.routes, expected))
            num_other += int((found != wanted).any((1, 2)).sum())
    # two experts may be as good to seven digits
    assert num_rows > 1000 and num_other <= 2


def test_what_a_server_scores_is_what_it_reported(run: SimpleNamespace, groups: list[Group]) -> None:
    alone: Any = Alone(run.servers.workers[0])
    engine = SGLangEngine(alone, alone, 64, Limits(300.0), VOCAB)
    try:
        scored = engine.score(groups)
    finally:
        engine.close()
    for group, logprobs in zip(groups, scored, strict=True):
        assert len(logprobs) == group.samples[0].length
        assert np.abs(logprobs - group.samples[0].behavior_logprobs).max() < 2e-5
