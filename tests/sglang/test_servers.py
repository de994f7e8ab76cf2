"""Servers of a run: their arguments, what is reported when they fail, and that no process of theirs is left,
however the trainer ends.

Most of it with a stand-in for SGLang that is up in half a second (fake/); real servers are in
test_real_servers.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from dapo import clock
from dapo.config import ConfigError, Limits
from dapo.engine import fleet, process
from dapo.engine.control import KEY_VARIABLE, Server
from dapo.engine.external import check_server
from dapo.engine.fleet import Fleet
from dapo.engine.sglang import SGLangEngine
from dapo.engine.weight_sync import make_sync
from dapo.types import EngineError, WeightsLost
from dapo.watch import server as guardian
from tests.sglang.conftest import server_config
from tests.sglang.fake_server import FakeServer, requests, tokens_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SGLang runs on Linux")
ROOT = Path(__file__).parents[2]
TRAINER = """import pathlib, sys, time
from dapo.engine.fleet import make_servers
from tests.sglang.conftest import server_config
folder = pathlib.Path(sys.argv[1])
make_servers(server_config(folder, folder)).wait()
print("up", flush=True)
time.sleep(600)"""


def processes_of(folder: Path) -> list[psutil.Process]:
    """The guardians that log below `folder`, and everything under them."""
    guardians = [
        p
        for p in psutil.process_iter()
        if any(str(folder) in word for word in command_of(p)) and "watch/server.py" in str(command_of(p))
    ]
    return [*guardians, *(child for guardian in guardians for child in guardian.children(recursive=True))]


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def survivors(processes: list[psutil.Process]) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=10)[1]


def until(condition: Callable[[], Any], limit: float = 30) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_survives_the_trainer(fake: Path, end: signal.Signals) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(fake)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout and trainer.stdout.readline() == "up\n"
    family = processes_of(fake)
    assert len(family) == 3, "a guardian, a server, the server's child"
    trainer.send_signal(end)
    trainer.wait()
    assert survivors(family) == []


def test_nothing_survives_closing(start: Callable[..., Fleet], fake: Path) -> None:
    started = start()
    started.wait()
    family = processes_of(fake)
    assert len(family) == 3
    started.close()
    assert survivors(family) == []


def test_a_server_goes_with_its_guardian(start: Callable[..., Fleet], fake: Path) -> None:
    started = start()
    started.wait()
    guardian, server, child = processes_of(fake)
    guardian.kill()
    assert survivors([guardian, server]) == []
    child.kill()  # SGLang's own children watch their parent


def test_a_server_lives_on_though_its_log_cannot_be_written() -> None:
    command = [
        sys.executable,
        "-I",
        guardian.__file__,
        str(os.getpid()),
        "/dev/full",
        "sh",
        "-c",
        "echo said; sleep 0.5; exit 7",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


def test_a_start_is_silent_by_its_log_and_not_by_the_clock_on_the_wall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "server.log"
    log.write_text("of an earlier start\n")
    started = process.ServerProcess("server 0", ["sleep", "60"], log, dict(os.environ))
    try:
        passed, begin = 0.0, time.monotonic()
        monkeypatch.setattr(process.time, "monotonic", lambda: begin + passed)
        for wall in (0.0, 1e12):
            monkeypatch.setattr(process.time, "time", lambda wall=wall: wall)
            os.utime(log, (wall, wall))
            assert not started.is_silent()
        passed = 0.9 * process.SILENCE
        with log.open("a") as file:
            file.write("it loads\n")
        assert not started.is_silent()
        passed = 1.8 * process.SILENCE
        assert not started.is_silent()
        passed = 2.0 * process.SILENCE
        assert started.is_silent()
        log.unlink()
        assert started.is_silent()
        assert started.describe_progress().startswith(f"server 0, {2 * process.SILENCE:.0f} s: ")
    finally:
        monkeypatch.undo()
        started.stop()


def test_a_server_that_died_takes_part_from_the_next_sync_on(start: Callable[..., Fleet], fake: Path) -> None:
    said: list[str] = []
    started = start(said)
    started.wait()
    assert started.refresh() is False
    [before] = started.workers
    processes_of(fake)[1].kill()
    until(lambda: any("up again" in line for line in said))
    assert "server 0 was killed by signal 9" in said[-2] and "starting it again" in said[-2]
    assert started.generate_urls == [], "it has the initial weights"
    with pytest.raises(
        WeightsLost,
        match="no server has the policy's weights; those that were started again get them at the next sync",
    ):
        started.check()
    assert started.refresh() is True
    started.serve()
    [after] = started.workers
    assert after.url != before.url, "requests meant for the old one must not reach it"
    assert started.generate_urls == [after.url]
    assert after.post("/generate")["authorization"] == f"Bearer {started.key}"
    assert started.refresh() is False


def test_waiting_for_a_server_that_starts_again_is_progress(start: Callable[..., Fleet], fake: Path) -> None:
    started = start()
    started.wait()
    processes_of(fake)[1].kill()
    until(lambda: not started.workers)
    before, *_ = clock.progress()
    assert started.refresh() is True
    assert clock.progress()[0] > before


def test_a_server_that_stands_still_is_started_again(start: Callable[..., Fleet], fake: Path) -> None:
    said: list[str] = []
    started = start(said)
    started.wait()
    [before], family = started.workers, processes_of(fake)
    started.restart("http://127.0.0.1:1", "stood still for 5 s")
    started.restart(before.url, "stood still for 5 s")
    until(lambda: any("up again" in line for line in said))
    assert "server 0 stood still for 5 s: " in said[-2] and "starting it again" in said[-2]
    assert survivors(family) == []
    assert started.refresh() is True
    [after] = started.workers
    assert after.url != before.url
    time.sleep(1)
    assert "up again" in said[-1], "once"


def test_servers_that_return_routes_are_asked_themselves(start: Callable[..., Fleet], fake: Path) -> None:
    """SGLang's router passes no routes on."""
    started = start(servers=2, replay="rollout")
    started.wait()
    assert started.router is None and len(started.workers) == 2
    assert started.generate_urls == [worker.url for worker in started.workers]
    assert "--enable-return-routed-experts" in started.local[0].command


