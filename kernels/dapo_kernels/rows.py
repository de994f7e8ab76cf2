"""The arguments of a loss, packed by what they describe, and the results for every row.

T = packed tokens, V = vocabulary, V/tp = this rank's shard of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from dapo_kernels.sequences import Sequences

Kind = Literal["dapo", "cispo", "gspo"]


@dataclass(frozen=True)
class Tokens:
    """The loss reads these arguments of every token, [T] each; log-probs alone need targets and mask.

    targets: int64, ids in the whole vocabulary.
    mask: bool, response tokens. Rows outside it may hold anything, NaN included.
    old_logprobs: log π_θold of the targets.
    advantages: Eq. 9.
    weights: ≥ 0, the normaliser and whatever else scales a token's loss. None: 1.
    """

    targets: Tensor
    mask: Tensor | None = None  # None: every row counts
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None
    penalty: Penalty | None = None
    sequences: Sequences | None = None  # read by gspo only

    def select(self, rows: Tensor) -> Tokens:
        """Return the given rows, all of which lie inside the mask: the result has no mask."""
        values = (self.old_logprobs, self.advantages, self.weights)
        old, advantages, weights = (None if x is None else x[rows] for x in values)
        penalty = self.penalty
        if penalty is not None:
            penalty = Penalty(penalty.kl_coef, penalty.ref_logprobs[rows])
        return Tokens(self.targets[rows], None, old, advantages, weights, penalty)


@dataclass(frozen=True)
class Penalty:
    """GRPO adds kl_coef · (e^d − d − 1) to every token's loss, d = ref − log π_θ; DAPO does not.

    kl_coef: β of GRPO, ≥ 0. Default: 0.
    ref_logprobs: [T], log π_ref of the targets. Default: no such term.
    """

    kl_coef: float
    ref_logprobs: Tensor


@dataclass(frozen=True)
class Objective:
    """A loss is of one kind, and has these constants.

    clip_low, clip_high: ε_low and ε_high, both required.
    dual_clip: of dapo: where A < 0, l_t is at most −dual_clip · A_t. None: no such bound.
    kind: dapo: Eq. 8; with clip_low = clip_high that of PPO and GRPO. cispo: −sg(clip(r_t)) · A_t · log π_θ,
        every token keeps its gradient (arXiv:2506.13585, Eq. 4 and 5). gspo: Eq. 8 with the ratio of whole
        sequences, exp of the mean of log r_t over a sequence (arXiv:2507.18071, Eq. 5 to 7). Default: dapo.
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    kind: Kind = "dapo"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Logits are read by these settings.

    temperature: logits are divided by it, as the sampler did. Default: 1.
    tp_group: the ranks that hold the vocabulary's shards, in order. The loss is then the same on all of them.
    valid_vocab: the vocabulary's true size where V is padded; padded columns have probability 0.
    """

    temperature: float = 1.0
    tp_group: dist.ProcessGroup | None = None
    valid_vocab: int | None = None

    def shard(self, columns: int) -> Shard:
        """Return the shard of a rank that holds `columns` columns, as every rank of the group does."""
        start = columns * (dist.get_rank(self.tp_group) if self.tp_group is not None else 0)
        valid = columns if self.valid_vocab is None else min(max(self.valid_vocab - start, 0), columns)
        return Shard(columns, start, valid, self.temperature, self.tp_group)


@dataclass(frozen=True)
class Shard:
    """One rank's columns of the vocabulary, and the temperature at which their logits are read."""

    columns: int  # V/tp, padding included
    start: int  # vocabulary id of the first column
    valid: int  # the columns from here on are padding and have probability 0
    temperature: float
    group: dist.ProcessGroup | None


@dataclass(frozen=True)
class Rows:
    """Results for every row, [T] each; 0 and False outside the mask. Without an objective the last three are
    empty.
    """

    logprobs: Tensor
    entropy: Tensor
    losses: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
