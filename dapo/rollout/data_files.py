"""Data files → distinct rows. Copies are left out and counted; prompts with conflicting answers are dropped
and listed.

A public training file repeats its 17 thousand prompts a hundred times, a few of them with conflicting
answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dapo.config import ConfigError
from dapo.rollout.ground_truth import GroundTruths
from dapo.rollout.parquet import RawRow, read_parquet, read_parquet_rows
from dapo.rollout.rows import BadRow, Messages, key_of, parse_json


@dataclass
class Summary:
    """Counts of a file's rows; every row is in exactly one of prompts, copies, conflicting, skipped,
    dropped.
    """

    path: Path
    rows: int = 0
    prompts: int = 0
    copies: int = 0  # repeated rows, beyond the first of each, which may be in an earlier file
    skipped: int = 0  # malformed, with data.on_error=skip
    conflicting: int = 0  # rows of prompts whose copies disagree on the answer
    dropped: int = 0  # too long
    truncated: int = 0  # too long, and kept
    conflicts: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # of the first rows that were skipped

    def skip(self, error: BadRow, count: int) -> None:
        """Count rows that cannot be used."""
        self.skipped += count
        self.errors += [str(error)] if len(self.errors) < 10 else []

    def __str__(self) -> str:
        counts = {
            "copies": self.copies,
            "malformed": self.skipped,
            "too long": self.dropped,
            "with conflicting answers": self.conflicting,
        }
        left_out = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        text = f"{self.path}: {self.rows:,} rows, {self.prompts:,} prompts"
        text += f"; left out: {left_out}" if left_out else ""
        text += f"; {self.truncated:,} cut on the left" if self.truncated else ""
        return text + (f"; the first malformed: {self.errors[0]}" if self.errors else "")


@dataclass
class Row:
    """One row, or several equal ones."""

    place: str  # file and line of the first, for error messages
    position: int  # as RawRow.position
    prompt: str | Messages
    answer: str
    count: int = 1


@dataclass
class _Copies:
    """All rows of one prompt."""

    file: int
    row: Row  # the first
    counts: dict[tuple[int, str], int] = field(default_factory=dict)  # rows, by file and answer

    def answers(self) -> dict[str, int]:
        """Return the number of rows of each answer."""
        found: dict[str, int] = {}
        for (_, answer), count in self.counts.items():
            found[answer] = found.get(answer, 0) + count
        return found


def distinct_rows(
    paths: Sequence[Path], truths: GroundTruths, skip_malformed: bool
) -> list[tuple[Summary, list[Row]]]:
    """Return the first row of each prompt of several files, which count as one; by file, in file order.

    The summaries count all rows. Prompts whose copies disagree on the answer are left out.

    Raises:
        ConfigError: no such file, an unknown format, or a row that cannot be used, unless `skip_malformed`.
    """
    found: dict[str, _Copies] = {}
    files = [(Summary(path), list[Row]()) for path in paths]
    for number, (summary, _) in enumerate(files):
        for row in _rows(summary, truths, skip_malformed):
            copies = found.setdefault(key_of(row.prompt), _Copies(number, row))
            key = number, row.answer
            copies.counts[key] = copies.counts.get(key, 0) + row.count
    for copies in found.values():
        answers = copies.answers()
        is_one = truths.agree(answers)
        for (number, _), count in copies.counts.items():
            if is_one:
                files[number][0].copies += count
            else:
                files[number][0].conflicting += count
        summary, rows = files[copies.file]
        if is_one:
            summary.copies -= 1
            rows.append(copies.row)
        else:
            conflict = {"place": copies.row.place, "prompt": copies.row.prompt, "answers": answers}
            summary.conflicts.append(conflict)
    return files


def row_reader(path: Path, positions: np.ndarray) -> Callable[[int], dict[str, Any]]:
    """Return a function that reads the i-th of a file's rows again, with all its columns, as it stands there.

    A line of .jsonl is read each time. A row of .parquet costs its whole row group, so these rows are read
    once and held in Arrow. `positions`: Row.position, int64, ascending.
    """
    if path.suffix == ".parquet":
        table = read_parquet_rows(path, positions)
        return lambda i: dict(table.slice(i, 1).to_pylist()[0])
    return lambda i: _read_line(path, int(positions[i]))


def _read_line(path: Path, position: int) -> dict[str, Any]:
    with path.open("rb") as lines:
        lines.seek(position)
        return dict(json.loads(lines.readline()))


def _rows(summary: Summary, truths: GroundTruths, skip_malformed: bool) -> Iterator[Row]:
    """Yield a file's rows that can be used; count all of them."""
    path = summary.path
    readers = {".jsonl": _read_jsonl, ".parquet": read_parquet}
    if not path.is_file():
        raise ConfigError(f"data file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    if path.suffix not in readers:
        raise ConfigError(f"data file {path}: expected .jsonl or .parquet")
    for raw in readers[path.suffix](path):
        summary.rows += raw.count
        try:
            prompt, answer = truths.read(raw.parse(), raw.place)
            if refusal := truths.refusal(answer):
                shown = answer if len(answer) <= 80 else answer[:80] + "…"
                raise BadRow(f"{raw.place}: the ground truth {shown!r} {refusal}")
        except BadRow as error:
            if not skip_malformed:
                raise
            summary.skip(error, raw.count)
            continue
        yield Row(raw.place, raw.position, prompt, answer, raw.count)


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    position = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                place = f"{path}, line {number}"
                if line.strip():
                    yield RawRow(place, position, 1, partial(_parse_line, line, place))
                position += len(line)
    except OSError as error:
        raise ConfigError(f"data file {path} cannot be read: {error.strerror}") from error


def _parse_line(line: bytes, place: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise BadRow(f"{place}: not JSON: {error}") from None
