"""Processes that call functions on responses, each call within a time limit that nothing in Python or C can
overrun.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait

from dapo.config import ConfigError
from dapo.reward.worker import Failure, Job, Verdict, serve

JOBS_PER_MESSAGE = 16
IMPORT_LIMIT = 300.0  # seconds for a worker to import the functions

# forks of a process that holds neither threads, nor CUDA, nor torch
_context = multiprocessing.get_context("forkserver")
# not within an answer's time limit
_context.set_forkserver_preload(["dapo.reward.worker", "dapo.reward", "math_verify"])


class _Worker:
    def __init__(self, functions: Sequence[str], limit: float):
        self.connection, theirs = _context.Pipe()
        self.process = _context.Process(
            target=serve, args=(theirs, functions, limit), name="reward", daemon=True
        )
        self.process.start()
        assert self.process.pid  # never 0, which would stand for our own group
        self.pid = self.process.pid
        theirs.close()
        self.is_ready = False
        self.todo: deque[int] = deque()  # numbers of the jobs it was sent; the first is being done
        self.deadline = time.monotonic() + IMPORT_LIMIT

    def end(self) -> None:
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # and what the function has started
        self.process.kill()
        self.process.join()


class Workers:
    """At most `count` processes. One that overruns `limit` seconds in a call, or dies of it, is replaced, and
    the call has no verdict.

    They start when there is work for them, from a fork server that starts here.
    """

    def __init__(self, functions: Sequence[str], count: int, limit: float):
        self.functions, self.count, self.limit = list(functions), count, limit
        self.workers: list[_Worker] = []
        self.num_timeouts = self.num_crashes = 0
        forkserver.ensure_running()

    def judge(self, jobs: Sequence[Job]) -> list[Verdict | Failure | None]:
        """One verdict a job, in the jobs' order; None where there was none within the limit.

        Raises:
            ConfigError: the functions cannot be imported in a worker.
        """
        verdicts: list[Verdict | Failure | None] = [None] * len(jobs)
        size = min(JOBS_PER_MESSAGE, -(-len(jobs) // self.count)) or 1
        waiting = deque(
            deque(range(first, min(first + size, len(jobs)))) for first in range(0, len(jobs), size)
        )
        try:
            while waiting or any(worker.todo for worker in self.workers):
                self._hand_out(waiting, jobs)
                ready = set(wait([worker.connection for worker in self.workers], timeout=self._patience()))
                for worker in list(self.workers):
                    if worker.connection in ready:
                        self._receive(worker, verdicts, waiting)
                    elif time.monotonic() > worker.deadline and (worker.todo or not worker.is_ready):
                        self._replace(worker, waiting, is_late=True)
        finally:
            # left in the middle: its verdicts would be taken for later ones
            if any(worker.todo for worker in self.workers):
                self.close()
        return verdicts

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.workers = []

    def _hand_out(self, waiting: deque[deque[int]], jobs: Sequence[Job]) -> None:
        for worker in [
            worker for worker in self.workers if not worker.todo and not worker.process.is_alive()
        ]:
            self._replace(worker, waiting, is_late=False)
        wanted = min(self.count, sum(bool(worker.todo) for worker in self.workers) + len(waiting))
        while len(self.workers) < wanted:
            self.workers.append(_Worker(self.functions, self.limit))
        for worker in self.workers:
            if worker.is_ready and not worker.todo and waiting:
                worker.todo = waiting.popleft()
                with contextlib.suppress(OSError):  # it died while idle: reading from it will tell
                    worker.connection.send([jobs[number] for number in worker.todo])
                worker.deadline = time.monotonic() + self.limit

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
                worker.deadline = time.monotonic() + self.limit
        except (EOFError, OSError):
            self._replace(worker, waiting, is_late=False)

    def _replace(self, worker: _Worker, waiting: deque[deque[int]], is_late: bool) -> None:
        worker.end()
        self.workers.remove(worker)
        if not worker.is_ready:
            what = (
                f"were not imported within {IMPORT_LIMIT:.0f} s"
                if is_late
                else "end the process that imports them"
            )
            raise ConfigError(f"reward.function: {', '.join(self.functions)} {what}")
        if worker.todo:
            worker.todo.popleft()  # the call that it hung in, or died of
            self.num_timeouts += is_late
            self.num_crashes += not is_late
            # one by one: what hangs often has neighbours that hang
            waiting.extendleft(deque([number]) for number in worker.todo)

    def _patience(self) -> float:
        """Seconds until the first deadline."""
        deadlines = [worker.deadline for worker in self.workers if worker.todo or not worker.is_ready]
        return max(0.0, min(deadlines) - time.monotonic()) + 0.001