def test_a_router_that_died_is_started_again_under_a_sync(start: Callable[..., Fleet], fake: Path) -> None:
    said: list[str] = []
    started = start(said, servers=2)
    started.wait()
    assert started.router
    started.router.process.kill()
    started.router.process.wait()
    started.serve()
    listed = Server(started.router.url).get("/workers")["workers"]
    assert sorted(worker["url"] for worker in listed) == sorted(worker.url for worker in started.workers)
    assert any("router was killed by signal 9" in line and "starting it again" in line for line in said)


def test_a_router_that_does_not_come_back_is_one_error(
    start: Callable[..., Fleet], fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = start(servers=2)
    started.wait()
    assert started.router
    monkeypatch.setattr(fleet, "ROUTER_TIMEOUT", 2.0)
    monkeypatch.setattr(started.router, "has_ended", lambda: False)
    started.router.process.kill()
    started.router.process.wait()
    with pytest.raises(EngineError, match=rf"{started.router.url}/workers: .*, after 2 s; see .*router\.log"):
        started.serve()


def test_a_server_that_dies_just_before_a_sync_is_left_out_of_it(
    start: Callable[..., Fleet], fake: Path
) -> None:
    started = start(servers=2)
    started.wait()
    where: dict[str, Any] = {"directory": fake / "weights", "model": fake, "device": torch.device("cpu")}
    sync = make_sync("disk", lambda: started.workers, bucket_bytes=64, timeout=20, **where)
    engine = SGLangEngine(started, sync, 4, Limits(60.0), 1000)
    try:
        dead, alive = started.workers
        for version in (1, 2):
            try:
                engine.load_weights([("w", torch.ones(3))], version)
            except WeightsLost:  # it died, and its guardian had not noticed yet
                engine.load_weights([("w", torch.ones(3))], version)
            if version == 1:
                psutil.Process(started.local[0].process.pid).children()[0].kill()
                until(lambda: refuses(dead), limit=5)
        assert alive.get("/model_info")["weight_version"] == "2"
        assert dead.url not in [worker.url for worker in started.workers]
    finally:
        engine.close()


def refuses(server: Server) -> bool:
    try:
        server.get("/health")
    except EngineError:
        return True
    return False


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "FIRST_PAUSE", 0.1)


