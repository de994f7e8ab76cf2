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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from dapo.engine import client, generate, sglang
from dapo.engine.control import Server
from dapo.engine.sglang import SGLangEngine
from dapo.types import EngineError, Interrupted, Request, Sample, Sampling
from tests.sglang import fake_server as fake
from tests.sglang.fake_server import FakeServer, requests, tokens_of

LIMIT = 30.0  # seconds for anything here; nothing takes so long, but nothing may hang either


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.2)


class Fakes:
    """Servers and weight sync of an engine over fake servers: weights go nowhere, the workers are told the
    version.
    """

    def __init__(self, *fakes: FakeServer, router: FakeServer | None = None):
        self.fakes, self.router = list(fakes), router
        self.workers = [Server(server.url) for server in fakes]
        self.calls: list[str] = []
        self.restarted: list[str] = []

    @property
    def generate_urls(self) -> list[str]:
        return [self.router.url] if self.router else [worker.url for worker in self.workers]

    def refresh(self) -> None:
        self.calls.append("refresh")
        self.workers = [Server(server.url) for server in self.fakes]

    def prepare(self, version: int) -> None:
        self.calls.append(f"prepare {version}")

    def load(self, weights, version: int) -> None:
        self.calls.append(f"load {version}: {dict(weights)}")
        for server in self.fakes:
            server.version = str(version)

    def serve(self) -> None:
        self.calls.append("serve")

    def check(self) -> None:
        if not self.workers:
            raise EngineError("no server is left")

    def restart(self, url: str, fault: str) -> None:
        self.restarted.append(url)

    def close(self) -> None:
        self.calls.append("close")
        for server in [*self.fakes, *([self.router] if self.router else [])]:
            server.stop()


@contextmanager
def engine_of(
    *fakes: FakeServer, router: FakeServer | None = None, max_concurrent: int = 4, stall_seconds: float = 60.0
) -> Iterator[SGLangEngine]:
    """The engine over these servers; it and they are closed at the end."""
    both = Fakes(*fakes, router=router)
    engine = SGLangEngine(both, both, max_concurrent, stall_seconds)
    try:
        yield engine
    finally:
        within_limit(engine.close)


def within_limit(work: Callable[[], object]) -> object:
    """What `work` returns or raises, in a thread that is not waited for longer than LIMIT."""
    ended: list[tuple[object, BaseException | None]] = []

    def run() -> None:
        try:
            ended.append((work(), None))
        except BaseException as error:  # noqa: BLE001  raised again below
            ended.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT)
    assert ended, f"hangs for {LIMIT} s"
    value, error = ended[0]
    if error:
        raise error
    return value


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def collect(engine: SGLangEngine) -> list[Sample]:
    return within_limit(lambda: list(engine.completed()))  # type: ignore[return-value]


def assert_answered(samples: list[Sample], wanted: list[Request]) -> None:
    """Each request once, by its own answer."""
    found = {f"{sample.group}.{sample.index}": sample for sample in samples}
    assert len(samples) == len(found) == len(wanted)
    for request in wanted:
        sample = found[request.id]
        np.testing.assert_array_equal(sample.tokens, tokens_of(request))
        np.testing.assert_array_equal(sample.behavior_logprobs, (-sample.tokens / 1000).astype(np.float32))
        assert (
            sample.tokens.dtype == np.int32
            and sample.loss_mask.all()
            and len(sample.loss_mask) == sample.length
        )


