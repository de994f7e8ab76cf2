"""An entry of a model's name table: names and shapes in Hugging Face's files, the name in Megatron. No torch.

`kind` says how Megatron shards and fuses a tensor:
  whole    the same on every tensor rank
  rows     split along dimension 0
  columns  split along dimension 1
  qkv      q, k, v interleaved by KV group, split along dimension 0
  pair     gate and up, each split along dimension 0, then stacked
Experts are split among expert ranks: each has whole ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

Kind = Literal["whole", "rows", "columns", "qkv", "pair"]
Dimensions = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the Hugging Face tensors in it.

    `megatron` is relative to its layer, and one name stands for all experts. `layer` and `expert` count over
    the whole model; None: outside the layers, of no expert.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Dimensions, ...]  # of Hugging Face's tensors
    kind: Kind
    layer: int | None = None
    stage: Literal["first", "last", "layer"] = "layer"  # pipeline stage
    expert: int | None = None

    @property
    def key(self) -> str:
        """Name of the tensor in a checkpoint, where one tensor holds all layers, and all their experts."""
        return self.megatron if self.layer is None else f"decoder.layers.{self.megatron}"

    @property
    def place(self) -> Dimensions:
        """Index of the tensor in that tensor, whose first dimensions count layers and experts."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)

    @property
    def is_split(self) -> bool:
        """True if tensor ranks split the tensor."""
        return self.kind != "whole" and self.expert is None

    @property
    def size(self) -> int:
        """Number of parameters, on all tensor ranks together, without padding."""
        return sum(map(prod, self.shapes))