def test_a_server_that_cannot_start_again_stays_dead(
    start: Callable[..., Fleet], fake: Path, short_pauses: None
) -> None:
    said: list[str] = []
    started = start(said)
    started.wait()
    (fake / "broken").touch()
    processes_of(fake)[1].kill()
    until(lambda: not started.workers)
    with pytest.raises(
        EngineError,
        match=r"no server is left: server 0 ended with status 1: OSError: .* no model; see .*server-0\.log",
    ) as error:
        started.refresh()
    assert not isinstance(error.value, WeightsLost), "another sync would not help"
    assert "stays dead" in said[-1]
    assert [line.endswith("; starting it again") for line in said] == [True] * process.RESTARTS + [False]
    assert processes_of(fake) == []


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_what_the_only_server_was_asked_when_it_was_lost_is_asked_of_it_after_the_next_sync(
    start: Callable[..., Fleet], fake: Path, how: str
) -> None:
    started = start()
    started.wait()
    sync = SimpleNamespace(prepared=None, prepare=lambda version: None, close=lambda: None)
    sync.load = lambda weights, version: [
        worker.post("/update_weight_version", {"new_version": str(version)}) for worker in started.workers
    ]
    engine = SGLangEngine(started, sync, 4, Limits(60.0 if how == "killed" else 3.0), 1000)  # type: ignore[arg-type]
    stream = engine.stream()
    engine.load_weights([], 3)
    (fake / "hung").touch()
    wanted = requests(6)
    stream.submit(wanted)
    until(lambda: engine.client.endpoints[0].outstanding)
    if how == "killed":
        processes_of(fake)[1].kill()
    with pytest.raises(WeightsLost):
        list(stream.completed())
    stream.abort()
    (fake / "hung").unlink()
    engine.load_weights([], 3)
    stream.submit(wanted)
    found = {f"{sample.group}.{sample.index}": sample.tokens.tolist() for sample in stream.completed()}
    assert found == {request.id: tokens_of(request).tolist() for request in wanted}
    engine.close()


