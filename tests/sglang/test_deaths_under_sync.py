"""A server that dies while weights travel is left out; the sync is made anew with those that live."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dapo.config import Limits
from dapo.engine.control import Server
from dapo.engine.external import ExternalServers
from dapo.engine.fleet import Fleet
from dapo.engine.sglang import SGLangEngine
from dapo.engine.weight_sync import make_sync
from dapo.types import EngineError, WeightsLost
from tests.sglang.conftest import server_config
from tests.sglang.test_servers import refuses, until
from tests.sglang.test_weight_faults import CPU, KINDS, UPDATE, assert_holds, make_weights
from tests.sglang.weight_server import WeightServer

CALLS = {kind: ["/pause_generation", "/begin_weight_update", UPDATE[kind]] for kind in KINDS}
CALLS["disk"].remove("/begin_weight_update")
AFTER = ["/flush_cache", "/update_weight_version", "/continue_generation"]


@pytest.fixture
def servers() -> Iterator[list[WeightServer]]:
    with WeightServer() as first, WeightServer() as second, WeightServer() as third:
        yield [first, second, third]


@pytest.fixture
def engine(
    request: pytest.FixtureRequest, fake: Path, servers: list[WeightServer], monkeypatch: pytest.MonkeyPatch
) -> Iterator[SGLangEngine]:
    """Over the three servers, by the transport that the test names."""
    monkeypatch.setattr("dapo.engine.sglang.DEATH_NOTICED", 0.0)
    said: list[str] = []
    external = ExternalServers(server_config(fake, fake, urls=[s.url for s in servers]), said.append)
    sync = make_sync(
        request.getfixturevalue("kind"),
        lambda: external.workers,
        bucket_bytes=600,
        device=CPU,
        directory=fake / "weights",
        model=fake,
        timeout=5,
    )
    made = SGLangEngine(external, sync, 4, Limits(60.0), 1000)
    yield made
    made.close()


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for kind in KINDS for path in CALLS[kind] + AFTER])
def test_a_server_that_dies_at_any_call_of_a_sync_is_left_out_of_the_next_which_all_others_get(
    kind: str, path: str, engine: SGLangEngine, servers: list[WeightServer]
) -> None:
    engine.load_weights(iter(make_weights(1)), 1)
    servers[1].faults[path] = [None, "die"] if path == UPDATE[kind] and kind != "disk" else ["die"]
    with pytest.raises(WeightsLost, match=f"^{servers[1].url} died under a weight sync: .*{path}") as error:
        engine.load_weights(iter(make_weights(2)), 2)
    assert "\n" not in str(error.value)
    for version in (2, 3):  # the same again, and the next step's
        engine.load_weights(iter(make_weights(version)), version)
        for server in (servers[0], servers[2]):
            assert_holds(server, version)
            assert len(server.groups) % 2 == 0
    assert [worker.url for worker in engine.servers.workers] == [servers[0].url, servers[2].url]
    assert engine.servers.generate_urls == [endpoint.url for endpoint in engine.client.endpoints]


@pytest.mark.parametrize("kind", KINDS)
def test_when_all_die_under_a_sync_the_next_one_says_so(
    kind: str, engine: SGLangEngine, servers: list[WeightServer]
) -> None:
    engine.load_weights(iter(make_weights(1)), 1)
    for server in servers:
        server.faults[UPDATE[kind]] = ["die"]
    with pytest.raises(WeightsLost):
        engine.load_weights(iter(make_weights(2)), 2)
    for server in servers:
        if not server.is_dead.is_set():  # calls to it came after the first failure
            server.die()
    with pytest.raises(EngineError, match="no server is left") as error:
        engine.load_weights(iter(make_weights(2)), 2)
    assert not isinstance(error.value, WeightsLost)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_by_servers_that_all_live_is_not_made_anew(
    kind: str, engine: SGLangEngine, servers: list[WeightServer]
) -> None:
    servers[1].faults[UPDATE[kind]] = ["refuse"]
    with pytest.raises(EngineError, match="not today") as error:
        engine.load_weights(iter(make_weights(1)), 1)
    assert not isinstance(error.value, WeightsLost)


def test_a_started_server_that_dies_under_a_sync_is_started_again_and_joins_the_next_but_one(
    start: Callable[..., Fleet], fake: Path
) -> None:
    said: list[str] = []
    started = start(said, servers=2)
    started.wait()
    where: dict[str, Any] = {"directory": fake / "weights", "model": fake, "device": torch.device("cpu")}
    sync = make_sync("tensor", lambda: started.workers, bucket_bytes=64, timeout=20, **where)
    engine = SGLangEngine(started, sync, 4, Limits(60.0), 1000)
    dead, alive = started.workers
    [victim] = psutil.Process(started.local[0].process.pid).children()

    def weights(is_fatal: bool) -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(8):
            if is_fatal and i == 4:
                victim.kill()
                until(lambda: refuses(dead))
            yield f"w{i}", torch.ones(9)

    try:
        with pytest.raises(WeightsLost, match=f"{dead.url} died under a weight sync"):
            engine.load_weights(weights(is_fatal=True), 1)
        assert started.router
        until(lambda: f"'{dead.url}'" not in str(listed(started)))  # at once: somebody may take its port
        engine.load_weights(weights(is_fatal=False), 1)
        assert alive.get("/model_info")["weight_version"] == "1"
        until(lambda: any("up again" in line for line in said))
        engine.load_weights(weights(is_fatal=False), 2)
        assert len(started.workers) == 2
        for worker in started.workers:
            assert worker.get("/model_info")["weight_version"] == "2"
    finally:
        engine.close()


def listed(started: Fleet) -> list[str]:

    assert started.router
    return [worker["url"] for worker in Server(started.router.url).get("/workers")["workers"]]
