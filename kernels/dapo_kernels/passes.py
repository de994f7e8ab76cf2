"""The order of the computation: statistics of each row, one gather over the vocabulary's ranks, then loss and
gradient. Two modules implement `Kernels`: `logits_triton` and its twin `logits_torch`.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels.rows import Objective, Rows, Shard, Tokens


class Kernels(Protocol):
    def row_statistics(self, logits: Tensor, tokens: Tokens, shard: Shard) -> Tensor:
        """Return [4, T] of this shard: peak m = max z, Σ e, Σ e·(z − m)/temperature, and the target's logit,
        with e = exp((z − m)/temperature).

        The last is −inf where the target lies on another rank. Rows outside the mask are (0, 1, 0, 0).
        """

    def loss_and_gradient(
        self, logits: Tensor, statistics: Tensor, tokens: Tokens,
        shard: Shard, objective: Objective | None, gradient: Tensor | None,
    ) -> Rows:  # fmt: skip
        """Compute every row from all ranks' statistics [tp, 4, T]. No objective: log-probs and entropy only.

        gradient: [T, V/tp], receives the gradient of Σ losses by the logits; may be `logits` itself.
        """

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """Multiply the gradient by the scalar `factor`, without waiting for the device to know its value."""


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """Return the Triton kernels where they can run: on a CUDA device, or on any under TRITON_INTERPRET=1;
    never in float64. Otherwise None.
    """
    runs_here = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    has_type = dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not runs_here or not has_type or find_spec("triton") is None:
        return None
    from dapo_kernels import logits_triton

    return logits_triton


def evaluate(
    kernels: Kernels, logits: Tensor, tokens: Tokens,
    shard: Shard, objective: Objective | None, gradient: Tensor | None,
) -> Rows:  # fmt: skip
    """Compute every row of logits [T, V/tp]. Collective over the group: one all-gather of [4, T]; the results
    are the same on all ranks.
    """
    statistics = kernels.row_statistics(logits, tokens, shard)
    if shard.group is None:
        gathered = statistics[None]
    else:
        gathered = statistics.new_empty(dist.get_world_size(shard.group), *statistics.shape)
        dist.all_gather_into_tensor(gathered.view(-1, statistics.shape[1]), statistics, group=shard.group)
    return kernels.loss_and_gradient(logits, gathered, tokens, shard, objective, gradient)
