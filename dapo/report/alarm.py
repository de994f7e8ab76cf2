"""Warns when the sampler's log-probs leave the trainer's further than in a run's first steps.

How far rounding alone takes them depends on model, engine and dtype, so each run's own beginning says it: at
step 0 both have the same weights. What is learnt follows from the rows of metrics.jsonl, and needs no saving.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

NUM_STEPS = 10  # steps with a value that are learnt from
TIMES, TIMES_AT_FIRST = 3.0, 10.0  # × the median is too far; while the run still learns
SPREADS = 6.0  # median distances from the median, on a logarithmic scale, are too far as well


@dataclass
class Watch:
    """One metric and what it was in the run's first steps."""

    name: str
    quantity: str  # in words
    floor: float  # below it rounding is no concern, whatever it was at first
    ceiling: float  # above it nothing is rounding, whatever it was at first
    learnt: list[float] = field(default_factory=list)

    @property
    def threshold(self) -> float | None:
        """The largest healthy value, None before the first step; it stays as it is after NUM_STEPS."""
        if not self.learnt:
            return None
        logs = [math.log(max(value, self.floor / 100)) for value in self.learnt]
        middle = median(logs)
        spread = min(SPREADS * median(abs(value - middle) for value in logs), math.log(TIMES_AT_FIRST))
        times = TIMES if len(self.learnt) == NUM_STEPS else TIMES_AT_FIRST
        return min(self.ceiling, max(self.floor, math.exp(middle + max(spread, math.log(times)))))

    def take(self, value: float) -> bool:
        """Return True if the value is too large, or NaN; learn from another one, unless it is 0."""
        threshold = self.ceiling if self.threshold is None else self.threshold
        is_above = not value <= threshold
        if not is_above and value > 0 and len(self.learnt) < NUM_STEPS:
            self.learnt.append(value)
        return is_above

    def describe(self, value: float) -> str:
        """Return how far the value is from what was learnt."""
        if not self.learnt:
            return f"{self.quantity} is {value:.2g}"
        usual, count = median(self.learnt), len(self.learnt)
        first = f"the first {count} steps" if count > 1 else "the first step"
        times = f"{value / max(usual, self.floor / 100):,.0f} times" if math.isfinite(value) else "not"
        return f"{self.quantity} is {value:.2g}, {times} what {first} had ({usual:.2g})"


class Alarm:
    """Says once when a step's mismatch is too large, and again only after a step where it was not."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()):
        """Learn from the rows of the steps before, from step 0 on."""
        self.watches = [
            Watch("policy/mismatch", "|old − behavior|", 1e-5, 0.1),
            Watch("policy/mismatch_p99", "the 99th percentile of |old − behavior|", 1e-4, 1.0),
            Watch("policy/mismatch_probe", "|old − behavior| of the probe", 1e-5, 0.1),
        ]
        self.is_on = False
        for row in rows:
            self(row["step"], row)

    def __call__(self, step: int, values: Mapping[str, Any]) -> str | None:
        """Take in a step's metrics. Return a line if an alarm begins."""
        seen = [watch for watch in self.watches if isinstance(values.get(watch.name), int | float)]
        above = [watch for watch in seen if watch.take(values[watch.name])]
        was_on, self.is_on = self.is_on, bool(above) if seen else self.is_on
        if was_on or not above:
            return None
        found = above[0].describe(values[above[0].name])
        return f"step {step}: {found}: run `dapo mismatch CONFIG` to see why"

    def thresholds(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Return, as a metric, the next step's threshold of policy/mismatch, if its `values` have that."""
        threshold = self.watches[0].threshold
        if threshold is None or self.watches[0].name not in values:
            return {}
        return {"policy/mismatch_threshold": threshold}


def lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the alarms of a whole run."""
    alarm = Alarm()
    return [line for row in rows if (line := alarm(row["step"], row))]
