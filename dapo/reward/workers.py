"""Processes that call reward functions. Nothing in Python or C can make a call exceed its timeout."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait

from dapo.config import ConfigError
from dapo.reward.worker import Failure, Job, Verdict, serve
from dapo.types import Interrupted

JOBS_PER_MESSAGE = 16
IMPORT_TIMEOUT = 300.0  # seconds for a worker to import the functions
CHECK_EVERY = 0.25  # seconds between two checks for an interruption

# workers are forks of a process that has neither threads, nor CUDA, nor torch
_context = multiprocessing.get_context("forkserver")
# imported before the fork, so that the import takes no part of a call's timeout
_context.set_forkserver_preload(["dapo.reward.worker", "dapo.reward", "math_verify"])


class _Worker:
    def __init__(self, functions: list[str], timeout: float):
        self.connection, theirs = _context.Pipe()
        arguments = (theirs, functions, timeout)
        self.process = _context.Process(target=serve, args=arguments, name="reward", daemon=True)
        self.process.start()
        assert self.process.pid  # never 0, which would be our own process group
        self.pid = self.process.pid
        theirs.close()
        self.is_ready = False
        self.todo: deque[int] = deque()  # numbers of the jobs it was sent; it is doing the first
        self.deadline = time.monotonic() + IMPORT_TIMEOUT

    @property
    def is_busy(self) -> bool:
        """True if it has until its deadline to send something."""
        return bool(self.todo) or not self.is_ready

    def end(self) -> None:
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # and the processes that the function started
        self.process.kill()
        self.process.join()


class Workers:
    """Calls reward functions in up to `count` processes, which start when there is work for them.

    A process that exceeds `timeout` seconds in a call, or dies in it, is replaced.
    """

    def __init__(self, functions: list[str], count: int, timeout: float, is_interrupted: Callable[[], bool]):
        self.functions = functions
        self.count = count
        self.timeout = timeout
        self.is_interrupted = is_interrupted
        self.workers: list[_Worker] = []
        self.num_timeouts = 0
        self.num_crashes = 0
        forkserver.ensure_running()

    def judge(self, jobs: Sequence[Job]) -> list[Verdict | Failure | None]:
        """Return one verdict a job, in order; None if the call exceeded its timeout or ended its process.

        Raises:
            ConfigError: the functions cannot be imported in a worker.
            Interrupted: the run is to stop.
        """
        verdicts: list[Verdict | Failure | None] = [None] * len(jobs)
        size = min(JOBS_PER_MESSAGE, -(-len(jobs) // self.count)) or 1
        numbers = range(len(jobs))
        waiting = deque(deque(numbers[first : first + size]) for first in numbers[::size])
        try:
            while waiting or any(worker.todo for worker in self.workers):
                if self.is_interrupted():
                    raise Interrupted
                self._assign(waiting, jobs)
                ready = set(wait([worker.connection for worker in self.workers], self._seconds_to_wait()))
                for worker in list(self.workers):
                    if worker.connection in ready:
                        self._receive(worker, verdicts, waiting)
                    elif worker.is_busy and time.monotonic() > worker.deadline:
                        self._replace(worker, waiting, is_late=True)
        finally:
            # after an error: verdicts of these jobs must not be taken for those of later ones
            if any(worker.todo for worker in self.workers):
                self.close()
        return verdicts

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.workers = []

    def _assign(self, waiting: deque[deque[int]], jobs: Sequence[Job]) -> None:
        """Start as many workers as there is work for, and send each idle one a message of jobs."""
        for worker in list(self.workers):
            if not worker.todo and not worker.process.is_alive():
                self._replace(worker, waiting, is_late=False)
        wanted = min(self.count, sum(bool(worker.todo) for worker in self.workers) + len(waiting))
        while len(self.workers) < wanted:
            self.workers.append(_Worker(self.functions, self.timeout))
        for worker in self.workers:
            if not worker.is_busy and waiting:
                worker.todo = waiting.popleft()
                with contextlib.suppress(OSError):  # it died while idle: the next read finds that out
                    worker.connection.send([jobs[number] for number in worker.todo])
                worker.deadline = time.monotonic() + self.timeout

    def _receive(
        self, worker: _Worker, verdicts: list[Verdict | Failure | None], waiting: deque[deque[int]]
    ) -> None:
        try:
            while worker.connection.poll():
                message = worker.connection.recv()
                if worker.is_ready:
                    verdicts[worker.todo.popleft()] = message
                elif message is not None:
                    raise ConfigError(f"reward.function={message.what}")
                worker.is_ready = True
                worker.deadline = time.monotonic() + self.timeout
        except (EOFError, OSError):
            self._replace(worker, waiting, is_late=False)

    def _replace(self, worker: _Worker, waiting: deque[deque[int]], is_late: bool) -> None:
        worker.end()
        self.workers.remove(worker)
        if not worker.is_ready:
            failure = "end the process that imports them"
            if is_late:
                failure = f"were not imported within {IMPORT_TIMEOUT:.0f} s"
            raise ConfigError(f"reward.function: {', '.join(self.functions)} {failure}")
        if worker.todo:
            worker.todo.popleft()  # the call that did not end
            self.num_timeouts += is_late
            self.num_crashes += not is_late
            # one by one, because calls next to one that hangs often hang too
            waiting.extendleft(deque([number]) for number in worker.todo)

    def _seconds_to_wait(self) -> float:
        """Seconds until the first deadline or the next check for an interruption."""
        deadlines = [worker.deadline for worker in self.workers if worker.is_busy]
        return min(max(0.0, min(deadlines) - time.monotonic()) + 0.001, CHECK_EVERY)
