"""Calls of the user's code in a worker process, each within a time limit, and whose code is executed now.

Calls that are async run side by side, in the event loop. Others run one after the other in a thread, so that
a user's code needs no locks. This must not import torch, even indirectly.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import mmap
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Generator
from typing import Any

from dapo.types import reason

NOBODY = -1
THREAD, LOOP = 0, 1  # the two places where user's code is executed
MOST_STUCK = 8  # calls that nothing ends; then the process is to be replaced
Outcome = tuple[Any, BaseException | None]  # what a call returned, or raised


class Marks:
    """Numbers of the episodes whose code is executed now: in the thread, and in the event loop.

    They are in memory that two processes share, so the main one can read them when the worker has died.
    """

    SIZE = 16  # bytes: two int64

    def __init__(self, file: int):
        """`file`: descriptor of a file of SIZE bytes; it is closed."""
        self.memory = mmap.mmap(file, self.SIZE)
        os.close(file)
        self.values = memoryview(self.memory).cast("q")

    @classmethod
    def make(cls) -> tuple[Marks, int]:
        """Return marks, and a descriptor of their memory to give away."""
        file = os.memfd_create("marks")
        os.truncate(file, cls.SIZE)
        marks = cls(os.dup(file))
        marks.values[THREAD] = marks.values[LOOP] = NOBODY
        return marks, file

    def executed(self) -> set[int]:
        """Return the episodes whose code is executed."""
        return {*self.values} - {NOBODY}


class TimeUp(Exception):
    """A call of the user's code took longer than rollout.turn_seconds."""


class Raised(Exception):
    """The user's code raised `error`."""

    def __init__(self, error: BaseException):
        super().__init__(f"{type(error).__name__}: {reason(error)[:300]}")
        self.error = error


class UserCode:
    """Calls the user's code.

    Args:
        seconds: time limit of one call.
        leave: called with the reason when too many calls do not end: the process is to be replaced.
    """

    def __init__(self, marks: Marks, seconds: float, leave: Callable[[str], None]):
        self.marks, self.seconds, self.leave = marks, seconds, leave
        self.thread = _Thread(marks)
        self.in_thread = NOBODY  # the episode of the call that was handed to the thread
        self.one_at_a_time = asyncio.Lock()
        self.stuck: list[_Thread] = []  # that were left alone
        self.num_left = 0  # coroutines that were cancelled after their time and go on

    async def call(self, episode: int, function: Callable[[], Any]) -> Any:
        """Return what `function()` returns, awaited if it has to be.

        Raises:
            TimeUp: it takes longer than `seconds`. It is made to end if that can be, and not waited for.
            Raised: it raised something, of whatever kind.
        """
        if inspect.iscoroutinefunction(function):
            return await self._await(episode, function())
        async with self.one_at_a_time:
            found = await self._call_in_thread(episode, function)
        # a plain function may hand on what an async one returns
        return await self._await(episode, found) if inspect.isawaitable(found) else found

    async def _call_in_thread(self, episode: int, function: Callable[[], Any]) -> Any:
        self.in_thread = episode
        answer = self.thread.begin(episode, function)
        try:
            await asyncio.wait({answer}, timeout=self.seconds)
        finally:
            self.in_thread = NOBODY
        if not answer.done():
            self._replace_thread()
            raise TimeUp
        return _value(answer.result())

    async def _await(self, episode: int, work: Awaitable[Any]) -> Any:
        task = asyncio.create_task(_outcome(_Marked(work, episode, self.marks)))
        try:
            await asyncio.wait({task}, timeout=self.seconds)
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            self.num_left += 1
            task.add_done_callback(self._note_end)
            self._leave_if_stuck()
            raise TimeUp
        if task.cancelled():  # by itself
            raise Raised(asyncio.CancelledError())
        return _value(task.result())

    def _note_end(self, task: asyncio.Task[Outcome]) -> None:
        self.num_left -= 1

    def _replace_thread(self) -> None:
        """Go on with another thread. A loop in Python is ended; what waits elsewhere stays."""
        self.thread.end()
        self.stuck = [thread for thread in [*self.stuck, self.thread] if thread.is_alive()]
        self.marks.values[THREAD] = NOBODY
        self.thread = _Thread(self.marks)
        self._leave_if_stuck()

    def _leave_if_stuck(self) -> None:
        if len(self.stuck) + self.num_left > MOST_STUCK:
            self.leave(f"more than {MOST_STUCK} calls did not end after their time")


class _Thread(threading.Thread):
    """Calls functions, one after the other."""

    def __init__(self, marks: Marks):
        super().__init__(daemon=True)
        self.values = marks.values
        self.loop = asyncio.get_running_loop()
        self.jobs: queue.SimpleQueue[tuple[int, Callable[[], Any], asyncio.Future[Outcome]] | None] = (
            queue.SimpleQueue()
        )
        self.start()

    def begin(self, episode: int, function: Callable[[], Any]) -> asyncio.Future[Outcome]:
        """Have a function called. What it returns or raises is the result."""
        answer = self.loop.create_future()
        self.jobs.put((episode, function, answer))
        return answer

    def end(self) -> None:
        """Raise SystemExit in what it calls, at the next bytecode; then end it."""
        assert self.ident
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(SystemExit))
        self.jobs.put(None)

    def run(self) -> None:
        try:
            while job := self.jobs.get():
                self._call(*job)
        except BaseException:  # noqa: BLE001  # the exception of `end`, which came late
            return

    def _call(self, episode: int, function: Callable[[], Any], answer: asyncio.Future[Outcome]) -> None:
        process = os.getpid()
        self.values[THREAD] = episode
        try:
            outcome: Outcome = function(), None
        except BaseException as error:  # noqa: BLE001  # the user's code may raise anything
            outcome = None, error
        if os.getpid() != process:  # a child that the user's code left behind: its parent answers
            os._exit(0)
        if self.values[THREAD] == episode:  # else another thread has taken over
            self.values[THREAD] = NOBODY
        self.loop.call_soon_threadsafe(_set, answer, outcome)


def _set(answer: asyncio.Future[Outcome], outcome: Outcome) -> None:
    if not answer.done():
        answer.set_result(outcome)


async def _outcome(work: Awaitable[Any]) -> Outcome:
    process = os.getpid()
    try:
        outcome: Outcome = await work, None
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001  # the user's code may raise anything
        outcome = None, error
    if os.getpid() != process:  # a child, as in _Thread
        os._exit(0)
    return outcome


def _value(outcome: Outcome) -> Any:
    value, error = outcome
    if error is not None:
        raise Raised(error)
    return value


class _Marked:
    """An awaitable whose episode is marked each time that it is executed."""

    def __init__(self, work: Awaitable[Any], episode: int, marks: Marks):
        self.work, self.episode, self.values = work, episode, marks.values

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self.work if inspect.iscoroutine(self.work) else _awaited(self.work)
        step: Callable[[Any], Any] = steps.send
        given: Any = None
        while True:
            self.values[LOOP] = self.episode
            try:
                found = step(given)
            except StopIteration as end:
                return end.value
            finally:
                self.values[LOOP] = NOBODY
            try:
                given = yield found
                step = steps.send
            except BaseException as error:  # noqa: BLE001  # for the user's code
                step, given = steps.throw, error


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work
