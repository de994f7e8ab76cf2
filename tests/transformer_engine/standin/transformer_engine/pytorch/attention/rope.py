"""Stands in for the fused rotation of packed sequences."""

import torch
from torch import Tensor


def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, tensor_format: str = "sbhd", start_positions: None = None,
    interleaved: bool = False, fused: bool = False, cu_seqlens: Tensor | None = None,
    cp_size: int = 1, cp_rank: int = 0,
) -> Tensor:  # fmt: skip
    """t [T, h, d], freqs [longest, 1, 1, d] → [T, h, d]; each sequence from position 0."""
    assert (tensor_format, start_positions, interleaved, fused, cp_size, cp_rank) == (
        "thd",
        None,
        False,
        True,
        1,
        0,
    )
    assert cu_seqlens is not None
    positions = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])
    angles = freqs[positions, 0]  # [T, 1, d]
    first, second = t.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (t.float() * angles.cos() + turned * angles.sin()).to(t.dtype)
