"""The order of calls, and every fault, against servers of this process that take weights as SGLang does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dapo.assemble import make_engine
from dapo.config import ConfigError
from dapo.engine.checksums import Checksums, gpu_digest
from dapo.engine.control import Server
from dapo.engine.weight_sync import WeightSync, make_sync
from dapo.types import EngineError
from tests.distributed.launch import measured
from tests.sglang.conftest import QWEN2, server_config
from tests.sglang.weight_server import MALFORMED, WeightServer

KINDS = ["disk", "broadcast", "tensor"]
UPDATE = {
    "disk": "/update_weights_from_disk",
    "broadcast": "/update_weights_from_distributed",
    "tensor": "/update_weights_from_tensor",
}
CPU = torch.device("cpu")


def make_weights(seed: int) -> list[tuple[str, torch.Tensor]]:
    """Odd sizes, two dtypes, one tensor larger than a bucket, one that is a view."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7,), (3, 5), (60, 9), (1,), (11, 2), (4, 4, 4), (5,), (40,)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[3], tensors[4] = tensors[3].bfloat16(), tensors[4].T
    return [(f"model.w{i}.weight", tensor) for i, tensor in enumerate(tensors)]


@pytest.fixture
def servers() -> Iterator[list[WeightServer]]:
    with WeightServer() as first, WeightServer() as second:
        yield [first, second]


