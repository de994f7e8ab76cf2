"""The rotary embedding: frequencies, the angles of a pack's tokens, and what stretching does to attention.

d = head size, T = packed tokens of a context rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dapo.model.rope import Llama3, Yarn
from dapo.model.shape import ModelShape


@dataclass
class Pack(PackedSeqParams):  # type: ignore[misc]
    """Megatron's description of a pack, with the position of each token in its own sequence."""

    positions: Tensor | None = None  # int64 [T]


def describe_pack(cu_seqlens: Tensor, longest: int, positions: Tensor, context: int, is_fused: bool) -> Pack:
    """Describe a pack of sequences, cu_seqlens int32 [S + 1] over all context ranks.

    Without the fused kernel Megatron rotates sequence after sequence, in Python: PackedRotary gives every
    token its angles, so for that the pack is one sequence. It is counted on the host, where nothing waits.
    """
    lengths: dict[str, Any] = dict(max_seqlen_q=longest, max_seqlen_kv=longest)
    if not is_fused:
        whole = torch.tensor([0, len(positions) * context], dtype=torch.int32)
        lengths |= dict(cu_seqlens_q_padded=whole, cu_seqlens_kv_padded=whole)
    return Pack("thd", cu_seqlens, cu_seqlens, **lengths, positions=positions)


class PackedRotary(torch.nn.Module):
    """Stands in for Megatron's rotary embedding, and gives each token of a pack its angles."""

    def __init__(self, frequencies: Tensor, rank: int, context: int):
        """`frequencies`: inverse_frequencies; `rank` of `context` ranks."""
        super().__init__()
        self.frequencies, self.rank, self.context = frequencies, rank, context

    def get_rotary_seq_len(self, inference: Any, decoder: Any, hidden: Any, config: Any, pack: Pack) -> Any:
        """Return what Megatron hands to `forward`: the positions, int64 [T], in place of a length."""
        return pack.positions

    def forward(self, positions: Tensor, packed_seq: bool, cp_group: Any) -> Tensor:
        """Return angles, float32 [context · T, 1, 1, d].

        Megatron takes this rank's two halves out of them, as of one sequence; the rest is not read.
        """
        self.frequencies = self.frequencies.to(positions.device)
        angles = torch.outer(positions.float(), self.frequencies).repeat(1, 2)[:, None, None]
        if self.context == 1:
            return angles
        first, second = angles.chunk(2)
        parts = [torch.zeros_like(first)] * (2 * self.context)
        parts[self.rank], parts[-1 - self.rank] = first, second
        return torch.cat(parts)


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Return the radians that each pair of a head's dimensions turns per position, float32 [d/2].

    Stretching keeps the pairs that turn often within the original context, slows those that hardly turn down
    by `factor`, and mixes both in between: llama3 by the number of turns, yarn along the dimensions
    (arXiv:2309.00071, section 3.2). linear slows all of them down.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    plain: Tensor = 1.0 / shape.rope_theta**exponents
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    kept = torch.zeros_like(plain)  # fraction of each pair's plain frequency
    if isinstance(scaling, Llama3):
        turns = plain * scaling.original_max_position_embeddings / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    if isinstance(scaling, Yarn):
        first = _pair_that_turns(scaling.beta_fast, scaling, shape)
        last = _pair_that_turns(scaling.beta_slow, scaling, shape)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, shape.head_dim - 1)
        pairs = torch.arange(len(plain), dtype=torch.float32)
        kept = 1 - ((pairs - first) / (last - first or 1e-3)).clamp(0, 1)
    mixed: Tensor = kept * plain + (1 - kept) * plain / scaling.factor
    return mixed


def _pair_that_turns(times: float, scaling: Yarn, shape: ModelShape) -> float:
    """Return which pair turns `times` times within the original context; mostly between two pairs."""
    length = scaling.original_max_position_embeddings
    return shape.head_dim / 2 * math.log(length / (2 * math.pi * times)) / math.log(shape.rope_theta)


def softmax_scale(shape: ModelShape) -> float | None:
    """Return the factor of attention scores; None for the usual 1/√d.

    yarn multiplies queries and keys by an attention factor, so scores by its square. Megatron's own rotation
    computes that factor from `factor` alone.
    """
    scaling = shape.rope_scaling
    if not isinstance(scaling, Yarn):
        return None
    stretch = scaling.attention_factor
    if stretch is None:
        above, below = scaling.mscale, scaling.mscale_all_dim
        if not (above and below):
            above, below = 1.0, 0.0
        log = math.log(scaling.factor)
        stretch = (0.1 * above * log + 1) / (0.1 * below * log + 1)
    return float(stretch**2 / math.sqrt(shape.head_dim))
