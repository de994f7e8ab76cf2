"""An engine over fake servers, without weights; and what its streams return, within a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from dapo.config import Limits
from dapo.engine.control import Server
from dapo.engine.sglang import SGLangEngine, SGLangStream
from dapo.types import EngineError, Request, Sample
from tests.sglang.fake_server import FakeServer, tokens_of

VOCAB = 1000  # no token of an honest answer is this or larger
LIMIT = 30.0  # seconds for anything here: nothing takes so long, but nothing may hang either


class Fakes:
    """Servers and weight sync of an engine over fake servers, which get the version and no weights."""

    def __init__(self, *fakes: FakeServer, router: FakeServer | None = None):
        self.fakes, self.router = list(fakes), router
        self.workers = [Server(server.url) for server in fakes]
        self.prepared: int | None = None
        self.calls: list[str] = []
        self.restarted: list[str] = []

    @property
    def generate_urls(self) -> list[str]:
        return [self.router.url] if self.router else [worker.url for worker in self.workers]

    def key_of(self, url: str) -> None:
        return None

    def lost(self) -> list[str]:
        return []

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
def stream_of(
    *fakes: FakeServer,
    router: FakeServer | None = None,
    max_concurrent: int = 4,
    stall_seconds: float = 60.0,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[SGLangStream]:
    """A stream of an engine over these servers; engine and servers are closed at the end."""
    both = Fakes(*fakes, router=router)
    engine = SGLangEngine(both, both, max_concurrent, Limits(stall_seconds), VOCAB, is_interrupted)
    try:
        yield engine.stream()
    finally:
        within_limit(engine.close)


def within_limit(work: Callable[[], object]) -> object:
    """Run `work` in a thread, for at most LIMIT seconds. Return its result, or raise its error."""
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


def collect(stream: SGLangStream) -> list[Sample]:
    return within_limit(lambda: list(stream.completed()))  # type: ignore[return-value]


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
