"""The flight recorder: when no rank gets on any more it says who is waited for, keeps every rank's stacks,
and at last ends the run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from itertools import groupby
from pathlib import Path

from torch._C._distributed_c10d import Store

from dapo import clock

LOOK = 5.0  # seconds between two looks, at most
# stalls: an engine that has been silent for two has raised EngineError by then, and the run is saved
LEAVE = 3
# may be silent for long and right: engines and disks have limits of their own
QUIET = {"rollout", "eval", "checkpoint", "export"}

PLACES = {"": "between phases", "?": "not begun"}


class Recorder:
    """A thread on every rank that watches the clock's beats, its own and, through the shared store,
    everyone's.

    After `seconds` without a beat on any rank each rank adds its threads' Python stacks to
    <directory>/rank-N.txt, and rank 0 tells on stderr which ranks are in which phase, and what `waiting()`
    says. After LEAVE times as long, unless a rank is in a QUIET phase, every rank ends itself with status 1:
    stuck in a collective, none can save.
    """

    def __init__(
        self, directory: Path, seconds: float, rank: int, world: int, store: Store, waiting: Callable[[], str]
    ):
        self.directory, self.seconds, self.rank, self.world, self.store, self.waiting = (
            directory,
            seconds,
            rank,
            world,
            store,
            waiting,
        )
        self.beats, self.total, self.since, self.is_told = -1, -1, time.monotonic(), False
        directory.mkdir(parents=True, exist_ok=True)
        self.stacks = (directory / f"rank-{rank}.txt").open("a")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="recorder", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(LOOK)
        faulthandler.cancel_dump_traceback_later()
        is_empty = self.stacks.tell() == 0
        self.stacks.close()
        if is_empty:
            Path(self.stacks.name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another rank's stacks are in it
                self.directory.rmdir()

    def _watch(self) -> None:
        try:
            while not self._closed.wait(min(self.seconds / 5, LOOK)):
                self._look()
        except RuntimeError:  # the store went with rank 0, and the other ranks are about to
            faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        # should a C call keep the interpreter, and us with it
        faulthandler.dump_traceback_later(self.seconds + LOOK, file=self.stacks)
        beats, phase = clock.progress()
        self.store.set(f"phase/{self.rank}", phase)
        total = self.store.add("beats", int(beats != self.beats))
        self.beats = beats
        if total != self.total:
            self.total, self.since, self.is_told = total, time.monotonic(), False
        idle = time.monotonic() - self.since
        if idle >= self.seconds and not self.is_told:
            self.is_told = True
            self._keep_stacks(idle, phase)
            self._tell(f"stalled: {self._who(idle)}; Python stacks in {self.directory}")
        if idle >= LEAVE * self.seconds and not QUIET & {
            word for phase in self._phases() for word in phase.split(" > ")
        }:
            told = f"error: {self._who(idle)}; stopped, and the steps since the last checkpoint are lost: the same command goes on from it"
            if self.store.add("left", 1) == 1:
                print(told, file=sys.stderr, flush=True)
            os._exit(1)

    def _keep_stacks(self, idle: float, phase: str) -> None:
        self.stacks.write(
            f"{datetime.now():%Y-%m-%d %H:%M:%S}, rank {self.rank} in {phase or 'no phase'}, no progress for "
            f"{idle:.0f} s\n"
        )
        self.stacks.flush()
        faulthandler.dump_traceback(self.stacks)
        self.stacks.write("\n")
        self.stacks.flush()

    def _tell(self, text: str) -> None:
        if self.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def _who(self, idle: float) -> str:
        ranks: dict[str, list[int]] = defaultdict(list)
        for rank, phase in enumerate(self._phases()):
            ranks[phase].append(rank)
        where = ", ".join(
            f"{spell(some)} {PLACES.get(phase, f'in {phase}')}" for phase, some in ranks.items()
        )
        return f"nothing has progressed for {idle:.0f} s: {where}; waiting for {self.waiting()}"

    def _phases(self) -> list[str]:
        """Of every rank; "?" of one whose recorder has not looked yet."""
        keys = [f"phase/{rank}" for rank in range(self.world)]
        return [self.store.get(key).decode() if self.store.check([key]) else "?" for key in keys]


def spell(ranks: list[int]) -> str:
    """`spell([0])` → "rank 0", `spell([1, 2, 3, 7])` → "ranks 1–3, 7"."""
    runs = [
        [rank for _, rank in run]
        for _, run in groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0])
    ]
    spelt = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank {spelt}" if len(ranks) == 1 else f"ranks {spelt}"
