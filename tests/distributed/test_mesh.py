"""What each of four ranks has after every call of the Mesh: two tensor ranks × two data-parallel ranks."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from dapo.mesh import GPU_ENVIRONMENT, WITH_SERVERS, Mesh, set_gpu_environment
from tests.distributed.launch import measured

FAILED = ["FailedElsewhere", "'x'", None]
EXPECTED: dict[str, list[Any]] = {
    "layout": [[rank, 4, 2, 2, rank // 2, rank == 0] for rank in range(4)],
    "shards of ranks": [[0, 0, 1, 1]] * 4,
    "scatter": ["<0>", "<0>", "<1>" * 1000, "<1>" * 1000],
    "on_main": [7] * 4,
    "on_main_only": [{"only": "here"}, None, None, None],
    # the signal travels with the exception
    "interrupted": [["Interrupted", "", 15]] * 4,
    "engine": [["EngineError", "server 3", None]] * 4,
    "bug": [["KeyError", "'x'", None], FAILED, FAILED, FAILED],
    "together": [None] * 4,
    "together failed": [["EngineError", "server 4", None]] * 4,
    "called": [[rank, rank] for rank in range(4)],
    "gather": [[{"rank": rank} for rank in range(4)], [], [], []],
    "sum": [[4.0, 1111.0]] * 4,
    "sum_by_key": [{"b": 6.0, "a": 6.0}] * 4,
    "max": [-1.0] * 4,
    "store": [True] * 4,
    "sum in the store": [10] * 4,
    "another store": [0] * 4,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_rank_has_what_the_call_promises(name: str) -> None:
    assert measured("tests.distributed.mesh", 4)[name]["ranks"] == EXPECTED[name]


def test_bytes_received_are_those_of_the_last_scatter() -> None:
    ranks = measured("tests.distributed.mesh", 4)["received"]["ranks"]
    most, total = (ranks[0][f"perf/bytes_received{suffix}"] for suffix in ("_max", ""))
    assert ranks == [ranks[0]] * 4
    # two ranks received 3,000 characters, one received 3, the main rank nothing; pickled
    assert 3000 < most < 3100 and 2 * most < total < 2 * most + 100


def test_exactly_one_rank_is_the_first_to_fail() -> None:
    results = measured("tests.distributed.mesh", 4)
    assert sum(results["first"]["ranks"]) == 1 and not any(results["second"]["ranks"])


def test_a_rank_whose_store_has_ended_prints_its_error() -> None:
    class Ended:
        def add(self, key: str, count: int) -> int:
            raise RuntimeError("Connection reset by peer")

    mesh = object.__new__(Mesh)
    mesh._store, mesh._number = Ended(), 0
    assert mesh.is_first_to_fail()


def test_another_rank_s_own_error_is_raised_there() -> None:
    mesh = object.__new__(Mesh)
    mesh.is_main = False
    with pytest.raises(ZeroDivisionError):
        mesh.together(lambda: 1 / 0)  # type: ignore[arg-type,return-value]


def test_the_environment_of_gpus_is_set_where_it_is_not_set_already(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = SimpleNamespace(kind="sglang", weight_sync="broadcast")
    monkeypatch.setattr(os, "environ", {})
    set_gpu_environment()
    assert os.environ == GPU_ENVIRONMENT
    os.environ |= dict.fromkeys(GPU_ENVIRONMENT, "mine")
    set_gpu_environment(engine)
    assert os.environ == dict.fromkeys(GPU_ENVIRONMENT, "mine") | WITH_SERVERS


def test_a_world_that_the_layout_does_not_divide_is_refused() -> None:
    for name, text, _ in measured("tests.distributed.mesh", 4)["not divisible"]["ranks"]:
        assert name == "ConfigError" and "world size 4 is not a multiple of parallel.tensor=3" in text
