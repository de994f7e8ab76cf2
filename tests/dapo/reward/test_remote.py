"""A reward over HTTP: batches, retries, and limits on what a server that fails or lies can cost."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from dapo import clock, http
from dapo.reward import remote
from dapo.types import RewardError
from tests.dapo.reward.test_pool import FUNCTIONS, RIGHT, WRONG, score


@pytest.fixture
def server(monkeypatch):
    """`server(replies)`: a URL; each request takes the next of `replies`, a status, a body or a function of
    the request's JSON. The keys that came are in `server.keys`.
    """
    monkeypatch.setattr(remote, "BACK_OFF", 0.01)
    servers = []

    def start(*replies):
        left, lock = list(replies), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                start.keys.append(self.headers["Authorization"])
                with lock:
                    reply = left.pop(0) if len(left) > 1 else left[0]
                if reply == "hang up":
                    self.connection.close()
                    return
                self.send_response(reply if isinstance(reply, int) else 200)
                self.send_header("Location", start.elsewhere)
                self.end_headers()
                try:
                    said = json.dumps(reply(sent)).encode() if callable(reply) else start.said
                    self.wfile.write(reply if isinstance(reply, bytes) else said)
                except OSError:
                    pass  # nobody reads any more

            def log_message(self, *args): ...

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/score"

    start.keys, start.elsewhere, start.said = [], "", b""
    yield start
    for each in servers:
        each.shutdown()
        each.server_close()


def equal(sent):
    return [response == answer for response, answer in zip(sent["responses"], sent["answers"], strict=True)]


def test_a_remote_function_is_asked_in_batches_and_answers_in_order(reward, server):
    texts = [str(i % 2) for i in range(150)]
    assert score(reward(f"function={server(equal)}"), texts) == [
        RIGHT if text == "1" else WRONG for text in texts
    ]


def test_a_remote_function_that_fails_for_a_while_is_asked_again(reward, server):
    url = server(500, 503, "hang up", 429, equal)
    assert score(reward(f"function={url}"), ["1", "\ud800\0"]) == [RIGHT, WRONG]


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        (500, "no answer in 6 attempts, the last: 500"), ("hang up", "no answer in 6 attempts, the last: "),
        (404, "the server answered 404"),
        (lambda sent: [True], "sent 2 responses, expected a list of as many verdicts, got 1"),
        (lambda sent: {"a": 1}, "got dict"), (lambda sent: [True, None], "returned None for prompt 1"),
        (lambda sent: [float("nan"), 1], "returned nan for prompt 0"), (200, "is not JSON"),
        (b"[1e999, 1]", "returned inf for prompt 0"), (b'["\\ud800", 1]', r"returned '\\ud800' for prompt 0"),
        (b"[[1.0, true], 1]", r"returned \[1.0, True\] for prompt 0; expected bool or finite float$"),
        (b"[" * 60_000, "is not JSON"), (b"\xff\xfe[1, 1]", "is not JSON"),
        (b"[" + b"1" * 5000 + b", 1]", "is not JSON"),
        (b" " * 66_000, "no answer in 6 attempts, the last: the answer is larger than 65,664 bytes"),
    ],
)  # fmt: skip
def test_a_remote_function_that_goes_on_failing_is_an_error_that_names_it(reward, server, reply, what):
    url = server(reply)
    with pytest.raises(RewardError, match=f"reward.function={url}.*{what}"):
        score(reward(f"function={url}"), ["1", "2"])


def test_a_server_that_is_not_there_is_an_error_that_names_it(reward, monkeypatch):
    monkeypatch.setattr(remote, "BACK_OFF", 0.01)
    with pytest.raises(
        RewardError, match=r"http://127.0.0.1:9/score: no answer in 6 attempts, the last: .*refused"
    ):
        score(reward("function=http://127.0.0.1:9/score"), ["1"])


def test_a_server_is_asked_so_often_and_each_time_after_a_longer_pause(monkeypatch):
    pauses, asked = [], []

    async def sleep(seconds):
        pauses.append(seconds)

    async def exchange(*arguments, **options):
        asked.append(arguments)
        raise http.NoAnswer("nobody is there")

    monkeypatch.setattr(remote.asyncio, "sleep", sleep)
    monkeypatch.setattr(remote.http, "exchange", exchange)
    with pytest.raises(RewardError, match="no answer in 6 attempts, the last: nobody is there"):
        asyncio.run(remote._ask("name", "http://host/score", [], 1.0))
    assert len(asked) == 6 and pauses == [remote.BACK_OFF * factor for factor in (1, 2, 4, 8, 16)]


def test_a_server_that_never_answers_is_an_error(reward, server, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    url = server(lambda sent: time.sleep(1.5) or [True])
    with pytest.raises(RewardError, match=r"no answer in 2 attempts, the last: .*timed out"):
        score(reward(f"function={url}", "time_limit=0.2"), ["1"])


def test_a_wait_for_a_server_is_no_hang_of_the_run(reward, server):
    pool = reward(f"function={server(lambda sent: time.sleep(0.5) or equal(sent))}")
    _, before, _ = clock.progress()
    clock.timed("rollout")(score)(pool, ["1"])
    assert clock.progress()[1] > before


def test_all_attempts_together_have_a_limit(reward, server, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.3)
    url = server(lambda sent: time.sleep(3) or [True])
    with pytest.raises(RewardError, match=r"no answer in [1-5] attempts, the last: .*timed out"):
        score(reward(f"function={url}", "time_limit=0.2"), ["1"])


@pytest.mark.parametrize("num_jobs", [1, 32])
def test_the_limit_on_bytes_leaves_room_for_any_honest_answer(reward, server, num_jobs):
    longest = b"-1.7976931348623157e+307"
    pool = reward(f"function={server(b'[' + b', '.join([longest] * num_jobs) + b']')}")
    assert score(pool, ["1"] * num_jobs) == [(False, float(longest))] * num_jobs


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_key_goes_nowhere_else(reward, server, status, monkeypatch):
    monkeypatch.setenv("DAPO_REWARD_KEY", "key-1")
    server.elsewhere = server(equal)
    url = server(status)
    with pytest.raises(RewardError, match=f"reward.function={url}: the server answered {status}"):
        score(reward(f"function={url}"), ["1"])
    assert server.keys == ["Bearer key-1"]


def test_the_key_is_sent_if_there_is_one_and_never_quoted(reward, server, monkeypatch):
    pool = reward(f"function={server(equal, equal, 401)}")
    monkeypatch.delenv("DAPO_REWARD_KEY", raising=False)
    score(pool, ["1"])
    monkeypatch.setenv("DAPO_REWARD_KEY", "key-1")
    score(pool, ["1"])
    assert server.keys == [None, "Bearer key-1"]
    server.said = b"no such key: key-1"
    with pytest.raises(RewardError, match=r"the server answered 401 no such key: \*\*\*$"):
        score(pool, ["1"])


def test_no_proxy_of_the_environment_sees_responses_or_key(reward, server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, server(404))
    monkeypatch.setenv("DAPO_REWARD_KEY", "key-1")
    assert score(reward(f"function={server(equal)}"), ["1"]) == [RIGHT]
    assert server.keys == ["Bearer key-1"]


def test_a_connection_is_needed_for_every_request_at_a_time(reward, monkeypatch):
    needed = []
    monkeypatch.setattr(http, "require_connections", needed.append)
    reward("workers=7", "shadow=['http://127.0.0.1:9/score']")
    reward("workers=7")
    assert needed == [7]


def test_a_shadow_that_fails_is_named_as_such(reward, server):
    url = server(404)
    with pytest.raises(RewardError, match=f"reward.shadow={url}: the server answered 404"):
        score(reward("workers=0", f"shadow=['{url}']"), ["1"])


def test_remote_and_local_functions_work_together(reward, server):
    weights = json.dumps({server(equal): 1.0, f"{FUNCTIONS}:graded": 0.5})
    assert score(reward("workers=1", f"function={weights}", f"shadow=['{server(equal)}']"), ["1", "-2"]) == [
        (True, 1.5),
        (False, -2.0),
    ]


def test_a_remote_function_is_sent_nothing_that_another_asks_for(reward, server):
    sent = []
    url = server(lambda body: sent.append(body) or equal(body))
    pool = reward("workers=0", f"function={url}", f"shadow=[{FUNCTIONS}:unfinished]")
    assert score(pool, ["1"]) == [RIGHT] and sent == [{"responses": ["1"], "answers": ["1"]}]


def test_a_later_attempt_has_what_is_left_of_the_time(monkeypatch):
    left, allowed = 5.0, []
    end = 60.0 * 2 + remote.RETRY_SECONDS
    clock = iter([0.0, 0.0, end - left, end - left, end - left])
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: next(clock, end)))
    monkeypatch.setattr(remote, "BACK_OFF", 0.0)

    async def exchange(method, url, body, timeout, key, **limits):
        allowed.append(timeout)
        assert limits == {"keep_alive": False, "max_bytes": 2 * remote.BYTES_PER_VERDICT + remote.OTHER_BYTES}
        raise http.NoAnswer("refused")

    monkeypatch.setattr(http, "exchange", exchange)
    with pytest.raises(RewardError, match="no answer in 2 attempts, the last: refused"):
        asyncio.run(remote._ask("f", "http://h", [SimpleNamespace(response="r", answer="a")] * 2, 60.0))
    assert allowed == [120.0, left]
