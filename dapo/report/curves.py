"""The metrics of a run, read from metrics.jsonl, and the paper's monitors plotted from them. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CURVES = {  # the paper's four monitors and accuracy (Figures 2 and 7)
    "eval/accuracy": "accuracy on held-out problems",
    "rollout/accuracy": "accuracy while sampling",
    "rollout/length": "response length (tokens)",
    "rollout/reward": "reward",
    "policy/entropy": "entropy (nats)",
    "policy/probability": "mean probability",
}


# of several runs, as in report.html
COLORS = ("#2a5c8a", "#c8692b", "#3a8464", "#8b5a9e", "#a8893a", "#b54a5c", "#2b8a96", "#6b6f76")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot(runs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """The paper's monitors over steps, as a PNG: the rows of each run, by the name that the legend has for
    it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, CURVES.items(), strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(
                *zip(*points, strict=True) if points else ([], []),
                marker="o" if key.startswith("eval") else None,
                linewidth=1.6,
                color=COLORS[i % len(COLORS)],
                label=name,
            )
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=min(len(runs), 4),
            frameon=False,
        )
    figure.savefig(path, dpi=110)
