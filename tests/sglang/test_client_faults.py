"""What a client does about one endpoint that fails or stands still, without a server."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from dapo import clock, http
from dapo.config import Limits
from dapo.engine import client
from dapo.engine.client import Client
from dapo.engine.endpoint import PROBE_TIMEOUT, Endpoint, first_few

STALL = 30.0


def make_client(*endpoints: Any) -> tuple[Any, list[Any]]:
    """A client's own state, and a record of what it does."""
    done: list[Any] = []
    own = SimpleNamespace(
        limits=Limits(STALL),
        is_loading=False,
        endpoints=list(endpoints),
        ready=deque(),
        servers=SimpleNamespace(restart=lambda url, why: done.append(("restart", url))),
        waiting=lambda: "nothing",
        _leave=lambda endpoint: done.append(("leave", endpoint.url)),
        _fail=lambda error: done.append(("fail", str(error))),
        _send=lambda: done.append("send"),
        _spawn=lambda work: (work.close(), done.append("restore")),
    )
    own._restore = lambda endpoint: Client._restore(own, endpoint)
    return own, done


def make_endpoint(**changes: Any) -> Any:
    state: dict[str, Any] = {
        "url": "http://a", "outstanding": {"rid": 1}, "progressed_at": 100.0, "moved_at": {},
        "is_usable": True, "usable_since": 0.0, "num_faults": 0, "fault": "",
    }  # fmt: skip
    return SimpleNamespace(**(state | changes))


def test_a_worker_that_stands_still_is_restarted_once() -> None:
    endpoint = make_endpoint(moved_at={"still": 100.0, "moving": 110.0}, progressed_at=125.0)
    own, done = make_client(endpoint)
    Client._check_stall(own, endpoint, 100 + STALL)
    assert done == [], "not yet"
    Client._check_stall(own, endpoint, 100 + STALL + 1)
    Client._check_stall(own, endpoint, 100 + STALL + 2)
    assert done == [("restart", "still")] and endpoint.moved_at == {"moving": 110.0}


def test_an_endpoint_that_stands_still_is_restarted_and_left() -> None:
    endpoint = make_endpoint()
    own, done = make_client(endpoint)
    Client._check_stall(own, endpoint, 100 + STALL)
    assert done == []
    Client._check_stall(own, endpoint, 100 + STALL + 1)
    assert done == [("restart", "http://a"), ("leave", "http://a")]


@pytest.mark.parametrize("why", ["loading", "idle"])
def test_the_clock_of_a_stall_stands_while_nothing_is_to_be_done(why: str) -> None:
    endpoint = make_endpoint(moved_at={"a": 1.0}, outstanding={} if why == "idle" else {"rid": 1})
    own, done = make_client(endpoint)
    own.is_loading = why == "loading"
    Client._check_stall(own, endpoint, 1000.0)
    assert done == [] and endpoint.progressed_at == 1000.0 and endpoint.moved_at == {}


def test_progress_of_a_server_is_a_heartbeat_of_the_run() -> None:
    own, endpoint, before = SimpleNamespace(progressed_at=0.0), make_endpoint(), clock.progress()[0]
    Client._note_progress(own, endpoint)
    assert clock.progress()[0] == before + 1
    assert endpoint.progressed_at == own.progressed_at > 100.0


def test_requests_that_fail_together_are_one_fault() -> None:
    endpoint = make_endpoint(usable_since=50.0)
    own, done = make_client(endpoint)
    Client._note_fault(own, endpoint, "of an earlier fault", 49.0)
    assert endpoint.num_faults == 0 and endpoint.is_usable and done == []
    Client._note_fault(own, endpoint, "gone", 50.0)
    Client._note_fault(own, endpoint, "gone, too", 51.0)
    assert endpoint.num_faults == 1 and not endpoint.is_usable and done == ["restore"]
    assert endpoint.fault == "gone, too"


