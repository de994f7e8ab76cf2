"""Reads metrics.md, the one table of every metric that a run logs: meaning, unit, healthy and sick signs.

The console's columns, the curves and the report page are made from it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A column of the console: its place among the columns, its header, and the format of its values."""

    place: int
    header: str
    format: str

    @property
    def width(self) -> int:
        """Number of characters in a row."""
        return int(self.format.split(".")[0])

    def text(self, value: float | None) -> str:
        """Format a value; None, a metric that the step does not have, leaves the column empty."""
        return " " * self.width if value is None else format(value, self.format)


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them: <set>, <phase> and so on in a name stand for any name."""

    name: str
    unit: str
    meaning: str
    healthy: str
    sick: str
    column: Column | None
    curve: str  # title of its curve on the report page; "": among everything else that was measured
    monitor: int  # place in curves.png; 0: not there
    band: tuple[float, float] | None = None  # healthy values, from and to

    def matches(self, name: str) -> bool:
        return re.fullmatch(re.sub("<[a-z]+>", ".+", self.name), name) is not None

    @property
    def title(self) -> str:
        """Name for a reader, with the unit: "entropy (nats)"."""
        return (self.curve or self.name) + (f" ({self.unit})" if self.unit else "")

    def describe(self, width: int = 100) -> str:
        """Write all about it for a reader, in lines of `width` characters."""
        signs = (("healthy", self.healthy), ("sick", self.sick))
        about = [self.meaning, *(f"{name}: {text}" for name, text in signs if text)]
        lines = [textwrap.fill(f"  {text}", width, subsequent_indent="    ") for text in about]
        return "\n".join([self.name + (f" ({self.unit})" if self.unit else ""), *lines])


def parse(line: str) -> Metric:
    """Read one line of the table."""
    cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
    name, unit, meaning, healthy, sick, console, curve, monitor, band = cells
    place, header, form = console.replace("`", "").split() if console else (0, "", "")
    column = Column(int(place), header, form) if console else None
    low, _, high = band.partition("..")
    healthy_band = (float(low), float(high)) if band else None
    return Metric(
        name.strip("`"), unit, meaning, healthy, sick, column, curve, int(monitor or 0), healthy_band
    )


TABLE = Path(__file__).with_name("metrics.md")
METRICS = [parse(line) for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]


def find(name: str) -> Metric | None:
    """Return the entry of a metric by its name, else the one whose pattern matches it."""
    exact = [metric for metric in METRICS if metric.name == name]
    return next(iter(exact or [metric for metric in METRICS if metric.matches(name)]), None)


def columns() -> dict[str, Column]:
    """Return the columns of the console by metric, from left to right."""
    found = {metric.name: metric.column for metric in METRICS if metric.column}
    return dict(sorted(found.items(), key=lambda item: item[1].place))


def monitors() -> list[Metric]:
    """List the metrics of curves.png in its order."""
    return sorted((metric for metric in METRICS if metric.monitor), key=lambda metric: metric.monitor)


INTRODUCTION = """# Metrics

A run writes each of these once a step to `metrics.jsonl`, to TensorBoard, and with `run.wandb_project` to
Weights & Biases. `dapo metrics` prints them, `dapo metrics entropy clip` those with these words in their
names. `<set>` is an evaluation set's name, `<phase>` a part of a step, `<position>` a place in the response,
`<bound>` a log-prob. [Reading the monitors](monitors.md) begins with the few that matter most.
"""
PARTS = {
    "rollout": "Sampling",
    "groups": "Dynamic sampling",
    "episode": "Several turns",
    "forecast": "Predictive sampling",
    "policy": "Learning",
    "reward": "The reward function",
    "eval": "Evaluation",
    "time": "Seconds",
    "perf": "Speed and memory",
}


def markdown() -> str:
    """Return docs/metrics.md."""
    head = "| metric, unit | meaning | healthy | sick |\n" + "| --- " * 4 + "|"
    parts = [INTRODUCTION]
    for prefix, title in PARTS.items():
        rows = [
            f"| `{m.name}`{f'<br>{_cell(m.unit)}' if m.unit else ''} | {_cell(m.meaning)} | "
            f"{_cell(m.healthy)} | {_cell(m.sick)} |"
            for m in METRICS
            if m.name.startswith(f"{prefix}/")
        ]
        parts.append("\n".join([f"## {title}\n", head, *rows]) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return re.sub(r"(`[^`]*`)|<", lambda found: found[1] or "&lt;", text.replace("|", "\\|"))


def described(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the page's texts for each metric of the table, and for the `names` that match a pattern."""
    entries = {name: find(name) for name in [*(metric.name for metric in METRICS), *names]}
    return {
        name: {
            "curve": m.curve,
            "unit": m.unit,
            "meaning": m.meaning,
            "healthy": m.healthy,
            "sick": m.sick,
            "band": m.band,
        }
        for name, m in entries.items()
        if m and "<" not in name
    }
