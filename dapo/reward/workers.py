"""Processes that call reward functions. Nothing in Python or C can make a call exceed its timeout."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import forkserver

from dapo import clock
from dapo.config import ConfigError
from dapo.reward.worker import Failure, Job, Reply, serve
from dapo.types import Interrupted, RewardError
from dapo.watch import forked
from dapo.watch.frames import Channel, wait
from dapo.watch.guarded import Guarded

JOBS_PER_MESSAGE = 16
IMPORT_TIMEOUT = 300.0  # seconds for a worker to import the functions
STARTS = 3  # in a row, of workers that end before they have imported the functions
CHECK_EVERY = 0.25  # seconds between two checks for an interruption
SUSPENDED = 1.0  # seconds that a wait takes too long if this process was stopped, and its workers with it

# imported before the fork, so that the import takes no part of a call's timeout
forked.context.set_forkserver_preload(["dapo.watch.worker", "dapo.reward.worker", "dapo.reward", "mpmath"])


class _Worker(Guarded):
    """A worker, and what it has to do."""

    def __init__(self, functions: list[str], tokenizer: str | None, max_bytes: int, num_failed_before: int):
        super().__init__(serve, functions, max_bytes, "reward")
        self.channel.send(tokenizer)  # no argument: those must be taken before `start` returns, and are kept
        self.num_failed_before = num_failed_before  # starts in a row, before this one
        self.is_ready = False
        self.todo: deque[int] = deque()  # numbers of the jobs it was sent; it is doing the first
        self.begin()

    def begin(self) -> None:
        """Give it time to import, while somebody waits: it is sent the tokenizer meanwhile."""
        self.deadline = time.monotonic() + IMPORT_TIMEOUT

    @property
    def is_busy(self) -> bool:
        """True if it has until its deadline to send something."""
        return bool(self.todo) or not self.is_ready

    @property
    def has_ended(self) -> bool:
        """True if it ended while it had nothing to do."""
        is_idle = self.is_ready and not self.todo
        return is_idle and (bool(wait([self.channel], 0.0)) or not self.guardian.is_alive())


class Workers:
    """Calls reward functions in up to `count` processes, which start when there is work for them.

    A process that exceeds `timeout` seconds in a call, or dies in it, or needs more than `memory` GiB with
    what it started, is replaced. `tokenizer` is the JSON of a tokenizers.Tokenizer, for jobs of token ids.
    """

    def __init__(
        self,
        functions: list[str],
        count: int,
        timeout: float,
        memory: float,
        is_interrupted: Callable[[], bool],
        tokenizer: str | None = None,
    ):
        self.functions = functions
        self.tokenizer = tokenizer
        self.count = count
        self.timeout = timeout
        self.memory = memory
        self.is_interrupted = is_interrupted
        self.has_warned = False
        self.num_failed_starts = 0  # since one succeeded
        self.workers: list[_Worker] = []
        self.num_timeouts = 0
        self.num_crashes = 0
        forkserver.ensure_running()

    def judge(self, jobs: Sequence[Job], together: int = 1) -> list[Reply | None]:
        """Return one reply a job, in order; None if the call exceeded its timeout or ended its process.

        As many jobs in a row as `together` says go to one worker.

        Raises:
            ConfigError: the functions cannot be imported, or the tokenizer loaded, in a worker.
            RewardError: workers end while they import them.
            Interrupted: the run is to stop.
        """
        for worker in self.workers:
            if not worker.is_ready:
                worker.begin()
        replies: list[Reply | None] = [None] * len(jobs)
        size = min(JOBS_PER_MESSAGE, -(-len(jobs) // self.count)) or 1
        size = -(-size // together) * together
        numbers = range(len(jobs))
        waiting = deque(deque(numbers[first : first + size]) for first in numbers[::size])
        try:
            while waiting or any(worker.todo for worker in self.workers):
                clock.waiting()  # each call has a timeout
                if self.is_interrupted():
                    raise Interrupted
                self._assign(waiting, jobs)
                ready = self._wait()
                for worker in list(self.workers):
                    if worker.channel in ready:
                        self._receive(worker, replies)
                    if worker.channel.has_ended:
                        self._replace(worker, waiting, is_late=False)
                    elif worker.is_busy and time.monotonic() > worker.deadline:  # a part of a reply is none
                        self._replace(worker, waiting, is_late=True)
        finally:
            # after an error: verdicts of these jobs must not be taken for those of later ones
            if any(worker.todo for worker in self.workers):
                self.close()
        return replies

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.workers = []

    def _assign(self, waiting: deque[deque[int]], jobs: Sequence[Job]) -> None:
        """Start as many workers as there is work for, and send each idle one a message of jobs."""
        for worker in list(self.workers):
            if worker.has_ended:
                self._replace(worker, waiting, is_late=False)
        wanted = min(self.count, sum(bool(worker.todo) for worker in self.workers) + len(waiting))
        while len(self.workers) < wanted:
            max_bytes = int(self.memory * 2**30)
            arguments = self.functions, self.tokenizer, max_bytes, self.num_failed_starts
            self.workers.append(_Worker(*arguments))
        for worker in self.workers:
            if not worker.is_busy and waiting:
                worker.todo = waiting.popleft()
                worker.channel.send([jobs[number] for number in worker.todo])
                worker.deadline = time.monotonic() + self.timeout

    def _receive(self, worker: _Worker, replies: list[Reply | None]) -> None:
        """Take the messages that have come whole. With each the time for the next one begins."""
        for message in worker.channel.receive():
            if isinstance(message, Reply):
                replies[worker.todo.popleft()] = message
            elif isinstance(message, Failure):
                raise ConfigError(message.what)
            worker.is_ready = True
            self.num_failed_starts = 0
            worker.deadline = time.monotonic() + self.timeout

    def _replace(self, worker: _Worker, waiting: deque[deque[int]], is_late: bool) -> None:
        is_too_large = worker.end()
        self.workers.remove(worker)
        limit = f"reward.memory_limit={self.memory:g} GiB"
        if not worker.is_ready:
            # those that ended together count once
            self.num_failed_starts = max(self.num_failed_starts, worker.num_failed_before + 1)
            failure = "" if self.num_failed_starts < STARTS else "end the process that imports them"
            if is_late:
                failure = f"were not imported within {IMPORT_TIMEOUT:.0f} s"
            if is_too_large:
                failure = f"need more than {limit} while they are imported"
            if failure:
                raise RewardError(f"reward.function: {', '.join(self.functions)} {failure}")
        if worker.todo:
            worker.todo.popleft()  # the call that did not end
            self.num_timeouts += is_late
            self.num_crashes += not is_late
            # one by one, because calls next to one that hangs often hang too
            waiting.extendleft(deque([number]) for number in worker.todo)
        if is_too_large and not self.has_warned:
            self.has_warned = True
            ended = f"a call of {', '.join(self.functions)} needed more than {limit} and was ended"
            print(f"warning: {ended}; such calls count as wrong and as crashes", file=sys.stderr, flush=True)

    def _wait(self) -> list[Channel]:
        """Wait for a message, the first deadline or the next check. Return the channels that have some."""
        deadlines = [worker.deadline for worker in self.workers if worker.is_busy]
        start = time.monotonic()
        seconds = min(max(0.0, min(deadlines) - start) + 0.001, CHECK_EVERY)
        ready = wait([worker.channel for worker in self.workers], seconds)
        excess = time.monotonic() - start - seconds
        if excess > SUSPENDED:  # a job that was stopped as a whole goes on: no call has used that time
            for worker in self.workers:
                worker.deadline += excess
        return ready