def test_every_request_is_answered_once_and_carries_its_own_sampling() -> None:
    server = FakeServer()
    wanted = requests(40, Sampling(0.7, 64, (fake.STOP, 3), top_p=0.9))
    with engine_of(server) as engine:
        engine.submit(wanted)
        assert_answered(collect(engine), wanted)
        assert list(engine.completed()) == []
    sent = {body["rid"].split("-")[1]: body for body in server.bodies}
    assert len(server.bodies) == len(sent) == 40
    for request in wanted:
        body, sampling = sent[request.id], sent[request.id]["sampling_params"]
        assert body["input_ids"] == request.tokens.tolist() and body["return_logprob"] is True
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
    "no finish reason": fake.changed(finish_reason=None),
    "unknown finish reason": fake.changed(finish_reason={"type": "tired"}),
    "NaN in the logits": fake.changed(finish_reason={"type": "stop", "matched": "NaN happened"}),
    "abort": fake.changed(finish_reason={"type": "abort", "message": "by a third party"}),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_after_a_fault_the_request_is_asked_again(fault: fake.Fault) -> None:
    server = FakeServer([fake.well, fault, fake.well, fault])
    wanted = requests(12)
    with engine_of(server) as engine:
        engine.submit(wanted)
        assert_answered(collect(engine), wanted)
    assert len(server.bodies) == 14 and len({body["rid"] for body in server.bodies}) == 14


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_without_end_is_one_error_that_names_request_server_and_fault(fault: fake.Fault) -> None:
    server = FakeServer(afterwards=fault)
    with engine_of(server) as engine:
        engine.submit(requests(3))
        with pytest.raises(
            EngineError, match=rf"request [01]\.[01] failed {client.MAX_ATTEMPTS} times.* at {server.url}: .+"
        ) as error:
            collect(engine)
    assert "\n" not in str(error.value)
    assert len(server.bodies) <= 3 * client.MAX_ATTEMPTS


@pytest.mark.parametrize("code", [400, 401, 404, 422])
def test_a_refusal_is_not_asked_again(code: int) -> None:
    server = FakeServer(afterwards=fake.status(code, "the input is longer than the context"))
    with engine_of(server) as engine:
        engine.submit(requests(1))
        with pytest.raises(
            EngineError,
            match=rf"{server.url} refused request 0\.0 \(3 tokens.*{code} .*longer than the context",
        ):
            collect(engine)
    assert len(server.bodies) == 1


def test_a_slow_server_is_waited_for() -> None:
    server = FakeServer(afterwards=fake.slow)
    wanted = requests(4)
    with engine_of(server) as engine:
        engine.submit(wanted)
        assert_answered(collect(engine), wanted)
    assert len(server.bodies) == 4


def test_what_is_never_answered_is_asked_again_elsewhere_after_the_stall(
    capfd: pytest.CaptureFixture[str],
) -> None:
    hung, good = FakeServer(afterwards=fake.nothing), FakeServer(seconds=0.05)
    wanted = requests(8)
    with engine_of(hung, good, max_concurrent=2, stall_seconds=1.0) as engine:
        engine.submit(wanted)
        assert_answered(collect(engine), wanted)
        assert {body["rid"] for body in hung.bodies} == set(hung.aborted), "the old place is told"
    err = capfd.readouterr().err
    assert f"no progress at {hung.url} for 1 s" in err
    assert re.search(rf"{hung.url} \(usable\): 2 asked: 0\.0 for \d+ s; 1\.0 for \d+ s", err)


def test_a_server_that_hangs_with_its_health_good_is_left_alone_until_the_next_sync() -> None:
    hung, good = FakeServer(afterwards=fake.nothing), FakeServer(seconds=0.4)
    wanted = requests(10)
    with engine_of(hung, good, max_concurrent=1, stall_seconds=0.5) as engine:
        engine.submit(wanted)
        assert_answered(collect(engine), wanted)  # in eight times stall_seconds
        assert len(hung.bodies) == 1
        assert engine.servers.restarted == [hung.url], "those that started it do so again"
        hung.afterwards = fake.well
        engine.load_weights([], 1)
        more = requests(10, first=10)
        engine.submit(more)
        assert_answered(collect(engine), more)
        assert len(hung.bodies) > 1


