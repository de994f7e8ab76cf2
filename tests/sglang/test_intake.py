"""The process that takes in answers: what it survives, how it ends, and what it says."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dapo import http
from dapo.engine import client
from dapo.engine.sglang import SGLangStream
from dapo.types import EngineError, Sampling, Stopped
from dapo.watch import forked, frames
from tests.sglang import fake_server as fake
from tests.sglang.fake_engine import assert_answered, collect, stream_of, wait_for
from tests.sglang.fake_server import FakeServer, requests

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.2)


def pid_of(stream: SGLangStream) -> int:
    process = stream.client.intake.process
    assert process and process.process.pid
    return process.process.pid


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def killing(stream_in: list[SGLangStream]) -> fake.Fault:
    """A server at whose first sight of a request the process that sent it is killed."""

    async def kill(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
        os.kill(pid_of(stream_in[0]), signal.SIGKILL)
        return await fake.nothing(server, request, body)

    return kill


def test_it_is_a_process_without_torch_that_signals_for_all_do_not_end() -> None:
    with stream_of(FakeServer()) as stream:
        pid = pid_of(stream)
        assert pid != os.getpid() and "torch" in Path("/proc/self/maps").read_text()
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            os.kill(pid, number)
        wanted = requests(10)
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
        assert pid_of(stream) == pid


def test_responses_larger_than_what_a_socket_holds_arrive_whole() -> None:
    wanted = requests(12, Sampling(1.0, 150_000, (fake.STOP,)))
    with stream_of(FakeServer(), max_concurrent=12) as stream:
        stream.submit(wanted)
        samples = collect(stream)
    assert_answered(samples, wanted)
    assert sum(sample.length for sample in samples) > 200_000


def test_a_key_is_sent_and_stands_neither_in_a_command_line_nor_in_an_error() -> None:
    async def quote(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
        return web.Response(status=403, text=f"{request.headers['Authorization']} is no key")

    with stream_of(FakeServer(afterwards=quote)) as stream:
        stream.engine.servers.key_of = lambda url: "5ecret"  # type: ignore[method-assign]
        stream.submit(requests(1))
        with pytest.raises(EngineError, match=r"refused request 0\.0 .*: 403 Bearer \*\*\* is no key"):
            collect(stream)
        assert "5ecret" not in Path(f"/proc/{pid_of(stream)}/cmdline").read_text()


def test_what_is_aborted_closes_its_connection() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server) as stream:
        stream.submit(requests(4))
        wait_for(lambda: server.num_asked == 4)
        stream.abort(["0.0", "1.1"])
        wait_for(lambda: server.num_asked == 2)


def test_an_abort_does_not_overtake_its_request() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server) as stream:
        os.kill(pid_of(stream), signal.SIGSTOP)
        try:
            stream.submit(requests(1))
            wait_for(lambda: bool(stream.client.endpoints[0].outstanding))
            stream.abort()
            wait_for(lambda: bool(stream.client.aborts))
            known = asyncio.run_coroutine_threadsafe(stream.client.finish_aborts(), http.loop())
            time.sleep(0.5)
            assert not known.done() and not server.aborted
        finally:
            os.kill(pid_of(stream), signal.SIGCONT)
        known.result(30)
        assert len(server.aborted) == 1 and server.num_asked == 0
        seen = len(server.bodies)
        server.afterwards = fake.well
        wanted = requests(1)
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
        assert len(server.bodies) == seen + 1


def test_an_abort_does_not_wait_long_for_a_process_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ABORT_TIMEOUT", 0.2)
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server) as stream:
        os.kill(pid_of(stream), signal.SIGSTOP)
        stream.submit(requests(1))
        wait_for(lambda: bool(stream.client.endpoints[0].outstanding))
        stream.abort()
        wait_for(lambda: len(server.aborted) == 1)


def test_after_its_death_it_is_started_again_and_asks_again(capfd: pytest.CaptureFixture[str]) -> None:
    streams: list[SGLangStream] = []
    server = FakeServer([fake.well, killing(streams)], seconds=0.02)
    wanted = requests(20)
    with stream_of(server) as stream:
        streams.append(stream)
        pid = pid_of(stream)
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
        assert pid_of(stream) != pid and not is_running(pid)
    err = capfd.readouterr().err
    assert "engine: the intake process ended (exit status -9); starting it again\n" in err
    assert re.search(rf"{server.url} failed, \d more .*: the intake process ended \(exit status -9\)\n", err)


def test_it_may_die_again_once_an_answer_has_come() -> None:
    streams: list[SGLangStream] = []
    kill = killing(streams)
    with stream_of(FakeServer([kill, kill, fake.well] * 2), max_concurrent=1) as stream:
        streams.append(stream)
        wanted = requests(4)
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)


def test_three_deaths_without_an_answer_are_one_error() -> None:
    streams: list[SGLangStream] = []
    server = FakeServer(afterwards=killing(streams))
    with stream_of(server, max_concurrent=1) as stream:
        streams.append(stream)
        stream.submit(requests(2))
        said = r"^the intake process ended \(exit status -9\), as did 2 before it without an answer$"
        with pytest.raises(EngineError, match=said):
            collect(stream)
        assert len(server.bodies) == 3
        with pytest.raises(EngineError, match=said):
            collect(stream)


def test_one_that_cannot_be_started_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(process: Any) -> None:
        raise BlockingIOError(11, "Resource\nunavailable")

    monkeypatch.setattr(forked, "start", fail)
    said = r"^the intake process could not be started: \[Errno 11\] Resource unavailable, as did 2"
    with pytest.raises(EngineError, match=said), stream_of(FakeServer()):
        pass


@pytest.mark.parametrize("missing", ["socket.socketpair", "threading.Thread.start"])
def test_one_that_cannot_be_started_again_is_an_error(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def fail(*given: Any) -> None:
        if missing == "socket.socketpair" or given[0].name.startswith("intake"):
            raise RuntimeError("there is none\nleft")
        start(*given)

    start = threading.Thread.start
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server) as stream:
        stream.submit(requests(3))
        wait_for(lambda: server.num_asked == 3)
        monkeypatch.setattr(f"dapo.engine.intake.{missing}", fail)
        os.kill(pid_of(stream), signal.SIGKILL)
        with pytest.raises(
            EngineError, match=r"^the intake process could not be started: there is none left$"
        ):
            collect(stream)


def test_one_that_sends_what_cannot_be_read_is_replaced(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def read(connection: socket.socket) -> Iterator[Any]:
        for number, message in enumerate(messages(connection)):
            if number == 2 and not failed:
                failed.append(True)
                raise pickle.UnpicklingError("invalid\nload key")
            yield message

    messages, failed = frames.messages, list[bool]()
    monkeypatch.setattr(frames, "messages", read)
    wanted = requests(8)
    with stream_of(FakeServer(), max_concurrent=2) as stream:
        pid = pid_of(stream)
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
        assert failed and not is_running(pid)
    assert "the intake process failed: invalid load key; starting it again\n" in capfd.readouterr().err


def test_closing_the_engine_ends_it_in_the_middle_of_requests() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server) as stream:
        stream.submit(requests(4))
        wait_for(lambda: server.num_asked == 4)
        pid = pid_of(stream)
        stream.engine.close()
        assert not is_running(pid)


def test_a_fork_of_the_trainer_that_ends_does_not_end_it() -> None:
    with stream_of(FakeServer()) as stream:
        pid, process = pid_of(stream), stream.client.intake.process
        assert process
        if not (child := os.fork()):
            process.end()
            os._exit(0)
        os.waitpid(child, 0)
        wanted = requests(4)
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
        assert pid_of(stream) == pid


TRAINER = """
import sys, time
from types import SimpleNamespace
from dapo.config import Limits
from dapo.engine.control import Server
from dapo.engine.sglang import SGLangEngine
from tests.sglang.fake_server import requests
servers = SimpleNamespace(
    workers=[Server(sys.argv[1])], generate_urls=[sys.argv[1]], key_of=lambda url: None, check=lambda: None
)
engine = SGLangEngine(servers, None, 4, Limits(60.0), 1000)
stream = engine.stream()
stream.submit(requests(3))
print(engine.client.intake.process.process.pid, flush=True)
list(stream.completed())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_a_trainer_that_is_killed(number: signal.Signals) -> None:
    server = FakeServer(afterwards=fake.nothing)
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, server.url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout
    pid = int(trainer.stdout.readline())
    wait_for(lambda: server.num_asked == 3)
    assert is_running(pid)
    trainer.send_signal(number)
    trainer.wait(30)
    wait_for(lambda: not is_running(pid))
    wait_for(lambda: server.num_asked == 0)
    server.stop()


