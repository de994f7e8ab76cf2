"""The code of a worker process, in which environments live and tools are called: thousands of episodes in one
event loop. It must not import torch, even indirectly.

Answers are sent together at the end of each turn of the event loop: the main process reads them at once.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import numpy as np

from dapo.config import ConfigError
from dapo.episodes.calls import Reader, reader_of
from dapo.episodes.chat import Chat
from dapo.episodes.checks import Wrong, cut, import_environment, messages_of, schemas_of, turn_of
from dapo.episodes.environment import Environment, Message, Reply, Turn
from dapo.episodes.tools import ToolBox, load
from dapo.episodes.user_code import LOOP, NOBODY, Marks, Raised, TimeUp, UserCode
from dapo.reward.worker import described
from dapo.types import reason
from dapo.watch import frames, streams

ALIVE_EVERY = 1.0  # seconds between two signs of life
BLOCKED = 1.0  # seconds for which an async function may keep the others waiting, without a warning
CLOSE_TIMEOUT = 2.0  # seconds for environments to close when the run ends
CHARACTERS = 256  # of a token at most, for first messages that are far too long to be encoded


class Setup(NamedTuple):
    """The first message to a worker."""

    chat: Chat
    environment: str | None  # module:Class
    tools: tuple[str, ...]  # module:function
    schemas: list[dict[str, Any]]  # theirs
    seconds: float  # for one call of the user's code
    max_prompt_length: int = 2**31  # tokens of an environment's first messages

    @property
    def name(self) -> str:
        """The option whose code answers the policy, for messages."""
        return f"rollout.environment={self.environment}" if self.environment else "rollout.tools"


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
    failure: str = ""  # what became of the process when its tools were called: they are not called again


class End(NamedTuple):
    """Close the environment."""

    episode: int


class Began(NamedTuple):
    """The first messages of an episode, and their tokens, int32."""

    episode: int
    tokens: bytes
    messages: list[Message]


class Answer(NamedTuple):
    """An answer to a turn. `tokens`, int32, follow it; None: they have no room, or the turn is the last."""

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


class Leaving(NamedTuple):
    """The process ends itself, through no fault of an episode that lives there."""


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
    """Answer messages until the other side closes. The first are a file for Marks, and the Setup."""
    streams.keep_open()  # an environment may print
    _, files, *_ = socket.recv_fds(connection, 1, 1)
    setup = next(frames.messages(connection), None) if files else None
    if setup is None:
        return
    try:
        player = Player(setup, Marks(files[0]), connection)
    except ConfigError as error:
        _send(connection, [Failed(reason(error))])
        return
    except (Exception, SystemExit) as error:  # noqa: BLE001  # the user's module may raise anything
        _send(connection, [Failed(f"{setup.environment or ', '.join(setup.tools)}: {reason(error)}")])
        return
    asyncio.run(player.run())


def _send(connection: socket.socket, messages: list[Any]) -> None:
    with suppress(OSError):  # the other side has ended, or takes no more
        connection.sendall(frames.frame(messages))


class Refusal(Exception):
    """The user's code gave no answer. The message says why: "step raised KeyError: 'x' (game.py:7)"."""


@dataclass(eq=False)
class _Episode:
    """An episode of which something is to be answered, or whose environment lives."""

    environment: Environment | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)  # schemas
    task: asyncio.Task[None] | None = None  # answers the message that came last


