"""Data files → distinct rows. Copies are left out and counted; prompts with conflicting answers are dropped
and listed.

A public training file repeats its 17 thousand prompts a hundred times, a few of them with conflicting
answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dapo.config import ConfigError

ROLES = {"system", "developer", "user", "assistant", "tool"}
ARROW_ROWS = 65_536  # parquet rows held at a time


@dataclass
class Summary:
    """Counts of a file's rows; every row is in exactly one of prompts, copies, conflicting, skipped,
    dropped.
    """

    path: Path
    rows: int = 0
    prompts: int = 0
    copies: int = 0  # repeated rows, beyond the first of each
    skipped: int = 0  # malformed, with data.on_error=skip
    conflicting: int = 0  # rows of prompts whose copies disagree on the answer
    dropped: int = 0  # too long
    truncated: int = 0  # too long, and kept
    conflicts: list[dict[str, Any]] = field(default_factory=list)

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
        return text + (f"; {self.truncated:,} cut on the left" if self.truncated else "")


@dataclass
class Row:
    """One row, or several equal ones."""

    place: str  # file and line of the first, for error messages
    position: int  # of the first: byte offset of its line in .jsonl, row number in .parquet, from 0
    prompt: str | list[dict[str, str]]
    answer: str
    count: int = 1


@dataclass
class _Raw:
    """A row before it is checked. `parse` returns its columns and may raise ConfigError."""

    place: str
    position: int
    count: int
    parse: Callable[[], Any]


def distinct_rows(path: Path, summary: Summary, skip_malformed: bool) -> list[Row]:
    """Return the first row of each prompt of a file, in file order; the summary counts all rows.

    Prompts whose copies disagree on the answer are left out.

    Raises:
        ConfigError: no such file, an unknown format, or a malformed row, unless `skip_malformed`.
    """
    first: dict[str, Row] = {}
    answers: dict[str, dict[str, int]] = {}
    for row in _rows(path, summary, skip_malformed):
        summary.rows += row.count
        key = row.prompt if isinstance(row.prompt, str) else json.dumps(row.prompt, sort_keys=True)
        first.setdefault(key, row)
        counts = answers.setdefault(key, {})
        counts[row.answer] = counts.get(row.answer, 0) + row.count
    for key, counts in answers.items():
        if len(counts) > 1:
            row = first.pop(key)
            summary.conflicting += sum(counts.values())
            summary.conflicts.append({"place": row.place, "prompt": row.prompt, "answers": counts})
        else:
            summary.copies += sum(counts.values()) - 1
    return list(first.values())


def read_row(path: Path, position: int) -> dict[str, Any]:
    """Read one row again, with all its columns, as it stands in the file. `position` is Row.position."""
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            lines.seek(position)
            return dict(json.loads(lines.readline()))
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    for number in range(file.num_row_groups):
        size = file.metadata.row_group(number).num_rows
        if position < size:
            return dict(file.read_row_group(number).slice(position, 1).to_pylist()[0])
        position -= size
    raise IndexError(f"{path} has no row {position} beyond its last")


def _rows(path: Path, summary: Summary, skip_malformed: bool) -> Iterator[Row]:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if not path.is_file():
        raise ConfigError(f"data file {path} does not exist")
    if path.suffix not in readers:
        raise ConfigError(f"data file {path}: expected .jsonl or .parquet")
    for raw in readers[path.suffix](path):
        try:
            prompt, answer = _prompt_and_answer(raw.parse(), raw.place)
        except ConfigError:
            if not skip_malformed:
                raise
            summary.rows += raw.count
            summary.skipped += raw.count
            continue
        yield Row(raw.place, raw.position, prompt, answer, raw.count)


def _read_jsonl(path: Path) -> Iterator[_Raw]:
    position = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            if line.strip():
                yield _Raw(place, position, 1, partial(_parse_line, line, place))
            position += len(line)


def _parse_line(line: bytes, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ConfigError(f"{place}: not JSON: {error}") from None


def _read_parquet(path: Path) -> Iterator[_Raw]:
    """Yield a parquet file's rows. Equal rows of a batch become one in Arrow, before they become Python
    objects.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"data file {path}: not parquet: {error}") from None
    names = file.schema_arrow.names
    columns = ["prompt", "reward_model" if "reward_model" in names else "answer"]
    for column in columns:
        if column not in names:
            raise ConfigError(
                f"{path}: no column {column!r}; expected prompt and reward_model.ground_truth (or answer), "
                f"found {names}"
            )
    before = 0
    for batch in file.iter_batches(batch_size=ARROW_ROWS, columns=columns):
        for first, count, row in _group_equal(pa.Table.from_batches([batch])):
            position = before + first
            yield _Raw(f"{path}, row {position + 1}", position, count, partial(dict, row))
        before += batch.num_rows


