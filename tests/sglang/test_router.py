"""The real router before fake servers: what it makes of their failures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dapo import http
from dapo.config import Limits
from dapo.engine.arguments import child_environment, module_command
from dapo.engine.control import KEY_VARIABLE, Server
from dapo.engine.intake import NO_WORKER
from dapo.engine.process import LOOPBACK, ServerProcess, free_port
from dapo.engine.router import OPTIONS
from dapo.engine.sglang import SGLangEngine
from tests.sglang import fake_server as fake
from tests.sglang.fake_engine import Fakes, assert_answered, collect
from tests.sglang.fake_server import FakeServer, requests
from tests.sglang.test_servers import until


class Routed(Fakes):
    """The engine's servers: fakes behind a real router."""

    def __init__(self, folder: Path, python: Path, *fakes: FakeServer, **others: int):
        super().__init__(*fakes)
        self.workers = [Server(server.url, "key") for server in fakes]
        options = {
            "host": LOOPBACK,
            "prometheus-port": free_port(),
            "worker-urls": [server.url for server in fakes],
        }
        command = module_command(str(python), "sglang_router.launch_router", OPTIONS | others | options)
        environment = child_environment(has_cuda=True) | {KEY_VARIABLE: "key"}
        self.process = ServerProcess("router", command, folder / "router.log", environment)

    @property
    def generate_urls(self) -> list[str]:
        return [self.process.url]

    def key_of(self, url: str) -> str:  # type: ignore[override]
        return "key"

    def num_healthy(self) -> int:
        listed = Server(self.process.url, "key").get("/workers", fields={"workers": list})["workers"]
        return sum(worker["is_healthy"] for worker in listed)

    def close(self) -> None:
        self.process.stop()
        super().close()


def test_a_worker_that_is_late_with_its_health_goes_on_taking_requests_and_a_dead_one_is_none(
    sglang_python: Path, tmp_path: Path
) -> None:
    late = FakeServer()
    often = {"health-check-interval-secs": 1, "health-failure-threshold": 1}
    routed = Routed(tmp_path, sglang_python, late, **often)
    try:
        until(routed.process.is_up, limit=120)
        until(lambda: routed.num_healthy() == 1, limit=120)
        late.probe_seconds = 8.0  # where the router's default is a limit of 5
        num_probes = late.num_probes
        until(lambda: late.num_probes >= num_probes + 2, limit=60)
        assert routed.num_healthy() == 1
        late.die()
        until(lambda: routed.num_healthy() == 0, limit=60)
        url = routed.process.url + "/generate"
        answer = http.call("POST", url, b'{"input_ids": [1]}', timeout=10, key="key")
        assert answer.status == 503 and NO_WORKER in answer.body
    finally:
        routed.close()


def test_what_fails_behind_the_router_is_asked_again_and_never_under_the_same_id(
    sglang_python: Path, tmp_path: Path
) -> None:
    faults = [fake.status(500), fake.status(503), fake.closed]
    routed = Routed(tmp_path, sglang_python, FakeServer(faults), FakeServer(faults))
    try:
        until(routed.process.is_up, limit=120)
        until(lambda: routed.num_healthy() == 2, limit=120)
        engine = SGLangEngine(routed, routed, 8, Limits(60.0), 1000)  # type: ignore[arg-type]
        try:
            wanted = requests(40)
            stream = engine.stream()
            stream.submit(wanted)
            assert_answered(collect(stream), wanted)
        finally:
            engine.close()
    finally:
        routed.close()
    asked = Counter(body["rid"] for server in routed.fakes for body in server.bodies)
    assert len(asked) >= 40 + len(faults) and set(asked.values()) == {1}
