"""One SGLang server, seen by whoever steers it: the calls that are not generation. Blocking, each with its
time limit.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from dapo.clock import heartbeat
from dapo.types import EngineError

S = TypeVar("S")
T = TypeVar("T")
KEY_VARIABLE = "DAPO_ENGINE_KEY"  # servers' API key: from the environment, for a config is kept with the run
IN_WORDS = {"/flush_cache"}  # what is answered in words; everything else with JSON, or with nothing
CHUNK = 1 << 16
NOTHING: Mapping[str, type] = {}
SUCCESS: Mapping[str, type] = {"success": bool}  # of whatever changes a server's weights; false is a refusal


class Server:
    """The server at `url`, http://host:port. `key` is its API key, if it wants one.

    `fields` are what the answer must have, by type: `get("/server_info", fields={"tp_size": int})`. Without
    any, an empty answer will do.

    Raises, in every call: EngineError naming the server, the call, what came back.
    """

    def __init__(self, url: str, key: str | None = None):
        self.url, self.key = url.rstrip("/"), key or os.environ.get(KEY_VARIABLE)

    def get(self, path: str, timeout: float = 10, fields: Mapping[str, type] = NOTHING) -> dict[str, Any]:
        return self._call(urllib.request.Request(self.url + path), path, timeout, fields)

    def post(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        timeout: float = 60,
        fields: Mapping[str, type] = NOTHING,
    ) -> dict[str, Any]:
        data = json.dumps(body or {}).encode()
        return self._call(
            urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}),
            path,
            timeout,
            fields,
        )

    def delete(self, path: str, timeout: float = 10) -> dict[str, Any]:
        return self._call(urllib.request.Request(self.url + path, method="DELETE"), path, timeout, NOTHING)

    def _call(
        self, request: urllib.request.Request, path: str, timeout: float, fields: Mapping[str, type]
    ) -> dict[str, Any]:
        if self.key:
            request.add_header("Authorization", f"Bearer {self.key}")
        where = self.url + path
        try:
            status, text = _exchange(request, timeout)
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{where}: {error or type(error).__name__}") from None
        finally:
            heartbeat()  # it has ended, well or not: the next call has a limit of its own
        if not 200 <= status < 300:
            raise EngineError(f"{where} answered {status}: {one_line(text)}")
        value = {} if path in IN_WORDS else _parse(text, where)
        if value.get("success") is False:
            raise EngineError(f"{where} refused: {value.get('message', value)}")
        for name, kind in fields.items():
            if not isinstance(value.get(name), kind):
                raise EngineError(f"{where} answered without {name}: {one_line(text) or 'nothing'}")
        return value


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """An answer is an answer, whatever its status; none sends us elsewhere."""

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:
        return response

    https_response = http_response


OPENER = urllib.request.build_opener(_AnyStatus)


def _exchange(request: urllib.request.Request, timeout: float) -> tuple[int, bytes]:
    """Status and body of the answer. `timeout` is for all of it: a server that sends a byte now and then is
    late, too.
    """
    deadline, parts = time.monotonic() + timeout, []
    with OPENER.open(request, timeout=timeout) as answer:
        while part := answer.read1(CHUNK):
            parts.append(part)
            if time.monotonic() > deadline:
                raise TimeoutError("timed out")
        text = b"".join(parts)
        # less than was announced; of a refusal, what came says more
        if answer.length and answer.status < 300:
            raise http.client.IncompleteRead(text, answer.length)
        return answer.status, text


def _parse(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`; {} of nothing, a list as {"items": …}."""
    try:
        value = json.loads(text or b"null")
    except ValueError:
        raise EngineError(f"{where} answered what is not JSON: {one_line(text)}") from None
    return value if isinstance(value, dict) else {} if value is None else {"items": value}


def on_all(servers: Sequence[S], call: Callable[[S], T]) -> list[T]:
    """`call` on every server at once; their answers in order. Raises the first error, after all have
    answered.
    """
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        return [future.result() for future in [pool.submit(call, server) for server in servers]]


def one_line(text: bytes) -> str:
    return " ".join(text[:500].decode("utf-8", "replace").split())
