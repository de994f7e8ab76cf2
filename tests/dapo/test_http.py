"""The HTTP client: an answer is whole and in time or one clear error, it is always direct, and waiting can be
interrupted.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dapo import http
from dapo.reward import remote
from dapo.reward.worker import Job
from dapo.types import Interrupted, Stopped

Reply = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # with its 5 the system drops connections of a busy machine


@pytest.fixture
def server() -> Iterator[Callable[[Reply], str]]:
    """`server(reply)` → the URL of a server that answers every request by calling reply(handler)."""
    started: list[ThreadingHTTPServer] = []

    def start(reply: Reply) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                reply(self)

            do_POST = do_DELETE = do_GET

            def log_message(self, *arguments: object) -> None: ...

        started.append(Server(("127.0.0.1", 0), Handler))
        started[-1].daemon_threads = True
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_port}"

    yield start
    for each in started:
        each.shutdown()
        each.server_close()


def send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, announced: int | None = None, **headers
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body) if announced is None else announced))
    handler.end_headers()
    handler.wfile.write(body)


def echo(handler: BaseHTTPRequestHandler) -> None:
    body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    seen = {"method": handler.command, "path": handler.path, "body": body.decode()}
    names = ("Authorization", "Content-Type", "Connection", "Cookie")
    send(handler, 200, json.dumps(seen | {name: handler.headers[name] for name in names}).encode())


def silent(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(20)


def test_a_request_arrives_as_it_was_made(server) -> None:
    url = server(echo)
    status, body = http.call("POST", url + "/a?b=1", b'{"x": 1}', timeout=5, key="secret")
    assert status == 200 and json.loads(body) == {
        "method": "POST",
        "path": "/a?b=1",
        "body": '{"x": 1}',
        "Authorization": "Bearer secret",
        "Content-Type": "application/json",
        "Connection": "close",
        "Cookie": None,
    }
    seen = json.loads(http.call("DELETE", url, timeout=5).body)
    assert (seen["method"], seen["body"], seen["Authorization"], seen["Content-Type"]) == (
        "DELETE",
        "",
        None,
        None,
    )


def test_a_body_of_many_megabytes_arrives_whole(server) -> None:
    def count(handler: BaseHTTPRequestHandler) -> None:
        send(handler, 200, str(len(handler.rfile.read(int(handler.headers["Content-Length"])))).encode())

    assert http.call("POST", server(count), b"x" * 30_000_001, timeout=30).body == b"30000001"


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("status", [200, 204, 301, 302, 303, 307, 308, 404, 429, 500])
def test_any_status_is_an_answer_and_no_redirect_is_followed(server, status: int, method: str) -> None:
    visits: list[str] = []
    elsewhere = server(lambda handler: visits.append(handler.path) or send(handler, 200, b"elsewhere"))
    body = b"" if status == 204 else b"said"
    url = server(lambda handler: send(handler, status, body, Location=elsewhere))
    assert http.call(method, url, b"{}", timeout=5, key="secret") == (status, body)
    assert visits == []


def chunks(count: int) -> Reply:
    """A reply of `count` chunks of 64 KiB whose length is not announced; it ends when nobody reads."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            for _ in range(count):
                handler.wfile.write(b"10000\r\n" + bytes(2**16) + b"\r\n")
            handler.wfile.write(b"0\r\n\r\n")
        except OSError:
            handler.close_connection = True

    return reply


@pytest.mark.parametrize("is_announced", [True, False])
def test_an_answer_has_at_most_max_bytes(server, is_announced: bool) -> None:
    whole = chunks(2) if not is_announced else lambda handler: send(handler, 200, bytes(2**17))
    url = server(whole)
    assert http.call("GET", url, timeout=5, max_bytes=2**17).body == bytes(2**17)
    with pytest.raises(http.NoAnswer, match=r"^the answer is larger than 131,071 bytes$"):
        http.call("GET", url, timeout=5, max_bytes=2**17 - 1)


def test_an_answer_without_end_is_left_at_the_limit(server) -> None:
    with pytest.raises(http.NoAnswer, match=r"^the answer is larger than 1,000,000 bytes$"):
        http.call("GET", server(chunks(2**40)), timeout=60, max_bytes=1_000_000)


