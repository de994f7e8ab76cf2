"""Control calls to one SGLang server: every call but generation. Each blocks, for a time limit at most."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import orjson

from dapo import http
from dapo.clock import heartbeat
from dapo.types import EngineError

S = TypeVar("S")
T = TypeVar("T")
# environment variable with the servers' API key: not an option, because the config is saved with the run
KEY_VARIABLE = "DAPO_ENGINE_KEY"
IN_WORDS = {"/flush_cache"}  # calls answered in words; all others are answered with JSON, or with nothing
Fields = Mapping[str, type]
Json = dict[str, Any]
NOTHING: Fields = {}
SUCCESS: Fields = {"success": bool}  # of every call that changes weights; false is a refusal


class Server:
    """The server at `url`, http://host:port. Every call may raise EngineError with the call and its answer.

    `fields` are those that the answer must have, by type: `get("/server_info", fields={"tp_size": int})`.
    Without any, the answer may be empty. `timeout` is in seconds. `require` is called before anything is
    sent; it raises NoAnswer if another process may have taken the server's place.
    """

    def __init__(self, url: str, key: str | None = None, require: Callable[[], None] = lambda: None):
        self.url = url.rstrip("/")
        self.key = key or os.environ.get(KEY_VARIABLE)
        self.require = require

    def get(self, path: str, timeout: float = 10, fields: Fields = NOTHING) -> Json:
        return self._call("GET", path, None, timeout, fields)

    def post(
        self, path: str, body: Json | None = None, timeout: float = 60, fields: Fields = NOTHING
    ) -> Json:
        return self._call("POST", path, json.dumps(body or {}).encode(), timeout, fields)

    def delete(self, path: str, timeout: float = 10) -> Json:
        return self._call("DELETE", path, None, timeout, NOTHING)

    def _call(self, method: str, path: str, body: bytes | None, timeout: float, fields: Fields) -> Json:
        where = self.url + path
        try:
            self.require()
            status, text = http.call(method, where, body, timeout=timeout, key=self.key)
        except http.NoAnswer as error:
            raise EngineError(f"{where}: {error}") from None
        finally:
            heartbeat()  # it has ended, well or not: the next call has a timeout of its own
        if not 200 <= status < 300:
            raise EngineError(f"{where} answered {status}: {http.one_line(text)}")
        value = {} if path in IN_WORDS else _parse(text, where)
        if value.get("success") is False:
            raise EngineError(f"{where} refused: {http.one_line(str(value.get('message', value)).encode())}")
        for name, kind in fields.items():
            if type(value.get(name)) is not kind:  # true is an int in Python, and no number here
                raise EngineError(f"{where} answered without {name}: {http.one_line(text) or 'nothing'}")
        return value


def _parse(text: bytes, where: str) -> Json:
    """Return the JSON object in `text`; {} for no text, or for a value that is not an object."""
    try:
        value = orjson.loads(
            text or b"null"
        )  # json would take lone surrogates, and overflow at deep brackets
    except orjson.JSONDecodeError:
        raise EngineError(f"{where} answered what is not JSON: {http.one_line(text)}") from None
    return value if isinstance(value, dict) else {}


def on_all(servers: Sequence[S], call: Callable[[S], T]) -> list[T]:
    """Run `call` on all at once. Return the answers in order, or raise the first error once all ended."""
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        return [future.result() for future in [pool.submit(call, server) for server in servers]]
