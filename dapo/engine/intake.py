"""A process that takes in answers of servers: HTTP, parsing and checks hold its interpreter's lock, not the
trainer's.

The trainer sends what to ask over a socket and receives samples, 9 bytes a token and its routes. Both
directions carry frames of lists of messages, as many as there are when the one before has left.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import pickle
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn

from dapo import http
from dapo.engine import generate
from dapo.engine.generate import Asked, BadAnswer, NoWorker
from dapo.model.routing import Routing
from dapo.types import EngineError, Sample, Stopped, reason
from dapo.watch import forked, frames, streams

RETRIED = {408, 429, 500, 502, 503, 504}  # HTTP: not now; any other status but 200 is a refusal
NO_WORKER = b"no_available_workers"  # in a router's answer 503
MAX_DEATHS = 3  # in a row, of processes that took in no answer
END_TIMEOUT = 5.0  # seconds for the process to end


class Ask(NamedTuple):
    """A request to send to `url`. A number alone cancels the one that has it."""

    number: int
    url: str
    body: bytes
    key: str | None
    asked: Asked


Answer = tuple[int, Sample | Exception | None]  # what came of an Ask, by its number; None: it was cancelled


class Intake:
    """Asks servers through a process of its own, which is started again if it ends.

    `num_connections` may be open at a time. Used in the event loop of dapo.http.
    """

    def __init__(self, vocab_size: int, num_connections: int, routing: Routing | None = None):
        self.arguments = (vocab_size, num_connections, routing)
        self.numbers = itertools.count()
        self.process: _Process | None = None
        self.num_deaths = 0  # since the last answer
        self.failure = ""  # once it is not started again
        self.is_ready = asyncio.Event()  # set after the first start, or after the last that failed

    async def open(self) -> None:
        """Start the process and wait until it runs. Raise EngineError if it cannot."""
        self._start()
        await self.is_ready.wait()
        if self.failure:
            raise EngineError(self.failure)

    async def ask(self, url: str, body: bytes, key: str | None, asked: Asked) -> Sample:
        """Return the sample that the server at `url` answers with.

        Cancelled, it closes the connection, and ends once nothing will be sent to the server any more.
        Cancelled again, it ends at once.

        Raises:
            NoAnswer: as `http.exchange` does, or the process has ended.
            NoWorker: the server is a router without a worker; it may be asked again.
            BadAnswer: the server is not ready, or its answer is no response; it may be asked again.
            EngineError: the server refused, or always would; or the process ends again and again.
            Stopped: there is no file descriptor left for a connection.
        """
        process = self.process
        if process is None:
            raise EngineError(self.failure or "the intake process was closed")
        number = next(self.numbers)
        loop = asyncio.get_running_loop()
        process.asked[number] = future = loop.create_future()
        process.outbox.put(Ask(number, url, body, key, asked))
        try:
            return await future  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            if number in process.asked:
                process.asked[number] = ended = loop.create_future()
                process.outbox.put(number)
                with suppress(Exception):  # whatever came of it
                    await ended
            raise

    async def close(self) -> None:
        """End the process, and with it whatever it is asking. A second call does nothing."""
        process, self.process = self.process, None
        if process:
            await asyncio.to_thread(process.end)
            process.fail(http.NoAnswer("the intake process was closed"))

    def _start(self) -> None:
        try:
            self.process = _Process(self.arguments, self._receive, self._replace)
        except (OSError, RuntimeError) as error:  # no file descriptor or thread is left
            self._stop(f"the intake process could not be started: {reason(error)}")

    def _stop(self, failure: str) -> None:
        self.failure = failure
        self.is_ready.set()

    def _receive(self, process: _Process, answers: list[Answer]) -> None:
        """Hand out answers; a list without any says that the process runs."""
        self.is_ready.set()
        if any(outcome is not None for _, outcome in answers):
            self.num_deaths = 0
        for number, outcome in answers:
            future = process.asked.pop(number, None)
            if future is None or future.done():  # it was cancelled
                continue
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _replace(self, process: _Process, how: str) -> None:
        """Start another process in place of one that has ended by itself."""
        if process is not self.process:  # it was closed meanwhile
            return
        self.process = None
        self.num_deaths += 1
        if self.num_deaths < MAX_DEATHS:
            print(f"engine: the intake process {how}; starting it again", file=sys.stderr, flush=True)
            process.fail(http.NoAnswer(f"the intake process {how}"))
            self._start()
        else:
            self._stop(f"the intake process {how}, as did {MAX_DEATHS - 1} before it without an answer")
            process.fail(EngineError(self.failure))


class _Process:
    """One intake process, seen from the trainer. A thread starts it and reads, another one writes.

    They call `on_answers` in the event loop, and `on_end`, with how it ended, unless `end` was called.
    """

    def __init__(
        self,
        arguments: tuple[int, int, Routing | None],
        on_answers: Callable[[_Process, list[Answer]], None],
        on_end: Callable[[_Process, str], None],
    ):
        self.asked: dict[int, asyncio.Future[Any]] = {}  # by number, until it is answered
        self.outbox = SimpleQueue[Ask | int]()
        self.on_answers, self.on_end = on_answers, on_end
        self.owner = os.getpid()
        self.is_wanted = True
        self.socket, theirs = socket.socketpair()
        called = (f"{__name__}:{serve.__name__}", theirs, *arguments)
        self.process = forked.context.Process(
            target=forked.without_signals, args=called, name="intake", daemon=True
        )
        self.writer = threading.Thread(target=self._write, name="intake writer", daemon=True)
        self.reader = threading.Thread(target=self._run, args=(theirs,), name="intake reader", daemon=True)
        self.reader.start()
        atexit.register(self.end)  # before multiprocessing's own function, which was registered earlier

    def end(self) -> None:
        """End it and wait until it has ended. A fork of the trainer does nothing."""
        if os.getpid() == self.owner:
            self.is_wanted = False
            with suppress(OSError):  # it has ended
                self.socket.shutdown(socket.SHUT_RDWR)
            self.reader.join(END_TIMEOUT)

    def fail(self, error: Exception) -> None:
        """Raise the error from all that is asked."""
        for future in self.asked.values():
            if not future.done():
                future.set_exception(error)
        self.asked.clear()

    def _run(self, theirs: socket.socket) -> None:
        how = ""
        try:
            how = self._start(theirs) or self._read_until_it_ends()
        except Exception as error:  # noqa: BLE001  # whatever it was, nobody may wait for answers any more
            how = f"failed: {reason(error)}"
        if self.process.pid:
            self.process.kill()
            self.process.join()
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        if self.writer.is_alive():
            self.outbox.put(-1)  # wakes it, and it ends
            self.writer.join()
        self.socket.close()
        atexit.unregister(self.end)
        if self.is_wanted:
            http.loop().call_soon_threadsafe(self.on_end, self, how)

    def _start(self, theirs: socket.socket) -> str:
        """Return why it cannot be started, "" if it was."""
        try:
            self.writer.start()
            forked.start(self.process)
        except (OSError, EOFError, RuntimeError) as error:
            return f"could not be started: {reason(error)}"
        finally:
            theirs.close()
        return ""

    def _read_until_it_ends(self) -> str:
        """Pass answers on. Return how the process ended."""
        loop = http.loop()
        for answers in frames.messages(self.socket):
            loop.call_soon_threadsafe(self.on_answers, self, answers)
        self.process.kill()
        self.process.join()
        return f"ended (exit status {self.process.exitcode})"

    def _write(self) -> None:
        with suppress(OSError):
            while True:
                messages = [self.outbox.get()]
                while not self.outbox.empty():
                    messages.append(self.outbox.get())
                self.socket.sendall(frames.frame(messages))


def serve(theirs: socket.socket, vocab_size: int, num_connections: int, routing: Routing | None) -> None:
    """Run the process, until the trainer's end of the socket is closed. It must not import torch."""
    streams.keep_open()
    http.require_connections(num_connections)
    asyncio.run(_Server(vocab_size, routing).run(theirs))


