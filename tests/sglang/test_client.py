"""The engine of SGLang servers against faults: every sample arrives once, or one clear error does, and
nothing hangs.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from dapo.engine import client, sglang
from dapo.engine.endpoint import Job
from dapo.types import EngineError, Interrupted, Prompt, Request, Sample, Sampling, WeightsLost
from tests.sglang import fake_server as fake
from tests.sglang.fake_engine import LIMIT, assert_answered, collect, stream_of, wait_for, within_limit
from tests.sglang.fake_server import FakeServer, requests, tokens_of


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.2)


def test_every_request_is_answered_once_and_carries_its_own_sampling() -> None:
    server = FakeServer()
    wanted = requests(40, Sampling(0.7, 64, (fake.STOP, 3), top_p=0.9))
    with stream_of(server) as stream:
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
        assert list(stream.completed()) == []
    sent = {body["rid"].split("-")[1]: body for body in server.bodies}
    assert len(server.bodies) == len(sent) == 40
    for request in wanted:
        body, sampling = sent[request.id], sent[request.id]["sampling_params"]
        assert body["input_ids"] == request.prompt.tokens.tolist() and body["return_logprob"] is True
        assert sampling["sampling_seed"] == request.seed and sampling["stop_token_ids"] == [fake.STOP, 3]
        assert (sampling["temperature"], sampling["top_p"], sampling["max_new_tokens"]) == (0.7, 0.9, 64)


FAULTS = {
    "429": fake.status(429),
    "500": fake.status(500),
    "503": fake.status(503),
    "garbage": fake.garbage,
    "half a JSON": fake.half_a_json,
    "half a body": fake.half_a_body,
    "closed": fake.closed,
    "two samples": fake.two_samples,
    "no sample": fake.no_sample,
    "too few log-probs": fake.too_few_logprobs,
    "log-probs of other tokens": fake.logprobs_of_others,
    "null log-probs": fake.null_logprobs,
    "a token that the policy does not have": fake.unknown_token,
    "more than a response can be": fake.too_large,
    "the answer to another request": fake.changed(id="0.0"),
    "the answer to another prompt": fake.changed(prompt_tokens=4),
    "no finish reason": fake.changed(finish_reason=None),
    "unknown finish reason": fake.changed(finish_reason={"type": "tired"}),
    "NaN in the logits": fake.changed(finish_reason={"type": "stop", "matched": "NaN happened"}),
    "abort": fake.changed(finish_reason={"type": "abort", "message": "by a third party"}),
    "an abort in many lines": fake.changed(finish_reason={"type": "abort", "message": "a\n\n" * 9999}),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_after_a_fault_the_request_is_asked_again(fault: fake.Fault) -> None:
    server = FakeServer([fake.well, fault, fake.well, fault])
    wanted = requests(12)
    with stream_of(server) as stream:
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
    assert len(server.bodies) == 14 and len({body["rid"] for body in server.bodies}) == 14


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_without_end_is_one_error_that_names_request_server_and_fault(fault: fake.Fault) -> None:
    server = FakeServer(afterwards=fault)
    with stream_of(server) as stream:
        stream.submit(requests(3))
        with pytest.raises(
            EngineError, match=rf"request [01]\.[01] failed {client.MAX_FAILURES} times.* at {server.url}: .+"
        ) as error:
            collect(stream)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert len(server.bodies) <= 3 * client.MAX_FAILURES


NO_WORKER = fake.status(503, "no_available_workers")


def test_a_router_without_a_worker_is_asked_as_long_as_another_request_goes_on() -> None:
    is_over = threading.Event()

    async def long(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
        while not is_over.is_set():
            await asyncio.sleep(0.02)
        return await fake.well(server, request, body)

    server = FakeServer([long, *[NO_WORKER] * 30])
    wanted = requests(3)
    with stream_of(server) as stream:
        stream.submit(wanted)
        wait_for(lambda: not server.faults)
        is_over.set()
        assert_answered(collect(stream), wanted)


def test_a_router_that_never_has_a_worker_is_an_error_once_nothing_goes_on() -> None:
    server = FakeServer(afterwards=NO_WORKER)
    with stream_of(server, stall_seconds=1.0) as stream:
        stream.submit(requests(3))
        with pytest.raises(EngineError, match=rf"^no progress for 2 .*{server.url} .*no_available_workers"):
            collect(stream)
    assert len(server.bodies) > client.MAX_FAILURES


@pytest.mark.parametrize("code", [400, 401, 404, 422])
def test_a_refusal_is_not_asked_again(code: int) -> None:
    server = FakeServer(afterwards=fake.status(code, "the input is longer than the context"))
    with stream_of(server) as stream:
        stream.submit(requests(1))
        with pytest.raises(
            EngineError,
            match=rf"{server.url} refused request 0\.0 \(3 tokens.*{code} .*longer than the context",
        ):
            collect(stream)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("code", [302, 307, 308])
def test_a_redirect_is_not_followed(code: int) -> None:
    elsewhere = FakeServer()

    async def redirect(server: FakeServer, request: web.Request, body: dict) -> web.Response:
        return web.Response(status=code, headers={"Location": elsewhere.url + "/generate"})

    server = FakeServer(afterwards=redirect)
    with stream_of(server) as stream:
        stream.submit(requests(1))
        with pytest.raises(EngineError, match=rf"{server.url} refused request 0\.0 \(3 tokens.*{code}"):
            collect(stream)
    assert elsewhere.bodies == []
    elsewhere.stop()


def test_a_slow_server_is_waited_for() -> None:
    server = FakeServer(afterwards=fake.slow)
    wanted = requests(4)
    with stream_of(server) as stream:
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
    assert len(server.bodies) == 4


def test_what_is_never_answered_is_asked_again_elsewhere_after_the_stall(
    capfd: pytest.CaptureFixture[str],
) -> None:
    hung, good = FakeServer(afterwards=fake.nothing), FakeServer(seconds=0.05)
    wanted = requests(8)
    with stream_of(hung, good, max_concurrent=2, stall_seconds=1.0) as stream:
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
        assert {body["rid"] for body in hung.bodies} == set(hung.aborted), "the server knows of the aborts"
    err = capfd.readouterr().err
    assert f"no progress at {hung.url} for 1 s" in err
    assert re.search(rf"{hung.url} \(usable\): 2 asked: 0\.0 for \d+ s; 1\.0 for \d+ s", err)


def test_a_server_that_hangs_with_its_health_good_is_left_alone_until_the_next_sync() -> None:
    hung, good = FakeServer(afterwards=fake.nothing), FakeServer(seconds=0.4)
    wanted = requests(10)
    with stream_of(hung, good, max_concurrent=1, stall_seconds=0.5) as stream:
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)  # in eight times stall_seconds
        assert len(hung.bodies) == 1
        assert stream.engine.servers.restarted == [hung.url], "those that started it do so again"
        hung.afterwards = fake.well
        stream.engine.load_weights([], 1)
        more = requests(10, first=10)
        stream.submit(more)
        assert_answered(collect(stream), more)
        assert len(hung.bodies) > 1


def test_a_server_that_hangs_is_noticed_though_requests_are_sent_to_it_all_the_time() -> None:
    hung = FakeServer(afterwards=fake.nothing)
    with stream_of(hung, max_concurrent=10_000, stall_seconds=1.0) as stream:
        left = iter(requests(5_000))

        def is_restarted() -> bool:
            stream.submit([next(left)])
            return bool(stream.engine.servers.restarted)

        wait_for(is_restarted)


def test_twice_the_stall_without_an_answer_is_an_error_that_says_who_is_waited_for() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server, max_concurrent=2, stall_seconds=0.5) as stream:
        stream.submit(requests(3))
        says = rf"no progress for 2 × engine.stall_seconds=0.5: waiting for 3 responses.*{server.url}.*0\.0"
        with pytest.raises(EngineError, match=says):
            collect(stream)


def test_a_server_that_never_was_there_is_an_error_after_twice_the_stall() -> None:
    server = FakeServer()
    server.die()
    with stream_of(server, stall_seconds=0.5) as stream:
        stream.submit(requests(3))
        with pytest.raises(EngineError, match=rf"{server.url} \(left alone, last fault: connection refused"):
            collect(stream)


def test_long_work_that_moves_is_no_stall() -> None:
    """/v1/loads reports another number of tokens each time: the server generates one long response."""
    server = FakeServer(seconds=2.5)
    server.loads = [{"num_running_reqs": 1, "num_used_tokens": 0}]
    wanted = requests(1)
    with stream_of(server, stall_seconds=0.5) as stream:
        stream.submit(wanted)
        done = threading.Event()

        def generate() -> None:
            while not done.wait(0.02):
                server.loads[0]["num_used_tokens"] += 1

        threading.Thread(target=generate, daemon=True).start()
        assert_answered(collect(stream), wanted)
        done.set()
    assert len(server.bodies) == 1


def test_of_two_servers_one_dies_midway_and_comes_back() -> None:
    servers = FakeServer(seconds=0.05), FakeServer(seconds=0.05)
    wanted = requests(120)
    with stream_of(*servers) as stream:
        stream.submit(wanted)
        samples = []
        for sample in stream.completed():
            samples.append(sample)
            if len(samples) == 20:
                servers[1].die()
                before = len(servers[1].bodies)
            if len(samples) == 60:
                servers[1].start()
        assert_answered(samples, wanted)
    assert len(servers[1].bodies) > before, "it is used again"


@pytest.mark.parametrize("version", [0, 7])
def test_a_restarted_server_is_not_used_until_it_has_the_weights(
    version: int, capfd: pytest.CaptureFixture[str]
) -> None:
    servers = FakeServer(seconds=0.02), FakeServer(seconds=0.02)
    with stream_of(*servers) as stream:
        stream.engine.load_weights([], version)
        servers[1].version = "default"  # as after a restart
        wanted = requests(40)
        stream.submit(wanted)
        samples = collect(stream)
        assert_answered(samples, wanted)
        assert all(sample.versions == ((version, 0, sample.length),) for sample in samples)
        assert len(servers[1].bodies) <= 4, "its first answers showed it"
        stream.engine.load_weights([], 8)
        time.sleep(0.5)
        more = requests(40, first=40)
        stream.submit(more)
        assert_answered(collect(stream), more)
        assert len(servers[1].bodies) > 10
    assert "missed the last weight sync" in capfd.readouterr().err


def test_when_no_server_is_left_the_wait_ends() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server) as stream:
        stream.submit(requests(3))
        wait_for(lambda: len(server.bodies) == 3)
        stream.engine.servers.workers = []
        with pytest.raises(EngineError, match="no server is left"):
            collect(stream)


def test_an_answer_of_the_new_weights_may_come_before_the_sync_returns() -> None:
    server = FakeServer(seconds=0.05)
    with stream_of(server) as stream:
        stream.engine.load_weights([], 3)
        wanted = requests(3)
        stream.submit(wanted)

        def serve() -> None:
            time.sleep(0.3)  # the answers are in, of version 4

        stream.engine.servers.serve = serve
        stream.engine.load_weights([], 4)
        samples = collect(stream)
        assert_answered(samples, wanted)
        assert len(server.bodies) == 3 and {sample.versions[0][0] for sample in samples} <= {3, 4}


def test_what_a_server_was_asked_before_a_sync_counts_as_its_load_after_it() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server, max_concurrent=3) as stream:
        wanted = requests(9)
        stream.submit(wanted)
        wait_for(lambda: len(server.bodies) == 3)
        [before] = stream.client.endpoints
        stream.engine.load_weights([], 1)
        assert stream.client.endpoints == [before] and len(before.outstanding) == 3
        assert "waiting for 9 responses" in stream.client.waiting()
        server.afterwards = fake.well
        stream.abort([request.id for request in wanted[:3]])  # the server is to know of these, too
        assert_answered(collect(stream), wanted[3:])
        assert server.most_asked == 3 and len(server.bodies) == 9
        stream.engine.load_weights([], 2)
        assert sorted(server.aborted) == sorted(body["rid"] for body in server.bodies[:3])


def test_what_no_server_could_take_is_sent_to_one_that_joins_as_soon_as_the_sync_is_over() -> None:
    first, second = FakeServer(), FakeServer()
    first.die()
    with stream_of(first) as stream:
        wanted = requests(3)
        stream.submit(wanted)
        wait_for(
            lambda: not stream.client.endpoints[0].is_usable and not stream.client.endpoints[0].outstanding
        )
        stream.engine.servers.fakes[:] = [second]
        stream.engine.load_weights([], 1)
        assert_answered(collect(stream), wanted)


def test_a_server_that_joins_takes_part_after_the_next_sync() -> None:
    first, second = FakeServer(seconds=0.02), FakeServer(seconds=0.02)
    with stream_of(first) as stream:
        stream.engine.servers.fakes.append(second)
        stream.engine.load_weights({"w": 1}.items(), 3)
        assert stream.engine.servers.calls == ["refresh", "prepare 3", "load 3: {'w': 1}", "serve"]
        wanted = requests(40)
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
        assert len(second.bodies) >= 10
        stream.engine.servers.fakes.remove(first)
        stream.engine.load_weights([], 4)
        more = requests(10, first=40)
        stream.submit(more)
        assert_answered(collect(stream), more)
        assert len(first.bodies) + len(second.bodies) == 50 and len(first.bodies) <= 30
    first.stop()


def test_a_response_over_a_weight_update_says_which_version_wrote_which_tokens() -> None:
    server = FakeServer()
    request = next(request for request in requests(20) if len(tokens_of(request)) > 10)
    n = len(tokens_of(request))
    spans = [{"version": "3", "start": 0, "end": 4}, {"version": "4", "start": 4, "end": n}]
    loading = threading.Event()

    async def over_an_update(server: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
        await asyncio.to_thread(loading.wait, LIMIT)
        return web.json_response(fake.answer(body, weight_versions=spans))

    server.faults = [over_an_update]
    with stream_of(server) as stream:
        stream.engine.load_weights([], 3)
        stream.submit([request])
        stream.engine.client.begin_load(4)
        loading.set()
        [sample] = collect(stream)
    assert sample.versions == ((3, 0, 4), (4, 4, n))


def test_what_is_asked_for_during_a_sync_may_be_answered_by_the_weights_before() -> None:
    server = FakeServer()
    wanted = requests(8)
    with stream_of(server) as stream:
        stream.engine.load_weights([], 3)
        stream.engine.client.begin_load(4)
        stream.submit(wanted)  # the server has not paused yet
        samples = collect(stream)
    assert_answered(samples, wanted)
    assert len(server.bodies) == len(wanted), "nothing was asked for twice"
    assert {version for sample in samples for version, _, _ in sample.versions} == {3}


def test_no_server_is_asked_for_more_than_it_should_and_both_work() -> None:
    servers = FakeServer(seconds=0.02), FakeServer(seconds=0.02)
    wanted = requests(60)
    with stream_of(*servers, max_concurrent=3) as stream:
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
    assert [server.most_asked for server in servers] == [3, 3]
    assert min(len(server.bodies) for server in servers) >= 20


def test_the_server_with_the_least_outstanding_is_asked_next() -> None:
    servers = FakeServer(afterwards=fake.nothing), FakeServer(afterwards=fake.nothing)
    with stream_of(*servers, max_concurrent=100) as stream:
        stream.submit(requests(20))
        wait_for(lambda: sum(len(server.bodies) for server in servers) == 20)
    assert [len(server.bodies) for server in servers] == [10, 10]


def test_samples_come_as_they_are_finished() -> None:
    server = FakeServer([fake.slow])
    wanted = requests(4)
    with stream_of(server) as stream:
        stream.submit(wanted)
        samples = collect(stream)
    assert_answered(samples, wanted)
    assert (samples[-1].group, samples[-1].index) == (0, 0)


def test_more_may_be_submitted_while_samples_are_taken() -> None:
    server = FakeServer()
    wanted = requests(30)
    with stream_of(server) as stream:
        stream.submit(wanted[:2])
        samples, later = [], list(range(2, 30))

        def take() -> None:
            for sample in stream.completed():
                samples.append(sample)
                if later:
                    stream.submit([wanted[later.pop()]])

        within_limit(take)
    assert_answered(samples, wanted)


def test_nothing_comes_back_for_what_was_aborted_and_the_server_knows() -> None:
    server = FakeServer([fake.well, fake.well], afterwards=fake.nothing)
    with stream_of(server, max_concurrent=4) as stream:
        wanted = requests(24)
        stream.submit(wanted)  # two are answered, four are asked, the rest waits
        taken = stream.completed()
        samples = [next(taken)]
        wait_for(lambda: len(server.bodies) == 6)
        time.sleep(0.2)  # the second answer lies there untaken: it must not come either
        server.afterwards = fake.well
        first = f"{samples[0].group}.{samples[0].index}"
        gone = [request.id for request in wanted[:6] + wanted[20:] if request.id != first]
        stream.abort([*gone, "99.9"])
        within_limit(lambda: samples.extend(taken))
        assert_answered(samples, [request for request in wanted if request.id not in gone])
        stream.engine.load_weights([], 1)  # waits until the servers know
        assert sorted(server.aborted) == sorted(body["rid"] for body in server.bodies[2:6])
        assert len(server.bodies) == 6 + 14, "what waited was never sent"
        stream.submit(wanted[:6])  # the same ids may be asked for anew
        assert_answered(collect(stream), wanted[:6])
        assert len({body["rid"] for body in server.bodies}) == 26


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/net/tcp")
def test_a_host_that_vanishes_under_a_request_is_noticed_by_probes_from_30_seconds_on() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server) as stream:
        stream.submit(requests(1))
        wait_for(lambda: len(server.bodies) == 1)
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        [timer] = [row[5] for row in rows if row[2].endswith(f":{server.port:04X}") and row[3] == "01"]
        kind, hundredths = (int(part, 16) for part in timer.split(":"))
        assert kind == 2 and hundredths <= 3000, "a keep-alive timer"


def test_what_was_aborted_is_not_waited_for() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server, max_concurrent=1, stall_seconds=0.3) as stream:
        stream.submit(requests(3))
        wait_for(lambda: len(server.bodies) == 1)
        server.die()
        wait_for(lambda: not stream.client.endpoints[0].is_usable)
        stream.abort([request.id for request in requests(3)])
        time.sleep(1.0)  # three times stall_seconds
        assert stream.client.failure is None


def test_what_is_aborted_before_it_was_sent_leaves_its_place_to_others() -> None:
    server = FakeServer()
    with stream_of(server, max_concurrent=2) as stream:
        for _ in range(5):
            stream.submit(requests(3))
            stream.abort([request.id for request in requests(3)])
        wanted = requests(6)
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)


def test_no_id_at_a_server_is_the_beginning_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang aborts every request whose id begins with the one in the abort."""
    monkeypatch.setattr(client, "MAX_FAILURES", 30)
    server = FakeServer([fake.status(500)] * 12)
    sampling = Sampling(1.0, 8, (fake.STOP,))
    with stream_of(server, max_concurrent=1) as stream:
        stream.submit(requests(1))
        collect(stream)
    again = [body["rid"] for body in server.bodies]
    assert len(again) == 13 and not [(a, b) for a in again for b in again if a != b and b.startswith(a)]
    server = FakeServer()
    wanted = [
        Request(group, index, Prompt(0, np.arange(3, dtype=np.int32), ""), 1, sampling)
        for group in (1, 11)
        for index in (1, 10, 11, 110)
    ]
    with stream_of(server) as stream:
        stream.submit(wanted)
        collect(stream)
    rids = [body["rid"] for body in server.bodies]
    assert len(rids) == 8 and not [(a, b) for a in rids for b in rids if a != b and b.startswith(a)]


