"""Batches of all ranks in one process, each made of a share that has travelled."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Any

import numpy as np

from dapo.config import Config
from dapo.learn import batch
from dapo.learn.batch import Batch, Share
from dapo.mesh import Mesh
from dapo.rollout.rollouts import Rollouts
from dapo.types import Group


def plan(
    groups: list[Group], config: Config, num_ranks: int, metrics: dict[str, float], version: int = 0
) -> list[Batch[np.ndarray]]:
    """The batch of every data-parallel rank and, within it, of every context rank."""
    return batches_of(batch.shares(groups, config, num_ranks, metrics, version), config)


def next_batches(rollouts: Rollouts, step: int) -> list[Batch[np.ndarray]]:
    return batches_of(rollouts.next_batch(step), rollouts.config)


def batches_of(shares: Iterable[Share], config: Config) -> list[Batch[np.ndarray]]:
    """As `plan`."""
    context = range(config.parallel.context)
    return [
        travelled(share).batch(config.parallel, context_rank) for share in shares for context_rank in context
    ]


def batch_of_rank(mesh: Mesh, *arguments: Any, **named: Any) -> Batch[np.ndarray]:
    """This rank's batch out of `plan`."""
    return plan(*arguments, **named)[mesh.data_rank * mesh.context + mesh.context_rank]


def travelled(share: Share) -> Share:
    return pickle.loads(pickle.dumps(share))  # type: ignore[no-any-return]
