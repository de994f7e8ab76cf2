"""The code of a worker process, in which environments live and tools are called: thousands of episodes in one
event loop. It must not import torch, even indirectly.

Calls that are async run side by side. Others run one after the other in a thread, so that a user's code needs
no locks, and whoever ends the process is known.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dapo.config import ConfigError
from dapo.episodes.calls import Reader, reader_of
from dapo.episodes.chat import Chat
from dapo.episodes.environment import Environment, Message, Reply, Turn
from dapo.episodes.tools import MOST, TimeUp, ToolBox, load
from dapo.reward.worker import import_function
from dapo.types import reason
from dapo.watch import frames, streams

ALIVE_EVERY = 1.0  # seconds between two signs of life
BLOCKED = 1.0  # seconds for which an async function may keep the others waiting, without a warning
MOST_STUCK = 8  # threads that no call ends; then the process is to be replaced
CLOSE_TIMEOUT = 2.0  # seconds for environments to close when the run ends
ROLES = ("user", "tool", "system", "developer", "assistant")


class Setup(NamedTuple):
    """The first message to a worker."""

    chat: Chat
    environment: str | None  # module:Class
    tools: tuple[str, ...]  # module:function
    schemas: list[dict[str, Any]]  # theirs
    seconds: float  # for one call of the user's code


class Begin(NamedTuple):
    """Make an environment, and reset it."""

    episode: int
    row: dict[str, Any]
    seed: int


class Step(NamedTuple):
    """Answer the policy's turn. What follows it has to have fewer than `room` tokens."""

    episode: int
    tokens: bytes  # int32
    is_truncated: bool
    room: int


class End(NamedTuple):
    """Close the environment."""

    episode: int


class Began(NamedTuple):
    """The first messages of an episode, and their tokens, int32."""

    episode: int
    tokens: bytes
    messages: list[Message]


class Answer(NamedTuple):
    """What became of a turn. `tokens`, int32, follow it; None: they have no room."""

    episode: int
    text: str  # of the policy's turn
    turn: Turn
    tokens: bytes | None
    num_calls: int
    num_unreadable: int
    num_failed: int
    num_neutralised: int


class Fault(NamedTuple):
    """The user's code did not answer."""

    episode: int
    what: str


class Running(NamedTuple):
    """The user's code is called for this episode now."""

    episode: int


class Warned(NamedTuple):
    """Something that the user should know."""

    text: str


class Alive(NamedTuple):
    """The event loop runs."""


class Ready(NamedTuple):
    """The user's code is imported."""


class Failed(NamedTuple):
    """The process cannot work at all."""

    what: str


def serve(connection: socket.socket, paths: Sequence[str]) -> None:
    """Answer messages until the other side closes. The first one is the Setup."""
    streams.keep_open()  # an environment may print
    setup = next(frames.messages(connection), None)
    if setup is None:
        return
    try:
        player = Player(setup)
    except ConfigError as error:
        _send(connection, [Failed(reason(error))])
        return
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's module may raise anything
        _send(connection, [Failed(f"{setup.environment or ', '.join(setup.tools)}: {reason(error)}")])
        return
    asyncio.run(player.run(connection))


def _send(connection: socket.socket, messages: list[Any]) -> None:
    with suppress(OSError):  # the other side has ended
        connection.sendall(frames.frame(messages))