@pytest.mark.parametrize("path", ["prepare", "load"])
@pytest.mark.parametrize("has_died", [True, False])
def test_a_sync_that_fails_may_be_made_anew_if_a_server_has_died(
    path: str, has_died: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang, "DEATH_NOTICED", 0.0)
    with stream_of(FakeServer()) as stream:
        both = stream.engine.servers

        def fail(*arguments: object) -> None:
            raise EngineError("connection refused")

        monkeypatch.setattr(both, path, fail)
        monkeypatch.setattr(both, "lost", lambda: ["http://a"] if has_died else [])
        with pytest.raises(EngineError, match="connection refused") as error:
            stream.engine.load_weights([], 3)
        assert isinstance(error.value, WeightsLost) == has_died
        assert ("http://a died under a weight sync" in str(error.value)) == has_died
        assert not stream.client.is_loading


def test_an_interruption_is_noticed_while_nothing_comes() -> None:
    server, interrupted = FakeServer(afterwards=fake.nothing), threading.Event()
    with stream_of(server, is_interrupted=interrupted.is_set) as stream:
        stream.submit(requests(3))
        threading.Timer(0.2, interrupted.set).start()
        with pytest.raises(Interrupted):
            collect(stream)
        stream.engine.load_weights([], 0)
        assert len(server.aborted) == 3


