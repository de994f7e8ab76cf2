"""One SGLang server, seen by whoever steers it: the calls that are not generation. Blocking, each with its time limit."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from dapo.clock import beat
from dapo.types import EngineError

S = TypeVar("S")
T = TypeVar("T")
KEY_VARIABLE = "DAPO_ENGINE_KEY"  # servers' API key: from the environment, for a config is kept with the run


class Server:
    """The server at `url`, http://host:port. `key` is its API key, if it wants one.

    Raises, in every call: EngineError naming the server, the call, what came back.
    """

    def __init__(self, url: str, key: str | None = None):
        self.url, self.key = url.rstrip("/"), key or os.environ.get(KEY_VARIABLE)

    def get(self, path: str, timeout: float = 10) -> dict[str, Any]:
        return self._call(urllib.request.Request(self.url + path), path, timeout)

    def post(self, path: str, body: dict[str, Any] | None = None, timeout: float = 60) -> dict[str, Any]:
        data = json.dumps(body or {}).encode()
        return self._call(urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}), path, timeout)

    def delete(self, path: str, timeout: float = 10) -> dict[str, Any]:
        return self._call(urllib.request.Request(self.url + path, method="DELETE"), path, timeout)

    def _call(self, request: urllib.request.Request, path: str, timeout: float) -> dict[str, Any]:
        if self.key:
            request.add_header("Authorization", f"Bearer {self.key}")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise EngineError(f"{self.url}{path} answered {error.code}: {one_line(error.read())}") from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{self.url}{path}: {error or type(error).__name__}") from None
        finally:
            beat()  # it has ended, well or not: the next call has a limit of its own
        try:
            value = json.loads(text) if text.strip().startswith((b"{", b"[")) else {}  # some calls answer in words, or with nothing
        except ValueError:
            raise EngineError(f"{self.url}{path} answered what is not JSON: {one_line(text)}") from None
        if isinstance(value, dict) and value.get("success") is False:
            raise EngineError(f"{self.url}{path} refused: {value.get('message', value)}")
        return value if isinstance(value, dict) else {"items": value}


def on_all(servers: Sequence[S], call: Callable[[S], T]) -> list[T]:
    """`call` on every server at once; their answers in order. Raises the first error, after all have answered."""
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        return [future.result() for future in [pool.submit(call, server) for server in servers]]


def one_line(text: bytes) -> str:
    return " ".join(text[:500].decode("utf-8", "replace").split())
