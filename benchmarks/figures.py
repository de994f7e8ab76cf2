"""Figures of gpu_check.py: each is on disk the moment it is measured, and so is the table of all.

DAPO_OUT names the directory, DAPO_STAGE what is measured; without DAPO_OUT nothing is written. As a plugin of
pytest (`-p figures`) it makes every test a figure.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from record import write_whole

FILE, SUMMARY = "figures.jsonl", "summary.md"


def write(
    name: str, value: float | None = None, unit: str = "", note: str = "", failed: bool = False
) -> None:
    """Append one figure, and write the table anew. A later figure of the same stage and name replaces it.

    A kill leaves all figures before this one, whole: the file only grows, and the table appears whole.
    """
    if "DAPO_OUT" not in os.environ:
        return
    out = Path(os.environ["DAPO_OUT"])
    if value is not None and not math.isfinite(value):
        value = None
    figure = {"at": round(time.time(), 2), "stage": os.environ.get("DAPO_STAGE", ""), "name": name}
    figure |= {"value": value, "unit": unit, "note": note, "failed": failed}
    print(f"figure: {json.dumps(figure)}", flush=True)
    with (out / FILE).open("a", encoding="utf-8") as file:
        # a line of its own, whatever a killed process has left
        file.write(f"\n{json.dumps(figure)}\n")
    summarize(out)


def read(out: Path) -> list[dict[str, Any]]:
    """Return the figures in the order in which they were measured, without a line that a kill has cut."""
    figures = []
    path = out / FILE
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            figures.append(json.loads(line))
        except ValueError:
            continue
    return figures


def newest(out: Path) -> list[dict[str, Any]]:
    """Return the last figure of each stage and name."""
    return list({(figure["stage"], figure["name"]): figure for figure in read(out)}.values())


def summarize(out: Path) -> str:
    """Write the table of the newest figures and the list of failures. Return the text."""
    figures = newest(out)
    start = figures[0]["at"] if figures else 0
    lines = ["| s | stage | figure | value | note |", "| --- | --- | --- | --- | --- |"]
    for figure in figures:
        value = "" if figure["value"] is None else f"{_digits(figure['value'])} {figure['unit']}".strip()
        note = figure["note"].replace("|", "\\|")
        name = ("FAILED: " if figure["failed"] else "") + figure["name"]
        lines.append(f"| {figure['at'] - start:.0f} | {figure['stage']} | {name} | {value} | {note} |")
    failed = [figure for figure in figures if figure["failed"]]
    lines += ["", f"{len(failed)} failed" + (":" if failed else ""), ""]
    lines += [f"- {figure['stage']}: {figure['name']}: {figure['note']}" for figure in failed]
    text = "\n".join(lines) + "\n"
    write_whole(out / SUMMARY, text)
    return text


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def pytest_runtest_logreport(report: Any) -> None:
    """Make a test a figure: the seconds it took and how it ended."""
    if report.when == "call" or report.outcome != "passed":
        lines = str(report.longrepr[2] if report.skipped else report.longrepr or "").splitlines()
        why = [line[1:].strip() for line in lines if line.startswith("E ")] or lines[-1:]
        note = ": ".join([report.outcome, *why[:1]]).replace("skipped: Skipped", "skipped")
        write(report.nodeid.split("::")[-1], report.duration, "s", note[:200], report.failed)