@pytest.mark.parametrize("num_faults", [1, 2, 4, 99])
def test_a_server_is_asked_again_once_it_is_well_after_pauses_that_grow(
    num_faults: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    endpoint = make_endpoint(num_faults=num_faults, is_usable=False, fault="gone")
    own, done = make_client(endpoint)
    well, pauses = [True, False, False], list[float]()

    async def is_well(endpoint: Any) -> bool:
        return well.pop()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    own._is_well = is_well
    monkeypatch.setattr(client.asyncio, "sleep", sleep)
    monkeypatch.setattr(client.random, "uniform", lambda low, high: high)
    asyncio.run(Client._restore(own, endpoint))
    first = min(client.FIRST_PAUSE * 2 ** min(num_faults - 1, 10), client.LONGEST_PAUSE)
    assert pauses == [first, *(min(factor * first, client.LONGEST_PAUSE) for factor in (2, 4))]
    assert endpoint.is_usable and endpoint.usable_since > 0 and done == ["send"]
    said = "http://a failed, 1 more responses asked there: gone", "http://a is asked again"
    assert capfd.readouterr().err.splitlines() == [f"engine: {line}" for line in said]


def test_a_server_that_left_meanwhile_is_not_asked_again() -> None:
    endpoint = make_endpoint(is_usable=False)
    own, done = make_client()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "FIRST_PAUSE", 0.0)
        asyncio.run(Client._restore(own, endpoint))
    assert not endpoint.is_usable and done == []


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_request_that_failed_too_often_ends_the_run_if_it_is_wanted(is_wanted: bool) -> None:
    own, done = make_client()
    job: Any = SimpleNamespace(
        endpoint=make_endpoint(fault="500"), num_failures=client.MAX_FAILURES - 2, is_wanted=is_wanted,
        request=SimpleNamespace(id="1-2"),
    )  # fmt: skip
    own.ready.append("later")
    Client._send_again(own, job)
    assert list(own.ready) == [job, "later"] and done == []
    Client._send_again(own, own.ready.popleft(), has_failed=False)
    assert list(own.ready) == [job, "later"] and done == []
    Client._send_again(own, own.ready.popleft())
    times = f"request 1-2 failed {client.MAX_FAILURES} times, the last time at http://a: 500"
    assert list(own.ready) == ["later"] and done == ([("fail", times)] if is_wanted else [])


def test_servers_know_of_every_abort_before_weights_are_sent() -> None:
    async def finish() -> list[int]:
        known: list[int] = []

        async def abort(number: int) -> None:
            await asyncio.sleep(0)
            known.append(number)

        own: Any = SimpleNamespace(aborts={asyncio.ensure_future(abort(number)) for number in range(3)})
        await Client.finish_aborts(own)
        return sorted(known)

    assert asyncio.run(finish()) == [0, 1, 2]


@pytest.mark.parametrize(("stall", "timeout"), [(2.0, 0.5), (8.0, 2.0), (1e6, PROBE_TIMEOUT)])
def test_a_probe_ends_well_before_a_stall_has_lasted_twice(stall: float, timeout: float) -> None:
    servers: Any = SimpleNamespace(workers=[])
    assert Endpoint("http://a", servers, stall).probe_timeout == timeout