@pytest.fixture
def start(tmp_path: Path, servers: list[WeightServer]) -> Iterator[Any]:
    """`start("disk")` → a WeightSync of those of `servers` that live."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN2))
    started: list[WeightSync] = []

    def make(kind: Any, timeout: float = 10.0) -> WeightSync:
        def workers() -> list[Server]:
            return [Server(server.url) for server in servers if not server.is_dead.is_set()]

        started.append(
            make_sync(
                kind,
                workers,
                bucket_bytes=600,
                device=CPU,
                directory=tmp_path / "weights",
                model=model,
                timeout=timeout,
            )
        )
        return started[-1]

    yield make
    for sync in started:
        sync.close()


def assert_holds(server: WeightServer, version: int) -> None:
    expected = dict(make_weights(version))
    assert server.weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert server.weights[name].dtype == tensor.dtype
        assert torch.equal(server.weights[name], tensor), name
    assert server.version == str(version)
    assert not server.is_paused and not server.is_open


@pytest.mark.parametrize("kind", KINDS)
def test_every_server_holds_the_weights_of_every_sync(
    kind: str, servers: list[WeightServer], start: Any
) -> None:
    sync = start(kind)
    for version in (1, 2, 3):
        sync.load(iter(make_weights(version)), version)
        for server in servers:
            assert_holds(server, version)
            assert len(server.groups) == 2 * (kind == "broadcast")


@pytest.mark.parametrize("kind", KINDS)
def test_generation_pauses_before_the_first_weight_and_goes_on_after_the_cache_is_flushed(
    kind: str, servers: list[WeightServer], start: Any
) -> None:
    start(kind).load(iter(make_weights(1)), 1)
    calls = [call for call in servers[0].calls if call != "/init_weights_update_group"]
    session = kind != "disk"
    updates = calls.count(UPDATE[kind])
    assert calls == [
        "/pause_generation",
        *["/begin_weight_update"] * session,
        *[UPDATE[kind]] * updates,
        *["/end_weight_update"] * session,
        "/flush_cache",
        "/update_weight_version",
        "/continue_generation",
    ]
    assert updates > 1 or kind == "disk"


@pytest.mark.parametrize("kind", KINDS)
def test_servers_generate_until_the_first_bucket_is_filled_or_all_files_are_written(
    kind: str, servers: list[WeightServer], start: Any, tmp_path: Path
) -> None:
    sync, drawn, at_pause = start(kind), list[str](), list[tuple[int, bool]]()
    num_weights, plain = len(make_weights(1)), servers[0].post

    def post(path: str, body: dict[str, Any]) -> None:
        if path == "/pause_generation":
            at_pause.append((len(drawn), (tmp_path / "weights/000001/model.safetensors.index.json").exists()))
        plain(path, body)

    servers[0].post = post  # type: ignore[method-assign]
    sync.prepare(1)
    assert servers[0].calls == ["/init_weights_update_group"] * 2 * (kind == "broadcast")
    sync.load((drawn.append(name) or (name, tensor) for name, tensor in make_weights(1)), 1)
    [(num_drawn, is_written)] = at_pause
    if kind == "disk":
        assert num_drawn == num_weights and is_written
    else:
        assert 1 <= num_drawn < num_weights, "the rest is gathered while buckets travel"
    assert not servers[0].is_paused and len(drawn) == num_weights


@pytest.mark.parametrize("kind", KINDS)
def test_servers_go_on_with_the_old_weights_if_gathering_fails_at_once(
    kind: str, servers: list[WeightServer], start: Any
) -> None:
    sync = start(kind)
    sync.load(iter(make_weights(1)), 1)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield make_weights(2)[0]
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        sync.load(broken(), 2)
    for server in servers:
        assert_holds(server, 1)
    sync.load(iter(make_weights(3)), 3)
    for server in servers:
        assert_holds(server, 3)


REFUSABLE = [(kind, "/pause_generation") for kind in KINDS] + [
    ("broadcast", "/begin_weight_update"),
    ("tensor", "/begin_weight_update"),
    ("broadcast", "/init_weights_update_group"),
]


@pytest.mark.parametrize(("kind", "path"), REFUSABLE)
def test_a_refusal_is_known_before_a_weight_is_sent(
    kind: str, path: str, servers: list[WeightServer], start: Any
) -> None:
    servers[1].faults[path] = ["refuse", "refuse"]
    sync, drawn = start(kind, timeout=3), []
    with pytest.raises(EngineError, match=f"{servers[1].url}{path} answered 400.*not today"):
        sync.load((drawn.append(name) or (name, tensor) for name, tensor in make_weights(1)), 1)
    if path == "/init_weights_update_group":
        assert drawn == [], "before a rank enters a collective"
    assert not any(server.weights for server in servers)
    servers[1].faults.clear()
    sync.load(iter(make_weights(2)), 2)
    for server in servers:
        assert_holds(server, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["refuse", "silence", "die"])
def test_a_server_that_fails_half_way_is_one_error_and_the_next_sync_works(
    kind: str, fault: str, servers: list[WeightServer], start: Any
) -> None:
    sync = start(kind, timeout=2)
    sync.load(iter(make_weights(1)), 1)
    servers[1].faults[UPDATE[kind]] = [fault] if kind == "disk" else [None, fault]
    with pytest.raises(EngineError) as error:
        sync.load(iter(make_weights(2)), 2)
    assert servers[1].url in str(error.value)
    assert "\n" not in str(error.value)
    if fault == "refuse":
        assert "not today" in str(error.value)
    assert servers[0].is_paused, "its weights are partly new"
    if fault == "silence":
        servers[1].die()
    sync.load(iter(make_weights(3)), 3)
    assert_holds(servers[0], 3)
    if fault == "refuse":
        assert_holds(servers[1], 3)


CALLS = [
    "/server_info", "/openapi.json", "/model_info", "/pause_generation", "/begin_weight_update",
    UPDATE["tensor"], "/end_weight_update", "/flush_cache", "/update_weight_version", "/weights_checker",
    "/continue_generation",
]  # fmt: skip
WORDS = ("garbage", "half a JSON", "empty", "deep JSON", "half a character")  # what /flush_cache may say


@pytest.mark.parametrize("fault", MALFORMED)
@pytest.mark.parametrize("path", CALLS)
def test_a_malformed_answer_is_one_error_and_the_next_sync_works(
    path: str, fault: str, servers: list[WeightServer], start: Any
) -> None:
    sync = start("tensor")
    sync.verify = path == "/weights_checker"
    servers[0].faults[path] = [fault] * 2  # the update is opened a second time
    if path == "/flush_cache" and fault in WORDS:
        sync.load(iter(make_weights(1)), 1)
    else:
        with pytest.raises(EngineError) as error:
            sync.load(iter(make_weights(1)), 1)
        assert str(error.value).startswith(servers[0].url + path) and "\n" not in str(error.value)
        status = str(MALFORMED[fault][0])
        assert status in str(error.value) or status == "200"
    servers[0].faults.clear()
    sync.verify = False
    sync.load(iter(make_weights(2)), 2)
    for server in servers:
        assert_holds(server, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_answer_half_way_is_one_error_by_every_transport(
    kind: str, fault: str, servers: list[WeightServer], start: Any
) -> None:
    sync = start(kind)
    servers[1].faults[UPDATE[kind]] = [fault] if kind == "disk" else [None, fault]
    with pytest.raises(EngineError, match=f"{servers[1].url}{UPDATE[kind]}"):
        sync.load(iter(make_weights(1)), 1)
    sync.load(iter(make_weights(2)), 2)
    for server in servers:
        assert_holds(server, 2)


@pytest.mark.parametrize("path", ["/pause_generation", UPDATE["tensor"], "/flush_cache"])
def test_an_answer_of_a_byte_now_and_then_is_late(path: str, servers: list[WeightServer], start: Any) -> None:
    servers[1].faults[path] = ["slow"]
    with pytest.raises(EngineError, match=f"{servers[1].url}{path}: timed out"):
        start("tensor", timeout=1).load(iter(make_weights(1)), 1)


@pytest.mark.parametrize(
    ("about", "missing"),
    [({"tp_size": 1}, "pp_size"), ({"tp_size": "two"}, "tp_size"), ({"tp_size": None}, "tp_size")],
)
def test_a_field_that_is_missing_is_named(
    about: dict[str, Any], missing: str, servers: list[WeightServer], start: Any
) -> None:
    servers[0].get = lambda path: about | {"weight_version": "0"}  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=f"{servers[0].url}/server_info answered without {missing}: {{"):
        start("tensor").prepare(0)


def test_checksums_of_too_few_ranks_are_an_error(servers: list[WeightServer], start: Any) -> None:
    sync = start("tensor")
    sync.verify = True
    for ranks in ([], [{}], [{"checksums": None}]):
        servers[0].answer = lambda path, ranks=ranks: json.dumps(
            {"success": True, "status": "ok", "ranks": ranks}
        ).encode()  # type: ignore[misc]
        with pytest.raises(
            EngineError,
            match=f"{servers[0].url}/weights_checker answered without checksums of 1 tensor ranks",
        ):
            sync.load(iter(make_weights(1)), 1)


def test_a_session_that_a_broken_sync_left_open_is_closed(servers: list[WeightServer], start: Any) -> None:
    servers[0].is_open = True
    start("tensor").load(iter(make_weights(1)), 1)
    assert_holds(servers[0], 1)


def test_a_server_that_was_started_anew_joins_a_new_group(servers: list[WeightServer], start: Any) -> None:
    sync = start("broadcast")
    sync.load(iter(make_weights(1)), 1)
    servers[1].groups.clear()  # as a new process at the same address
    servers[1].version = "default"
    sync.load(iter(make_weights(2)), 2)
    for server in servers:
        assert_holds(server, 2)
        assert len(server.groups) == 2


def test_a_version_that_did_not_arrive_is_noticed(servers: list[WeightServer], start: Any) -> None:
    plain = servers[1].post
    servers[1].post = lambda path, body: None if path == "/update_weight_version" else plain(path, body)  # type: ignore[method-assign]
    with pytest.raises(
        EngineError, match=f"{servers[1].url} says that it holds weights default, after a sync of 1"
    ):
        start("tensor").load(iter(make_weights(1)), 1)


def test_a_server_without_sessions_is_asked_for_none(start: Any, servers: list[WeightServer]) -> None:
    servers[0].has_sessions = False
    start("broadcast").load(iter(make_weights(1)), 1)
    assert_holds(servers[0], 1)
    assert not [call for call in servers[0].calls if call in ("/begin_weight_update", "/end_weight_update")]
    assert "/begin_weight_update" in servers[1].calls


def test_a_version_that_was_not_run_is_said_once(
    servers: list[WeightServer], start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    servers[0].sglang = servers[1].sglang = "0.5.10"
    for _ in range(2):
        start("tensor").prepare(0)
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        "warning: a server is SGLang 0.5.10; this trainer was run with 0.5.23 only: "
        "with the server's Python, pip install sglang==0.5.23"
    )


def test_a_layout_that_cannot_be_served_is_refused(servers: list[WeightServer], start: Any) -> None:
    about, plain = servers[0].get("/server_info"), servers[0].get
    servers[0].get = lambda path: about if path == "/server_info" else plain(path)  # type: ignore[method-assign]
    for name, value, says in (
        ("dp_size", 2, "has tp-size 1, dp-size 2, pp-size 1"),
        ("tp_size", 0, "has tp-size 0"),
        ("pp_size", -1, "has tp-size 1, dp-size 1, pp-size -1"),
        ("tp_size", True, "answered without tp_size"),
    ):
        about = plain("/server_info") | {name: value}
        with pytest.raises(EngineError, match=f"{servers[0].url}.* {says}"):
            start("tensor").prepare(0)


def test_a_refusal_of_many_lines_is_quoted_as_one(servers: list[WeightServer], start: Any) -> None:
    servers[0].faults["/pause_generation"] = ["many lines"]
    with pytest.raises(
        EngineError, match=f"{servers[0].url}/pause_generation refused: out of memory"
    ) as error:
        start("tensor").load(iter(make_weights(0)), 0)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


COLOCATED = [
    "/pause_generation",
    "/release_memory_occupation kv_cache weights cuda_graph",
    "/resume_memory_occupation weights",
    "/pause_generation",
    "/begin_weight_update",
    "/end_weight_update",
    "/resume_memory_occupation kv_cache cuda_graph",
    "/flush_cache",
    "/update_weight_version",
    "/continue_generation",
]


def test_memory_is_resumed_weights_first_and_the_cache_after_the_update(
    servers: list[WeightServer], start: Any
) -> None:
    servers[0].has_memory_saver = True
    sync = start("tensor")
    for version in (1, 2):  # before any sync, and after one
        servers[0].calls.clear()
        sync.release()
        sync.release()
        sync.load(iter(make_weights(version)), version)
        assert_holds(servers[0], version)
        assert [call for call in servers[0].calls if call != UPDATE["tensor"]] == COLOCATED
    assert not [call for call in servers[1].calls if "memory" in call], "it does not share the trainer's GPUs"


@pytest.mark.parametrize("kind", KINDS)
def test_no_bucket_is_held_when_servers_take_the_memory_for_their_caches(
    kind: str, servers: list[WeightServer], start: Any
) -> None:
    servers[0].has_memory_saver = True
    sync, held = start(kind), list[bool]()
    buckets_of_sync, plain_start, plain_post = list[StorageWeakRef](), sync.transport.start, servers[0].post

    def watched(bucket: Any) -> Any:
        buckets_of_sync.append(StorageWeakRef(bucket.data.untyped_storage()))
        return plain_start(bucket)

    def post(path: str, body: dict[str, Any]) -> None:
        if path == "/resume_memory_occupation" and "kv_cache" in body["tags"]:
            held.extend(not ref.expired() for ref in buckets_of_sync)
        plain_post(path, body)

    sync.transport.start, servers[0].post = watched, post  # type: ignore[method-assign]
    sync.release()
    sync.load(iter(make_weights(1)), 1)
    assert len(held) == len(buckets_of_sync) > 2 and not any(held)


def test_a_sync_that_breaks_off_resumes_nothing_twice(servers: list[WeightServer], start: Any) -> None:
    servers[0].has_memory_saver = True
    servers[1].faults["/pause_generation"] = ["refuse"]
    sync = start("tensor")
    sync.release()
    with pytest.raises(EngineError, match="not today"):
        sync.load(iter(make_weights(1)), 1)
    sync.load(iter(make_weights(2)), 2)
    assert_holds(servers[0], 2)
    resumed = [call for call in servers[0].calls if call.startswith("/resume")]
    assert resumed == ["/resume_memory_occupation weights", "/resume_memory_occupation kv_cache cuda_graph"]


def test_a_server_that_was_started_anew_since_has_nothing_to_resume(
    servers: list[WeightServer], start: Any
) -> None:
    servers[0].has_memory_saver = True
    sync = start("tensor")
    sync.load(iter(make_weights(1)), 1)
    sync.release()
    servers[0].version = "default"
    sync.load(iter(make_weights(2)), 2)
    assert_holds(servers[0], 2)
    assert not [call for call in servers[0].calls if call.startswith("/resume")]


def test_servers_give_up_the_memory_that_they_share_before_the_policy_is_built(
    servers: list[WeightServer], tmp_path: Path
) -> None:
    servers[0].has_memory_saver = True
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    config = server_config(tmp_path, tmp_path, urls=[server.url for server in servers], weight_sync="tensor")
    engine = make_engine(config, SimpleNamespace(device=CPU), lambda: False)  # type: ignore[arg-type]
    try:
        assert servers[0].calls == COLOCATED[:2] and servers[1].calls == []
        assert engine.is_colocated
    finally:
        engine.close()


def test_disk_keeps_one_whole_directory_that_a_server_could_start_from(
    servers: list[WeightServer], start: Any, tmp_path: Path
) -> None:
    sync = start("disk")
    for version in (7, 8):
        sync.load(iter(make_weights(version)), version)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["000008"]
    whole = tmp_path / "weights" / "000008"
    assert json.loads((whole / "config.json").read_text()) == QWEN2
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in make_weights(8))
    assert len(set(index["weight_map"].values())) > 1


def test_weights_that_cannot_be_written_are_one_error_before_a_weight_is_asked_for(
    servers: list[WeightServer], start: Any, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_text("a file in the way")
    with pytest.raises(EngineError, match=r"cannot be written to .*weights"):
        start("disk").prepare(1)


def test_a_disk_that_hangs_is_one_error(servers: list[WeightServer], start: Any, tmp_path: Path) -> None:
    sync = start("disk", timeout=1)
    sync.prepare(1)
    path = tmp_path / "weights/.partial/model-00001.safetensors"
    os.mkfifo(path)  # opening it waits for a reader
    try:
        with pytest.raises(EngineError, match=f"writing weights to {path}: not done after 1 s"):
            sync.load(iter(make_weights(1)), 1)
    finally:
        with open(path, "rb") as reader:  # so that the thread ends
            reader.read()


def sha(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def test_checksums_are_of_the_parameters_as_a_server_shards_them() -> None:
    rng = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": (16, 8), "self_attn.k_proj": (8, 8), "self_attn.v_proj": (8, 8),
        "self_attn.o_proj": (8, 16), "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12), "input_layernorm": (8,),
    }  # fmt: skip
    layer = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    vocab = rng.normal(size=(70, 8)).astype(np.float32)
    checksums = Checksums([1, 2, 4], num_kv_heads=2)
    for name in sorted(layer):  # not the order in which a server fuses them
        checksums.add(f"model.layers.0.{name}.weight", torch.from_numpy(layer[name]))
    checksums.add("model.embed_tokens.weight", torch.from_numpy(vocab))
    checksums.add("lm_head.weight", torch.from_numpy(vocab))
    q, k, v, o, gate, up, down, norm = layer.values()
    padded = np.concatenate([vocab, np.zeros((58, 8), np.float32)])
    for size in (1, 2, 4):
        rows = [[np.split(x, size)[rank] for x in (q, gate, up, padded)] for rank in range(size)]
        heads = [
            [np.split(x, min(size, 2))[rank * min(size, 2) // size] for x in (k, v)] for rank in range(size)
        ]
        columns = [
            [np.ascontiguousarray(np.split(x, size, axis=1)[rank]) for x in (o, down)] for rank in range(size)
        ]
        expected = [
            {
                "model.layers.0.self_attn.qkv_proj.weight": sha(rows[rank][0], *heads[rank]),
                "model.layers.0.self_attn.o_proj.weight": sha(columns[rank][0]),
                "model.layers.0.mlp.gate_up_proj.weight": sha(rows[rank][1], rows[rank][2]),
                "model.layers.0.mlp.down_proj.weight": sha(columns[rank][1]),
                "model.layers.0.input_layernorm.weight": sha(norm),
                "model.embed_tokens.weight": sha(rows[rank][3]),
                "lm_head.weight": sha(rows[rank][3]),
            }
            for rank in range(size)
        ]
        assert checksums.differences(expected) == []
        expected[-1]["model.layers.0.input_layernorm.weight"] = "0"
        del expected[0]["model.embed_tokens.weight"]
        assert checksums.differences(expected) == [
            "model.embed_tokens.weight",
            "model.layers.0.input_layernorm.weight",
        ]


def test_checksums_of_experts_are_of_all_of_a_layer_together() -> None:
    rng = np.random.default_rng(0)
    shapes = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
    experts = [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(3)
    ]
    router = rng.normal(size=(3, 8)).astype(np.float32)
    checksums = Checksums([1, 2], num_kv_heads=2, num_experts=3)
    checksums.add("model.layers.0.mlp.gate.weight", torch.from_numpy(router))
    for expert in (2, 0, 1):  # in any order
        for name, weight in experts[expert].items():
            checksums.add(f"model.layers.0.mlp.experts.{expert}.{name}.weight", torch.from_numpy(weight))
    for size in (1, 2):
        expected = [
            {
                "model.layers.0.mlp.gate.weight": sha(router),
                "model.layers.0.mlp.experts.w13_weight": sha(
                    *(
                        np.split(expert[part], size)[rank]
                        for expert in experts
                        for part in ("gate_proj", "up_proj")
                    )
                ),
                "model.layers.0.mlp.experts.w2_weight": sha(
                    *(
                        np.ascontiguousarray(np.split(expert["down_proj"], size, axis=1)[rank])
                        for expert in experts
                    )
                ),
            }
            for rank in range(size)
        ]
        assert checksums.differences(expected) == []


@pytest.mark.parametrize(
    ("length", "dtype", "digest"),
    [
        (1, torch.float32, "f615cbc75aec9145"),
        (7, torch.bfloat16, "9b6d2cf3c31e1e24"),  # not a whole number of words
        (8193, torch.bfloat16, "04d7d9bf9ba91c15"),
        (20001, torch.float32, "3347f73f142e128f"),  # several tiles
    ],
)
def test_the_digest_for_gpus_is_what_sglangs_kernel_computes(
    length: int, dtype: torch.dtype, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # the values: SGLang 0.5.23's own kernel, under Triton's interpreter
    data = (torch.arange(length) * 0.37 - 5).to(dtype).view(torch.uint8)
    assert gpu_digest(data) == digest
    monkeypatch.setattr("dapo.engine.checksums.TILES_AT_ONCE", 1)
    assert gpu_digest(data) == digest


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("refused_at_first", "/begin_weight_update answered 400"),
        ("refused_half_way", "/update_weights_from_distributed answered 400"),
        ("silent_half_way", "took more than 5 s"),
        ("dead_half_way", "/update_weights_from_distributed"),
        ("garbage_at_first", "/model_info answered what is not JSON: <html>"),
        ("half_a_500_half_way", "/update_weights_from_distributed answered 500"),
        ("half_a_json_half_way", "/update_weights_from_distributed answered what is not JSON"),
        ("empty_half_way", "/update_weights_from_distributed answered without success: nothing"),
        ("slow_half_way", "took more than 5 s"),
    ],
)
def test_a_sync_that_fails_ends_a_run_on_two_ranks_with_one_line_and_a_checkpoint(
    name: str, says: str
) -> None:
    result = measured("tests.sglang.sync_fails", 2)[name]
    assert [rank["status"] for rank in result["ranks"]] == [1, 1]
    lines = "".join(rank["printed"] for rank in result["ranks"]).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert (
        says in lines[0]
        and "http://127.0.0.1:" in lines[0]
        and "the same command goes on from there" in lines[0]
    )
    assert result["saved"] == ["step-000002"]


def test_the_same_command_goes_on_after_a_sync_that_failed() -> None:
    result = measured("tests.sglang.sync_fails", 2)["no_fault"]
    assert [rank["status"] for rank in result["ranks"]] == [0, 0]
    assert "step-000003" in result["saved"]


def test_a_mixture_of_experts_whose_checksums_are_not_known_is_refused_before_any_server_is_asked(
    tmp_path: Path,
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | experts | {"model_type": "qwen3_moe"}))
    options: dict[str, Any] = dict(
        bucket_bytes=600, directory=tmp_path / "weights", model=tmp_path, timeout=10
    )
    with pytest.raises(ConfigError, match=r"engine.verify_weights=true: .* is a mixture of experts"):
        make_sync("tensor", list, verify=True, device=torch.device("cuda"), **options)
    for device, verify in (("cuda", False), ("cpu", True)):
        make_sync("tensor", list, verify=verify, device=torch.device(device), **options).close()
