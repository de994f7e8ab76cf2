"""The flight recorder: it reports when no rank makes progress, and ends a run that cannot go on.

The report names the ranks and what they wait for, and keeps every rank's Python stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from torch._C._distributed_c10d import Store

from dapo import clock
from dapo.config import ConfigError, Limits
from dapo.watch import last_line
from dapo.watch.last_line import LOST
from dapo.watch.rank import renew

CHECK_SECONDS = 5.0  # between two checks, at most
# phases that may be silent for long: a disk has no timeout
SILENT_PHASES = {"checkpoint", "export"}

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PLACES = {"": "between phases", "?": "not begun"}


class State(NamedTuple):
    """A recorder publishes this of its rank at each check."""

    number: int  # of the check
    phases: str  # as clock.progress() has them; "?" of a rank that has not checked yet
    machine: str = ""
    process: int = 0


@dataclass(eq=False)
class Recorder:
    """A thread on every rank that watches heartbeats: its own, and those of all ranks in the shared store.

    After `limits.stall` seconds without a heartbeat on any rank, each rank adds its threads' Python stacks to
    <directory>/rank-N.txt, and one rank reports on stderr which ranks are in which phases, which are frozen
    (their recorders no longer check), and what `waiting()` returns. After `limits.exit` seconds in which no
    rank has waited by a timeout of its own either, the ranks exit with status 1, and end frozen ones on their
    machine, unless none is frozen and one is in one of the SILENT_PHASES: ranks stuck in a collective
    cannot save. Seconds in which this process is suspended do not count: a job that is suspended as a whole
    goes on.
    """

    directory: Path
    limits: Limits
    rank: int
    world: int
    store: Store
    waiting: Callable[[], str]

    def __post_init__(self) -> None:
        self.interval = min(self.limits.stall / 5, CHECK_SECONDS)
        self.parent = os.getppid()
        self.number = 0  # of checks so far
        self.checked_at = time.monotonic()
        self.seconds = 0.0  # in which this recorder has watched
        self.own = (-1, -1)  # this rank's heartbeats and waits at the last check
        self.progress = Counter(self.store, "progress")  # checks of any rank that found new heartbeats
        self.life = Counter(self.store, "life")  # or new waits
        # rank → number of its last check, and `seconds` when it was new
        self.seen: dict[int, tuple[int, float]] = {}
        self.kept_for = self.reported_for = -1  # value of `progress` at the last stall
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # unbuffered: what a full disk does not take is dropped, not kept until it is closed
            self.stacks = (self.directory / f"rank-{self.rank}.txt").open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"run.dir: {self.directory} cannot be written: {error.strerror}") from error
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="recorder", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching; a stack file without stacks is removed."""
        self._closed.set()
        self._thread.join(CHECK_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        is_empty = os.fstat(self.stacks.fileno()).st_size == 0
        self.stacks.close()
        if is_empty:
            with contextlib.suppress(OSError):  # another rank's stacks are in the directory
                Path(self.stacks.name).unlink(missing_ok=True)
                self.directory.rmdir()

    def _watch(self) -> None:
        try:
            self._check()
            while not self._closed.wait(self.interval):
                self._check()
        except RuntimeError:  # the store has ended, with the launcher or its machine
            self._end_alone()

    def _end_alone(self) -> None:
        """Without the store nobody knows of the others: ask this rank to save, and end it if it does not."""
        faulthandler.cancel_dump_traceback_later()
        if not self._closed.is_set():
            lost = "the ranks' store is lost, its launcher or machine has ended"
            # if the launcher was this process's parent, the guardian says why
            if os.environ.get("LOCAL_RANK", "0") == "0" and os.getppid() == self.parent:
                say(f"dapo: {lost}: the ranks save and stop")
            os.kill(os.getpid(), signal.SIGTERM)
            if not self._closed.wait(self.limits.exit):
                late = f"rank {self.rank} has not ended in {self.limits.exit:.0f} s: stopped, and {LOST}"
                last_line.say(f"error: {lost}, and {late}", 1)
                os._exit(1)

    def _check(self) -> None:
        # in case a C call holds the interpreter, and with it this thread
        faulthandler.dump_traceback_later(self.limits.stall + CHECK_SECONDS, file=self.stacks)
        renew()  # this rank's guardian
        now = time.monotonic()
        self.seconds += min(now - self.checked_at, 2 * self.interval)  # it was suspended for the rest
        self.checked_at = now
        self.number += 1
        heartbeats, waits, phases = clock.progress()
        mine = State(self.number, phases, machine(), os.getpid())
        self.store.set(f"states/{self.rank}", json.dumps(mine))
        idle = self.seconds - self.progress.advance(heartbeats != self.own[0], self.seconds)
        dead = self.seconds - self.life.advance((heartbeats, waits) != self.own, self.seconds)
        self.own = heartbeats, waits
        if idle < self.limits.stall / 2:
            self.seen.clear()
            return
        states = self._all_states()
        frozen = self._frozen(states)
        awake = [rank for rank, state in enumerate(states) if state.number and rank not in frozen]
        if idle >= self.limits.stall:
            self._tell(idle, states, frozen, is_first=self.rank == min(awake))
        is_silent = not frozen and any(may_be_silent(states[rank].phases) for rank in awake)
        if dead >= self.limits.exit and not is_silent:
            self._exit(dead, states, frozen)

    def _all_states(self) -> list[State]:
        keys = [f"states/{rank}" for rank in range(self.world)]
        # two requests, not two a rank: every rank asks
        there = keys if self.store.check(keys) else [key for key in keys if self.store.check([key])]
        found = dict(zip(there, self.store.multi_get(there), strict=True))
        return [State(*json.loads(found[key])) if key in found else State(0, "?") for key in keys]

    def _frozen(self, states: list[State]) -> set[int]:
        """Return the ranks whose recorders have not checked for a third of a stall."""
        for rank, state in enumerate(states):
            if rank not in self.seen or self.seen[rank][0] != state.number:
                self.seen[rank] = state.number, self.seconds
        limit = self.seconds - self.limits.stall / 3
        return {
            rank for rank, (number, at) in self.seen.items() if at < limit and number and rank != self.rank
        }

    def _tell(self, idle: float, states: list[State], frozen: set[int], is_first: bool) -> None:
        """Once a stall, keep this rank's stacks and, on the first rank that is awake, report."""
        stall = self.progress.value
        if self.kept_for != stall:
            self.kept_for = stall
            self._keep_stacks(idle, states[self.rank].phases)
        if is_first and self.reported_for != stall:
            self.reported_for = stall
            if self.store.add(f"reported/{stall}", 1) == 1:
                report = self._report(idle, states, frozen)
                say(f"stalled: {report}; Python stacks in {self.directory}")

    def _exit(self, dead: float, states: list[State], frozen: set[int]) -> None:
        if self.store.add("exited", 1) == 1:
            report = self._report(dead, states, frozen)
            last_line.say(f"error: {report}; stopped, and {LOST}", 1)
        for state in (states[rank] for rank in frozen):
            if state.machine == machine():  # a process that is stopped ends by SIGKILL only
                with contextlib.suppress(ProcessLookupError):
                    os.kill(state.process, signal.SIGKILL)
        os._exit(1)

    def _keep_stacks(self, idle: float, phases: str) -> None:
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        where = phases or "no phase"
        with contextlib.suppress(OSError):  # the disk is full
            self.stacks.write(f"{now}, rank {self.rank} in {where}, no progress for {idle:.0f} s\n".encode())
            faulthandler.dump_traceback(self.stacks)
            self.stacks.write(b"\n")

    def _report(self, idle: float, states: list[State], frozen: set[int]) -> str:
        ranks: dict[str, list[int]] = defaultdict(list)
        for rank, state in enumerate(states):
            place = PLACES.get(state.phases, f"in {state.phases}")
            ranks[f"frozen, last seen {place}" if rank in frozen else place].append(rank)
        where = ", ".join(f"{ranges(some)} {place}" for place, some in ranks.items())
        return f"nothing has progressed for {idle:.0f} s: {where}; waiting for {self.waiting()}"


@dataclass(eq=False)
class Counter:
    """A counter that all ranks advance, and when this rank saw it change."""

    store: Store
    name: str
    value: int = -1
    changed_at: float = 0.0

    def advance(self, has_changed: bool, now: float) -> float:
        """Add 1 if `has_changed`. Return when the counter last changed, in the clock of `now`."""
        value = self.store.add(self.name, int(has_changed))
        if value != self.value:
            self.value, self.changed_at = value, now
        return self.changed_at


def machine() -> str:
    """Return a name of the place where a process id means one process: containers of one host, and machines
    that were given one name, differ in it.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        parts += [os.readlink("/proc/self/ns/pid"), BOOT_ID.read_text().strip()]
    return " ".join(parts)


def may_be_silent(phases: str) -> bool:
    """True if a thread is in one of the SILENT_PHASES: `may_be_silent("update | checkpoint > sync")`."""
    return not SILENT_PHASES.isdisjoint(re.split(r" > | \| ", phases))


def ranges(ranks: list[int]) -> str:
    """Name ranks briefly: `ranges([0])` → "rank 0", `ranges([1, 2, 3, 7])` → "ranks 1–3, 7"."""
    pairs = enumerate(sorted(ranks))
    runs = [[rank for _, rank in run] for _, run in groupby(pairs, key=lambda pair: pair[1] - pair[0])]
    names = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"


def say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more
        print(text, file=sys.stderr, flush=True)
