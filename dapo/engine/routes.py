"""Do servers return the routes of what they generate? Asked before the first step."""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from functools import partial

from dapo.config import ConfigError
from dapo.engine.control import Server, on_all
from dapo.model.routing import Routing
from dapo.types import EngineError

PROMPT = (1, 2, 3)  # token ids, which every vocabulary has
MAX_TOKENS = 2
ASKED = "policy.routing_replay=rollout"
REMEDY = "or set policy.routing_replay=old, which needs nothing of servers"


def check_routes(servers: Sequence[Server], routing: Routing) -> None:
    """Let every server generate two tokens.

    Raises:
        ConfigError: one returns no routes, or such as the policy cannot have, or may return another prompt's.
    """
    on_all(servers, partial(_check, routing))


def _check(routing: Routing, server: Server) -> None:
    where = f"{ASKED}: {server.url}"
    try:
        info = server.get("/server_info")
        for name in filter(info.get, ("enable_hierarchical_cache", "enable_lmcache", "enable_flexkv")):
            stale = f"has {name}: a prompt that comes back into the cache has another's routes"
            raise ConfigError(f"{where} {stale}: start it without --{name.replace('_', '-')}, {REMEDY}")
        if kind := info.get("speculative_algorithm"):
            why = f"has speculative_algorithm={kind}, of which SGLang records no routes"
            raise ConfigError(f"{where} {why}: start it without, {REMEDY}")
        sampling = {"max_new_tokens": MAX_TOKENS, "temperature": 1.0, "ignore_eos": True}
        asked = {"input_ids": PROMPT, "sampling_params": sampling, "return_routed_experts": True}
        answer = server.post("/generate", asked, fields={"output_ids": list, "meta_info": dict})
    except EngineError as error:
        raise ConfigError(f"{ASKED}: {error}") from error
    if (encoded := answer["meta_info"].get("routed_experts")) is None:
        start = "start it with --enable-return-routed-experts, or, if it is a router, name its workers"
        raise ConfigError(f"{where} returns no routes: {start}; {REMEDY}")
    try:
        routing.read(binascii.a2b_base64(encoded), len(PROMPT) + len(answer["output_ids"]) - 1)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where} returns wrong routes: {error}: use another server, {REMEDY}") from None
