"""Rows of a parquet file. Equal rows of a batch become one in Arrow, before they become Python objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dapo.config import ConfigError
from dapo.rollout.rows import BadRow

BATCH = 65_536  # rows held at a time


@dataclass
class RawRow:
    """A row before it is checked, or several equal ones."""

    place: str  # file and line of the first, for error messages
    position: int  # of the first: byte offset of its line in .jsonl, row number in .parquet, from 0
    count: int
    parse: Callable[[], Any]  # returns its columns, or raises BadRow


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Yield a file's rows. Raise ConfigError if it is not parquet, or has not the columns."""
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        columns = [name for name in ("prompt", "reward_model", "answer") if name in names]
        if twice := [name for name in columns if names.count(name) > 1]:
            raise ConfigError(f"{path}: column {twice[0]!r} is there twice; remove one of them")
        for column, others in [("prompt", {"prompt"}), ("answer", {"reward_model", "answer"})]:
            if not others & set(columns):
                expected = "expected prompt and reward_model.ground_truth (or answer)"
                raise ConfigError(f"{path}: no column {column!r}; {expected}, found {names}")
        before = 0
        for batch in file.iter_batches(batch_size=BATCH, columns=columns):
            for first, count, parse in _group_equal(_widened(pa.Table.from_batches([batch]))):
                position = before + first
                place = f"{path}, row {position + 1}"
                yield RawRow(place, position, count, partial(_parse, parse, place))
            before += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"data file {path}: not parquet: {' '.join(str(error).split())}") from None


def read_parquet_rows(path: Path, numbers: np.ndarray) -> pa.Table:
    """Return rows with all their columns, by their numbers from 0: int64 [rows], ascending."""
    file, before, found = pq.ParquetFile(path), 0, []
    for batch in file.iter_batches(batch_size=BATCH):
        first, end = np.searchsorted(numbers, [before, before + batch.num_rows])
        found.append(batch.take(pa.array(numbers[first:end] - before)))
        before += batch.num_rows
    return pa.Table.from_batches(found)


def _parse(parse: Callable[[], Any], place: str) -> Any:
    try:
        return parse()
    except UnicodeDecodeError as error:
        raise BadRow(f"{place}: not UTF-8: {error}") from None


def _widened(table: pa.Table) -> pa.Table:
    """Make doubles of ground truths of 32 bits, with their own digits: 0.1, not 0.10000000149011612."""
    for i, name in enumerate(table.column_names):
        column = table.column(i)
        is_rule = pa.types.is_struct(column.type) and "ground_truth" in {f.name for f in column.type}
        truths = pc.struct_field(column, "ground_truth") if is_rule else column
        if pa.types.is_float32(truths.type):
            truths = truths.cast(pa.string()).cast(pa.float64())
            column = pc.make_struct(truths, field_names=["ground_truth"]) if is_rule else truths
            table = table.set_column(i, name, column)
    return table


def _group_equal(table: pa.Table) -> Iterator[tuple[int, int, Callable[[], Any]]]:
    """Yield (index of the first, number of equal rows, what makes the row) of prompts and ground truths.

    Arrow finds equal rows if every prompt is text or a single message, and every ground truth is text;
    otherwise each row stands for itself.
    """
    keys = _text_columns(table)
    if not keys:
        try:
            yield from ((i, 1, partial(dict, row)) for i, row in enumerate(table.to_pylist()))
        except UnicodeDecodeError:  # in one of them
            yield from ((i, 1, partial(_row, table, i)) for i in range(table.num_rows))
        return
    rows = pa.table(keys | {"row": np.arange(table.num_rows)})
    groups = rows.group_by([*keys], use_threads=False).aggregate([("row", "min"), ("row", "count")])
    for row in groups.sort_by("row_min").to_pylist():
        prompt = [{"role": row["role"], "content": row["content"]}] if "role" in keys else row["content"]
        columns = {"prompt": prompt, "answer": row["answer"]}
        if "reward_model" in table.column_names:
            columns = {"prompt": prompt, "reward_model": {"ground_truth": row["answer"]}}
        yield row["row_min"], row["row_count"], partial(dict, columns)


def _row(table: pa.Table, i: int) -> dict[str, Any]:
    return dict(table.slice(i, 1).to_pylist()[0])


def _text_columns(table: pa.Table) -> dict[str, pa.Array]:
    """Return flat columns of text that say when two rows are equal: content, answer, and of messages role.

    Empty if the table's prompts or ground truths are not that simple, or a text is not UTF-8.
    """
    columns = _prompt_columns(table.column("prompt").combine_chunks()) | {"answer": _truths(table)}
    if "content" not in columns or not all(_is_text(column.type) for column in columns.values()):
        return {}
    try:
        for column in columns.values():
            column.validate(full=True)
    except pa.ArrowInvalid:
        return {}
    return columns


def _prompt_columns(prompts: pa.Array) -> dict[str, pa.Array]:
    """Return content; or of single messages, which have nothing else, role and content; or nothing."""
    if _is_text(prompts.type):
        return {"content": prompts}
    if not pa.types.is_list(prompts.type) or not pa.types.is_struct(prompts.type.value_type):
        return {}
    if {f.name for f in prompts.type.value_type} != {"role", "content"} or prompts.null_count:
        return {}
    if not pc.all(pc.equal(pc.list_value_length(prompts), 1)).as_py():
        return {}
    return {name: pc.struct_field(prompts.flatten(), name) for name in ("role", "content")}


def _truths(table: pa.Table) -> pa.Array:
    """Return reward_model.ground_truth, or `answer` where it is null; all null if that is not simple."""
    found = []
    for name in table.column_names[1:]:
        column = table.column(name).combine_chunks()
        if name == "reward_model":
            is_rule = pa.types.is_struct(column.type) and "ground_truth" in {f.name for f in column.type}
            column = pc.struct_field(column, "ground_truth") if is_rule else pa.nulls(len(column))
        found.append(column)
    if len(found) == 1 or not found[0].null_count:
        return found[0]
    return pc.coalesce(*found) if found[0].type == found[1].type else pa.nulls(len(found[0]))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
