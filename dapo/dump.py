"""Rollouts as parquet, one file a step: to look at, and to train from again (rollout.replay); and what the updates saw of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapo.buffer import Buffer
from dapo.config import ConfigError
from dapo.types import Group, Prompt, Sample

KINDS = ("kept", "all_correct", "all_wrong", "surplus")


@dataclass(frozen=True)
class Trace:
    """What the update that a sample took part in saw of its n response tokens. 0 and False where loss_mask is False."""

    group: int
    index: int
    old_logprobs: np.ndarray  # float32 [n], log π_θold, the policy's own
    logprobs: np.ndarray  # float32 [n], log π_θ when its minibatch came: the ratio's numerator
    clipped_low: np.ndarray  # bool [n], A < 0 and the ratio below 1 − clip_low: no gradient
    clipped_high: np.ndarray  # bool [n], A > 0 and the ratio above 1 + clip_high: no gradient


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06}.parquet"


def traces_path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06}.traces.parquet"


def chosen(groups: Sequence[Group], share: float) -> list[Group]:
    """About `share` of the groups, spread evenly: over asking order, which says nothing of what came out, and so over a step's updates."""
    count = round(share * len(groups))
    return [groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)]


def write(path: Path, buffer: Buffer, share: float) -> None:
    """One row a sample, of the chosen `share` of the groups of each kind. Appears whole or not at all."""
    _write(path, [_row(kind, group, s) for kind in KINDS for group in chosen(getattr(buffer, kind), share) for s in group.samples])


def write_traces(path: Path, traces: Iterable[Trace]) -> None:
    """One row a sample, by (group, index) as in the dump of the same step. Appears whole or not at all."""
    _write(path, [asdict(trace) for trace in sorted(traces, key=lambda trace: (trace.group, trace.index))])


def read(path: Path, capacity: int) -> Buffer:
    """The buffer that `write` was given, as far as it was written.

    Raises:
        ConfigError: no such file, or it is not a dump.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise ConfigError(f"rollout.replay: {path} does not exist; run fewer steps, or dump more") from None
    except pa.ArrowInvalid as error:
        raise ConfigError(f"rollout.replay: {path} is not parquet, or cut short: {error}") from None
    buffer = Buffer(capacity, is_dynamic=True)
    groups: dict[int, Group] = {}
    for row in rows:
        if row["group"] not in groups:
            prompt = Prompt(row["prompt_index"], np.array(row["prompt_tokens"], np.int32), row["answer"])
            groups[row["group"]] = Group(row["group"], prompt)
            getattr(buffer, row["kind"]).append(groups[row["group"]])
        groups[row["group"]].samples.append(_sample(row))
    return buffer


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(rows), partial, compression="zstd")
    partial.rename(path)


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
