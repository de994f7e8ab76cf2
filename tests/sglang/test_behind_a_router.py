"""A client behind a router, which alone knows what its workers were asked: fakes of both."""

from __future__ import annotations

import asyncio
import threading

import pytest
from aiohttp import web

from dapo.engine import client
from tests.sglang import fake_server as fake
from tests.sglang.fake_engine import assert_answered, collect, stream_of, wait_for, within_limit
from tests.sglang.fake_server import FakeServer, requests


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.2)


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
    with stream_of(hung, good, idle, router=router, max_concurrent=1, stall_seconds=0.5) as stream:
        servers = stream.engine.servers

        def restart(url: str, fault: str) -> None:
            assert fault == "stood still for 0.5 s"
            servers.restarted.append(url)
            servers.workers = [worker for worker in servers.workers if worker.url != url]
            is_restarted.set()

        servers.restart = restart
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
        assert stream.engine.servers.restarted == [hung.url]
    done.set()
    for worker in (hung, good, idle):
        worker.stop()


@pytest.mark.parametrize("odd", [5, [5], [[]], [{}], {"url": 1}, [{"url": None, "load": "x"}], None])
def test_what_a_server_says_of_its_work_may_be_anything(odd: object) -> None:
    router, worker = FakeServer(seconds=0.5), FakeServer()
    router.workers = worker.loads = odd
    wanted = requests(2)
    with stream_of(worker, router=router, stall_seconds=1.0) as stream:
        stream.submit(wanted)
        assert_answered(collect(stream), wanted)
    worker.stop()


def test_a_router_that_loses_a_worker_is_asked_for_no_more_than_the_others_should_be() -> None:
    router, workers = FakeServer(seconds=0.02), [FakeServer(), FakeServer()]
    wanted = requests(60)
    with stream_of(*workers, router=router, max_concurrent=3) as stream:
        stream.submit(wanted)
        samples = []
        for sample in stream.completed():
            samples.append(sample)
            if len(samples) == 20:
                assert router.most_asked == 6
                stream.engine.servers.workers.pop()
            if len(samples) == 40:
                router.most_asked = 0
        assert_answered(samples, wanted)
        assert router.most_asked == 3


def test_the_place_of_a_worker_that_died_unnoticed_is_not_given_to_the_others() -> None:
    is_dead, at_the_dead_one = threading.Event(), [1, 2, 3]

    async def under_a_death(router: FakeServer, request: web.Request, body: dict) -> web.StreamResponse:
        while not is_dead.is_set():
            await asyncio.sleep(0.01)
        fault = fake.status(502) if at_the_dead_one and at_the_dead_one.pop() else fake.well
        return await fault(router, request, body)

    router = FakeServer([fake.well] * 6, afterwards=under_a_death, seconds=0.05)
    workers = [FakeServer(), FakeServer()]
    wanted = requests(30)
    with stream_of(*workers, router=router, max_concurrent=3) as stream:
        stream.submit(wanted)
        taken = stream.completed()
        samples = [next(taken) for _ in range(6)]
        wait_for(lambda: router.num_asked == 6)
        workers[1].die()
        is_dead.set()
        wait_for(lambda: not at_the_dead_one and not stream.client.endpoints[0].outstanding)
        asked, probes = len(router.bodies), router.num_probes
        wait_for(lambda: router.num_probes > probes + 3)
        assert len(router.bodies) == asked
        router.most_asked = 0
        stream.engine.servers.workers.pop()
        within_limit(lambda: samples.extend(taken))
        assert_answered(samples, wanted)
        assert router.most_asked == 3
    workers[0].stop()


def test_behind_a_router_every_worker_gets_an_abort() -> None:
    router, workers = FakeServer(afterwards=fake.nothing), [FakeServer(), FakeServer()]
    with stream_of(*workers, router=router, max_concurrent=3) as stream:
        stream.submit(requests(10))
        wait_for(lambda: len(router.bodies) == 6)
        stream.abort([request.id for request in requests(10)])
        stream.engine.load_weights([], 0)
        assert len(router.bodies) == 6, "max_concurrent for each worker behind it"
        assert router.aborted == [] and {len(set(worker.aborted)) for worker in workers} == {6}


def test_a_worker_that_is_silent_about_an_abort_does_not_get_all_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "ABORT_TIMEOUT", 1.5)
    router, silent, good = FakeServer(afterwards=fake.nothing), FakeServer(), FakeServer()
    silent.is_hung = True
    with stream_of(silent, good, router=router, max_concurrent=75) as stream:
        stream.submit(requests(150))
        wait_for(lambda: len(router.bodies) == 150)
        stream.abort([request.id for request in requests(150)])
        stream.engine.load_weights([], 0)
        assert len(silent.aborted) == client.NUM_ABORTS
        assert sorted(good.aborted) == sorted(body["rid"] for body in router.bodies)
        stream.submit(requests(2))
        wait_for(lambda: len(router.bodies) == 152)
        stream.abort([request.id for request in requests(2)])
        stream.engine.load_weights([], 1)
        assert len(silent.aborted) == client.NUM_ABORTS + 2, "it gets the next ones again"
