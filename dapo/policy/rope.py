"""The rotary embedding: frequencies, the rotation of a pack's tokens, and what stretching does to attention.

d = head size, r = those of its dimensions that are rotated, h = heads, T = packed tokens of a context rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dapo.model.rope import Llama3, Yarn
from dapo.model.shape import ModelShape


@dataclass
class Pack(PackedSeqParams):  # type: ignore[misc]
    """Megatron's description of a pack, with the position of each token in its own sequence."""

    positions: Tensor | None = None  # int64 [T]
    turns: tuple[Tensor, Tensor] | None = None  # each token's, [T, 1, r]: see `rotate`


def describe_pack(cu_seqlens: Tensor, longest: int, positions: Tensor) -> Pack:
    """Describe a pack of sequences, cu_seqlens int32 [S + 1] over all context ranks."""
    return Pack(
        "thd", cu_seqlens, cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest, positions=positions
    )


class PackedRotary(torch.nn.Module):
    """Stands in for Megatron's rotary embedding, and gives a pack its turns: PackedAttention rotates at once
    what Megatron would rotate sequence after sequence, in Python.
    """

    def __init__(self, frequencies: Tensor, dtype: torch.dtype):
        """`frequencies`: inverse_frequencies; `dtype`: of queries and keys."""
        super().__init__()
        self.frequencies, self.dtype = frequencies, dtype

    def get_rotary_seq_len(
        self, inference: object, decoder: object, hidden: object, config: object, pack: Pack
    ) -> Pack:
        """Return what Megatron hands to `forward`: the pack, in place of a length."""
        return pack

    def forward(self, pack: Pack, packed_seq: bool, cp_group: object) -> None:
        """Set pack.turns. Return nothing for Megatron to rotate by."""
        assert pack.positions is not None
        self.frequencies = self.frequencies.to(pack.positions.device)
        angles = torch.outer(pack.positions.float(), self.frequencies)  # [T, r/2]
        cos, sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        pack.turns = torch.cat((cos, cos), dim=1)[:, None], torch.cat((-sin, sin), dim=1)[:, None]


def rotate(x: Tensor, pack: Pack) -> Tensor:
    """Rotate each token's heads by its angles: x [T, h, d], of which the first r dimensions turn, or all.

    Pair i is (x[…, i], x[…, i + r/2]).
    """
    assert pack.turns is not None
    cos, sin = pack.turns
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Return the radians that each pair of a head's dimensions turns per position, float32 [r/2].

    Stretching keeps the pairs that turn often within the original context, slows those that hardly turn down
    by `factor`, and mixes both in between: llama3 by the number of turns, yarn along the dimensions
    (arXiv:2309.00071, section 3.2). linear slows all of them down.
    """
    exponents = torch.arange(0, shape.num_rotated, 2, dtype=torch.float32) / shape.num_rotated
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
        first, last = max(first, 0), min(last, shape.num_rotated - 1)
        pairs = torch.arange(len(plain), dtype=torch.float32)
        kept = 1 - ((pairs - first) / (last - first or 1e-3)).clamp(0, 1)
    mixed: Tensor = kept * plain + (1 - kept) * plain / scaling.factor
    return mixed


def _pair_that_turns(times: float, scaling: Yarn, shape: ModelShape) -> float:
    """Return which pair turns `times` times within the original context; mostly between two pairs."""
    length = scaling.original_max_position_embeddings
    return shape.num_rotated / 2 * math.log(length / (2 * math.pi * times)) / math.log(shape.rope_theta)


def softmax_scale(shape: ModelShape) -> float | None:
    """Return the factor of attention scores; None for the usual 1/√d.

    yarn multiplies queries and keys by an attention factor, so scores by its square. Megatron's own rotation
    computes that factor from `factor` alone. For latent attention Megatron makes the factor of its fields.
    """
    scaling = shape.rope_scaling
    if not isinstance(scaling, Yarn) or shape.latent:
        return None
    stretch = scaling.attention_factor
    if stretch is None:
        above, below = scaling.mscale, scaling.mscale_all_dim
        if not (above and below):
            above, below = 1.0, 0.0
        log = math.log(scaling.factor)
        stretch = (0.1 * above * log + 1) / (0.1 * below * log + 1)
    return float(stretch**2 / math.sqrt(shape.head_dim))
