"""What each of four ranks has after every call of the Mesh: two tensor ranks × two data-parallel ranks."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dapo.config import ConfigError
from dapo.mesh import GPU_ENVIRONMENT, LARGE, MAX_PARTS, WITH_SERVERS, Mesh, set_gpu_environment
from tests.distributed.launch import measured

FAILED = ["FailedElsewhere", "'x'", None]
HOST = socket.gethostname()
OTHER_MOON = (
    f"the moon is not the same on all ranks: m0 on {HOST}, m1 on {HOST}; "
    f"the tide is not the same on all ranks: t0 on {HOST}, t1 on {HOST}: look again"
)
OTHER_CODE = (
    f"the code of dapo is not the same on all ranks: code 0 on {HOST}, code 1 on {HOST}: "
    "install the same version on all machines"
)
TOO_FEW = "1 shares, expected 2"


def large(share: int) -> list[Any]:
    """The share as tests.distributed.mesh prints it."""
    values = [100 * share + i for i in range(34)]
    values[-1] += 1
    return [f"share {share}", True, values, 0, [share, share + 1, share + 2]]


EXPECTED: dict[str, list[Any]] = {
    "layout": [[rank, 4, 2, rank // 2, 0, rank == 0] for rank in range(4)],
    "data ranks of ranks": [[0, 0, 1, 1]] * 4,
    "scatter": ["<0>", "<0>", "<1>" * 1000, "<1>" * 1000],
    "same": [None] * 4,
    "not the same": [["ConfigError", OTHER_MOON, None]] * 4,
    "other code": [["ConfigError", OTHER_CODE, None]] * 4,
    "large": [large(0), large(0), large(1), large(1)],
    "in a tree": [large(0)] * 4,
    "by stage": ["first", "first", "last", "last"],
    "bug by stage": [["EngineError", "server 6", None]] * 4,
    "bug in a tree": [["EngineError", "server 5", None]] * 4,
    # the ranks of the first share have it already
    "bug late": [
        ["KeyError", "'y'", None],
        "the first",
        ["FailedElsewhere", "'y'", None],
        ["FailedElsewhere", "'y'", None],
    ],
    "too few": [
        ["AssertionError", TOO_FEW, None],
        "only one",
        ["FailedElsewhere", TOO_FEW, None],
        ["FailedElsewhere", TOO_FEW, None],
    ],
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


def test_a_share_reaches_each_rank_of_its_tree_once() -> None:
    ranks = measured("tests.distributed.mesh", 4)["received in a tree"]["ranks"]
    most, total = (ranks[0][f"perf/bytes_received{suffix}"] for suffix in ("_max", ""))
    arrays = (MAX_PARTS + 2) * LARGE
    assert arrays < most < arrays + 10_000 and total == 3 * most


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
    engine = SimpleNamespace(kind="sglang", weight_sync="broadcast")
    config: Any = SimpleNamespace(engine=engine, run=SimpleNamespace(deterministic=False))
    monkeypatch.setattr(os, "environ", {})
    set_gpu_environment()
    assert os.environ == GPU_ENVIRONMENT
    os.environ |= dict.fromkeys(GPU_ENVIRONMENT, "mine")
    set_gpu_environment(config)
    assert os.environ == dict.fromkeys(GPU_ENVIRONMENT, "mine") | WITH_SERVERS


def test_a_deterministic_run_sets_what_adds_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    run, engine = SimpleNamespace(deterministic=True), SimpleNamespace(kind="embedded")
    config: Any = SimpleNamespace(engine=engine, run=run)
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(os, "environ", {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})
    set_gpu_environment(config)
    assert asked == [True]
    assert os.environ == GPU_ENVIRONMENT | {
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "NCCL_ALGO": "Ring",
    }
    os.environ["NCCL_ALGO"] = "Tree"
    with pytest.raises(ConfigError, match=r"NCCL_ALGO=Tree with run.deterministic=true: .*, or set Ring"):
        set_gpu_environment(config)
    run.deterministic = False
    set_gpu_environment(config)
    assert asked == [True]


def test_a_world_that_the_layout_does_not_divide_is_refused() -> None:
    for name, text, _ in measured("tests.distributed.mesh", 4)["not divisible"]["ranks"]:
        assert name == "ConfigError" and "world size 4 is not a multiple of parallel.tensor=3" in text
