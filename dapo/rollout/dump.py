"""Rollouts and their traces as parquet, one file a step: to read, and to train from (rollout.replay)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dapo import files
from dapo.config import ConfigError
from dapo.learn.traces import Trace, chosen
from dapo.model.routing import Routing
from dapo.rollout.buffer import Buffer
from dapo.types import Episode, Group, Prompt, Sample, StorageError, token_fields

Rows = list[dict[str, Any]]
Columns = Mapping[str, str]  # name → type
Values = dict[str, list[Any]]  # of columns, by name
KINDS = ("kept", "all_correct", "all_wrong", "surplus")
TRACES = ".traces.parquet"
NONE: Columns = {}
MOST = 2**30  # numbers in a column of a table: offsets are int32
ROWS, PAGE = 16, 2**20  # rows decoded, and bytes read, at a time
TYPES = {  # a field's annotation → its column; [x]: a list of x
    "int": "int64",
    "float": "double",
    "bool": "bool",
    "str": "string",
    "FinishReason": "string",
    "tuple[tuple[int, int, int], ...]": "[[int64]]",
}


# of samples that have them; a file without such samples has no such column. routes: [fed tokens × columns];
# episode: JSON of an Episode
OPTIONAL = {"routes": "[int16]", "episode": "string"}


def columns_of(kind: type) -> dict[str, str]:
    """Return a dataclass's columns that every file has: name → type."""
    per_token = token_fields(kind)
    return {
        f.name: f"[{per_token[f.name]}]" if f.name in per_token else TYPES[str(f.type)]
        for f in fields(kind)
        if f.name not in (*OPTIONAL, "num_cached")
    }


PROMPT = {"prompt_index": "int64", "prompt_tokens": "[int32]", "answer": "string"}
KEY = {"kind": "string", "group": "int64", "index": "int64"}
COLUMNS = KEY | PROMPT | columns_of(Sample)  # of a dump, a row a sample
TRACE_COLUMNS = columns_of(Trace)


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06}.parquet"


def traces_path_of(directory: Path, step: int) -> Path:
    return path_of(directory, step).with_suffix(TRACES)


class Writer:
    """Writes dumps in a thread, beside the step, in order. `check` says what failed."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "dump")
        self._begun: list[Future[None]] = []  # since the last check

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, path: Path, buffer: Buffer, fraction: float) -> None:
        """Begin to write a `fraction` of each kind's groups, a row a sample. The file appears whole or not at
        all.

        Raises:
            StorageError: its directory cannot be written to.
        """
        with files.writing(path):
            path.with_suffix(TRACES).unlink(missing_ok=True)  # of an earlier attempt at this step
        groups = [(kind, group) for kind in KINDS for group in chosen(getattr(buffer, kind), fraction)]
        self._begin(path, *_values_of(groups))

    def write_traces(self, path: Path, traces: Iterable[Trace]) -> None:
        """Begin to write a row a sample, by (group, index) as in the step's dump, whole or not at all.

        If that fails a warning says so: the step is over.
        """
        ordered = sorted(traces, key=lambda trace: (trace.group, trace.index))
        values = {name: [getattr(trace, name) for trace in ordered] for name in TRACE_COLUMNS}
        self._begin(path, values, TRACE_COLUMNS, is_needed=False)

    def finish(self) -> None:
        """Wait until nothing is being written."""
        wait(self._begun)

    def check(self) -> None:
        """Wait. Raise StorageError, once, if a dump could not be written."""
        begun, self._begun = self._begun, []
        wait(begun)
        for writing in begun:
            writing.result()

    def close(self) -> None:
        """Wait, and end the thread. What ended the run is more than a dump that failed: that is a warning."""
        try:
            self.check()
        except StorageError as error:
            _warn(error)
        finally:
            self._thread.shutdown()

    def _begin(self, path: Path, values: Values, columns: Columns, is_needed: bool = True) -> None:
        """Begin to write. The values are the dump's own, the arrays among them do not change any more."""

        def write() -> None:
            try:
                _write(path, values, columns)
            except StorageError as error:
                if is_needed:
                    raise
                _warn(error)

        self._begun.append(self._thread.submit(write))


def _warn(error: StorageError) -> None:
    print(f"warning: {error}", file=sys.stderr, flush=True)