def test_close_is_quick_with_requests_outstanding_aborts_them_and_may_be_called_twice() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server) as stream:
        stream.submit(requests(9))
        wait_for(lambda: len(server.bodies) == 4)
        within_limit(stream.engine.close)
        stream.engine.close()
        assert stream.engine.servers.calls == ["close", "close"] and not stream.client.tasks
        assert len(server.aborted) == 4 and list(stream.completed()) == []


def test_who_waits_for_samples_is_woken_by_a_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang, "CHECK_EVERY", 2 * LIMIT)
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server) as stream:
        stream.submit(requests(3))
        wait_for(lambda: len(server.bodies) == 3)
        closing = threading.Timer(0.2, stream.engine.close)
        closing.start()
        assert collect(stream) == []
        closing.join()


def test_a_program_that_never_closes_the_engine_ends_all_the_same() -> None:
    server = FakeServer(afterwards=fake.nothing)
    code = f"""
from types import SimpleNamespace
from dapo.config import Limits
from dapo.engine.control import Server
from dapo.engine.sglang import SGLangEngine
from tests.sglang.fake_server import requests
urls = ["{server.url}"]
servers = SimpleNamespace(workers=[Server(urls[0])], generate_urls=urls, key_of=lambda url: None)
engine = SGLangEngine(servers, None, 4, Limits(60.0), 1000)
engine.stream().submit(requests(3))
import time; time.sleep(0.5)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        timeout=60,
        capture_output=True,
        text=True,
    )
    server.stop()
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(server.bodies) == 3


def test_an_error_of_our_own_in_the_loop_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(own: client.Client, job: Job, sample: Sample) -> None:
        raise ZeroDivisionError("a fault of the client")

    monkeypatch.setattr(client.Client, "_check_versions", broken)
    server = FakeServer()
    with stream_of(server) as stream:
        stream.submit(requests(2))
        with pytest.raises(ZeroDivisionError):
            collect(stream)
