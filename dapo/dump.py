"""Rollouts as parquet, one file a step: to look at, and to train from again (rollout.replay)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dapo.buffer import Buffer
from dapo.config import ConfigError
from dapo.types import Group, Prompt, Sample

KINDS = ("kept", "all_correct", "all_wrong", "surplus")


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06}.parquet"


def write(path: Path, buffer: Buffer, share: float) -> None:
    """One row a sample, of the first `share` of the groups of each kind, in asking order. Appears whole or not at all."""
    kinds = {kind: getattr(buffer, kind) for kind in KINDS}
    _write(path, [(kind, group) for kind, groups in kinds.items() for group in groups[: round(share * len(groups))]])


def read(path: Path, capacity: int) -> Buffer:
    """The buffer that `write` was given, as far as it was written.

    Raises:
        ConfigError: no such file, or it is not a dump.
    """
    import pyarrow as pa

    try:
        groups = _read(path)
    except FileNotFoundError:
        raise ConfigError(f"rollout.replay: {path} does not exist; run fewer steps, or dump more") from None
    except pa.ArrowInvalid as error:
        raise ConfigError(f"rollout.replay: {path} is not parquet, or cut short: {error}") from None
    buffer = Buffer(capacity, is_dynamic=True)
    for kind, group in groups:
        getattr(buffer, kind).append(group)
    return buffer


def write_groups(path: Path, groups: list[Group]) -> None:
    """The groups that have samples, one row a sample; no file if none has."""
    _write(path, [("carried", group) for group in groups])


def read_groups(path: Path) -> list[Group]:
    """What `write_groups` was given, as far as it had samples."""
    return [group for _, group in _read(path)] if path.exists() else []


def _write(path: Path, groups: list[tuple[str, Group]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [_row(kind, group, sample) for kind, group in groups for sample in group.samples]
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")
    partial.rename(path)


def _read(path: Path) -> list[tuple[str, Group]]:
    """(kind, group), in the order in which they were written."""
    import pyarrow.parquet as pq

    groups: dict[int, tuple[str, Group]] = {}
    for row in pq.read_table(path).to_pylist():
        if row["group"] not in groups:
            prompt = Prompt(row["prompt_index"], np.array(row["prompt_tokens"], np.int32), row["answer"])
            groups[row["group"]] = row["kind"], Group(row["group"], prompt)
        groups[row["group"]][1].samples.append(_sample(row))
    return list(groups.values())


def _row(kind: str, group: Group, sample: Sample) -> dict[str, Any]:
    return {
        "kind": kind,
        "group": group.id,
        "index": sample.index,
        "prompt_index": group.prompt.index,
        "prompt_tokens": group.prompt.tokens,
        "answer": group.prompt.answer,
        "tokens": sample.tokens,
        "behavior_logprobs": sample.behavior_logprobs,
        "loss_mask": sample.loss_mask,
        "versions": [list(version) for version in sample.versions],
        "finish_reason": sample.finish_reason,
        "text": sample.text,
        "is_correct": sample.is_correct,
        "reward": sample.reward,
        "advantage": sample.advantage,
    }


def _sample(row: dict[str, Any]) -> Sample:
    return Sample(
        group=row["group"],
        index=row["index"],
        tokens=np.array(row["tokens"], np.int32),
        behavior_logprobs=np.array(row["behavior_logprobs"], np.float32),
        loss_mask=np.array(row["loss_mask"], bool),
        versions=tuple((version, start, end) for version, start, end in row["versions"]),
        finish_reason=row["finish_reason"],
        text=row["text"],
        is_correct=row["is_correct"],
        reward=row["reward"],
        advantage=row["advantage"],
    )
