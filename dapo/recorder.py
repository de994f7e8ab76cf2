"""The flight recorder: it reports when no rank makes progress, and ends a run that cannot go on.

The report names the ranks and what they wait for, and keeps every rank's Python stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path

from torch._C._distributed_c10d import Store

from dapo import clock
from dapo.config import Limits

CHECK_SECONDS = 5.0  # between two checks, at most
# phases that may be silent for long: engines and disks have time limits of their own
SILENT_PHASES = {"rollout", "eval", "checkpoint", "export"}

PLACES = {"": "between phases", "?": "not begun"}


@dataclass(eq=False)
class Recorder:
    """A thread on every rank that watches heartbeats: its own, and those of all ranks in the shared store.

    After `limits.stall` seconds without a heartbeat on any rank, each rank adds its threads' Python stacks to
    <directory>/rank-N.txt, and rank 0 reports on stderr which ranks are in which phases, and what
    `waiting()` returns. After `limits.exit` seconds every rank exits with status 1, unless a rank is in one
    of the SILENT_PHASES: ranks stuck in a collective cannot save.
    """

    directory: Path
    limits: Limits
    rank: int
    world: int
    store: Store
    waiting: Callable[[], str]

    def __post_init__(self) -> None:
        self.heartbeats = -1  # this rank's at the last check
        self.total = -1  # checks of any rank that found new heartbeats
        self.since = time.monotonic()  # when `total` last changed
        self.is_reported = False
        self.directory.mkdir(parents=True, exist_ok=True)
        self.stacks = (self.directory / f"rank-{self.rank}.txt").open("a")
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
            Path(self.stacks.name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another rank's stacks are in it
                self.directory.rmdir()

    def _watch(self) -> None:
        try:
            while not self._closed.wait(min(self.limits.stall / 5, CHECK_SECONDS)):
                self._check()
        except RuntimeError:  # the store ended with rank 0, and the other ranks are about to
            faulthandler.cancel_dump_traceback_later()

    def _check(self) -> None:
        # in case a C call holds the interpreter, and with it this thread
        faulthandler.dump_traceback_later(self.limits.stall + CHECK_SECONDS, file=self.stacks)
        heartbeats, phases = clock.progress()
        self.store.set(f"phases/{self.rank}", phases)
        total = self.store.add("progress", int(heartbeats != self.heartbeats))
        self.heartbeats = heartbeats
        if total != self.total:
            self.total = total
            self.since = time.monotonic()
            self.is_reported = False
        idle = time.monotonic() - self.since
        if idle >= self.limits.stall and not self.is_reported:
            self.is_reported = True
            self._keep_stacks(idle, phases)
            if self.rank == 0:
                report = f"stalled: {self._report(idle)}; Python stacks in {self.directory}"
                print(report, file=sys.stderr, flush=True)
        if idle >= self.limits.exit and not any(map(may_be_silent, self._all_phases())):
            report = f"error: {self._report(idle)}; stopped, and the steps since the last checkpoint are lost"
            if self.store.add("exited", 1) == 1:
                print(f"{report}: the same command goes on from it", file=sys.stderr, flush=True)
            os._exit(1)

    def _keep_stacks(self, idle: float, phases: str) -> None:
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        where = phases or "no phase"
        self.stacks.write(f"{now}, rank {self.rank} in {where}, no progress for {idle:.0f} s\n")
        self.stacks.flush()
        faulthandler.dump_traceback(self.stacks)
        self.stacks.write("\n")
        self.stacks.flush()

    def _report(self, idle: float) -> str:
        ranks: dict[str, list[int]] = defaultdict(list)
        for rank, phases in enumerate(self._all_phases()):
            ranks[phases].append(rank)
        where = ", ".join(f"{ranges(r)} {PLACES.get(phases, f'in {phases}')}" for phases, r in ranks.items())
        return f"nothing has progressed for {idle:.0f} s: {where}; waiting for {self.waiting()}"

    def _all_phases(self) -> list[str]:
        """Phases of every rank, as clock.progress() has them; "?" of a rank that has not checked yet."""
        keys = [f"phases/{rank}" for rank in range(self.world)]
        return [self.store.get(key).decode() if self.store.check([key]) else "?" for key in keys]


def may_be_silent(phases: str) -> bool:
    """True if a thread is in one of the SILENT_PHASES: `may_be_silent("update | rollout > sync")`."""
    return not SILENT_PHASES.isdisjoint(re.split(r" > | \| ", phases))


def ranges(ranks: list[int]) -> str:
    """Name ranks briefly: `ranges([0])` → "rank 0", `ranges([1, 2, 3, 7])` → "ranks 1–3, 7"."""
    pairs = enumerate(sorted(ranks))
    runs = [[rank for _, rank in run] for _, run in groupby(pairs, key=lambda pair: pair[1] - pair[0])]
    names = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"