class Player:
    """Environments of many episodes, or the tools that answer all of them."""

    def __init__(self, setup: Setup, marks: Marks, connection: socket.socket):
        self.setup, self.chat = setup, setup.chat
        self.marks, self.connection = marks, connection
        self.make = import_environment(setup.environment) if setup.environment else None
        self.toolbox = ToolBox(load(setup.tools), self._warn)
        self.episodes: dict[int, _Episode] = {}
        self.reader: Reader | None = reader_of(self.chat.template) if setup.tools else None
        self.ends: set[asyncio.Task[None]] = set()  # close what has ended
        self.outbox: list[Any] = []
        self.turned_at = time.monotonic()  # when the event loop turned last
        self.reported: set[str] = set()
        self.is_checked = not self.make  # the chat template can be continued

    async def run(self) -> None:
        self.connection.setblocking(False)
        reader, self.writer = await asyncio.open_connection(sock=self.connection)
        self.loop = asyncio.get_running_loop()
        self.code = UserCode(self.marks, self.setup.seconds, self._leave)
        self.send(Ready())
        background = [asyncio.create_task(self._live()), asyncio.create_task(self._sign())]
        threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True).start()
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = await reader.readexactly(frames.LENGTH)
                for message in frames.loads(await reader.readexactly(frames.length(head))):
                    self._take(message)
        for task in background:
            task.cancel()
        for episode in list(self.episodes):
            self._take(End(episode))
        if self.ends:
            await asyncio.wait(self.ends, timeout=CLOSE_TIMEOUT)
        os._exit(0)  # threads that are stuck would be waited for

    def send(self, message: Any) -> None:
        """Send a message, together with others."""
        if not self.outbox:
            self.loop.call_soon(self._flush)
        self.outbox.append(message)

    def _flush(self) -> None:
        messages, self.outbox = self.outbox, []
        self.writer.write(frames.frame(messages))

    # --- messages ---

    def _take(self, message: Begin | Step | End) -> None:
        episode = self.episodes.setdefault(message.episode, _Episode())
        if not isinstance(message, End):
            episode.task = asyncio.create_task(self._answer(episode, message))
            return
        del self.episodes[message.episode]
        end = asyncio.create_task(self._end(message.episode, episode))
        self.ends.add(end)
        end.add_done_callback(self.ends.discard)

    async def _answer(self, episode: _Episode, message: Begin | Step) -> None:
        try:
            answer: Began | Answer
            if isinstance(message, Begin):
                answer = await self._begin(episode, message)
            else:
                answer = await self._step(episode, message)
        except (Refusal, ConfigError) as error:
            self.send(Fault(message.episode, reason(error)))
        except Exception as error:  # noqa: BLE001  # of the template or the tokenizer, about the user's text
            self.send(Fault(message.episode, f"its messages cannot be encoded: {described(error)}"))
        else:
            self.send(answer)
        if not self.make:
            self.episodes.pop(message.episode, None)

    async def _begin(self, episode: _Episode, message: Begin) -> Began:
        assert self.make
        number = message.episode
        made = episode.environment = await self._call(number, "its constructor", self.make)
        reset = partial(made.reset, message.row, message.seed)
        messages = await self._call(number, "reset", reset, messages_of)
        if not messages:
            raise Refusal("reset returned no messages")
        if getattr(type(made), "tools", Environment.tools) is not Environment.tools:
            episode.tools = await self._call(number, "tools", made.tools, schemas_of)
        if episode.tools:
            self.reader = self.reader or reader_of(self.chat.template)
        if not self.is_checked:
            self.chat.check(episode.tools)
            self.is_checked = True
        limit = self.setup.max_prompt_length
        count, unit = sum(len(each["content"]) for each in messages), "characters"
        if is_short := count <= CHARACTERS * limit:
            tokens = self.chat.start(messages, episode.tools)
            count, unit = len(tokens), "tokens"
        if not is_short or count > limit:
            wrong = f"reset returned first messages of {count} {unit}"
            raise Refusal(f"{wrong}, beyond data.max_prompt_length={limit}: raise it, or write less")
        return Began(number, _bytes(tokens), messages)

    async def _step(self, episode: _Episode, message: Step) -> Answer:
        number, environment = message.episode, episode.environment
        raw = np.frombuffer(message.tokens, np.int32).tolist()
        text = self.chat.text(raw)
        tools = episode.tools if environment else self.setup.schemas
        calls = self.reader(text, tools) if self.reader and tools else []
        num_unreadable = sum(bool(call.error) for call in calls)
        reply = Reply(text, calls, message.is_truncated)
        num_failed = 0
        if environment:
            turn = await self._call(number, "step", partial(environment.step, reply), turn_of)
        else:
            call = partial(self.code.call, number)
            turn, num_failed = await self.toolbox.step(reply, call, message.failure)
            turn = turn_of(turn)
        tokens, num_neutralised = None, 0
        if not (turn.is_done or message.is_truncated):
            suffix = self.chat.after(raw[-1], turn.messages, tools, message.room)
            num_neutralised = suffix.num_neutralised
            tokens = None if suffix.tokens is None else _bytes(suffix.tokens)
        if tokens is None:  # the policy does not read them
            turn = Turn(cut(turn.messages), turn.is_done, turn.reward, turn.is_correct)
        counts = len(calls), num_unreadable, num_failed, num_neutralised
        return Answer(number, text, turn, tokens, *counts)

    async def _end(self, number: int, episode: _Episode) -> None:
        """Close an episode's environment, after the call that is being made."""
        if episode.task and not episode.task.done():
            if self.code.in_thread != number:
                episode.task.cancel()
            await asyncio.wait({episode.task})
        made = episode.environment
        if made and getattr(type(made), "close", Environment.close) is not Environment.close:
            try:
                await self._call(number, "close", made.close)
            except Refusal as error:  # the episode is over
                self._warn(str(error))

    async def _call(
        self,
        episode: int,
        name: str,
        function: Callable[[], Any],
        checked: Callable[[Any], Any] = lambda found: found,
    ) -> Any:
        """Call the user's code; return what it returns, `checked`. Raise Refusal."""
        try:
            return checked(await self.code.call(episode, function))
        except TimeUp:
            limit = f"rollout.turn_seconds={self.setup.seconds:g}"
            raise Refusal(f"{name} did not answer in {limit}") from None
        except Raised as error:
            raise Refusal(f"{name} raised {described(error.error)}") from error
        except Wrong as error:
            raise Refusal(f"{name} returned {error}") from error

    # --- signs of life ---

    async def _live(self) -> None:
        while True:
            self.turned_at = time.monotonic()
            await asyncio.sleep(BLOCKED / 10)

    async def _sign(self) -> None:
        while True:
            self.send(Alive())
            await asyncio.sleep(ALIVE_EVERY)

    def _watch(self, main: int) -> None:
        """Name an async function that blocks the event loop, once for each place. End the process where one
        does so for longer than a call may take: nothing else can.
        """
        while True:
            time.sleep(BLOCKED / 4)
            seconds = time.monotonic() - self.turned_at
            if seconds < BLOCKED or not (frame := sys._current_frames().get(main)):
                continue
            if not (place := _place_of_user_code(frame)):
                continue
            blocks = f"is async and blocks its worker ({place.filename}:{place.lineno})"
            remedy = "await what it waits for, or make it a plain function"
            self.loop.call_soon_threadsafe(self._warn, f"{place.name} {blocks}: {remedy}")
            episode = self.marks.values[LOOP]
            if seconds > self.setup.seconds + BLOCKED and episode != NOBODY:
                if not self.writer.transport.get_write_buffer_size():  # nobody else writes meanwhile
                    _send(self.connection, [Fault(episode, f"{place.name} {blocks}: {remedy}"), Leaving()])
                os._exit(1)

    def _leave(self, why: str) -> None:
        """End the process."""
        self._warn(f"{why}: their process is replaced")
        self.send(Leaving())
        self._flush()
        os._exit(1)

    def _warn(self, text: str) -> None:
        if text not in self.reported:
            self.reported.add(text)
            self.send(Warned(text))


def _place_of_user_code(frame: FrameType) -> traceback.FrameSummary | None:
    """Return the outermost line of the user's code in a stack that begins with ours; None if it has none."""
    stack = traceback.extract_stack(frame)
    own = [each for each in stack if not _is_ours(each.filename)]
    is_encoding = any(each.filename.endswith("episodes/chat.py") for each in stack)
    return own[0] if own and _is_ours(stack[0].filename) and not is_encoding else None


def _is_ours(path: str) -> bool:
    """Return True for the frames that stand above every call of the user's code."""
    here = os.path.dirname(__file__)
    library = os.path.dirname(os.__file__)
    is_library = path.startswith(library) and "site-packages" not in path
    return is_library or path.startswith((os.path.dirname(here), "<frozen", "<string>"))


def _bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()
