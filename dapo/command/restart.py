"""Decides whether a run that has failed starts again without a person, and when."""

from __future__ import annotations

import re
from pathlib import Path

from dapo.report import curves
from dapo.watch.last_line import Ending

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 640.0  # seconds, doubled at each failure without a new step between
NUMBER = re.compile(r"\d+(\.\d+)?")


class Restarts:
    """Counts the failures of a run: it may start again `most` times.

    It does not if the user has to mend something first, or stopped it; nor if it ends in the same fault at
    the same step twice in a row.
    """

    def __init__(self, run_dir: Path, most: int):
        self._metrics, self.most = run_dir / "metrics.jsonl", most
        self.count = 0
        self._fault: tuple[str, int] | None = None  # the last one, and the last step before it
        self._step = -1  # the last one before any failure
        self._pause = FIRST_PAUSE

    def after(self, ending: Ending) -> tuple[float | None, str]:
        """Return the seconds to wait before the run starts again, None if it must not; and what to say."""
        if not self.most or ending.status != 1 or ending.is_final:
            return None, ending.line
        step = max((int(row["step"]) for row in curves.read(self._metrics)), default=-1)
        fault = NUMBER.sub("N", ending.line), step  # times, processes and ports differ
        if fault == self._fault:
            where = "before the first step" if step < 0 else f"after step {step}"
            return None, f"{ending.line}; not started again: it has ended so twice {where}"
        if self.count == self.most:
            return None, f"{ending.line}; not started again: --restarts {self.most} are used up"
        self._pause = FIRST_PAUSE if step > self._step else min(2 * self._pause, LONGEST_PAUSE)
        self._fault, self._step = fault, max(step, self._step)
        self.count += 1
        again = f"starting again in {self._pause:.0f} s, {self.count} of {self.most}"
        return self._pause, f"{ending.line}; {again}"
