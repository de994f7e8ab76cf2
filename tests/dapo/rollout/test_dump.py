"""Dumps are written beside the step, in order, and what fails is said when it is asked for."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo.config import ConfigError
from dapo.learn.traces import Trace, blank
from dapo.rollout import dump
from dapo.rollout.buffer import Buffer
from dapo.types import StorageError
from tests.conftest import make_group


def make_buffer(*ids: int) -> Buffer:
    buffer = Buffer(len(ids), is_dynamic=True)
    for id in ids:
        buffer.offer(make_group([1, 0], [5, 3], id=id))
    return buffer


def traces_of(*groups: int) -> list[Trace]:
    return [blank(group, 0, 3) for group in groups]


def no_room(path: Path) -> None:
    path.with_suffix(".partial").symlink_to("/dev/full")


def test_the_step_goes_on_while_dumps_are_written_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write, order = Event(), dump._write, []

    def slow(path: Path, *arguments: Any) -> None:
        assert may_write.wait(30)
        write(path, *arguments)
        order.append(path.name)

    monkeypatch.setattr(dump, "_write", slow)
    first, second = (dump.path_of(tmp_path, step) for step in range(2))
    with dump.Writer() as writer:
        writer.write(first, make_buffer(1), 1.0)
        writer.write(second, make_buffer(2), 1.0)
        assert not first.exists(), "it is written aside"
        may_write.set()
        writer.finish()
        assert first.exists() and second.exists()
        writer.check()
    assert order == [first.name, second.name]


def test_what_failed_is_raised_once_when_it_is_asked_for(tmp_path: Path) -> None:
    first, second = (dump.path_of(tmp_path, step) for step in range(2))
    no_room(first)
    with dump.Writer() as writer:
        writer.write(first, make_buffer(1), 1.0)
        writer.write_traces(dump.traces_path_of(tmp_path, 0), traces_of(1))  # the step goes on
        writer.finish()
        with pytest.raises(StorageError, match=r"step-000000\.parquet cannot be written"):
            writer.check()
        assert [path.name for path in tmp_path.iterdir()] == ["step-000000.traces.parquet"]
        writer.check()
        writer.write(second, make_buffer(2), 1.0)
    assert second.exists()


def test_at_the_end_a_failure_is_a_warning_and_the_thread_has_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = dump.path_of(tmp_path, 0)
    no_room(path)
    writer = dump.Writer()
    writer.write(path, make_buffer(1), 1.0)
    writer.close()
    error = capfd.readouterr().err
    assert error.startswith(f"warning: {path} cannot be written") and error.count("\n") == 1
    with pytest.raises(RuntimeError, match="after shutdown"):
        writer.write(dump.path_of(tmp_path, 1), make_buffer(1), 1.0)


def test_traces_that_cannot_be_written_are_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = dump.traces_path_of(tmp_path, 3)
    no_room(path)
    with dump.Writer() as writer:
        writer.write_traces(path, traces_of(2, 1))
        writer.write_traces(dump.traces_path_of(tmp_path, 4), traces_of(2, 1))
        writer.check()
    error = capfd.readouterr().err
    assert error.startswith(f"warning: {path} cannot be written") and error.count("\n") == 1
    rows = dump.read_rows(dump.traces_path_of(tmp_path, 4), dump.TRACE_COLUMNS)
    assert [row["group"] for row in rows] == [1, 2]


@pytest.mark.parametrize("most", [1, 8, 9, 24, 25, 2**30])
def test_a_dump_of_more_numbers_than_an_offset_counts_is_cut(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump, "MOST", most)
    path, buffer = dump.path_of(tmp_path, 0), make_buffer(7, 3, 5)
    with dump.Writer() as writer:
        writer.write(path, buffer, 1.0)
    file = pq.ParquetFile(path)
    rows = [file.read_row_group(i)["tokens"].to_pylist() for i in range(file.num_row_groups)]
    assert all(sum(map(len, row)) <= max(most + 5, 5) for row in rows)
    assert (len(rows) > 1) is (most <= 24)
    again = dump.read(path, 3)
    assert [s.tokens.tolist() for g in again.kept for s in g.samples] == [
        s.tokens.tolist() for g in buffer.kept for s in g.samples
    ]


def test_nothing_is_written_of_nothing(tmp_path: Path) -> None:
    with dump.Writer() as writer:
        writer.write(dump.path_of(tmp_path, 0), make_buffer(1), 0.0)
        writer.write_traces(dump.traces_path_of(tmp_path, 0), [])
    dump.write_groups(tmp_path / "carried.parquet", [])
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_is_what_was_written_without_a_copy_of_each_sample(tmp_path: Path) -> None:
    buffer = make_buffer(7, 3)
    buffer.kept[0].samples[1].loss_mask[1] = False
    buffer.kept[1].samples[0].versions = ((4, 0, 2), (5, 2, 5))
    with dump.Writer() as writer:
        writer.write(dump.path_of(tmp_path, 0), buffer, 1.0)
    again = dump.read(dump.path_of(tmp_path, 0), 2)
    assert [group.id for group in again.kept] == [7, 3]
    for group, expected in zip(again.kept, buffer.kept, strict=True):
        assert np.array_equal(group.prompt.tokens, expected.prompt.tokens)
        assert (group.prompt.index, group.prompt.answer) == (expected.prompt.index, expected.prompt.answer)
        for sample, wanted in zip(group.samples, expected.samples, strict=True):
            for name in dump.columns_of(type(sample)):
                found, value = getattr(sample, name), getattr(wanted, name)
                assert np.array_equal(found, value) and type(found) is type(value), name
                assert not isinstance(found, np.ndarray) or found.dtype == value.dtype
    first, second = again.kept[0].samples
    assert first.tokens.base is not None and np.shares_memory(
        first.tokens.base, second.tokens.base if second.tokens.base is not None else second.tokens
    )


def test_routes_are_in_the_dumps_of_samples_that_have_them(tmp_path: Path) -> None:
    """Also in one dump with samples that have none; and older dumps are as they were."""
    buffer, rng = make_buffer(7, 3), np.random.default_rng(0)
    for number, sample in enumerate(buffer.kept[0].samples):
        fed = len(buffer.kept[0].prompt.tokens) + sample.length - 1
        sample.routes = rng.integers(0, 200 + 400 * number, (fed, 6)).astype([np.uint8, np.int16][number])
    with dump.Writer() as writer:
        writer.write(dump.path_of(tmp_path, 0), buffer, 1.0)
        writer.write(dump.path_of(tmp_path, 1), make_buffer(7), 1.0)
    dump.write_groups(tmp_path / "carried.parquet", buffer.kept)
    again = dump.read(dump.path_of(tmp_path, 0), 2).kept
    carried = dump.read_groups(tmp_path / "carried.parquet")
    for group in (again[0], carried[0]):
        for sample, wanted in zip(group.samples, buffer.kept[0].samples, strict=True):
            assert np.array_equal(sample.routes, wanted.routes)
    assert all(sample.routes is None for sample in again[1].samples)
    assert "routes" in pq.read_schema(dump.path_of(tmp_path, 0)).names
    assert "routes" not in pq.read_schema(dump.path_of(tmp_path, 1)).names
    assert dump.read(dump.path_of(tmp_path, 1), 2).kept[0].samples[0].routes is None


def test_replay_decodes_a_part_at_a_time_and_keeps_nothing_else(tmp_path: Path) -> None:
    """Of one group of rows, as all dumps are that have fewer than 2^30 tokens."""
    rng, buffer = np.random.default_rng(0), Buffer(8, is_dynamic=True)
    for id in range(8):
        group = make_group([1, 0] * 8, [8_000] * 16, id=id)
        for sample in group.samples:
            sample.tokens[:] = rng.integers(0, 150_000, sample.length)
        buffer.offer(group)
    path = dump.path_of(tmp_path, 0)
    with dump.Writer() as writer:
        writer.write(path, buffer, 1.0)
    assert pq.ParquetFile(path).num_row_groups == 1

    usual, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        again = dump.read(path, 8)
    finally:
        pa.set_memory_pool(usual)
    samples = [sample for group in again.kept for sample in group.samples]
    held, most = pool.bytes_allocated(), pool.max_memory()
    assert [len(group.samples) for group in again.kept] == [16] * 8
    assert all(
        np.array_equal(found.tokens, sample.tokens)
        for group, expected in zip(again.kept, buffer.kept, strict=True)
        for found, sample in zip(group.samples, expected.samples, strict=True)
    )
    num_bytes = sum(s.tokens.nbytes + s.behavior_logprobs.nbytes + s.loss_mask.nbytes for s in samples)
    del again, samples
    assert held == 0 and most < 0.8 * num_bytes


def test_groups_are_whole_wherever_the_rows_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, buffer = dump.path_of(tmp_path, 0), make_buffer(7, 3, 5)
    with dump.Writer() as writer:
        writer.write(path, buffer, 1.0)
    rows = dump.read_rows(path, dump.COLUMNS)
    for number in (1, 3, 4, 5):
        monkeypatch.setattr(dump, "ROWS", number)
        again = dump.read(path, 3)
        assert [(g.id, [s.tokens.tolist() for s in g.samples]) for g in again.kept] == [
            (g.id, [s.tokens.tolist() for s in g.samples]) for g in buffer.kept
        ]
        assert dump.read_rows(path, dump.COLUMNS) == rows
        assert dump.read_rows(path, dump.COLUMNS, [5, 7]) == [row for row in rows if row["group"] != 3]


def test_a_damaged_byte_of_a_page_or_of_its_header_is_found(tmp_path: Path) -> None:
    path = dump.path_of(tmp_path, 0)
    with dump.Writer() as writer:
        writer.write(path, make_buffer(7, 3), 1.0)
    file, content = pq.ParquetFile(path), path.read_bytes()
    columns = [file.metadata.row_group(0).column(i) for i in range(file.metadata.num_columns)]
    for column in columns:
        header = column.data_page_offset
        end = (column.dictionary_page_offset or header) + column.total_compressed_size
        # the page's kind: at one that Arrow does not know it takes the column to end
        for position in (header + 1, end - 1):
            damaged = bytearray(content)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ConfigError, match="is damaged, or no dump of rollouts"):
                dump.read(path, 2)
