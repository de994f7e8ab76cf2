"""A key is sent to a port only while the process listens there for which it was made."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dapo.config import ConfigError, Limits
from dapo.engine import fleet, listener, process
from dapo.engine.fleet import Fleet
from dapo.engine.listener import Listener, Taken
from dapo.engine.sglang import SGLangEngine
from dapo.http import NoAnswer
from dapo.types import EngineError, WeightsLost
from tests.sglang.fake_engine import wait_for
from tests.sglang.fake_server import requests
from tests.sglang.test_servers import processes_of, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SGLang runs on Linux")
ME = f"process {os.getpid()} of user {pwd.getpwuid(os.getuid()).pw_name}"
SERVER = (
    "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); "
)
FORKED = SERVER + "import os; os.fork() and (s.close(), print('closed', flush=True)); sys.stdin.read()"


class Stranger:
    """Listens at a port, answers everything with 200, and keeps what it got: it is no server of the run's."""

    def __init__(self, port: int = 0):
        self.keys: list[str | None] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stranger = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stranger.keys.append(self.headers["Authorization"])
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_POST = do_DELETE = do_GET

            def log_message(self, *arguments: object) -> None: ...

        return Handler

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    made = Stranger()
    yield made
    made.close()


@pytest.mark.parametrize("num_servers", [1, 2])
def test_a_server_whose_port_is_taken_while_it_starts_gets_another_and_the_key_goes_nowhere_else(
    start: Callable[..., Fleet],
    fake: Path,
    stranger: Stranger,
    num_servers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ports, said = [stranger.port], list[str]()
    monkeypatch.setattr(
        process, "free_port", lambda avoid=0: ports.pop() if ports else fleet.free_port(avoid)
    )
    started = start(said, servers=num_servers)
    started.wait()
    assert f"server 0: port {stranger.port} is held by {ME}; starting it on another one" in said
    assert [worker.post("/generate")["authorization"] for worker in started.workers] == [
        f"Bearer {started.key}"
    ] * num_servers
    assert set(stranger.keys) <= {None}
    with pytest.raises(NoAnswer, match="it has been stopped"):
        started.key_of(f"http://127.0.0.1:{stranger.port}")


def test_ports_that_are_always_taken_are_one_error_that_names_who_takes_them(
    start: Callable[..., Fleet],
    fake: Path,
    stranger: Stranger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (process, fleet):
        monkeypatch.setattr(module, "free_port", lambda avoid=0: stranger.port)
    started = start()
    with pytest.raises(ConfigError, match=rf"^server 0: port {stranger.port} is held by {ME}, .*3 starts"):
        started.wait()
    assert set(stranger.keys) <= {None} and processes_of(fake) == []


def test_who_takes_the_place_of_a_server_that_died_gets_neither_key_nor_request(
    start: Callable[..., Fleet],
    fake: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "CHECK_EVERY", 3.0)  # it is long before the death is noticed
    started = start()
    started.wait()
    sync = SimpleNamespace(prepared=0, prepare=lambda version: None, close=lambda: None)
    sync.load = lambda weights, version: None
    engine = SGLangEngine(started, sync, 4, Limits(60.0), 1000)  # type: ignore[arg-type]
    [server] = started.workers
    processes_of(fake)[1].kill()
    until(lambda: not started.local[0].listener.is_held())
    thief = Stranger(started.local[0].port)
    try:
        stream = engine.stream()
        stream.submit(requests(3))
        with pytest.raises(EngineError, match=f"port {thief.port} is held by {ME}"):
            server.post("/begin_weight_update")
        wait_for(lambda: "is held by" in engine.client.endpoints[0].fault)
        with pytest.raises(WeightsLost):
            list(stream.completed())
        assert started.refresh() is True
        assert started.workers[0].post("/generate")["authorization"] == f"Bearer {started.key}"
        assert thief.keys == []
    finally:
        engine.close()
        thief.close()


def test_a_router_that_lost_its_port_moves_and_is_found_after_a_sync(
    start: Callable[..., Fleet],
    fake: Path,
) -> None:
    started = start(servers=2)
    started.wait()
    assert started.router
    before = started.router.url
    held = started.router.listener.is_held
    started.router.process.kill()
    until(lambda: started.router and not _is_bound(started.router.port))
    thief = Stranger(int(before.rpartition(":")[2]))
    try:
        until(lambda: started.router and started.router.url != before and held and _is_up(started.router))
        with pytest.raises(WeightsLost, match="the router had to move to"):
            started.check()
        assert started.refresh() is False
        started.serve()
        assert started.generate_urls == [started.router.url] != [before]
        assert set(thief.keys) <= {None}
    finally:
        thief.close()


def _is_up(router: Any) -> bool:
    """False also in the moment in which it still looks at the port that it has lost."""
    try:
        return bool(router.is_up())
    except listener.Taken:
        return False


def _is_bound(port: int) -> bool:
    return any(True for _ in listener._listening(port))


def test_a_port_belongs_to_a_session_while_one_of_its_processes_holds_the_socket() -> None:
    """The process that opened it may close it and leave it to its child."""
    guardian = subprocess.Popen(
        [sys.executable, "-c", FORKED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert guardian.stdout and guardian.stdin
    port = int(guardian.stdout.readline())
    assert guardian.stdout.readline() == b"closed\n"
    ours = Listener(f"http://127.0.0.1:{port}", guardian)
    assert ours.is_held()
    theirs = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        with pytest.raises(Taken, match=rf"port {port} is held by process \d+ of user"):
            Listener(ours.url, theirs).require()
    finally:
        theirs.kill()
        theirs.wait()
    guardian.stdin.close()
    guardian.wait()
    wait_for(lambda: not _is_bound(port))
    with pytest.raises(NoAnswer, match=f"nobody listens at port {port}"):
        ours.require()


def test_a_guardian_that_has_ended_has_no_session_though_its_id_lives_on() -> None:
    ended: Any = SimpleNamespace(pid=os.getsid(0), poll=lambda: 0)
    alive: Any = SimpleNamespace(pid=os.getsid(0), poll=lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as held:
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        Listener(url, alive).require()
        with pytest.raises(Taken, match=ME):
            Listener(url, ended).require()


def test_a_socket_that_is_still_held_is_not_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: Any = SimpleNamespace(pid=os.getsid(0), poll=lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as held:
        ours = Listener(f"http://127.0.0.1:{held.getsockname()[1]}", alive)
        ours.require()
        monkeypatch.setattr(listener, "_listening", lambda port: iter(()))
        ours.require()
    with pytest.raises(NoAnswer):
        ours.require()


def test_processes_whose_session_is_hidden_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, session = os.getpid(), os.getsid(0)

    def getsid(process: int) -> int:
        if process != ours:
            raise PermissionError
        return session

    monkeypatch.setattr("os.getsid", getsid)
    alive: Any = SimpleNamespace(pid=session, poll=lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as held:
        assert Listener(f"http://127.0.0.1:{held.getsockname()[1]}", alive).is_held()


def test_a_process_that_we_may_not_look_into_is_named_by_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = " 0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 {} 0 999999999 1 0 100"
    alive: Any = SimpleNamespace(pid=os.getsid(0), poll=lambda: None)
    monkeypatch.setattr(listener, "TABLES", [tmp_path / "tcp", tmp_path / "tcp6"])
    for user, name in ((0, pwd.getpwuid(0).pw_name), (12345678, "12345678")):
        (tmp_path / "tcp").write_text("  sl  local_address …\n" + row.format(user) + "\n")
        with pytest.raises(Taken, match=f"^port 8080 is held by a process of user {name}$"):
            Listener("http://127.0.0.1:8080", alive).require()
        with pytest.raises(NoAnswer, match="nobody listens at port 8081"):
            Listener("http://127.0.0.1:8081", alive).require()
