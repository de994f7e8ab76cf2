"""What the loss is computed from, row by row, and what comes out.

T = packed tokens, V = vocabulary, V/tp = this rank's shard of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

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
        picked = {
            f.name: None if (x := getattr(self, f.name)) is None else x[rows]
            for f in fields(self)
            if f.name != "mask"
        }
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
    def of(
        cls, columns: int, valid_vocab: int | None, temperature: float, group: dist.ProcessGroup | None
    ) -> Shard:
        start = columns * (dist.get_rank(group) if group is not None else 0)
        valid = columns if valid_vocab is None else min(max(valid_vocab - start, 0), columns)
        return cls(columns, start, valid, temperature, group)


@dataclass(frozen=True)
class Rows:
    """What comes out for every row, [T] each; 0 and False outside the mask. Without an objective the last
    three are empty.
    """

    logprobs: Tensor
    entropy: Tensor
    losses: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
