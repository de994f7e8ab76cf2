"""Worker processes for environments and tools, from the main rank. A thread speaks with all of them."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver
from typing import Any

from dapo.clock import heartbeat
from dapo.config import ConfigError
from dapo.episodes.player import (
    Alive,
    Answer,
    Began,
    Begin,
    End,
    Failed,
    Fault,
    Leaving,
    Ready,
    Setup,
    Step,
    Warned,
    serve,
)
from dapo.episodes.user_code import Marks
from dapo.types import EpisodeError
from dapo.watch import forked
from dapo.watch.frames import Channel, wait
from dapo.watch.guarded import Guarded

PRELOADED = ["dapo.watch.worker", "dapo.reward.worker", "dapo.reward", "dapo.episodes.player", "mpmath"]
IMPORT_TIMEOUT = 300.0  # seconds for a worker to import the user's code
SILENT = 5.0  # seconds beyond the time limit of a call without a sign of life: something holds the process
CLOSE_TIMEOUT = 3.0  # seconds for environments to close when the run ends
MOST_DEATHS = 20  # of workers, while no call is answered
MOST_FAILURES = 32  # of steps, if none was ever answered
CHECK_EVERY = 0.25  # seconds between two checks of the processes
WARNINGS, SAME = 20, 2  # different warnings that are printed, and alike ones
SUSPENDED = 1.0  # seconds that a wait takes too long if this process was stopped, and its workers with it


@dataclass(eq=False)
class Call:
    """A message that a worker is to answer, and what the workers' thread does with the answer."""

    message: Begin | Step
    done: Callable[[Began | Answer | Fault], None]


@dataclass(eq=False)
class _Worker:
    process: Guarded
    marks: Marks
    is_ready: bool = False
    is_leaving: bool = False
    episodes: set[int] = field(default_factory=set)  # that live there
    calls: dict[int, Call] = field(default_factory=dict)  # that it is to answer, by episode
    heard_at: float = field(default_factory=time.monotonic)

    @property
    def channel(self) -> Channel:
        return self.process.channel

    def suspects(self) -> set[int]:
        """Return the episodes that may have ended it: those whose code it executed; if it executed none,
        those that it was to answer, else all. Nobody may have if it has not begun, or left by itself.
        """
        if self.is_leaving or not self.is_ready:
            return set()
        return self.marks.executed() or set(self.calls) or set(self.episodes)