def read(path: Path, capacity: int, vocab_size: int | None = None, routing: Routing | None = None) -> Buffer:
    """Return the buffer that `write` was given, as far as it was written.

    Raises:
        ConfigError: no such file, or it is not a dump, or it has token ids that are not below `vocab_size`,
            or routes that a model of this `routing` cannot have.
    """
    if not path.exists():
        raise ConfigError(f"rollout.replay: {path} does not exist; run fewer steps, or dump more")
    buffer = Buffer(capacity, is_dynamic=True)
    for kind, group in _groups(path):
        for tokens in (group.prompt.tokens, *(sample.tokens for sample in group.samples)):
            _check_tokens(tokens, vocab_size, path)
        for sample in group.samples if routing else ():
            if sample.routes is not None and routing and (fault := routing.fault(sample.routes)):
                which = f"sample {sample.index} of group {group.id}: {fault}"
                raise ConfigError(f"rollout.replay: {path}: {which}: a dump of another model?")
        getattr(buffer, kind).append(group)
    return buffer


def _check_tokens(tokens: np.ndarray, vocab_size: int | None, path: Path) -> None:
    """Raise ConfigError if a token has no row in the policy's vocabulary. None: its size is not known."""
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)] if vocab_size is not None else tokens[:0]
    if wrong.size:
        has = f"token id {wrong[0]}, where the policy's vocabulary has {vocab_size}"
        raise ConfigError(f"rollout.replay: {path}: {has}: a dump of another model?")


def write_groups(path: Path, groups: Sequence[Group]) -> None:
    """Write the groups that have samples, a row a sample; no file if none has. Raise StorageError."""
    _write(path, *_values_of([("carried", group) for group in groups]))


def read_groups(path: Path) -> list[Group]:
    """Return the groups that `write_groups` was given, those with samples."""
    return [group for _, group in _groups(path)] if path.exists() else []


def read_rows(
    path: Path, columns: Columns, groups: Sequence[int] | None = None, optional: Columns = NONE
) -> Rows:
    """Return the rows, only those of `groups` if given, with `columns` of COLUMNS or TRACE_COLUMNS, and those
    of `optional` that the file has.

    Raises:
        ConfigError: the file is damaged, or was not written here.
    """
    return [row for batch in _batches(path, columns, groups, optional) for row in batch.to_pylist()]


def _batches(
    path: Path, columns: Columns, groups: Sequence[int] | None = None, optional: Columns = NONE
) -> Iterator[Any]:
    """Yield Arrow record batches of ROWS rows, read page by page. Raise ConfigError as `read_rows` does.

    Of `optional` columns they have those that the file has.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    options = {"page_checksum_verification": True, "buffer_size": PAGE, "pre_buffer": False}
    try:
        with pq.ParquetFile(path, **options) as file:
            names = file.schema_arrow.names
            columns = {**columns, **{name: kind for name, kind in optional.items() if name in names}}
            found = sorted(
                (field for field in file.schema_arrow if field.name in columns),
                key=lambda field: list(columns).index(field.name),
            )
            if not pa.schema(found).equals(_schema(columns)):
                names = ", ".join(field.name for field in found)
                raise pa.ArrowInvalid(f"columns {names or 'other than'} in place of {', '.join(columns)}")
            missing = file.metadata.num_rows
            for batch in file.iter_batches(ROWS, columns=list(columns), use_threads=False):
                batch.validate(full=True)  # text is UTF-8
                missing -= len(batch)
                yield batch if groups is None else batch.filter(pc.field("group").isin(groups))
            if missing:  # a page's header is damaged: to Arrow the column ends there
                raise pa.ArrowInvalid(f"{missing} of {file.metadata.num_rows} rows are missing")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{path} is damaged, or no dump of rollouts: {said}") from None


def _groups(path: Path) -> list[tuple[str, Group]]:
    """Return (kind, group) in the order in which they were written. Arrays are views of a batch's columns."""
    groups: dict[int, tuple[str, Group]] = {}
    for batch in _batches(path, COLUMNS, optional=OPTIONAL):
        kinds = COLUMNS | OPTIONAL
        values = {name: _values(batch[name], kinds[name]) for name in batch.schema.names}
        values["versions"] = [tuple(map(tuple, versions)) for versions in values["versions"]]
        for i, id in enumerate(values["group"]):
            if id not in groups:
                prompt = Prompt(*(values[name][i] for name in PROMPT))
                groups[id] = values["kind"][i], Group(id, prompt)
            sample = Sample(**{name: values[name][i] for name in columns_of(Sample)})
            if "routes" in values and len(routes := values["routes"][i]):
                sample.routes = routes.reshape(len(groups[id][1].prompt.tokens) + sample.length - 1, -1)
            if "episode" in values and (said := values["episode"][i]):
                sample.episode = Episode(**json.loads(said))
            groups[id][1].samples.append(sample)
    return list(groups.values())