def test_a_start_that_fails_is_tried_again(
    start: Callable[..., Fleet], fake: Path, short_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port that another process takes first, then no process at all; the log has gone, too."""
    said: list[str] = []
    started = start(said)
    started.wait()
    begin, failures = subprocess.Popen, [BlockingIOError(11, "Resource temporarily unavailable")]

    def popen(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return begin(*arguments, **options)

    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", 0))
        occupied.listen()
        ports = [occupied.getsockname()[1]]
        monkeypatch.setattr(
            fleet, "free_port", lambda avoid=0: ports.pop() if ports else process.free_port(avoid)
        )
        monkeypatch.setattr(process.subprocess, "Popen", popen)
        shutil.rmtree(fake / "run/servers")
        processes_of(fake)[1].kill()
        until(lambda: any("up again" in line for line in said))
    assert "killed by signal 9: its log cannot be read" in said[0]
    assert "server 0 cannot be started: [Errno 11]" in said[1]
    assert not any("stays dead" in line for line in said)
    started.refresh()
    started.serve()
    assert started.workers[0].post("/generate")


def test_servers_are_watched_though_no_news_can_be_printed(start: Callable[..., Fleet], fake: Path) -> None:
    started = start()
    started.wait()

    def full(text: str) -> None:
        raise OSError(28, "No space left on device")

    started.say = full
    processes_of(fake)[1].kill()
    until(lambda: started.local[0].state == "up")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("model", ["server 0 ended with status 1", "OSError", "holds no model", "server-0.log"]),
        ("argument", ["server 0 ended with status 2", "--tensor-parallel-size: invalid int value: 'two'"]),
    ],
)
def test_a_server_that_does_not_start_is_one_clear_line(
    start: Callable[..., Fleet], fake: Path, what: str, words: list[str]
) -> None:
    if what == "model":
        (fake / "broken").touch()
    started = start(sglang={"tp-size": "two"} if what == "argument" else {})
    with pytest.raises(ConfigError) as error:
        started.wait()
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)
    assert processes_of(fake) == []


def test_the_key_is_wanted_and_shows_nowhere(start: Callable[..., Fleet], fake: Path) -> None:
    started = start()
    started.wait()
    assert started.workers[0].post("/generate")["authorization"] == f"Bearer {started.key}"
    log = fake / "run/servers/server-0.log"
    until(lambda: "server_args=" in log.read_text())
    assert "'api_key': '***'" in log.read_text() and str(started.key) not in log.read_text()
    assert log.stat().st_mode & 0o077 == 0
    assert not [process for process in processes_of(fake) if str(started.key) in str(command_of(process))]


def test_servers_of_other_people_are_checked_and_left_alone(
    start: Callable[..., Fleet], fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = start()
    theirs.wait()
    monkeypatch.setenv(KEY_VARIABLE, str(theirs.key))
    said: list[str] = []
    url = theirs.workers[0].url
    ours = start(said, urls=[url + "/"])
    ours.wait()
    assert said == [f"{url}: SGLang 0.5.23, {fake}"]
    assert ours.generate_urls == [url]
    ours.close()
    assert theirs.workers[0].get("/health"), "still up"

    (fake / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(
        ConfigError,
        match=rf"engine.urls: {url} serves \['Qwen2ForCausalLM'\], policy.model=.* is \['LlamaForCausalLM'\]",
    ):
        check_server(Server(url), server_config(fake, fake))
    theirs.close()
    with pytest.raises(ConfigError, match=rf"engine.urls: {url}/model_info: .*refused.*is it up"):
        check_server(Server(url), server_config(fake, fake))


def test_a_url_that_is_named_twice_is_one_server(start: Callable[..., Fleet], fake: Path) -> None:
    server = FakeServer()
    try:
        started = start([], urls=[server.url, server.url + "/", server.url])
        started.wait()
        assert started.refresh() is False
        assert started.generate_urls == [server.url]
    finally:
        server.die()


def test_a_model_that_cannot_be_trained_here_can_be_sent_to_servers(tmp_path: Path) -> None:
    fields = {"model_type": "gemma2", "num_key_value_heads": 4, "attn_logit_softcapping": 50.0}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    where: dict[str, Any] = {"directory": tmp_path, "model": tmp_path, "device": torch.device("cpu")}
    sync = make_sync("disk", lambda: [], bucket_bytes=64, timeout=20, **where)
    assert (sync.num_kv_heads, sync.num_experts) == (4, 0)


def test_a_server_of_other_people_that_died_is_left_out_until_it_answers(
    start: Callable[..., Fleet], fake: Path
) -> None:
    said: list[str] = []
    first, second = FakeServer(), FakeServer()
    try:
        started = start(said, urls=[first.url, second.url])
        started.wait()
        assert started.refresh() is False
        del said[:]
        first.die()
        assert [started.refresh(), started.refresh()] == [True, False]
        assert started.generate_urls == [second.url]
        assert (
            len(said) == 1
            and f"{first.url}/model_info" in said[0]
            and said[0].endswith("left out until it answers at a sync of weights")
        )
        first.start()
        assert started.refresh() is True
        assert started.generate_urls == [first.url, second.url]
        assert said[1:] == [f"{first.url} answers again"]
        first.die()
        second.die()
        with pytest.raises(EngineError, match=rf"no server is left: .*{first.url}.*{second.url}"):
            started.refresh()
    finally:
        first.stop()
        second.stop()
