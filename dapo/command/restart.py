"""Decides whether a run that has failed starts again without a person, and when."""

from __future__ import annotations

import json
import re
from contextlib import suppress

from dapo.config import Run
from dapo.watch.last_line import Ending

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 640.0  # seconds, doubled at each failure without a new step between
NUMBER = re.compile(r"\d+(\.\d+)?")


class Restarts:
    """Counts the failures of a run: it may start again `most` times.

    It does not if the user stopped it, or has to mend something first; nor if it ends in the same fault at
    the same step twice in a row. What is refused after the first start, which passed, is no user's: servers
    that are not up yet, for example.
    """

    def __init__(self, run: Run, most: int):
        self._run, self.most = run, most
        self.count = 0
        self._fault: tuple[str, int] | None = None  # the last one, and the last step before it
        self._step = -1  # the last one before any failure
        self._pause = FIRST_PAUSE
        self._there = self._checkpoints()

    def overrides(self) -> list[str]:
        """Return what the next start needs beside the command: run.resume is for the first that gets so far.

        A run that goes back to a step first renames the newer checkpoints.
        """
        resume = self._run.resume
        newer = {found for found in self._there if isinstance(resume, int) and found[0] > resume}
        is_over = self.count > 0 and not newer & self._checkpoints()
        return ["run.resume=auto"] if is_over and resume != "auto" else []

    def after(self, ending: Ending) -> tuple[float | None, str]:
        """Return the seconds to wait before the run starts again, None if it must not; and what to say."""
        is_refused = ending.status == 2
        if not self.most or ending.status > 2 or ending.is_final or (is_refused and not self.count):
            return None, ending.line
        if self.count == self.most:
            return None, f"{ending.line}; not started again: --restarts {self.most} are used up"
        step = self._last_step()
        fault = NUMBER.sub("N", ending.line), step  # times, processes and ports differ
        if fault == self._fault and not is_refused:
            where = "before the first step" if step < 0 else f"after step {step}"
            return None, f"{ending.line}; not started again: it has ended so twice {where}"
        is_first = not self.count or step > self._step
        self._pause = FIRST_PAUSE if is_first else min(2 * self._pause, LONGEST_PAUSE)
        self._fault, self._step = fault, max(step, self._step)
        self.count += 1
        again = f"starting again in {self._pause:.0f} s, {self.count} of {self.most}"
        return self._pause, f"{ending.line}; {again}"

    def _checkpoints(self) -> set[tuple[int, int]]:
        """Return (step, inode) of the run's checkpoints: one that is made again is another."""
        found = (self._run.dir / "checkpoints").glob("step-*")
        return {(int(path.name.removeprefix("step-")), path.stat().st_ino) for path in found}

    def _last_step(self) -> int:
        """Return the last step that the run has logged, -1 if there is none."""
        path, last = self._run.dir / "metrics.jsonl", -1
        with suppress(OSError):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, LookupError, TypeError):
                    last = max(last, int(json.loads(line)["step"]))
        return last