def test_the_default_limit_holds_where_none_is_given(server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(http.NoAnswer, match=f"larger than {http.MAX_BYTES:,} bytes"):
        http.wait(http.exchange("GET", server(chunks(2**40)), timeout=60))


def test_of_a_refusal_only_the_beginning_is_read(server) -> None:
    url = server(lambda handler: send(handler, 400, b"why " * 2**20))
    assert http.call("GET", url, timeout=5) == (400, b"why " * (http.MAX_REFUSAL // 4))


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP", "identity, gzip"])
def test_a_compressed_answer_is_neither_asked_for_nor_unpacked(server, encoding: str) -> None:
    seen: list[str | None] = []
    bomb = gzip.compress(bytes(2**26))  # 64 MiB in 64 KiB

    def reply(handler: BaseHTTPRequestHandler) -> None:
        seen.append(handler.headers["Accept-Encoding"])
        status = 400 if handler.path == "/refused" else 200
        send(handler, status, bomb, **{"Content-Encoding": encoding})

    url = server(reply)
    with pytest.raises(http.NoAnswer, match=r"the answer is compressed \(.*\), which the request excludes"):
        http.call("GET", url, timeout=5)
    assert http.call("GET", url + "/refused", timeout=5) == (400, b"")
    assert seen == ["identity"] * 2


def cut(status: int) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        send(handler, status, b"half", announced=1000)
        handler.close_connection = True

    return reply


def test_a_body_that_is_cut_short_is_no_answer_unless_it_is_a_refusal(server) -> None:
    with pytest.raises(http.NoAnswer, match=r"^the answer was cut short$"):
        http.call("GET", server(cut(200)), timeout=5)
    assert http.call("GET", server(cut(500)), timeout=5) == (500, b"half")


def test_the_timeout_is_for_the_whole_answer(server) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        send(handler, 200, b"", announced=1000)
        while True:
            handler.wfile.write(b" ")
            time.sleep(0.1)

    for reply in (drip, silent):
        start = time.monotonic()
        with pytest.raises(http.TimedOut, match=r"^timed out$"):
            http.call("GET", server(reply), timeout=0.5)
        assert time.monotonic() - start < 5


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:9/", "^connection refused$"),
        ("http://no.such.host.invalid/", "no.such.host.invalid"),
        ("http://", "^it is no valid URL$"),
        ("http://a..b/", "^it is no valid URL$"),
        (hang_up, "disconnected"),
    ],
)
def test_a_server_that_cannot_be_reached_is_one_line_that_says_why(server, url, says: str) -> None:
    with pytest.raises(http.NoAnswer, match=says) as error:
        http.call("GET", server(url) if callable(url) else url, timeout=5)
    assert "\n" not in str(error.value)


def test_no_proxy_is_used_whatever_the_environment_says(server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as proxy, socket.socket() as target:
        for each in (proxy, target):
            each.bind(("127.0.0.1", 0))
            each.listen()
            each.settimeout(5)
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        url = server(echo)
        assert http.call("GET", url, timeout=5).status == 200
        assert http.wait(http.exchange("GET", url, timeout=5)).status == 200
        answering = threading.Thread(target=lambda: target.accept()[0].close())
        answering.start()
        with pytest.raises(http.NoAnswer):
            http.call("GET", f"https://127.0.0.1:{target.getsockname()[1]}", timeout=5)
        answering.join(5)
        assert not answering.is_alive(), "the call went to the target itself"
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_a_blocking_call_is_interrupted_within_half_a_second(server) -> None:
    interrupted, started = threading.Event(), time.monotonic()
    threading.Timer(0.3, interrupted.set).start()
    with pytest.raises(Interrupted):
        http.call("GET", server(silent), timeout=20, is_interrupted=interrupted.is_set)
    assert 0.3 <= time.monotonic() - started < 2  # half a second, on a busy machine


def test_an_interrupted_coroutine_is_cancelled() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    with pytest.raises(Interrupted):
        http.wait(work(), lambda: True)
    deadline = time.monotonic() + 5
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == ["cancelled"]


@pytest.mark.parametrize("where", ["in a request", "between two attempts"])
def test_a_reward_over_http_is_interrupted_in_its_retries_too(server, where: str) -> None:
    url = server(silent if where == "in a request" else lambda handler: send(handler, 503, b""))
    interrupted, started = threading.Event(), time.monotonic()
    threading.Timer(0.3, interrupted.set).start()
    with pytest.raises(Interrupted):
        remote.judge("reward.function", url, [Job(0, "1", "1")] * 100_000, 2, 20.0, interrupted.is_set)
    assert time.monotonic() - started < 3


def test_connections_are_kept_for_the_next_request_and_shared_by_threads(server) -> None:
    ports = set()

    def note(handler: BaseHTTPRequestHandler) -> None:
        ports.add(handler.client_address[1])
        send(handler, 200, b"")

    url = server(note)
    for _ in range(5):
        http.wait(http.exchange("GET", url))
    assert len(ports) == 1
    with ThreadPoolExecutor(8) as threads:
        assert {
            answer.status for answer in threads.map(lambda _: http.call("GET", url, timeout=5), range(40))
        } == {200}


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="Linux shows a connection's timer")
def test_a_connection_that_waits_notices_a_host_that_vanished(server) -> None:
    timers: list[tuple[str, float]] = []

    def look(handler: BaseHTTPRequestHandler) -> None:
        port = f":{handler.client_address[1]:04X}"
        with open("/proc/net/tcp") as table:
            [row] = [row for line in table if (row := line.split())[1].endswith(port)]
        kind, ticks = row[5].split(":")
        timers.append((kind, int(ticks, 16) / os.sysconf("SC_CLK_TCK")))
        send(handler, 200, b"")

    http.wait(http.exchange("GET", server(look)))
    [(kind, seconds)] = timers
    assert kind == "02" and seconds <= 30  # 2: keep-alive; the system's own begins after two hours


@pytest.fixture
def file_limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_many_connections_raise_the_limit_on_open_files(file_limits, capsys) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    http.require_connections(10)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    assert capsys.readouterr().err == ""
    http.require_connections(10**7)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 10000000 connections may be open at a time: this process may open ")
    assert f"{hard} files; raise that with `ulimit -n`" in line


def test_too_few_open_files_stop_the_run_and_are_no_fault_of_the_server(server, file_limits) -> None:
    url = server(echo)
    assert http.call("GET", url, timeout=5).status == 200  # everything is open that is needed besides
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    with pytest.raises(Stopped, match=f"no connection to {url} could be opened: .*ulimit -n"):
        http.call("GET", url, timeout=5)


def test_an_error_text_is_cut_to_one_line() -> None:
    assert http.one_line(b" a\n\tb\xff ") == "a b�"
    assert len(http.one_line(b"x" * 10_000)) == 500
