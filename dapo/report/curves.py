"""The metrics of a run, read from metrics.jsonl, and the paper's monitors plotted from them. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from dapo.report import glossary

# of the first run, the second, …, here and on the page; light backgrounds
COLORS = ("#2a5c8a", "#c8692b", "#3a8464", "#8b5a9e", "#a8893a", "#b54a5c", "#2b8a96", "#6b6f76")


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, without a last line that a crash cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Return every number in the rows by name and row, rounded; None where a row lacks it."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    return {key: [rounded(row.get(key)) for row in rows] for key in keys}


def rounded(value: Any) -> float | None:
    """Round to six digits; None if it is no finite number."""
    return float(f"{value:.6g}") if isinstance(value, int | float) and math.isfinite(value) else None


def plot(runs: Mapping[str, list[dict[str, Any]]], path: Path | IO[bytes]) -> None:
    """Plot the paper's monitors over steps as a PNG. `runs`: name in the legend → rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    monitors = glossary.monitors()
    num_rows = math.ceil(len(monitors) / 3)
    figure = Figure(figsize=(12, 3.25 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(num_rows, 3).flat)
    for axes, metric in zip(panels, monitors, strict=False):
        marker = "o" if metric.name.startswith("eval") else None
        for i, (name, rows) in enumerate(runs.items()):
            points = [(row["step"], row[metric.name]) for row in rows if metric.name in row]
            x, y = zip(*points, strict=True) if points else ([], [])
            axes.plot(x, y, marker=marker, linewidth=1.6, color=COLORS[i % len(COLORS)], label=name)
        axes.set_title(metric.title, fontsize=11, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(monitors) :]:
        axes.remove()
    if len(runs) > 1:
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=min(len(runs), 4), frameon=False)
    figure.savefig(path, dpi=110)