class Player:
    """Environments of many episodes, or the tools that answer all of them."""

    def __init__(self, setup: Setup):
        self.setup, self.chat = setup, setup.chat
        self.make = import_environment(setup.environment) if setup.environment else None
        self.toolbox = ToolBox(load(setup.tools))
        self.environments: dict[int, Environment] = {}
        self.schemas: dict[int, list[dict[str, Any]]] = {}  # of environments that have tools
        self.reader: Reader | None = reader_of(self.chat.template) if setup.tools else None
        self.thread = ThreadPoolExecutor(1)
        self.one_at_a_time = asyncio.Lock()
        self.stuck: list[int] = []  # ids of threads that were given up
        self.tasks: set[asyncio.Task[None]] = set()
        self.beat = time.monotonic()
        self.reported: set[str] = set()
        self.is_checked = not self.make  # the chat template can be continued

    async def run(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        reader, self.writer = await asyncio.open_connection(sock=connection, limit=2**26)
        self.send(Ready())
        background = [asyncio.create_task(self._live()), asyncio.create_task(self._sign())]
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, args=(loop, threading.get_ident()), daemon=True).start()
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = await reader.readexactly(frames.LENGTH)
                for message in frames.loads(await reader.readexactly(frames.length(head))):
                    task = asyncio.create_task(self._handle(message))
                    self.tasks.add(task)
                    task.add_done_callback(self.tasks.discard)
        for task in background:
            task.cancel()
        for task in list(self.tasks):
            task.cancel()
        ends = [self._close(episode) for episode in list(self.environments)]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*ends), CLOSE_TIMEOUT)
        os._exit(0)  # threads that are stuck would be waited for

    def send(self, message: Any) -> None:
        self.writer.write(frames.frame([message]))

    # --- messages ---

    async def _handle(self, message: Begin | Step | End) -> None:
        if isinstance(message, End):
            await self._close(message.episode)
            return
        process = os.getpid()
        try:
            answer: Any
            if isinstance(message, Begin):
                answer = await self._begin(message)
            else:
                answer = await self._step(message)
        except ConfigError as error:
            answer = Fault(message.episode, reason(error))
        except TimeUp:
            what = f"did not answer in rollout.turn_seconds={self.setup.seconds:g}"
            answer = Fault(message.episode, f"{_method(message)} {what}")
        except _NoTurn as error:
            answer = Fault(message.episode, f"{_method(message)} returned {error}")
        except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's code may raise anything
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = f"raised {type(error).__name__}: {reason(error)[:300]} ({place.filename}:{place.lineno})"
            answer = Fault(message.episode, f"{_method(message)} {said}")
        if os.getpid() != process:  # a child that the user's code left behind: its parent answers
            os._exit(0)
        self.send(answer)

    async def _begin(self, message: Begin) -> Began:
        assert self.make
        environment: Environment = await self.call(message.episode, self.make)
        self.environments[message.episode] = environment
        messages = _messages(await self.call(message.episode, environment.reset, message.row, message.seed))
        tools: list[dict[str, Any]] = []
        if getattr(type(environment), "tools", Environment.tools) is not Environment.tools:
            tools = await self.call(message.episode, environment.tools)
        if tools:
            self.reader = self.reader or reader_of(self.chat.template)
            self.schemas[message.episode] = tools
        if not self.is_checked:
            self.chat.check(tools)
            self.is_checked = True
        if not messages:
            raise _NoTurn("no messages")
        return Began(message.episode, _bytes(self.chat.start(messages, tools)), messages)

    async def _step(self, message: Step) -> Answer:
        raw = np.frombuffer(message.tokens, np.int32).tolist()
        text = self.chat.text(raw)
        environment = self.environments.get(message.episode)
        tools = self.schemas.get(message.episode, []) if environment else self.setup.schemas
        calls = self.reader(text, tools) if self.reader and tools else []
        num_unreadable = sum(bool(call.error) for call in calls)
        reply = Reply(text, calls, message.is_truncated)
        num_failed = 0
        if environment:
            turn = _checked(await self.call(message.episode, environment.step, reply))
        else:
            turn, num_failed = await self.toolbox.step(reply, partial(self._call_tool, message.episode))
        tokens, num_neutralised = None, 0
        if not (turn.is_done or message.is_truncated):
            suffix = self.chat.after(raw[-1], turn.messages, tools, message.room)
            num_neutralised = suffix.num_neutralised
            tokens = None if suffix.tokens is None else _bytes(suffix.tokens)
            if tokens is None:
                turn = Turn([_cut(each) for each in turn.messages], False, turn.reward, turn.is_correct)
        counts = len(calls), num_unreadable, num_failed, num_neutralised
        return Answer(message.episode, text, turn, tokens, *counts)

    async def _close(self, episode: int) -> None:
        self.schemas.pop(episode, None)
        environment = self.environments.pop(episode, None)
        if environment and getattr(type(environment), "close", Environment.close) is not Environment.close:
            try:
                await self.call(episode, environment.close)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's code; the episode is over
                self._warn(f"close raised {type(error).__name__}: {reason(error)[:300]}")

    # --- calls of the user's code ---

    async def _call_tool(self, episode: int, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        return await self.call(episode, function, **arguments)

    async def call(self, episode: int, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Call it within the time limit. Raise TimeUp after that, or what it raises."""
        if inspect.iscoroutinefunction(function):
            self.send(Running(episode))
            return await self._in_time(function(*args, **named))
        async with self.one_at_a_time:
            self.send(Running(episode))
            ids: list[int] = []

            def called() -> Any:
                ids.append(threading.get_ident())
                return function(*args, **named)

            try:
                found = await self._in_time(asyncio.get_running_loop().run_in_executor(self.thread, called))
            except TimeUp:
                self._give_up(ids)
                raise
        if inspect.isawaitable(found):  # a plain function that hands on what an async one returns
            return await self._in_time(found)
        return found

    async def _in_time(self, work: Awaitable[Any]) -> Any:
        limit = asyncio.timeout(self.setup.seconds)
        try:
            async with limit:
                return await work
        except TimeoutError:  # or the user's own
            if limit.expired():
                raise TimeUp from None
            raise

    def _give_up(self, ids: list[int]) -> None:
        """Go on with another thread. A loop in Python is ended; what waits elsewhere, stays."""
        for id in ids:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(id), ctypes.py_object(SystemExit))
        self.thread.shutdown(wait=False)
        self.thread = ThreadPoolExecutor(1)
        alive = {thread.ident for thread in threading.enumerate()}
        self.stuck = [id for id in [*self.stuck, *ids] if id in alive]
        if len(self.stuck) > MOST_STUCK:
            self._warn(f"{len(self.stuck)} calls did not end after their time: their process is replaced")
            os._exit(1)

    # --- signs of life ---

    async def _live(self) -> None:
        while True:
            self.beat = time.monotonic()
            await asyncio.sleep(BLOCKED / 10)

    async def _sign(self) -> None:
        while True:
            self.send(Alive())
            await asyncio.sleep(ALIVE_EVERY)

    def _watch(self, loop: asyncio.AbstractEventLoop, main: int) -> None:
        """Name an async function that blocks the event loop, once for each place."""
        while True:
            time.sleep(BLOCKED / 4)
            if time.monotonic() - self.beat < BLOCKED or not (frame := sys._current_frames().get(main)):
                continue
            stack = traceback.extract_stack(frame)
            own = [each for each in stack if not _is_ours(each.filename)]
            if own and _is_ours(stack[0].filename) and not any("chat.py" in each.filename for each in stack):
                what = f"{own[0].name} is async and blocks its worker ({own[0].filename}:{own[0].lineno})"
                remedy = "await what it waits for, or make it a plain function"
                loop.call_soon_threadsafe(self._warn, f"{what}: {remedy}")

    def _warn(self, text: str) -> None:
        if text not in self.reported:
            self.reported.add(text)
            self.send(Warned(text))


class _NoTurn(Exception):
    """An environment returned what is none of its turns. The message says what."""


def _is_ours(path: str) -> bool:
    """True for the frames that stand above every call of the user's code."""
    here = os.path.dirname(__file__)
    library = os.path.dirname(os.__file__)
    is_library = path.startswith(library) and "site-packages" not in path
    return is_library or path.startswith((os.path.dirname(here), "<frozen", "<string>"))


def _method(message: Begin | Step) -> str:
    return "reset" if isinstance(message, Begin) else "step"


def _messages(found: Any) -> list[Message]:
    """Return messages of an environment, checked. Raise _NoTurn."""
    if not isinstance(found, list):
        raise _NoTurn(f"{type(found).__name__}; expected a list of {{role, content}}")
    for message in found:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise _NoTurn(f"{str(message)[:80]}; expected {{role, content}}, both text")
        if message.get("role") not in ROLES:
            raise _NoTurn(f"a message with role {message.get('role')!r}; known: {', '.join(ROLES)}")
    return found


def _checked(turn: Any) -> Turn:
    """Return an environment's turn. Raise _NoTurn unless it is one."""
    if not isinstance(turn, Turn):
        raise _NoTurn(f"{type(turn).__name__}; expected a Turn")
    if (
        isinstance(turn.reward, bool)
        or not isinstance(turn.reward, int | float)
        or not math.isfinite(turn.reward)
    ):
        raise _NoTurn(f"a reward of {turn.reward!r}; expected a finite number")
    if turn.is_correct not in (None, True, False):
        raise _NoTurn(f"is_correct={turn.is_correct!r}; expected True, False or None")
    if not _messages(turn.messages) and not turn.is_done:
        raise _NoTurn("no messages, and is not done")
    return turn


def _cut(message: Message) -> Message:
    """Return a message for the record: it is too long for the policy to read."""
    return message | {"content": message["content"][:MOST]}


def _bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()


def import_environment(path: str) -> Callable[[], Environment]:
    """Import the class at `path`, "module:Class".

    Raises:
        ConfigError: there is none, or it lacks reset or step.
    """
    try:
        kind = import_function(path)
    except ValueError as error:
        raise ConfigError(f"rollout.environment={str(error).partition('; expected')[0]}") from error
    wanted = "expected a class with reset(row, seed) and step(reply), as dapo.episodes.Environment"
    if not inspect.isclass(kind):
        raise ConfigError(f"rollout.environment={path} is {type(kind).__name__}; {wanted}")
    for name, count in (("reset", 2), ("step", 1)):
        method = getattr(kind, name, None)
        if method is None or method is getattr(Environment, name):
            raise ConfigError(f"rollout.environment={path} has no method {name}; {wanted}")
        try:
            inspect.signature(method).bind(None, *[None] * count)
        except TypeError as error:
            raise ConfigError(f"rollout.environment={path}.{name}: {error}; {wanted}") from error
    try:
        inspect.signature(kind).bind()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rollout.environment={path} is made without arguments: {error}") from error
    return kind  # type: ignore[return-value]  # as far as can be seen
