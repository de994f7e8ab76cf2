"""What the loss is computed from, row by row, and the order of the computation: statistics, one gather, loss and gradient.

T = packed tokens, V = vocabulary, V/tp = this rank's shard of it. Two modules implement `Kernels`: `logits_triton` and its twin
`logits_torch`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The targets and, where there is a loss to compute, what else it needs of every row; all [T]."""

    targets: Tensor
    mask: Tensor | None = None  # None: every row counts
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None
    ref_logprobs: Tensor | None = None

    def select(self, rows: Tensor) -> Tokens:
        """The given rows only. They are the ones inside the mask, so the result has none."""
        picked = {f.name: None if (x := getattr(self, f.name)) is None else x[rows] for f in fields(self) if f.name != "mask"}
        return Tokens(**picked)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Objective:
    """The constants of the loss (Eq. 8), by the names `reference.policy_loss` gives them."""

    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    kl_coef: float = 0.0


@dataclass(frozen=True)
class Shard:
    """The part of the vocabulary that this rank's columns are, and the temperature the logits are read at."""

    columns: int  # V/tp, padding included
    start: int  # vocabulary id of the first column
    valid: int  # the columns from here on are padding and have probability 0
    temperature: float
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, columns: int, valid_vocab: int | None, temperature: float, group: dist.ProcessGroup | None) -> Shard:
        start = columns * (dist.get_rank(group) if group is not None else 0)
        valid = columns if valid_vocab is None else min(max(valid_vocab - start, 0), columns)
        return cls(columns, start, valid, temperature, group)


@dataclass(frozen=True)
class Rows:
    """What comes out for every row, [T] each; 0 and False outside the mask. Without an objective the last three are empty."""

    logprobs: Tensor
    entropy: Tensor
    losses: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


class Kernels(Protocol):
    def row_statistics(self, logits: Tensor, tokens: Tokens, shard: Shard) -> Tensor:
        """[4, T] of this shard: peak m = max z, Σ e, Σ e·(z − m)/temperature with e = exp((z − m)/temperature), and the target's logit.

        The last is −inf where the target lies on another rank. Rows outside the mask are (0, 1, 0, 0).
        """

    def loss_and_gradient(
        self, logits: Tensor, statistics: Tensor, tokens: Tokens, shard: Shard, objective: Objective | None, gradient: Tensor | None
    ) -> Rows:
        """Everything per row from all ranks' statistics [tp, 4, T]. No objective: log-probs and entropy only.

        gradient: [T, V/tp], receives the gradient of Σ losses by the logits; may be `logits` itself.
        """

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """gradient ← factor · gradient, without asking the device what the scalar `factor` is."""


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The Triton kernels where they can run: on a CUDA device, or on any under TRITON_INTERPRET=1; never in float64."""
    runs_here = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if not runs_here or dtype not in (torch.float32, torch.bfloat16, torch.float16) or find_spec("triton") is None:
        return None
    from dapo_kernels import logits_triton

    return logits_triton


def evaluate(
    kernels: Kernels, logits: Tensor, tokens: Tokens, shard: Shard, objective: Objective | None, gradient: Tensor | None = None
) -> Rows:
    """All of it for logits [T, V/tp]. Collective over the group: one all-gather of [4, T]; the results are the same on all ranks."""
    statistics = kernels.row_statistics(logits, tokens, shard)
    if shard.group is None:
        gathered = statistics[None]
    else:
        gathered = statistics.new_empty(dist.get_world_size(shard.group), *statistics.shape)
        dist.all_gather_into_tensor(gathered.view(-1, statistics.shape[1]), statistics, group=shard.group)
    return kernels.loss_and_gradient(logits, gathered, tokens, shard, objective, gradient)
