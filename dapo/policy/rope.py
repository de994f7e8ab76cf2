"""Rotary embedding, also where config.json stretches it beyond the context that the model was first trained
on. d = head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dapo.model.shape import ModelShape


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Radians that each pair of a head's dimensions turns per position, float32 [d/2].

    Stretching leaves alone the pairs that turn often within the original context, slows those that hardly
    turn down by `factor`, and mixes
    between: llama3 by the number of turns, yarn along the dimensions (arXiv:2309.00071, section 3.2). linear
    slows all of them down.
    """
    plain: Tensor = 1.0 / shape.rope_theta ** (
        torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    )
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    unchanged = torch.zeros_like(plain)  # the share that is left alone
    if scaling["rope_type"] == "llama3":
        turns = plain * scaling["original_max_position_embeddings"] / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        unchanged = ((turns - low) / (high - low)).clamp(0, 1)
    if scaling["rope_type"] == "yarn":
        first, last = (_pair_that_turns(scaling[name], shape) for name in ("beta_fast", "beta_slow"))
        if scaling["truncate"]:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, shape.head_dim - 1)
        pairs = torch.arange(len(plain), dtype=torch.float32)
        unchanged = 1 - ((pairs - first) / (last - first or 1e-3)).clamp(0, 1)
    mixed: Tensor = unchanged * plain + (1 - unchanged) * plain / scaling["factor"]
    return mixed


def _pair_that_turns(times: float, shape: ModelShape) -> float:
    """Which pair of dimensions turns so many times within the original context; between two pairs as a
    rule.
    """
    assert shape.rope_scaling
    length = shape.rope_scaling["original_max_position_embeddings"]
    return shape.head_dim / 2 * math.log(length / (2 * math.pi * times)) / math.log(shape.rope_theta)


def softmax_scale(shape: ModelShape) -> float | None:
    """What attention scores are multiplied by; None for the usual 1/√d.

    yarn stretches queries and keys by an attention factor: Megatron's rotation knows it from `factor` alone,
    the scores take its square.
    """
    scaling = shape.rope_scaling
    if scaling is None or scaling["rope_type"] != "yarn":
        return None
    stretch = scaling["attention_factor"]
    if stretch is None:
        is_weighted = scaling["mscale"] and scaling["mscale_all_dim"]
        above, below = (scaling["mscale"], scaling["mscale_all_dim"]) if is_weighted else (1.0, 0.0)
        stretch = (0.1 * above * math.log(scaling["factor"]) + 1) / (
            0.1 * below * math.log(scaling["factor"]) + 1
        )
    return float(stretch**2 / math.sqrt(shape.head_dim))
