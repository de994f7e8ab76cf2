"""Routes in answers of servers, and what is refused before the first step."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from dapo.config import ConfigError
from dapo.engine import generate
from dapo.engine.control import Server
from dapo.engine.generate import BadAnswer
from dapo.engine.routes import check_routes
from dapo.model.families import read_shape
from dapo.model.routing import Routing
from dapo.types import EngineError
from tests.sglang.conftest import make_model
from tests.sglang.test_generate import REQUEST, RID, VOCAB, answer

ASKED = replace(REQUEST, sampling=replace(REQUEST.sampling, returns_routes=True))  # 3 tokens of prompt


@pytest.fixture(scope="module")
def routing(tmp_path_factory: pytest.TempPathFactory) -> Routing:
    """Of two layers, each with 2 of 8 experts for a token."""
    return Routing(read_shape(make_model(tmp_path_factory.mktemp("routes") / "moe", num_experts=8)))


def routes_of(rows: int) -> np.ndarray:
    return np.random.default_rng(1).random((rows, 2, 8)).argsort(-1)[..., :2].astype(np.int32)


def encoded(routes: np.ndarray) -> str:
    return base64.b64encode(routes.tobytes()).decode()


def read(routing: Routing | None, tokens: list[int], *reason: str, **changes: Any) -> Any:
    made = answer(tokens, *reason, **changes)
    return generate.read(made, generate.asked(ASKED, RID), VOCAB, routing)


def test_only_a_request_that_wants_routes_asks_for_them() -> None:
    assert orjson.loads(generate.body(ASKED, RID))["return_routed_experts"] is True
    assert "return_routed_experts" not in orjson.loads(generate.body(REQUEST, RID))


def test_a_sample_has_the_routes_of_every_token_that_was_fed(routing: Routing) -> None:
    routes = routes_of(3 + 6 - 1)
    sample = read(routing, [20, 21, 22, 23, 24, 25], routed_experts=encoded(routes))
    assert np.array_equal(sample.routes, routes.reshape(8, 4))


def test_what_follows_our_own_stop_token_is_cut_off(routing: Routing) -> None:
    routes = routes_of(3 + 4 - 1)
    sample = read(routing, [20, 9, 22, 23], "stop", routed_experts=encoded(routes))
    assert sample.length == 2 and np.array_equal(sample.routes, routes[:4].reshape(4, 4))


def test_who_asks_for_no_routes_gets_none(routing: Routing) -> None:
    made = answer([20, 9], "stop", routed_experts=encoded(routes_of(4)))
    assert generate.read(made, generate.asked(REQUEST, RID), VOCAB, routing).routes is None
    assert read(None, [20, 9], "stop", routed_experts=encoded(routes_of(4))).routes is None


def test_a_server_that_returns_none_ends_the_run_by_name(routing: Routing) -> None:
    with pytest.raises(EngineError, match="start it with --enable-return-routed-experts"):
        read(routing, [20, 9], "stop")


@pytest.mark.parametrize(
    "wrong", ["routes of another length", "not base64!", 7, encoded(routes_of(3)), encoded(0 * routes_of(4))]
)
def test_routes_that_cannot_be_are_a_bad_answer(routing: Routing, wrong: Any) -> None:
    with pytest.raises(BadAnswer):
        read(routing, [20, 9], "stop", routed_experts=wrong)


@pytest.mark.parametrize("count", [1, 5000])
def test_an_answer_may_have_the_bytes_of_its_routes(routing: Routing, count: int) -> None:
    request = replace(ASKED, sampling=replace(ASKED.sampling, max_tokens=count))
    exact = len(answer([VOCAB - 1] * count, routed_experts=encoded(np.zeros((count + 2, 2, 2), np.int32))))
    asked = generate.asked(request, RID)
    assert exact < asked.max_bytes(routing) == asked.max_bytes(None) + (3 + count) * 23


class Fake(Server):
    """A server that answers the two calls of the check."""

    def __init__(self, routes: np.ndarray | None, has_cache: bool = False):
        super().__init__("http://node7:30000")
        self.routes, self.has_cache = routes, has_cache

    def get(self, path: str, *_: Any, **__: Any) -> dict[str, Any]:
        return {"enable_hierarchical_cache": self.has_cache}

    def post(self, path: str, body: Any = None, *_: Any, **__: Any) -> dict[str, Any]:
        assert path == "/generate" and body["return_routed_experts"] is True
        meta = {} if self.routes is None else {"routed_experts": encoded(self.routes)}
        return {"output_ids": [4, 5], "meta_info": meta}


def test_servers_that_return_routes_are_used(routing: Routing) -> None:
    check_routes([Fake(routes_of(4)), Fake(routes_of(4))], routing)


@pytest.mark.parametrize(
    ("server", "said"),
    [
        (Fake(None), "http://node7:30000 returns no routes: start it with --enable-return-routed-experts"),
        (Fake(routes_of(3)), "http://node7:30000 returns wrong routes: routes of 3 rows"),
        (Fake(0 * routes_of(4)), "returns wrong routes: token 0 goes twice"),
        (Fake(routes_of(4), has_cache=True), "http://node7:30000 has enable_hierarchical_cache"),
    ],
)
def test_a_server_without_them_is_refused_by_name_before_the_first_step(
    routing: Routing, server: Server, said: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        check_routes([Fake(routes_of(4)), server], routing)
    assert said in str(raised.value) and "policy.routing_replay=old" in str(raised.value)


def test_a_server_that_does_not_answer_is_refused(routing: Routing, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy.routing_replay=rollout: http://127.0.0.1:9/server_info"):
        check_routes([Server("http://127.0.0.1:9")], routing)