class _Server:
    """The process's side: does what it is sent, in an event loop."""

    def __init__(self, vocab_size: int, routing: Routing | None):
        self.vocab_size = vocab_size
        self.routing = routing
        self.tasks: dict[int, asyncio.Task[Sample | Exception]] = {}  # by number of what is asked
        self.answers: list[Answer] = []  # to be sent
        self.has_answers = asyncio.Event()
        self.has_answers.set()  # the first list, without any, says that the process runs

    async def run(self, theirs: socket.socket) -> NoReturn:
        reader, writer = await asyncio.open_unix_connection(sock=theirs)
        tasks = [asyncio.create_task(work) for work in (self._receive(reader), self._send(writer))]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # raises if it did not end with the trainer
        os._exit(0)  # at once, whatever is asked

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = await reader.readexactly(frames.LENGTH)
                for message in pickle.loads(await reader.readexactly(frames.length(head))):
                    self._take(message)

    def _take(self, message: Ask | int) -> None:
        if isinstance(message, Ask):
            task = self.tasks[message.number] = asyncio.create_task(self._outcome(message))
            # a callback: a task that is cancelled before it begins runs nothing of its own
            task.add_done_callback(partial(self._answer, message.number))
        elif message in self.tasks:  # else its answer is on its way
            self.tasks[message].cancel()

    async def _outcome(self, ask: Ask) -> Sample | Exception:
        try:
            return await fetch(ask, self.vocab_size, self.routing)
        except (http.NoAnswer, BadAnswer, Stopped) as error:
            return error
        except Exception:  # noqa: BLE001  # a bug: its traceback is for the trainer
            return RuntimeError(f"in the intake process:\n{traceback.format_exc()}")

    def _answer(self, number: int, task: asyncio.Task[Sample | Exception]) -> None:
        del self.tasks[number]
        self.answers.append((number, None if task.cancelled() else task.result()))
        self.has_answers.set()

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        """Send answers, all that there are whenever the last have left."""
        writer.transport.set_write_buffer_limits(0)
        with suppress(OSError):
            while True:
                await self.has_answers.wait()
                self.has_answers.clear()
                answers, self.answers = self.answers, []
                writer.write(frames.frame(answers))
                await writer.drain()


async def fetch(ask: Ask, vocab_size: int, routing: Routing | None = None) -> Sample:
    """Send a request and return the sample of its answer; raise as `Intake.ask` does."""
    asked = ask.asked
    url = ask.url + "/generate"
    status, answer = await http.exchange(
        "POST", url, ask.body, key=ask.key, max_bytes=asked.max_bytes(routing)
    )
    if status in RETRIED:
        fault = NoWorker if status == 503 and NO_WORKER in answer else BadAnswer
        raise fault(f"{status} {http.one_line(answer)}")
    if status != 200:
        size = f"{asked.num_prompt_tokens} tokens of prompt, max_tokens {asked.max_tokens}"
        refused = f"{ask.url} refused request {asked.id} ({size})"
        raise EngineError(f"{refused}: {status} {http.one_line(answer)}")
    return generate.read(answer, asked, vocab_size, routing)
