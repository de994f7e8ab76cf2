"""Dumps are written beside the step, one at a time, and what fails is said by the next call."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

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


def test_the_step_goes_on_while_a_dump_is_written_and_the_next_one_waits(
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
        assert not first.exists(), "it is written aside"
        may_write.set()
        writer.write(second, make_buffer(2), 1.0)
        assert first.exists(), "one at a time"
        writer.wait()
        assert second.exists()
        writer.wait()
    assert order == [first.name, second.name]


def test_what_failed_is_raised_once_by_the_next_call(tmp_path: Path) -> None:
    first, second = (dump.path_of(tmp_path, step) for step in range(2))
    no_room(first)
    with dump.Writer() as writer:
        writer.write(first, make_buffer(1), 1.0)
        with pytest.raises(StorageError, match=r"step-000000\.parquet cannot be written"):
            writer.write(second, make_buffer(2), 1.0)
        assert list(tmp_path.iterdir()) == []
        writer.write(second, make_buffer(2), 1.0)
    assert [path.name for path in tmp_path.iterdir()] == [second.name]


def test_the_end_says_it_too_and_the_thread_has_ended(tmp_path: Path) -> None:
    no_room(dump.path_of(tmp_path, 0))
    writer = dump.Writer()
    writer.write(dump.path_of(tmp_path, 0), make_buffer(1), 1.0)
    with pytest.raises(StorageError, match=r"step-000000\.parquet cannot be written"):
        writer.close()
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
    error = capfd.readouterr().err
    assert error.startswith(f"warning: {path} cannot be written") and error.count("\n") == 1
    rows = dump.read_rows(dump.traces_path_of(tmp_path, 4), dump.TRACE_COLUMNS)
    assert [row["group"] for row in rows] == [1, 2]


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
