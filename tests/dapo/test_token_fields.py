"""A per-token field is declared once in each class that has it; everything else follows from that."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dapo import types
from dapo.config import ConfigError
from dapo.learn import traces
from dapo.learn.batch import Microbatch
from dapo.rollout import dump
from dapo.types import Sample, StorageError, per_token
from tests.conftest import make_config, make_group

RUNS = sorted((Path(__file__).parents[1] / "fixtures").glob("*/*/run"))


@dataclass(slots=True, kw_only=True)
class ToySample(Sample):
    toy: np.ndarray = field(metadata=per_token(np.float16))


@dataclass(kw_only=True)
class ToyMicrobatch(Microbatch):
    toy: Any = field(metadata=per_token(np.float16))


@dataclass(frozen=True, kw_only=True)
class ToyTrace(traces.Trace):
    toy: np.ndarray = field(metadata=per_token(np.float32))


def imported_anew(name: str) -> ModuleType:
    """Return another module of the same source: the others keep their own."""
    spec = importlib.util.find_spec(name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy_group() -> Any:
    """Return a group of two samples with a value for every token."""
    group = make_group([1, 0], [5, 3])
    for sample in group.samples:
        known = {name: getattr(sample, name) for name in Sample.__slots__}
        group.samples[sample.index] = ToySample(**known, toy=np.arange(sample.length, dtype=np.float16) + 1)
    return group


@pytest.mark.parametrize("context", [1, 2])
def test_a_new_field_of_a_sample_travels_to_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    from dapo.policy.schedule import on_device

    monkeypatch.setattr(types, "Sample", ToySample)
    batch = imported_anew("dapo.learn.batch")
    monkeypatch.setattr(batch, "Microbatch", ToyMicrobatch)
    group = toy_group()
    found = []
    config = make_config(tmp_path, f"parallel.context={context}")
    monkeypatch.setitem(sys.modules, "dapo.learn.batch", batch)  # for pickle
    [share] = batch.shares([group], config, 1, {})
    for rank in range(context):
        [[sent]] = pickle.loads(pickle.dumps(share)).batch(config.parallel, rank).minibatches
        placed = on_device(sent, torch.device("cpu"))
        assert placed.toy.dtype == torch.float16 and not placed.toy[~placed.loss_mask].any()
        found += placed.toy[placed.loss_mask].tolist()
    assert sorted(found) == sorted(value for sample in group.samples for value in sample.toy.tolist())


def test_a_new_field_of_a_sample_is_dumped_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(types, "Sample", ToySample)
    fresh = imported_anew("dapo.rollout.dump")
    group = toy_group()
    fresh.write_groups(tmp_path / "dump.parquet", [group])
    [again] = fresh.read_groups(tmp_path / "dump.parquet")
    for sample, expected in zip(again.samples, group.samples, strict=True):
        assert sample.toy.dtype == np.float16 and np.array_equal(sample.toy, expected.toy)
    assert list(fresh.COLUMNS) == [*dump.COLUMNS, "toy"]


def test_a_new_field_of_a_trace_is_recorded_and_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "Trace", ToyTrace)
    found: list[dict] = [{}, {}]
    whole = traces.Location(group=3, index=1, tokens=slice(4, 7), start=0, length=5)
    traces.record(found[0], [whole], {"toy": np.arange(10.0)})
    rest = replace(whole, tokens=slice(1, 3), start=3)
    traces.record(found[1], [rest], {"toy": np.arange(10.0), "clipped_low": np.arange(10.0) == 2})
    [trace] = traces.merged([*found[0].values(), *found[1].values()])
    assert trace.toy.tolist() == [4, 5, 6, 1, 2] and trace.toy.dtype == np.float32
    assert trace.clipped_low.tolist() == [False] * 4 + [True] and not trace.logprobs.any()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.parent.name)
def test_dumps_are_read_and_written_as_by_earlier_versions(run: Path, tmp_path: Path) -> None:
    """The same columns in the same order, of the same types, with the same values."""
    for path in sorted((run / "rollouts").glob("step-??????.parquet")):
        with dump.Writer() as writer:
            writer.write(tmp_path / path.name, dump.read(path, capacity=99), 1.0)
        old, new = pq.read_table(path), pq.read_table(tmp_path / path.name)
        assert new.schema.equals(old.schema, check_metadata=True) and new.equals(old)
        assert len(old)
    for path in sorted((run / "rollouts").glob("*.traces.parquet")):
        rows = dump.read_rows(path, dump.TRACE_COLUMNS)
        with dump.Writer() as writer:
            writer.write_traces(tmp_path / path.name, [traces.Trace(**row) for row in rows])
        old, new = pq.read_table(path), pq.read_table(tmp_path / path.name)
        assert new.schema.equals(old.schema, check_metadata=True) and new.equals(old) and len(rows)


def test_a_dump_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "carried.parquet").mkdir()  # so that it cannot be renamed
    with pytest.raises(StorageError, match=r"carried\.parquet cannot be written"):
        dump.write_groups(tmp_path / "carried.parquet", [make_group([1, 0])])
    assert [path.name for path in tmp_path.iterdir()] == ["carried.parquet"]


def test_a_dump_that_is_damaged_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "carried.parquet"
    path.write_bytes(b"PAR1\nand no more")
    with pytest.raises(ConfigError, match=r"^.*carried\.parquet is damaged, or no dump of rollouts: .+$"):
        dump.read_groups(path)
