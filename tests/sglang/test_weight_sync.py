"""Weights reach the real server: from a trainer on two ranks, by every transport, under a generation that
goes on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dapo.engine.control import KEY_VARIABLE, Server
from dapo.engine.fleet import make_servers
from dapo.engine.weight_sync import WeightSync, make_sync
from dapo.types import EngineError
from tests.distributed.launch import torchrun
from tests.sglang.conftest import make_model, server_config
from tests.sglang.sync import gap, generate, load, logprobs, make_variant

LONG = 700  # tokens: a generation that is still going on when a sync begins, on a busy machine too


@pytest.fixture(scope="module")
def results(sglang_server: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return synced(sglang_server.server, sglang_server.model, tmp_path_factory.mktemp("sync") / "out.json")


@pytest.fixture(scope="module")
def results_of_experts(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """As `results`, of a mixture of experts and a server of its own."""
    folder = tmp_path_factory.mktemp("experts")
    model = make_model(folder / "model", num_experts=4)
    servers = make_servers(
        server_config(folder, model, python=str(sglang_python)), say=lambda text: print(text, file=sys.stderr)
    )
    try:
        servers.wait()
        return synced(servers.workers[0], model, folder / "out.json")
    finally:
        servers.close()


def synced(server: Server, model: Path, out: Path) -> list[dict[str, Any]]:
    """What sync.py measured with the server."""
    key = {KEY_VARIABLE: server.key} if server.key else {}
    done = torchrun(2, "-m", "tests.sglang.sync", server.url, str(model), str(out), **key)
    assert done.returncode == 0, done.stdout[-6000:]
    return json.loads(out.read_text())  # type: ignore[no-any-return]


@pytest.fixture
def variants(sglang_server: Any, tmp_path: Path) -> list[Path]:
    return [make_variant(sglang_server.model, tmp_path / f"variant-{seed}", seed) for seed in (10, 11)]


@pytest.fixture
def start(sglang_server: Any, tmp_path: Path) -> Iterator[Any]:
    """`start("tensor")` → a verifying WeightSync. The server ends with the weights that it began with."""
    started: list[WeightSync] = []

    def make(kind: Any) -> WeightSync:
        options: dict[str, Any] = dict(
            bucket_bytes=40_000, device=torch.device("cpu"), verify=True, timeout=60
        )
        started.append(
            make_sync(
                kind,
                lambda: [sglang_server.server],
                directory=tmp_path / "weights",
                model=sglang_server.model,
                **options,
            )
        )
        return started[-1]

    yield make
    make("tensor").load(stored(sglang_server.model), 0)
    for sync in started:
        sync.close()


def stored(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    yield from load_file(directory / "model.safetensors").items()


@pytest.mark.parametrize("index", range(4), ids=["disk", "tensor", "broadcast", "broadcast again"])
def test_a_server_generates_with_the_weights_of_a_trainer_on_two_ranks(
    results: list[dict[str, Any]], index: int
) -> None:
    check(results[index])


@pytest.mark.parametrize("index", range(4), ids=["disk", "tensor", "broadcast", "broadcast again"])
def test_a_server_generates_with_the_experts_of_a_trainer_on_two_ranks(
    results_of_experts: list[dict[str, Any]], index: int
) -> None:
    check(results_of_experts[index])


def check(result: dict[str, Any]) -> None:
    assert result["before"]["gap"] > 0.1, "it had these weights before"
    assert result["after"]["gap"] <= 1e-4
    assert [v["version"] for v in result["after"]["versions"]] == [str(result["version"])]


@pytest.mark.parametrize("kind", ["disk", "tensor", "broadcast"])
def test_a_generation_goes_on_over_a_sync_and_says_which_token_is_whose(
    kind: str, sglang_server: Any, variants: list[Path], start: Any
) -> None:
    server: Server = sglang_server.server
    first, second = (load(variant) for variant in variants)
    sync = start(kind)
    sync.load(stored(variants[0]), 1)
    prompts = [[3 + i, 5, 7] for i in range(8)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(generate, server, prompt, LONG) for prompt in prompts]
        wait_until_generating(server, len(prompts))
        sync.load(stored(variants[1]), 2)
        done = [answer.result() for answer in answers]
    num_old = 0
    for prompt, answer in zip(prompts, done, strict=True):
        tokens = answer["output_ids"]
        old, new = answer["meta_info"]["weight_versions"]
        assert (old["version"], new["version"]) == ("1", "2")
        assert (old["start"], old["end"], new["end"]) == (0, new["start"], LONG)
        reported = np.array([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
        split = old["end"]
        num_old += split
        assert np.abs(reported[:split] - logprobs(first, prompt, tokens)[:split]).max(initial=0) <= 1e-4
        assert np.abs(reported[split:] - logprobs(second, prompt, tokens)[split:]).max() <= 1e-4
        assert np.abs(reported[split:] - logprobs(first, prompt, tokens)[split:]).max() > 0.1
    assert num_old > 0


def wait_until_generating(server: Server, num: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        loads = server.get("/v1/loads")["loads"]
        if sum(load["num_running_reqs"] for load in loads) == num:
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["disk", "tensor", "broadcast"])
def test_one_wrong_byte_is_noticed(kind: str, sglang_server: Any, variants: list[Path], start: Any) -> None:
    sync = start(kind)
    plain = sync.transport.start

    def corrupt(bucket: Any) -> Any:
        for part in bucket.parts:
            if part.name == "model.layers.1.self_attn.k_proj.weight":
                bucket.data[part.start] ^= 1
        return plain(bucket)

    sync.transport.start = corrupt
    with pytest.raises(
        EngineError, match=r"1 weights are not the policy's: model.layers.1.self_attn.qkv_proj.weight"
    ):
        sync.load(stored(variants[0]), 5)
    sync.transport.start = plain
    sync.load(stored(variants[0]), 6)
    answer = generate(sglang_server.server, [4, 5, 6], 8)
    assert gap(load(variants[0]), [4, 5, 6], answer) <= 1e-4


def test_a_weight_that_does_not_fit_is_a_refusal_and_the_next_sync_works(
    sglang_server: Any, variants: list[Path], start: Any
) -> None:
    sync = start("broadcast")  # not tensors: the server ends where one does not fit
    wrong = [
        (name, weight[:-1] if name == "model.norm.weight" else weight) for name, weight in stored(variants[0])
    ]
    with pytest.raises(
        EngineError, match=r"/update_weights_from_distributed answered 400.*Attempted to load weight"
    ):
        sync.load(iter(wrong), 7)
    sync.load(stored(variants[1]), 8)
    answer = generate(sglang_server.server, [4, 5, 6], 8)
    assert gap(load(variants[1]), [4, 5, 6], answer) <= 1e-4