def _group_equal(table: Any) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (index of the first, number of equal rows, row) of a table of prompts and truths.

    Arrow finds equal rows if every prompt is text or a single message, and every truth is text; otherwise
    each row stands for itself.
    """
    import pyarrow as pa

    keys = _prompt_columns(table.column("prompt").combine_chunks())
    truths = _truth_column(table)
    if not keys or not _is_text(truths.type):
        yield from ((i, 1, row) for i, row in enumerate(table.to_pylist()))
        return
    rows = pa.table({**keys, "answer": truths, "row": np.arange(len(truths))})
    groups = rows.group_by([*keys, "answer"], use_threads=False).aggregate([("row", "min"), ("row", "count")])
    for row in groups.sort_by("row_min").to_pylist():
        prompt = [{"role": row["role"], "content": row["content"]}] if "role" in keys else row["content"]
        yield row["row_min"], row["row_count"], {"prompt": prompt, "answer": row["answer"]}


def _prompt_columns(prompts: Any) -> dict[str, Any]:
    """Return flat columns that say when two prompts are equal: content, or role and content of single
    messages.

    Empty if the prompts are neither.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if _is_text(prompts.type):
        return {"content": prompts}
    if not pa.types.is_list(prompts.type) or not pa.types.is_struct(prompts.type.value_type):
        return {}
    names = {f.name for f in prompts.type.value_type}
    if not {"role", "content"} <= names or prompts.null_count:
        return {}
    if not pc.all(pc.equal(pc.list_value_length(prompts), 1)).as_py():
        return {}
    return {name: pc.struct_field(prompts.flatten(), name) for name in ("role", "content")}


def _truth_column(table: Any) -> Any:
    """Return the column `answer`, or reward_model.ground_truth, all null if there is no such field."""
    import pyarrow as pa
    import pyarrow.compute as pc

    truths = table.column(1).combine_chunks()
    if table.column_names[1] != "reward_model":
        return truths
    if pa.types.is_struct(truths.type) and "ground_truth" in {f.name for f in truths.type}:
        return pc.struct_field(truths, "ground_truth")
    return pa.nulls(len(truths))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _prompt_and_answer(row: Any, place: str) -> tuple[Any, str]:
    """Return the prompt and the answer of a row. Raise ConfigError that names the column if there is none."""
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: {type(row).__name__}; expected {{prompt, answer}}")
    prompt, answer, truths = row.get("prompt"), row.get("answer"), row.get("reward_model")
    if answer is None and isinstance(truths, dict):
        answer = truths.get("ground_truth")
    if prompt is None:
        raise ConfigError(f"{place}: no column 'prompt'; expected {{prompt, answer}}")
    if answer is None:
        column = "reward_model.ground_truth" if "reward_model" in row else "answer"
        raise ConfigError(f"{place}: no column {column!r}")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise ConfigError(f"{place}: column 'answer' is {type(answer).__name__}; expected text or a number")
    if not isinstance(prompt, str):
        _check_chat(prompt, place)
    return prompt, str(answer)


def _check_chat(prompt: Any, place: str) -> None:
    is_chat = isinstance(prompt, list) and all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in prompt
    )
    if not is_chat or not prompt:
        found = type(prompt).__name__
        raise ConfigError(
            f"{place}: column 'prompt' is {found}; expected text or a list of {{role, content}}"
        )
    for message in prompt:
        if message["role"] not in ROLES:
            known = ", ".join(sorted(ROLES))
            raise ConfigError(f"{place}: chat role {message['role']!r} is not known; known: {known}")
