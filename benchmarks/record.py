"""What every result says of itself: where, when and from which commit it was measured."""

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
    """A Markdown heading with machine, date, commit, versions and the command."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent
    ).stdout.strip()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "dapo", "kernels"],
        capture_output=True,
        text=True,
        cwd=RESULTS.parents[1],
    ).stdout
    machine = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores, {_cpu_model()}"
    )
    return (
        f"# {title}\n\n"
        f"{machine}; {datetime.date.today()}; commit "
        f"{commit or 'unknown'}{' (changed)' if changed.strip() else ''}; "
        f"Python {platform.python_version()}, torch {torch.__version__}\n\n"
        f"    python {' '.join(sys.argv).replace(str(Path.home()), '~')}\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`spread([1, 2, 4])` → "2.000 (1.000–4.000)": median, minimum and maximum."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def save(name: str, text: str) -> None:
    """Print the result and keep it under benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text)
    print(text)
    print(f"kept in {RESULTS / name}")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
