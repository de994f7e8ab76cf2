"""Command lines of a run's servers: from the config, and from the arguments that SGLang lists."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dapo.config import Config, ConfigError
from dapo.engine import arguments
from dapo.engine.arguments import (
    check_broadcast,
    child_environment,
    command_line,
    gpu_sets,
    known_arguments,
    server_options,
)
from dapo.engine.external import check_server
from tests.sglang.conftest import server_config

FLAG = "enable-deterministic-inference"
KNOWN = {
    "model-path": ("model-path", "value"),
    "model": ("model-path", "value"),
    "tp-size": ("tp-size", "value"),
    "tensor-parallel-size": ("tp-size", "value"),
    "sleep-on-idle": ("sleep-on-idle", "nothing"),
    "enable-tf32-matmul": ("enable-tf32-matmul", "yes or no"),
    "cuda-graph-bs-decode": ("cuda-graph-bs-decode", "list"),
}


def test_arguments_are_asked_of_sglang_once(fake: Path) -> None:
    asked = known_arguments(sys.executable, has_cuda=False)
    assert {name: asked[name] for name in KNOWN} == KNOWN
    [kept] = (fake / "cache/dapo").glob("sglang-arguments-*.json")
    kept.write_text('{"other": ["other", "value"]}')
    known_arguments.cache_clear()
    assert known_arguments(sys.executable, has_cuda=False) == {"other": ("other", "value")}


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"model-path": ["model-',
        b"[1, 2]",
        b"7",
        b'{"other": 5}',
        b'{"other": ["a", "b"]}',
        b"[" * 10**5,
    ],
)
def test_kept_arguments_that_are_damaged_are_asked_for_anew(fake: Path, damage: bytes) -> None:
    whole = known_arguments(sys.executable, has_cuda=False)
    [kept] = (fake / "cache/dapo").glob("sglang-arguments-*.json")
    kept.write_bytes(damage)
    known_arguments.cache_clear()
    assert known_arguments(sys.executable, has_cuda=False) == whole
    assert kept.read_bytes() != damage


def test_arguments_need_no_cache_that_can_be_written(fake: Path) -> None:
    (fake / "cache").write_text("a file in the way")
    assert "tp-size" in known_arguments(sys.executable, has_cuda=False)


@pytest.mark.parametrize("printed", ["", "Goodbye!", '{"other": 5}'])
def test_an_sglang_that_lists_no_arguments_is_one_error(
    fake: Path, printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "LIST_ARGUMENTS", f"print({printed!r}, end='')")
    with pytest.raises(
        ConfigError, match=r"^engine.python=.*: the arguments of its SGLang 0\.5\.23 cannot be listed: .+"
    ):
        known_arguments(sys.executable, has_cuda=False)


def test_a_python_without_sglang_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    known_arguments.cache_clear()
    with pytest.raises(
        ConfigError, match=r"engine.python=.* has no SGLang that works: .*PackageNotFoundError"
    ):
        known_arguments(f"{sys.base_prefix}/bin/python3", has_cuda=False)  # no environment's
    with pytest.raises(ConfigError, match=r"engine.python=.*nowhere: No such file"):
        known_arguments(str(tmp_path / "nowhere"), has_cuda=False)


@pytest.mark.parametrize(
    ("passed", "words"),
    [
        ({"tp-sise": 2}, "engine.sglang.tp-sise: SGLang has no such argument; did you mean tp-size?"),
        ({"model": "x"}, "engine.sglang.model is set by the run: set policy.model"),
        ({"sleep-on-idle": "please"}, "engine.sglang.sleep-on-idle='please': true or false is expected"),
        ({"tp_size": True}, "engine.sglang.tp_size=True: a value is expected"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_starts(
    tmp_path: Path, passed: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        server_options(server_config(tmp_path, tmp_path, sglang=passed), KNOWN, has_cuda=False)
    assert str(error.value) == words


def test_arguments_become_a_command_line(tmp_path: Path) -> None:
    passed = {
        "tensor_parallel_size": 2,
        "sleep-on-idle": False,
        "enable-tf32-matmul": False,
        "cuda-graph-bs-decode": [1, 2],
    }
    line = " ".join(
        command_line(server_options(server_config(tmp_path, tmp_path, sglang=passed), KNOWN, has_cuda=False))
    )
    for part in (
        "--tp-size 2",
        "--cuda-graph-bs-decode 1 2",
        "--no-enable-tf32-matmul",
        "--device cpu",
        "--dtype float32",
    ):
        assert part in line
    for part in ("--sleep-on-idle", "--enable-tf32-matmul"):
        assert f" {part}" not in line
    assert "--host 127.0.0.1" in line
    assert f"--max-total-tokens {64 * 512}" in line, "what max_concurrent samples of the longest kind take"
    with_cuda = " ".join(command_line(server_options(server_config(tmp_path, tmp_path), {}, has_cuda=True)))
    assert "cpu" not in with_cuda and "--max-total-tokens" not in with_cuda
    assert command_line({"preferred-sampling-params": {"top_k": 1}}) == [
        "--preferred-sampling-params",
        '{"top_k": 1}',
    ]


def deterministic(config: Config) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"deterministic": True})})


def test_servers_of_a_deterministic_run_are_deterministic_where_they_can_be(tmp_path: Path) -> None:
    def options(has_cuda: bool = True, **engine: Any) -> dict[str, Any]:
        config = deterministic(server_config(tmp_path, tmp_path, **engine))
        return server_options(config, KNOWN | {FLAG: (FLAG, "nothing")}, has_cuda)

    assert options()[FLAG] is True
    assert FLAG not in options(has_cuda=False), "there SGLang would not start"
    with pytest.raises(ConfigError, match=f"engine.sglang.{FLAG}=false with run.deterministic=true"):
        options(sglang={FLAG: False})
    with pytest.raises(ConfigError, match="of servers one of tp-size 2 fixes"):
        options(sglang={"tp-size": 2})
    assert options(sglang={"tp-size": 2}, weight_sync="tensor")[FLAG] is True


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({}, "http://s runs without --enable-deterministic-inference"),
        ({"enable_deterministic_inference": False}, "http://s runs without --enable-deterministic-inference"),
        ({"enable_deterministic_inference": True, "tp_size": 2}, "of servers one of tp-size 2 fixes"),
        ({"enable_deterministic_inference": True, "tp_size": 1}, ""),
    ],
)
def test_an_external_server_says_whether_it_is_deterministic(
    info: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    server: Any = SimpleNamespace(url="http://s", get=lambda path: {"version": "0.5.23"} | info)
    config = server_config(tmp_path, tmp_path)
    assert check_server(server, config), "nobody asked"
    with pytest.raises(ConfigError, match=words) if words else nullcontext():
        check_server(server, deterministic(config))


def test_servers_take_the_gpus_after_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert gpu_sets(2, {"tp-size": 2}) == [["4", "5"], ["6", "7"]]
    assert gpu_sets(4, {}) == [["4"], ["5"], ["6"], ["7"]]
    assert gpu_sets(2, {"tp-size": 4, "enable-memory-saver": True}) == [
        ["0", "1", "2", "3"],
        ["4", "5", "6", "7"],
    ]
    assert gpu_sets(2, {"tp-size": 2}, sees_main=True) == [["4", "5", "0"], ["6", "7", "0"]], (
        "the main rank's GPU comes last"
    )
    assert gpu_sets(1, {"tp-size": 2, "enable-memory-saver": True}, sees_main=True) == [["0", "1"]]
    with pytest.raises(ConfigError, match=r"engine.servers=3 of 2 GPUs .* after the trainer's 4: here are 8"):
        gpu_sets(3, {"tp-size": 2})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,5,7,GPU-a,GPU-b")
    assert gpu_sets(1, {"tp-size": 2}) == [["GPU-a", "GPU-b"]]


def test_a_broadcast_that_nccl_would_refuse_is_refused_before_a_server_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(arguments, "_ask", lambda *arguments, **options: "2.30.7")
    broadcast, tensor = (
        server_config(tmp_path, tmp_path, weight_sync=kind) for kind in ("broadcast", "tensor")
    )
    check_broadcast(broadcast, {}, sys.executable)
    with pytest.raises(
        ConfigError,
        match=r"engine.python=/other/python has NCCL 2.30.7, the trainer 2.28.9.* engine.weight_sync=disk",
    ):
        check_broadcast(broadcast, {}, "/other/python")
    with pytest.raises(ConfigError, match=r"no two processes on one GPU; set engine.weight_sync=tensor"):
        check_broadcast(broadcast, {"enable-memory-saver": True}, sys.executable)
    check_broadcast(tensor, {"enable-memory-saver": True}, "/other/python")


def test_a_server_does_not_take_the_trainers_place_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    assert not theirs.keys() & child_environment(has_cuda=True).keys()
    assert "PATH" in child_environment(has_cuda=True)


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "all_proxy"])
def test_servers_and_routers_know_of_no_proxy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be sent prompts and key, by a router to its servers or by a server to itself."""
    for each in (name, name.upper(), name.capitalize()):
        monkeypatch.setenv(each, "http://proxy:3128")
    assert not [each for each in child_environment(has_cuda=True) if each.lower() == name]
