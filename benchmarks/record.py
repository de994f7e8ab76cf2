"""The heading of every result: where, when and from which commit it was measured; and its tables."""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# DAPO_OUT: another directory for results
RESULTS = Path(os.environ.get("DAPO_OUT", Path(__file__).parent / "results"))
# half a 95 % interval in standard errors, of 2, 3, … values; of more than 10 as of 10: a little too wide
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def heading(title: str) -> str:
    """Write a Markdown heading with machine, date, commit, versions and the command."""
    import torch  # takes seconds: tables are written without it

    machine = f"{os.cpu_count()} CPU cores, {_cpu_model()}"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    command = " ".join(sys.argv).replace(str(Path.home()), "~")
    return (
        f"# {title}\n\n{machine}; {datetime.date.today()}; commit {commit()}; {versions}\n\n"
        f"    python {command}\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Write median, minimum and maximum: `spread([1, 2, 4])` → "2.000 (1.000–4.000)"."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error (nan for a single value): `mean_and_error([1, 3])` → (2, 1)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def average(values: Sequence[float | None] | None, digits: int = 3) -> str:
    """Write mean ± standard error, `average([1, 3], 1)` → "2.0 ± 1.0"; the mean alone of a single value; –
    where one is absent.
    """
    present = [value for value in values or [] if value is not None]
    if not present or values is None or len(present) < len(values):
        return "–"
    mean, error = mean_and_error(present)
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def difference(ours: Sequence[float | None], theirs: Sequence[float | None], digits: int = 3) -> str:
    """Write the mean of paired differences ± standard error and its 95 % interval, by Student's t:
    `difference([2, 4], [1, 1], 1)` → "+2.0 ± 1.0 (-10.7 to +14.7)".
    """
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if len(pairs) < len(ours):
        return "–"
    mean, error = mean_and_error([a - b for a, b in pairs])
    if math.isnan(error):
        return f"{mean:+.{digits}f}"
    half = T95[min(len(pairs), len(T95) + 1) - 2] * error
    return f"{mean:+.{digits}f} ± {error:.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"


def save(name: str, text: str) -> None:
    """Print the result and keep it under benchmarks/results/, or in DAPO_OUT."""
    keep(name, text)
    print(text)
    print(f"kept in {RESULTS / name}")


def keep(name: str, text: str) -> None:
    """Keep a result, or what there is of it so far; the file is always whole."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_whole(RESULTS / name, text)


def write_whole(path: Path, text: str) -> None:
    """Replace the file: a reader, or a kill, finds the old text or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def commit() -> str:
    """Return the commit that is measured: DAPO_COMMIT, or git's, or "unknown" outside a checkout."""
    if given := os.environ.get("DAPO_COMMIT"):
        return given
    if not (ROOT / ".git").exists():  # git would answer for a checkout around this directory
        return "unknown"
    head = _git("rev-parse", "--short", "HEAD") or "unknown"
    measured = ("dapo", "kernels", "benchmarks", ":!benchmarks/results")
    return head + (" (changed)" if _git("status", "--porcelain", *measured) else "")


def _git(*arguments: str) -> str:
    """Return what git prints; "" if it fails or is not there."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    except OSError:
        return ""


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