@pytest.mark.parametrize(
    ("outcome", "is_dead"),
    [(None, False), (http.TimedOut("late"), False), (http.NoAnswer("refused"), True)],
    ids=["answers", "is late", "refuses"],
)
def test_a_worker_is_dead_if_nobody_answers_at_once(
    outcome: Exception | None, is_dead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def exchange(*arguments: Any, **options: Any) -> None:
        if outcome:
            raise outcome

    monkeypatch.setattr(http, "exchange", exchange)
    servers: Any = SimpleNamespace(workers=[], key_of=lambda url: None)
    assert asyncio.run(Endpoint("http://a", servers, 2.0)._is_dead("http://b")) is is_dead


def test_a_task_is_kept_until_it_ends_and_its_error_reaches_the_streams() -> None:
    failed, own = list[Any](), SimpleNamespace(tasks=set())
    own._fail, own._end_task = failed.append, lambda task: Client._end_task(own, task)

    async def main() -> None:
        go = asyncio.Event()

        async def work() -> None:
            await go.wait()
            raise KeyError("a bug")

        task = Client._spawn(own, work())
        assert own.tasks == {task}, "asyncio itself keeps only a weak reference"
        go.set()
        await asyncio.wait({task})
        await asyncio.sleep(0)
        assert own.tasks == set()

    asyncio.run(main())
    assert [type(error) for error in failed] == [KeyError]


def test_a_worker_that_lets_an_abort_wait_is_asked_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    async def exchange(method: str, url: str, *rest: Any) -> None:
        asked.append(url)
        if "slow" in url:
            raise http.TimedOut("late")
        if "gone" in url:
            raise http.NoAnswer("refused")

    monkeypatch.setattr(http, "exchange", exchange)
    endpoint = make_endpoint(worker_urls=["http://slow", "http://gone", "http://well"])

    async def main() -> None:
        servers = SimpleNamespace(key_of=lambda url: None)
        own, silent = SimpleNamespace(abort_slots=asyncio.Semaphore(4), servers=servers), set[str]()
        for rid in ("a", "b"):
            await Client._abort_at(own, endpoint, rid, silent)

    asyncio.run(main())
    names = [url.removeprefix("http://").removesuffix("/abort_request") for url in asked]
    assert names == ["slow", "gone", "well", "gone", "well"]


def test_a_server_progresses_while_its_number_of_tokens_changes_and_it_runs_something() -> None:
    told = iter([(1, 5), (1, 5), (1, 6), (0, 0), (0, 7), (2, 7)])

    async def load_of(url: str, path: str, key: str) -> list[dict[str, int]]:
        running, used = next(told)
        return [{"num_running_reqs": running, "num_used_tokens": used}]

    own = SimpleNamespace(is_router=False, worker_urls=["http://a"], loads={}, _list=load_of)

    async def main() -> list[bool]:
        return [await Endpoint.has_progressed(own) for _ in range(6)]  # type: ignore[arg-type]

    assert asyncio.run(main()) == [True, False, True, False, False, True]


@pytest.mark.parametrize("dead", [(), ("http://w0",), ("http://w1",), ("http://w0", "http://w1")])
def test_a_router_is_well_while_none_of_its_workers_is_dead(
    dead: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def exchange(method: str, url: str, **options: Any) -> Any:
        if url.startswith(dead):
            raise http.NoAnswer("refused")
        return SimpleNamespace(status=200, body=b"")

    monkeypatch.setattr(http, "exchange", exchange)
    workers = [SimpleNamespace(url=f"http://w{number}") for number in range(2)]
    servers: Any = SimpleNamespace(workers=workers, key_of=lambda url: None)
    assert asyncio.run(Endpoint("http://router", servers, 2.0).is_well(3)) is (not dead)


def test_first_waves_are_sent_before_what_waits_and_in_their_order() -> None:
    own, _ = make_client()
    own._is_idle = lambda: False

    def jobs(names: str) -> list[Any]:
        return [
            SimpleNamespace(request=SimpleNamespace(id=name, priority=int(name.isupper()))) for name in names
        ]

    Client._add(own, jobs("aBCd"))
    Client._add(own, jobs("eFG"))
    assert "".join(job.request.id for job in own.ready) == "FGBCade"


def test_what_the_policy_waits_for_is_sent_before_first_waves() -> None:
    own, _ = make_client()
    own._is_idle = lambda: False
    for name, priority in (("a", 0), ("W", 1), ("E", 2), ("V", 1), ("F", 2), ("b", 0)):
        Client._add(own, [SimpleNamespace(request=SimpleNamespace(id=name, priority=priority))])  # type: ignore[list-item]
    assert "".join(job.request.id for job in own.ready) == "FEVWab"


def test_of_many_requests_the_first_eight_are_named() -> None:
    names = list("abcdefghi")
    assert first_few(names[:8]) == names[:8] and first_few(names) == [*names[:8], "…"]


def test_before_its_first_request_a_client_waits_for_nothing() -> None:
    servers: Any = SimpleNamespace(workers=[])
    said = Client(servers, 4, Limits(STALL), 50).waiting()
    assert said == "waiting for 0 responses; the last one came 0 s ago"