def _values_of(groups: Iterable[tuple[str, Group]]) -> tuple[Values, Columns]:
    """Return the columns of a dump, and their types."""
    rows = [(kind, group, sample) for kind, group in groups for sample in group.samples]
    prompts = [group.prompt for _, group, _ in rows]
    values: Values = {
        "kind": [kind for kind, _, _ in rows],
        "prompt_index": [prompt.index for prompt in prompts],
        "prompt_tokens": [prompt.tokens for prompt in prompts],
        "answer": [prompt.answer for prompt in prompts],
    }
    values |= {name: [getattr(sample, name) for _, _, sample in rows] for name in columns_of(Sample)}
    values |= {"group": [group.id for _, group, _ in rows]}
    routes = [sample.routes for _, _, sample in rows]
    if any(each is not None for each in routes):
        values["routes"] = [np.zeros(0, np.int16) if each is None else each.ravel() for each in routes]
    episodes = [sample.episode for _, _, sample in rows]
    if any(episodes):
        values["episode"] = [_json(each) if each else "" for each in episodes]
    return values, COLUMNS | {name: OPTIONAL[name] for name in OPTIONAL if name in values}


def _json(episode: Episode) -> str:
    return json.dumps(
        {f.name: getattr(episode, f.name) for f in fields(Episode) if f.name != "prompt_tokens"}
    )


def _tables(values: Values, columns: Columns) -> Iterator[Any]:
    """Yield Arrow tables of about MOST numbers in a column at most. A row's list of numbers is an array, and
    all of a table's become one.
    """
    import pyarrow as pa

    schema, lists = _schema(columns), [values[name] for name, kind in columns.items() if _is_list(kind)]
    sizes = np.array([max(map(len, row)) for row in zip(*lists, strict=True)], np.int64)
    parts = np.flatnonzero(np.diff(np.cumsum(sizes) // MOST, prepend=0)).tolist()
    for start, end in pairwise([0, *(i for i in parts if i), len(sizes)]):
        arrays = [
            (_list_array if _is_list(kind) else pa.array)(values[name][start:end], schema.field(name).type)
            for name, kind in columns.items()
        ]
        yield pa.Table.from_arrays(arrays, schema=schema)


def _is_list(kind: str) -> bool:
    return kind.startswith("[") and not kind.startswith("[[")


def _list_array(rows: list[np.ndarray], kind: Any) -> Any:
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    whole = np.concatenate(rows) if rows else np.zeros(0)
    return pa.ListArray.from_arrays(offsets, pa.array(whole, kind.value_type), type=kind)


def _values(column: Any, kind: str) -> list[Any]:
    """Return a column's values, the rows of lists as arrays over one memory, which is not Arrow's: that holds
    on to what it has decoded from.
    """
    if not _is_list(kind):
        values: list[Any] = column.to_pylist()
        return values
    numbers, offsets = column.flatten().to_numpy(zero_copy_only=False).copy(), column.offsets.to_pylist()
    return [numbers[start - offsets[0] : end - offsets[0]] for start, end in pairwise(offsets)]


def _schema(columns: Columns) -> Any:
    import pyarrow as pa

    def kind_of(name: str) -> Any:
        return pa.list_(kind_of(name[1:-1])) if name.startswith("[") else pa.type_for_alias(name)

    return pa.schema([(name, kind_of(kind)) for name, kind in columns.items()])


def _write(path: Path, values: Values, columns: Columns) -> None:
    """Write a row for each of the values, and no file if there are none. Raise StorageError."""
    import pyarrow.parquet as pq

    if not values["group"]:
        return
    partial, options = path.with_suffix(".partial"), {"compression": "zstd", "write_page_checksum": True}
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with pq.ParquetWriter(partial, _schema(columns), **options) as file:
                for table in _tables(values, columns):
                    file.write_table(table)
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