def test_a_worker_that_hangs_behind_a_router_is_started_again_while_another_works() -> None:
    """Its own account of its work is of before it hung: it says that it has nothing to do."""
    hung, good, idle = FakeServer(), FakeServer(), FakeServer()
    hung.loads = idle.loads = [{"num_running_reqs": 0, "num_used_tokens": 0}]
    good.loads = [{"num_running_reqs": 1, "num_used_tokens": 0}]
    is_restarted = threading.Event()

    async def at_the_hung_worker(router: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
        while not is_restarted.is_set():
            await asyncio.sleep(0.02)
        return await fake.status(502)(router, request, body)

    router = FakeServer([at_the_hung_worker] * 2, seconds=0.3)
    router.workers = [
        {"url": hung.url + "/", "load": 2},
        {"url": good.url, "load": 1},
        {"url": idle.url, "load": 0},
    ]
    wanted, done = requests(9), threading.Event()

    def generate() -> None:
        while not done.wait(0.02):
            good.loads[0]["num_used_tokens"] += 1

    threading.Thread(target=generate, daemon=True).start()
    with engine_of(hung, good, idle, router=router, max_concurrent=1, stall_seconds=0.5) as engine:

        def restart(url: str, fault: str) -> None:
            assert fault == "stood still for 0.5 s"
            engine.servers.restarted.append(url)
            engine.servers.workers = [worker for worker in engine.servers.workers if worker.url != url]
            is_restarted.set()

        engine.servers.restart = restart
        engine.submit(wanted)
        assert_answered(collect(engine), wanted)
        assert engine.servers.restarted == [hung.url]
    done.set()
    for worker in (hung, good, idle):
        worker.stop()


def test_twice_the_stall_without_an_answer_is_an_error_that_says_who_is_waited_for() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with engine_of(server, max_concurrent=2, stall_seconds=0.5) as engine:
        engine.submit(requests(3))
        with pytest.raises(
            EngineError,
            match=rf"no progress for 2 × engine.stall_seconds=0.5: waiting for 3 responses.*{server.url}.*0\.0",
        ):
            collect(engine)


def test_a_server_that_never_was_there_is_an_error_after_twice_the_stall() -> None:
    server = FakeServer()
    server.die()
    with engine_of(server, stall_seconds=0.5) as engine:
        engine.submit(requests(3))
        with pytest.raises(
            EngineError, match=rf"{server.url} \(left alone, last fault: ClientConnectorError"
        ):
            collect(engine)


def test_long_work_that_moves_is_no_stall() -> None:
    """/v1/loads tells other numbers of tokens each time: the server generates one long response."""
    server = FakeServer(seconds=2.5)
    server.loads = [{"num_running_reqs": 1, "num_used_tokens": 0}]
    wanted = requests(1)
    with engine_of(server, stall_seconds=0.5) as engine:
        engine.submit(wanted)
        done = threading.Event()

        def generate() -> None:
            while not done.wait(0.02):
                server.loads[0]["num_used_tokens"] += 1

        threading.Thread(target=generate, daemon=True).start()
        assert_answered(collect(engine), wanted)
        done.set()
    assert len(server.bodies) == 1


def test_of_two_servers_one_dies_midway_and_comes_back() -> None:
    servers = FakeServer(seconds=0.05), FakeServer(seconds=0.05)
    wanted = requests(120)
    with engine_of(*servers) as engine:
        engine.submit(wanted)
        samples = []
        for sample in engine.completed():
            samples.append(sample)
            if len(samples) == 20:
                servers[1].die()
                before = len(servers[1].bodies)
            if len(samples) == 60:
                servers[1].start()
        assert_answered(samples, wanted)
    assert len(servers[1].bodies) > before, "it is used again"


def test_a_restarted_server_is_not_used_until_it_has_the_weights(capfd: pytest.CaptureFixture[str]) -> None:
    servers = FakeServer(seconds=0.02), FakeServer(seconds=0.02)
    with engine_of(*servers) as engine:
        engine.load_weights([], 7)
        servers[1].version = "default"  # as after a restart
        wanted = requests(40)
        engine.submit(wanted)
        samples = collect(engine)
        assert_answered(samples, wanted)
        assert {sample.versions for sample in samples} == {((7, 0, sample.length),) for sample in samples}
        assert len(servers[1].bodies) <= 4, "its first answers told"
        engine.load_weights([], 8)
        time.sleep(0.5)
        more = requests(40, first=40)
        engine.submit(more)
        assert_answered(collect(engine), more)
        assert len(servers[1].bodies) > 10
    assert "missed the last weight sync" in capfd.readouterr().err


def test_when_no_server_is_left_the_wait_ends() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with engine_of(server) as engine:
        engine.submit(requests(3))
        wait_for(lambda: len(server.bodies) == 3)
        engine.servers.workers = []
        with pytest.raises(EngineError, match="no server is left"):
            collect(engine)


def test_an_answer_of_the_new_weights_may_come_before_the_sync_returns() -> None:
    server = FakeServer(seconds=0.05)
    with engine_of(server) as engine:
        engine.load_weights([], 3)
        wanted = requests(3)
        engine.submit(wanted)

        def serve() -> None:
            time.sleep(0.3)  # the answers are in, of version 4

        engine.servers.serve = serve
        engine.load_weights([], 4)
        samples = collect(engine)
        assert_answered(samples, wanted)
        assert len(server.bodies) == 3 and {sample.versions[0][0] for sample in samples} <= {3, 4}


def test_a_server_that_joins_takes_part_after_the_next_sync() -> None:
    first, second = FakeServer(seconds=0.02), FakeServer(seconds=0.02)
    with engine_of(first) as engine:
        engine.servers.fakes.append(second)
        engine.load_weights({"w": 1}.items(), 3)
        assert engine.servers.calls == ["refresh", "prepare 3", "load 3: {'w': 1}", "serve"]
        wanted = requests(40)
        engine.submit(wanted)
        assert_answered(collect(engine), wanted)
        assert len(second.bodies) >= 10
        engine.servers.fakes.remove(first)
        engine.load_weights([], 4)
        more = requests(10, first=40)
        engine.submit(more)
        assert_answered(collect(engine), more)
        assert len(first.bodies) + len(second.bodies) == 50 and len(first.bodies) <= 30
    first.stop()


def test_a_response_over_a_weight_update_tells_who_wrote_which_tokens() -> None:
    server = FakeServer()
    request = next(request for request in requests(20) if len(tokens_of(request)) > 10)
    n = len(tokens_of(request))
    spans = [{"version": "3", "start": 0, "end": 4}, {"version": "4", "start": 4, "end": n}]
    server.faults = [fake.changed(weight_versions=spans, weight_version="4")]
    with engine_of(server) as engine:
        engine.load_weights([], 3)
        engine.submit([request])
        engine.dispatch.version = 4  # as a sync underway leaves it
        [sample] = collect(engine)
    assert sample.versions == ((3, 0, 4), (4, 4, n))


def test_no_server_is_asked_for_more_than_it_should_and_both_work() -> None:
    servers = FakeServer(seconds=0.02), FakeServer(seconds=0.02)
    wanted = requests(60)
    with engine_of(*servers, max_concurrent=3) as engine:
        engine.submit(wanted)
        assert_answered(collect(engine), wanted)
    assert [server.most_asked for server in servers] == [3, 3]
    assert min(len(server.bodies) for server in servers) >= 20


def test_a_router_that_loses_a_worker_is_asked_for_no_more_than_the_others_should_be() -> None:
    router, workers = FakeServer(seconds=0.02), [FakeServer(), FakeServer()]
    wanted = requests(60)
    with engine_of(*workers, router=router, max_concurrent=3) as engine:
        engine.submit(wanted)
        samples = []
        for sample in engine.completed():
            samples.append(sample)
            if len(samples) == 20:
                assert router.most_asked == 6
                engine.servers.workers.pop()
            if len(samples) == 40:
                router.most_asked = 0
        assert_answered(samples, wanted)
        assert router.most_asked == 3


def test_the_server_with_the_least_outstanding_is_asked_next() -> None:
    servers = FakeServer(afterwards=fake.nothing), FakeServer(afterwards=fake.nothing)
    with engine_of(*servers, max_concurrent=100) as engine:
        engine.submit(requests(20))
        wait_for(lambda: sum(len(server.bodies) for server in servers) == 20)
    assert [len(server.bodies) for server in servers] == [10, 10]


def test_samples_come_as_they_are_finished() -> None:
    server = FakeServer([fake.slow])
    wanted = requests(4)
    with engine_of(server) as engine:
        engine.submit(wanted)
        samples = collect(engine)
    assert_answered(samples, wanted)
    assert (samples[-1].group, samples[-1].index) == (0, 0)


def test_more_may_be_submitted_while_samples_are_taken() -> None:
    server = FakeServer()
    wanted = requests(30)
    with engine_of(server) as engine:
        engine.submit(wanted[:2])
        samples, later = [], list(range(2, 30))

        def take() -> None:
            for sample in engine.completed():
                samples.append(sample)
                if later:
                    engine.submit([wanted[later.pop()]])

        within_limit(take)
    assert_answered(samples, wanted)


def test_nothing_comes_back_for_what_was_aborted_and_the_server_is_told() -> None:
    server = FakeServer([fake.well, fake.well], afterwards=fake.nothing)
    with engine_of(server, max_concurrent=4) as engine:
        wanted = requests(24)
        engine.submit(wanted)  # two are answered, four are asked, the rest waits
        taken = engine.completed()
        samples = [next(taken)]
        wait_for(lambda: len(server.bodies) == 6)
        time.sleep(0.2)  # the second answer lies there untaken: it must not come either
        server.afterwards = fake.well
        first = f"{samples[0].group}.{samples[0].index}"
        gone = [request.id for request in wanted[:6] + wanted[20:] if request.id != first]
        engine.abort([*gone, "99.9"])
        within_limit(lambda: samples.extend(taken))
        assert_answered(samples, [request for request in wanted if request.id not in gone])
        engine.load_weights([], 1)  # waits until the servers know
        assert sorted(server.aborted) == sorted(body["rid"] for body in server.bodies[2:6])
        assert len(server.bodies) == 6 + 14, "what waited was never sent"
        engine.submit(wanted[:6])  # the same ids may be asked for anew
        assert_answered(collect(engine), wanted[:6])
        assert len({body["rid"] for body in server.bodies}) == 26


def test_what_was_aborted_is_not_waited_for() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with engine_of(server, max_concurrent=1, stall_seconds=0.3) as engine:
        engine.submit(requests(3))
        wait_for(lambda: len(server.bodies) == 1)
        server.die()
        wait_for(lambda: not engine.dispatch.endpoints[0].is_usable)
        engine.abort([request.id for request in requests(3)])
        time.sleep(1.0)  # three times stall_seconds
        assert engine.failure is None


def test_what_is_aborted_before_it_was_sent_leaves_its_place_to_others() -> None:
    server = FakeServer()
    with engine_of(server, max_concurrent=2) as engine:
        for _ in range(5):
            engine.submit(requests(3))
            engine.abort([request.id for request in requests(3)])
        wanted = requests(6)
        engine.submit(wanted)
        assert_answered(collect(engine), wanted)


def test_no_id_at_a_server_is_the_beginning_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang aborts every request whose id begins with the one that it is told."""
    monkeypatch.setattr(client, "MAX_ATTEMPTS", 30)
    server = FakeServer([fake.status(500)] * 12)
    sampling = Sampling(1.0, 8, (fake.STOP,))
    with engine_of(server, max_concurrent=1) as engine:
        engine.submit(requests(1))
        collect(engine)
    again = [body["rid"] for body in server.bodies]
    assert len(again) == 13 and not [(a, b) for a in again for b in again if a != b and b.startswith(a)]
    server = FakeServer()
    wanted = [
        Request(group, index, np.arange(3, dtype=np.int32), 1, sampling)
        for group in (1, 11)
        for index in (1, 10, 11, 110)
    ]
    with engine_of(server) as engine:
        engine.submit(wanted)
        collect(engine)
    rids = [body["rid"] for body in server.bodies]
    assert len(rids) == 8 and not [(a, b) for a in rids for b in rids if a != b and b.startswith(a)]


def test_behind_a_router_every_worker_is_told_of_an_abort() -> None:
    router, workers = FakeServer(afterwards=fake.nothing), [FakeServer(), FakeServer()]
    with engine_of(*workers, router=router, max_concurrent=3) as engine:
        engine.submit(requests(10))
        wait_for(lambda: len(router.bodies) == 6)
        engine.abort([request.id for request in requests(10)])
        engine.load_weights([], 0)
        assert len(router.bodies) == 6, "max_concurrent for each worker behind it"
        assert router.aborted == [] and {len(set(worker.aborted)) for worker in workers} == {6}


def test_a_worker_that_is_silent_about_an_abort_is_not_told_of_all_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "ABORT_LIMIT", 0.5)
    router, silent, good = FakeServer(afterwards=fake.nothing), FakeServer(), FakeServer()
    silent.is_hung = True
    with engine_of(silent, good, router=router, max_concurrent=75) as engine:
        engine.submit(requests(150))
        wait_for(lambda: len(router.bodies) == 150)
        engine.abort([request.id for request in requests(150)])
        engine.load_weights([], 0)
        assert len(silent.aborted) == client.NUM_ABORTS
        assert sorted(good.aborted) == sorted(body["rid"] for body in router.bodies)
        engine.submit(requests(2))
        wait_for(lambda: len(router.bodies) == 152)
        engine.abort([request.id for request in requests(2)])
        engine.load_weights([], 1)
        assert len(silent.aborted) == client.NUM_ABORTS + 2, "the next time it is told again"


@pytest.mark.parametrize("has_died", [True, False])
def test_a_sync_that_a_server_refuses_is_prepared_once_more_if_one_has_died(
    has_died: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang, "NOTICED", 0.0)
    with engine_of(FakeServer()) as engine:
        both, failures = engine.sync, [EngineError("connection refused")]

        def prepare(version: int) -> None:
            Fakes.prepare(both, version)  # type: ignore[arg-type]
            if failures:
                raise failures.pop()

        monkeypatch.setattr(both, "prepare", prepare)
        monkeypatch.setattr(both, "refresh", lambda: both.calls.append("refresh") or has_died)  # type: ignore[attr-defined]
        if has_died:
            engine.prepare_weights(3)
            assert both.calls == ["refresh", "prepare 3"] * 2  # type: ignore[attr-defined]
        else:
            with pytest.raises(EngineError, match="connection refused"):
                engine.prepare_weights(3)


def test_an_interruption_is_noticed_while_nothing_comes() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with engine_of(server) as engine:
        engine.submit(requests(3))
        interrupted = threading.Event()
        engine.is_interrupted = interrupted.is_set
        threading.Timer(0.2, interrupted.set).start()
        with pytest.raises(Interrupted):
            collect(engine)
        engine.load_weights([], 0)
        assert len(server.aborted) == 3


def test_close_is_quick_with_requests_outstanding_tells_the_servers_and_may_be_called_twice() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with engine_of(server) as engine:
        engine.submit(requests(9))
        wait_for(lambda: len(server.bodies) == 4)
        within_limit(engine.close)
        engine.close()
        assert engine.servers.calls == ["close", "close"] and not engine.thread.is_alive()
        assert len(server.aborted) == 4 and list(engine.completed()) == []


def test_a_program_that_never_closes_the_engine_ends_all_the_same() -> None:
    server = FakeServer(afterwards=fake.nothing)
    code = f"""
from types import SimpleNamespace
from dapo.engine.control import Server
from dapo.engine.sglang import SGLangEngine
from tests.sglang.fake_server import requests
servers = SimpleNamespace(workers=[Server("{server.url}")], generate_urls=["{server.url}"])
engine = SGLangEngine(servers, None, 4, 60.0)
engine.submit(requests(3))
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
    def broken(answer: bytes, request: Request) -> Sample:
        raise ZeroDivisionError("a fault of the client")

    monkeypatch.setattr(generate, "read", broken)
    server = FakeServer()
    with engine_of(server) as engine:
        engine.submit(requests(2))
        with pytest.raises(ZeroDivisionError):
            collect(engine)