# what goes wrong there


@pytest.fixture
def limit_of_forks() -> Any:
    """Sets the limit on open files of processes that are started meanwhile."""
    forkserver.ensure_running()
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    yield lambda soft: resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, before[1]))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_it_raises_its_own_limit_on_open_files(limit_of_forks: Callable[[int], None]) -> None:
    limit_of_forks(300)
    with stream_of(FakeServer(), FakeServer(), max_concurrent=5) as stream:
        assert stream.client.intake.arguments[1] == 10, "a connection for every request"
        soft, hard = resource.prlimit(pid_of(stream), resource.RLIMIT_NOFILE)
        assert soft == hard > 300


def test_too_few_open_files_stop_the_run() -> None:
    server = FakeServer()
    with stream_of(server) as stream:
        stream.submit(requests(1))
        collect(stream)  # everything is open that is needed besides
        pid = pid_of(stream)
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
        server.afterwards = fake.nothing
        stream.submit(requests(4, first=2))
        with pytest.raises(Stopped, match=f"no connection to {server.url}.*ulimit -n") as error:
            collect(stream)
        assert type(error.value) is Stopped


def test_a_fault_of_its_own_reaches_the_caller_with_its_traceback() -> None:
    [request] = requests(1)
    broken = replace(request, sampling=replace(request.sampling, stop_ids=(1, [])))  # type: ignore[arg-type]
    with stream_of(FakeServer()) as stream:
        stream.submit([broken])
        with pytest.raises(RuntimeError, match=r"(?s)in the intake process:.*generate\.py.*Error"):
            collect(stream)


@pytest.mark.parametrize("kept", [0, 3, frames.LENGTH, -1])
def test_a_frame_that_is_cut_off_is_none(kept: int) -> None:
    frame = frames.frame([(1, "all of it")])
    for text, whole in ((frame, [[(1, "all of it")]]), (frame[:kept], [])):
        ours, theirs = socket.socketpair()
        theirs.sendall(frame + text)
        theirs.close()
        assert list(frames.messages(ours)) == [[(1, "all of it")], *whole]
        ours.close()