class Workers:
    """Up to `count` processes, which start when there is work for them.

    An environment lives in one of them, from its Begin to its End. Tools answer in any. If a process dies, or
    shows no sign of life for longer than a call may take, or needs more than `memory` GiB with what it
    started, it is replaced. Turns of tools are answered again elsewhere, those that may have ended it one at
    a time: then it is known which did, and its calls have failed.
    """

    def __init__(self, setup: Setup, count: int, memory: float):
        self.setup, self.count, self.memory = setup, max(count, 1), memory
        self.listener: Callable[[int, str, bool], None] | None = None
        self.numbers = itertools.count()
        self.workers: list[_Worker] = []
        self.homes: dict[int, _Worker] = {}  # where each episode's environment lives
        self.alone: _Worker | None = None  # makes one call at a time, of those that may have ended a process
        self.suspects: deque[Call] = deque()  # calls of tools for it
        self.inbox: deque[Call | End] = deque()
        self.failure: BaseException | None = None
        self.num_deaths = 0  # since a call was answered
        self.num_failures = 0  # of steps
        self.has_answered = False  # a step
        self.warned: Counter[str] = Counter()
        self.is_closed = False
        self.ours, theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.wakes = Channel(theirs)
        forkserver.ensure_running()
        self.thread = threading.Thread(target=self._run, name="environments", daemon=True)
        self.thread.start()

    def ask(self, call: Call) -> None:
        """Have it answered. Any thread may call this."""
        self._send(call)

    def end(self, episode: int) -> None:
        """Close an episode's environment. Its call, if there is one, is answered no more."""
        self._send(End(episode))

    def listen(self, listener: Callable[[int, str, bool], None]) -> None:
        """Have it called with each episode whose environment is gone with its process, how that ended, and
        whether the environment's code was being called.
        """
        self.listener = listener

    def close(self) -> None:
        """Let environments close, and end all processes."""
        self.is_closed = True
        self._wake()
        self.thread.join()

    def warn(self, text: str, place: str = "") -> None:
        """Print a warning, twice at most, and so many different ones. `place`: no part of what it says."""
        self.warned[text] += 1
        is_known = len(self.warned) <= WARNINGS
        if is_known and self.warned[text] <= SAME:
            last = "; more like this are not shown" if self.warned[text] == SAME else ""
            print(f"warning: {self.setup.name}: {place}{text}{last}", file=sys.stderr, flush=True)
        elif not is_known:
            del self.warned[text]

    def _send(self, item: Call | End) -> None:
        self.inbox.append(item)
        # what stood there before has woken the thread, and it takes all
        if len(self.inbox) == 1 and threading.get_ident() != self.thread.ident:
            self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError, OSError):  # it is awake, or has ended
            self.ours.send(b"\0")

    # --- the thread ---

    def _run(self) -> None:
        try:
            while not self.is_closed:
                self._turn()
        except BaseException as error:  # noqa: BLE001  # streams raise it
            self.failure = error
        finally:
            self._end_all()

    def _turn(self) -> None:
        """Send what there is, wait, and take what comes."""
        outgoing: dict[_Worker, list[Any]] = {}
        while self.inbox:
            item = self.inbox.popleft()
            if isinstance(item, End):
                self._drop(item, outgoing)
            else:
                self._assign(item, outgoing)
        if self.alone and self.suspects and not self.alone.calls:
            self._give(self.alone, self.suspects.popleft(), outgoing)
        for worker, messages in outgoing.items():
            worker.channel.send(messages)
        everyone = self._everyone()
        before = time.monotonic()
        ready = wait([self.wakes, *(worker.channel for worker in everyone)], CHECK_EVERY)
        if self.wakes in ready:
            with suppress(OSError):
                self.wakes.socket.recv(2**16)
        now = time.monotonic()
        was_stopped = now - before > CHECK_EVERY + SUSPENDED  # the whole job was stopped, and goes on
        for worker in everyone:
            if was_stopped:
                worker.heard_at = now
            if worker.channel in ready:
                worker.heard_at = now
                for messages in worker.channel.receive():
                    for message in messages:
                        self._take(worker, message)
            limit = IMPORT_TIMEOUT if not worker.is_ready else self.setup.seconds + SILENT
            if worker.channel.has_ended:
                self._replace(worker, is_late=False)
            elif (worker.calls or not worker.is_ready) and now - worker.heard_at > limit:
                self._replace(worker, is_late=True)

    def _everyone(self) -> list[_Worker]:
        return [*self.workers, self.alone] if self.alone else list(self.workers)

    def _assign(self, call: Call, outgoing: dict[_Worker, list[Any]]) -> None:
        episode = call.message.episode
        if isinstance(call.message, Step) and self.setup.environment:
            if episode not in self.homes:  # its process has died, and the listener was called
                return
            worker = self.homes[episode]
        else:
            if len(self.workers) < self.count:
                self.workers.append(self._start())
                worker = self.workers[-1]
            else:
                worker = min(self.workers, key=lambda each: len(each.episodes) + len(each.calls))
            if isinstance(call.message, Begin):
                worker.episodes.add(episode)
                self.homes[episode] = worker
        self._give(worker, call, outgoing)

    def _give(self, worker: _Worker, call: Call, outgoing: dict[_Worker, list[Any]]) -> None:
        if not worker.calls:
            worker.heard_at = time.monotonic()
        worker.calls[call.message.episode] = call
        outgoing.setdefault(worker, []).append(call.message)

    def _drop(self, end: End, outgoing: dict[_Worker, list[Any]]) -> None:
        if self.suspects:
            self.suspects = deque(call for call in self.suspects if call.message.episode != end.episode)
        for worker in self._everyone():
            is_called = worker.calls.pop(end.episode, None)
            if is_called or end.episode in worker.episodes:
                worker.episodes.discard(end.episode)
                self.homes.pop(end.episode, None)
                outgoing.setdefault(worker, []).append(end)

    def _take(self, worker: _Worker, message: Any) -> None:
        match message:
            case Began(episode) | Answer(episode) | Fault(episode):
                heartbeat()
                call = worker.calls.pop(episode, None)
                if not isinstance(message, Fault):
                    self.num_deaths = 0
                    self.has_answered |= isinstance(message, Answer)
                elif call and not self.setup.environment:
                    self._note_failure(call, message.what)
                    return
                elif call and isinstance(call.message, Step):
                    self._count_failure(message.what)
                if call:
                    call.done(message)
            case Ready():
                worker.is_ready = True
            case Warned(text):
                self.warn(text)
            case Leaving():
                worker.is_leaving = True
            case Failed(what):
                raise ConfigError(what)
            case Alive():
                pass

    def _count_failure(self, what: str) -> None:
        """Raise EpisodeError if steps have always failed so far."""
        self.num_failures += 1
        if not self.has_answered and self.num_failures == MOST_FAILURES:
            raise EpisodeError(
                f"{self.setup.name}: the first {MOST_FAILURES} calls of step have failed: {what}"
            )

    def _start(self) -> _Worker:
        process = Guarded(serve, [], int(self.memory * 2**30), "environment")
        marks, file = Marks.make()
        with suppress(OSError):  # it has ended, which is seen later
            socket.send_fds(process.channel.socket, [b"\0"], [file])
        os.close(file)
        process.channel.send(self.setup)
        return _Worker(process, marks)

    def _replace(self, worker: _Worker, is_late: bool) -> None:
        is_too_large = worker.process.end()
        how = "the process that ran it ended"
        if is_late:
            how = f"it did not answer within rollout.turn_seconds={self.setup.seconds:g} and held its process"
        if is_too_large:
            how = f"the process that ran it needed more than reward.memory_limit={self.memory:g} GiB"
        self.num_deaths += 1
        if not worker.is_ready and is_late:
            raise EpisodeError(f"{self.setup.name} was not imported within {IMPORT_TIMEOUT:.0f} s")
        if self.num_deaths > MOST_DEATHS or (not worker.is_ready and self.num_deaths >= 3):
            what = "while it was imported" if not worker.is_ready else "and no call was answered meanwhile"
            raise EpisodeError(f"{self.setup.name}: {self.num_deaths} processes ended {what}: {how}")
        is_alone = worker is self.alone
        if is_alone:
            self.alone = None
        else:
            self.workers.remove(worker)
        suspects = worker.suspects()
        if self.setup.environment:
            for episode in worker.episodes:
                del self.homes[episode]
                if self.listener:
                    self.listener(episode, how, episode in suspects)
                elif call := worker.calls.get(episode):
                    call.done(Fault(episode, how))
            return
        for episode, call in worker.calls.items():
            if episode not in suspects:
                self.inbox.append(call)
            elif is_alone or len(suspects) == 1:
                self._note_failure(call, how)
            else:
                self.suspects.append(call)
        if self.suspects and not self.alone:
            self.alone = self._start()

    def _note_failure(self, call: Call, how: str) -> None:
        """Have the policy read that its calls have ended a process."""
        message = call.message
        if isinstance(message, Step) and not message.failure:
            self.inbox.append(Call(message._replace(failure=how), call.done))
        else:
            call.done(Fault(message.episode, how))

    def _end_all(self) -> None:
        everyone = self._everyone()
        for worker in everyone:
            with suppress(OSError):
                worker.channel.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + CLOSE_TIMEOUT
        while (left := [w for w in everyone if not w.channel.has_ended]) and time.monotonic() < deadline:
            for channel in wait([worker.channel for worker in left], 0.1):
                channel.receive()
        for worker in everyone:
            worker.process.end()
        self.workers, self.alone = [], None
        self.ours.close()
        self.wakes.close()


def preload() -> None:
    """Have the fork server import what workers need, once for all of them. It must not have started yet."""
    forked.context.set_forkserver_preload(PRELOADED)
