"""The one HTTP client: for requests to inference servers, their health, and rewards at a URL.

One thread runs an event loop for all of them. Every status is an answer; a body that is cut short, too large
or compressed is none: an answer costs at most the bytes and the time that its request allows. No proxy is
used, whatever the environment says, and no redirect is followed.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import errno
import functools
import io
import resource
import socket
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

import aiohttp

from dapo.clock import waiting
from dapo.types import Interrupted, Stopped

T = TypeVar("T")
CHECK_EVERY = 0.25  # seconds between two checks for an interruption
CONNECT_TIMEOUT = 60.0  # seconds, for requests whose answer has no timeout
MAX_BYTES = 64 * 2**20  # of an answer, unless the request says otherwise
MAX_REFUSAL = 64 * 2**10  # bytes that are read of an answer with status 300 or more, to be quoted
OTHER_FILES = 256  # open files of this process that are no connections
KEEP_ALIVE = 2.0  # seconds that an idle connection stays open; SGLang closes one after 5
_starting = threading.Lock()


class NoAnswer(Exception):
    """The server cannot be reached, or its answer did not arrive whole or is too large.

    The message is one line.
    """


class TimedOut(NoAnswer):
    """The whole answer was not there in time."""


class Answer(NamedTuple):
    status: int
    body: bytes


async def exchange(
    method: str, url: str, body: bytes | None = None, timeout: float | None = None, key: str | None = None,
    keep_alive: bool = True, max_bytes: int = MAX_BYTES,
) -> Answer:  # fmt: skip
    """Send a request, in the event loop, and return the answer. Any number are sent at a time.

    `body` is JSON; `key` is sent as a bearer token. `timeout`, in seconds, is for the whole answer: a server
    that sends a byte now and then is late, too. With None only connecting has a timeout. `max_bytes` limits
    the body of the answer.

    Raises:
        NoAnswer: the server cannot be reached, or its answer is cut short, too large or compressed.
        TimedOut: the answer is late.
        Stopped: this process has no file descriptor left for a connection.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if body is not None:
        headers["Content-Type"] = "application/json"
    data = None if body is None else io.BytesIO(body)  # sent piece by piece: bytes would block the loop
    timeouts = aiohttp.ClientTimeout(total=timeout, sock_connect=None if timeout else CONNECT_TIMEOUT)
    request: dict[str, Any] = dict(data=data, headers=headers, timeout=timeouts, allow_redirects=False)
    try:
        async with _session(keep_alive).request(method, url, **request) as response:
            said = await _read(response, max_bytes)
            if key and response.status >= 300:  # a refusal is quoted, and may quote the key
                said = said.replace(key.encode(), b"***")
            return Answer(response.status, said)
    except TimeoutError:
        raise TimedOut("timed out") from None
    except (aiohttp.ClientError, OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise Stopped(f"no connection to {url} could be opened: {_file_limit()}") from None
        raise NoAnswer(_describe(error)) from None


def call(
    method: str, url: str, body: bytes | None = None, *, timeout: float, key: str | None = None,
    max_bytes: int = MAX_BYTES, is_interrupted: Callable[[], bool] = lambda: False,
) -> Answer:  # fmt: skip
    """Send a request as `exchange` does and wait for the answer as `wait` does."""
    work = exchange(method, url, body, timeout, key, keep_alive=False, max_bytes=max_bytes)
    return wait(work, is_interrupted)


def wait(work: Coroutine[Any, Any, T], is_interrupted: Callable[[], bool] = lambda: False) -> T:
    """Run a coroutine in the event loop and wait for its result. Any thread but the loop's own may call it.

    Cancel it and raise Interrupted once `is_interrupted()`, checked every CHECK_EVERY seconds, is true.
    """
    future = asyncio.run_coroutine_threadsafe(work, loop())
    try:
        while not concurrent.futures.wait([future], CHECK_EVERY).done:
            waiting()  # an exchange has a timeout
            if is_interrupted():
                raise Interrupted
        return future.result()
    finally:
        future.cancel()  # one that has ended stays as it is


def require_connections(count: int) -> None:
    """Raise the limit on open files as far as the system allows: a connection is an open file.

    Warn if it is too low for `count` connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit than the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    wanted = count + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        print(
            f"warning: {count} connections may be open at a time: {_file_limit()}",
            file=sys.stderr,
            flush=True,
        )


def _file_limit() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"this process may open {soft} files; raise that with `ulimit -n` (hard limit {hard}), or send fewer "
        "requests at a time"
    )


def loop() -> asyncio.AbstractEventLoop:
    """Return the event loop, which runs in a thread of its own until the process ends."""
    with _starting:
        return _start_loop()


@functools.cache
def _start_loop() -> asyncio.AbstractEventLoop:
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, name="http", daemon=True).start()
    atexit.register(made.set_exception_handler, lambda *_: None)  # else it reports open connections then
    return made


@functools.cache
def _session(keep_alive: bool) -> aiohttp.ClientSession:
    """Return the session of connections that are kept, or of those for one request each.

    One for both would send the last request of a connection, after which the server closes it, on one that
    another request may take in the same moment.
    """
    kept: dict[str, Any] = {"keepalive_timeout": KEEP_ALIVE} if keep_alive else {"force_close": True}
    connector = aiohttp.TCPConnector(limit=0, socket_factory=_make_socket, **kept)
    cookies = aiohttp.DummyCookieJar()
    plain: dict[str, Any] = dict(auto_decompress=False, headers={"Accept-Encoding": "identity"})
    return aiohttp.ClientSession(
        connector=connector, cookie_jar=cookies, trust_env=False, **plain
    )  # no proxies


async def _read(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Return the body, or of a refusal the beginning that came. Leaving early closes the connection."""
    is_refusal = response.status >= 300
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        if is_refusal:
            return b""
        raise NoAnswer(f"the answer is compressed ({encoding[:20]}), which the request excludes")
    limit = min(max_bytes, MAX_REFUSAL) if is_refusal else max_bytes
    parts: list[bytes] = []
    size = 0
    try:
        async for part in response.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > limit:
                if is_refusal:
                    break
                raise NoAnswer(f"the answer is larger than {max_bytes:,} bytes")
    except aiohttp.ClientPayloadError:
        if not is_refusal:  # the part of a refusal that came says more
            raise
    return b"".join(parts)[:limit]


def _describe(error: Exception) -> str:
    if isinstance(error, aiohttp.InvalidURL | UnicodeError):  # the latter: no name of a host
        return "it is no valid URL"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the answer was cut short"
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ConnectionRefusedError):
        return "connection refused"
    return one_line(str(error).encode()) or type(error).__name__


def _make_socket(address: Any) -> socket.socket:
    """Make a socket that notices within 75 s that a host has vanished: no host sends while it generates."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 3)):
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made


def one_line(text: bytes) -> str:
    """Return the first 500 bytes of an answer as one line, to be quoted in an error message."""
    return " ".join(text[:500].decode("utf-8", "replace").split())
