"""The findings of a pretended GPU: which rule was broken, by what, and where."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
OWN = {Path(__file__).with_name(name) for name in ("report.py", "pretence.py", "gpu.py")}


class Finding(NamedTuple):
    kind: str  # the rule: "devices", "host memory", "group", "thread", "nccl", "kernel", "cache",
    # "order"
    what: str
    where: str  # "file:line function", the innermost call first


class Report:
    """Collects findings, each with how often it was seen, and counts the operations that were checked."""

    def __init__(self) -> None:
        self.operations = 0  # that a tensor on a GPU takes part in
        self.found: Counter[Finding] = Counter()

    def clear(self) -> None:
        self.operations = 0
        self.found.clear()

    def find(self, kind: str, what: str) -> None:
        self.found[Finding(kind, what, _where())] += 1


def is_found(found: list[Finding], kind: str, place: str) -> bool:
    return any(finding.kind == kind and place in finding.where for finding in found)


def _where() -> str:
    """Return the four innermost calls outside torch and this package."""
    calls = []
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path not in OWN and not {"torch", "threading.py"} & set(path.parts):
            short = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
            calls.append(f"{short}:{frame.lineno} {frame.name}")
    return " < ".join(calls[:4])


REPORT = Report()
