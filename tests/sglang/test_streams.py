"""Streams of one engine side by side: each gets its own samples, and none disturbs another."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dapo.engine.sglang import SGLangStream
from dapo.types import EngineError, Interrupted, Request, Sample, Sampling
from tests.sglang import fake_server as fake
from tests.sglang.fake_engine import assert_answered, collect, stream_of, wait_for, within_limit
from tests.sglang.fake_server import FakeServer, requests


def ask(stream: SGLangStream, wanted: list[Request]) -> list[Sample]:
    """Submit them in groups, and read samples meanwhile, as a user does."""
    samples, left = [], [wanted[i : i + 4] for i in range(0, len(wanted), 4)]
    stream.submit(left.pop(0))
    for sample in stream.completed():
        samples.append(sample)
        if left:
            stream.submit(left.pop(0))
    return samples


def test_two_streams_in_two_threads_each_get_only_their_own_samples() -> None:
    server = FakeServer(seconds=0.01)
    wanted = [requests(80), requests(80, first=80)]
    with stream_of(server) as first:
        streams = [first, first.engine.stream()]
        with ThreadPoolExecutor(2) as threads:
            found = within_limit(lambda: list(threads.map(ask, streams, wanted)))
    for samples, of_stream in zip(found, wanted, strict=True):
        assert_answered(samples, of_stream)
    assert server.most_asked == 4, "they share max_concurrent"


def test_streams_may_use_the_same_request_ids() -> None:
    server = FakeServer(seconds=0.01)
    wanted = requests(40, Sampling(1.0, 64, (fake.STOP,))), requests(40, Sampling(0.5, 16, (fake.STOP,)))
    with stream_of(server) as first:
        streams = [first, first.engine.stream()]
        with ThreadPoolExecutor(2) as threads:
            found = within_limit(lambda: list(threads.map(ask, streams, wanted)))
    for samples, of_stream in zip(found, wanted, strict=True):
        assert_answered(samples, of_stream)
    assert len({body["rid"] for body in server.bodies}) == 80


def test_abort_of_one_stream_leaves_the_other() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server, max_concurrent=12) as first:
        second = first.engine.stream()
        first.submit(requests(8))
        second.submit(requests(8))
        wait_for(lambda: len(server.bodies) == 12)
        server.afterwards = fake.well
        first.abort()
        assert collect(first) == []
        wait_for(lambda: len(server.bodies) == 16)  # what waited of the second
        wait_for(lambda: len(server.aborted) == 8)
        assert set(server.aborted) == {body["rid"] for body in server.bodies[:8]}
        more = requests(4)
        first.submit(more)
        assert_answered(collect(first), more)
        second.abort([request.id for request in requests(4)])
        assert_answered(collect_some(second, 4), requests(4, first=4))
        second.abort()


def collect_some(stream: SGLangStream, num: int) -> list[Sample]:
    samples = stream.completed()
    return within_limit(lambda: [next(samples) for _ in range(num)])  # type: ignore[return-value]


def test_abort_from_another_thread_ends_a_wait() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server) as stream:
        stream.submit(requests(6))
        threading.Timer(0.2, stream.abort).start()
        start = time.monotonic()
        assert collect(stream) == [] and time.monotonic() - start < 5


def test_a_failure_reaches_every_stream_that_waits() -> None:
    server = FakeServer([fake.nothing, fake.nothing], afterwards=fake.status(400, "too long"))
    with stream_of(server) as first:
        second = first.engine.stream()
        first.submit(requests(2))
        wait_for(lambda: len(server.bodies) == 2)
        with ThreadPoolExecutor(2) as threads:
            waiting = threads.submit(collect, first)
            second.submit(requests(1, first=2))
            for found in (threads.submit(collect, second), waiting):
                with pytest.raises(EngineError, match=r"refused request 1\.0"):
                    found.result()
        with pytest.raises(EngineError, match=r"refused request 1\.0"):
            third = first.engine.stream()
            third.submit(requests(1))
            collect(third)


def test_an_interruption_aborts_what_each_stream_has_outstanding() -> None:
    server, interrupted = FakeServer(afterwards=fake.nothing), threading.Event()
    with stream_of(server, is_interrupted=interrupted.is_set) as first:
        streams = [first, first.engine.stream()]
        for stream in streams:
            stream.submit(requests(2))
        wait_for(lambda: len(server.bodies) == 4)
        interrupted.set()
        for stream in streams:
            with pytest.raises(Interrupted):
                collect(stream)
        wait_for(lambda: len(server.aborted) == 4)


def test_closing_the_engine_ends_every_wait() -> None:
    server = FakeServer(afterwards=fake.nothing)
    with stream_of(server) as first:
        second = first.engine.stream()
        first.submit(requests(2))
        second.submit(requests(2))
        with ThreadPoolExecutor(2) as threads:
            waiting = [threads.submit(collect, stream) for stream in (first, second)]
            wait_for(lambda: len(server.bodies) == 4)
            within_limit(first.engine.close)
            assert [wait.result() for wait in waiting] == [[], []]
