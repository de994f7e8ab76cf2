"""Rollouts and their traces as parquet, one file a step: to read, and to train from (rollout.replay)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from dapo import files
from dapo.config import ConfigError
from dapo.learn.traces import Trace, chosen
from dapo.rollout.buffer import Buffer
from dapo.types import Group, Prompt, Sample, token_fields

Rows = list[dict[str, Any]]
KINDS = ("kept", "all_correct", "all_wrong", "surplus")
TRACES = ".traces.parquet"
TYPES = {  # a field's annotation → its column; [x]: a list of x
    "int": "int64",
    "float": "double",
    "bool": "bool",
    "str": "string",
    "FinishReason": "string",
    "tuple[tuple[int, int, int], ...]": "[[int64]]",
}


def columns_of(kind: type) -> dict[str, str]:
    """Return a dataclass's columns: name → type."""
    per_token = token_fields(kind)
    return {
        f.name: f"[{per_token[f.name]}]" if f.name in per_token else TYPES[str(f.type)] for f in fields(kind)
    }


PROMPT = {"prompt_index": "int64", "prompt_tokens": "[int32]", "answer": "string"}
KEY = {"kind": "string", "group": "int64", "index": "int64"}
COLUMNS = KEY | PROMPT | columns_of(Sample)  # of a dump, a row a sample
TRACE_COLUMNS = columns_of(Trace)


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06}.parquet"


def traces_path_of(directory: Path, step: int) -> Path:
    return path_of(directory, step).with_suffix(TRACES)


def write(path: Path, buffer: Buffer, fraction: float) -> None:
    """Write a `fraction` of each kind's groups, a row a sample. The file appears whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    with files.writing(path):
        path.with_suffix(TRACES).unlink(missing_ok=True)  # of an earlier attempt at this step
    groups = [(kind, group) for kind in KINDS for group in chosen(getattr(buffer, kind), fraction)]
    _write(path, _rows(groups), COLUMNS)


def read(path: Path, capacity: int) -> Buffer:
    """Return the buffer that `write` was given, as far as it was written.

    Raises:
        ConfigError: no such file, or it is not a dump.
    """
    if not path.exists():
        raise ConfigError(f"rollout.replay: {path} does not exist; run fewer steps, or dump more")
    buffer = Buffer(capacity, is_dynamic=True)
    for kind, group in _groups(path):
        getattr(buffer, kind).append(group)
    return buffer


def write_groups(path: Path, groups: Sequence[Group]) -> None:
    """Write the groups that have samples, a row a sample; no file if none has."""
    _write(path, _rows([("carried", group) for group in groups]), COLUMNS)


def read_groups(path: Path) -> list[Group]:
    """Return the groups that `write_groups` was given, those with samples."""
    return [group for _, group in _groups(path)] if path.exists() else []


def write_traces(path: Path, traces: Iterable[Trace]) -> None:
    """Write a row a sample, by (group, index) as in the step's dump. It appears whole or not at all."""
    ordered = sorted(traces, key=lambda trace: (trace.group, trace.index))
    _write(path, [asdict(trace) for trace in ordered], TRACE_COLUMNS)


def read_rows(path: Path, columns: Mapping[str, str], groups: Sequence[int] | None = None) -> Rows:
    """Return the rows, only those of `groups` if given, with `columns` of COLUMNS or TRACE_COLUMNS.

    Raises:
        ConfigError: the file is damaged, or was not written here.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    filters = None if groups is None else [("group", "in", groups)]
    try:
        table = pq.read_table(path, columns=list(columns), filters=filters, page_checksum_verification=True)
        if not table.schema.equals(_schema(columns)):
            raise pa.ArrowInvalid(
                f"columns {', '.join(table.column_names) or 'other than'} in place of {', '.join(columns)}"
            )
        rows: Rows = table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{path} is damaged, or no dump of rollouts: {said}") from None
    return rows


def _groups(path: Path) -> list[tuple[str, Group]]:
    """Return (kind, group) in the order in which they were written."""
    groups: dict[int, tuple[str, Group]] = {}
    for row in read_rows(path, COLUMNS):
        if row["group"] not in groups:
            prompt = Prompt(row["prompt_index"], np.array(row["prompt_tokens"], np.int32), row["answer"])
            groups[row["group"]] = row["kind"], Group(row["group"], prompt)
        groups[row["group"]][1].samples.append(_sample(row))
    return list(groups.values())


def _rows(groups: Iterable[tuple[str, Group]]) -> Rows:
    return [_row(kind, group, sample) for kind, group in groups for sample in group.samples]


def _schema(columns: Mapping[str, str]) -> Any:
    import pyarrow as pa

    def kind_of(name: str) -> Any:
        return pa.list_(kind_of(name[1:-1])) if name.startswith("[") else pa.type_for_alias(name)

    return pa.schema([(name, kind_of(kind)) for name, kind in columns.items()])


def _write(path: Path, rows: Rows, columns: Mapping[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        return
    partial = path.with_suffix(".partial")
    table = pa.Table.from_pylist(rows, schema=_schema(columns))
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def _row(kind: str, group: Group, sample: Sample) -> dict[str, Any]:
    row = {name: getattr(sample, name) for name in columns_of(Sample)}
    prompt = group.prompt
    about = {"prompt_index": prompt.index, "prompt_tokens": prompt.tokens, "answer": prompt.answer}
    return row | {"kind": kind, "group": group.id} | about


def _sample(row: dict[str, Any]) -> Sample:
    values = {name: row[name] for name in columns_of(Sample)}
    values |= {name: np.array(row[name], dtype) for name, dtype in token_fields(Sample).items()}
    values["versions"] = tuple((version, start, end) for version, start, end in row["versions"])
    return Sample(**values)
