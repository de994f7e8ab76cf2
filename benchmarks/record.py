"""The heading of every result: where, when and from which commit it was measured; and its tables."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def heading(title: str) -> str:
    """Write a Markdown heading with machine, date, commit, versions and the command."""
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    if _git("status", "--porcelain", "dapo", "kernels"):
        commit += " (changed)"
    machine = f"{os.cpu_count()} CPU cores, {_cpu_model()}"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    command = " ".join(sys.argv).replace(str(Path.home()), "~")
    return (
        f"# {title}\n\n{machine}; {datetime.date.today()}; commit {commit}; {versions}\n\n"
        f"    python {command}\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Write median, minimum and maximum: `spread([1, 2, 4])` → "2.000 (1.000–4.000)"."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def save(name: str, text: str) -> None:
    """Print the result and keep it under benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text)
    print(text)
    print(f"kept in {RESULTS / name}")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parents[1])
    return done.stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
