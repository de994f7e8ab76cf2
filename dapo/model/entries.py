"""An entry of a model's name table: names and shapes in Hugging Face's files, the name in Megatron. No torch.

`kind` says how Megatron shards and fuses a tensor:
  whole      the same on every tensor rank
  rows       split along dimension 0
  columns    split along dimension 1
  sections   sections, each split along dimension 0, then stacked: gate and up
  qkv        q, k, v interleaved by KV group, split along dimension 0
  gated_qkv  the same with an output gate beside each query, as attention's q_proj has them head by head
  key_heads  sections whose rows Hugging Face interleaves by key head of a DeltaNet
Experts are split among expert ranks: each has whole ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from dapo.model.shape import ModelShape

Kind = Literal["whole", "rows", "columns", "sections", "qkv", "gated_qkv", "key_heads"]
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
    # rows of each section, on all tensor ranks together; (): each of Hugging Face's tensors is one
    sections: Dimensions = ()
    # in a checkpoint, where a section is a tensor of its own; (): they are one tensor
    section_names: tuple[str, ...] = ()
    is_buffer: bool = False  # nothing learns it; it is float32 whatever the model's dtype
    is_stacked: bool = True  # a checkpoint has one tensor for all layers: see ModelShape.are_layers_alike

    @property
    def key(self) -> str:
        """Name of the tensor in a checkpoint, where one tensor holds all experts of a layer, and all layers
        that are alike.
        """
        if self.layer is None:
            return self.megatron
        return f"decoder.layers.{'' if self.is_stacked else f'{self.layer}.'}{self.megatron}"

    @property
    def keys(self) -> dict[str, int]:
        """Names and numbers of rows of the tensors in a checkpoint, one for each section that has a name."""
        if not self.section_names:
            return {self.key: sum(rows for rows, *_ in self.shapes)}
        names = (f"{self.key}.{name}" for name in self.section_names)
        return dict(zip(names, self.sections, strict=True))

    @property
    def place(self) -> Dimensions:
        """Index of the tensor in that tensor, whose first dimensions count layers and experts."""
        return tuple(i for i in (self.layer if self.is_stacked else None, self.expert) if i is not None)

    def counts(self, shape: ModelShape) -> Dimensions:
        """Return that tensor's first dimensions."""
        layers = shape.num_layers if self.layer is not None and self.is_stacked else None
        experts = shape.num_experts if self.expert is not None else None
        return tuple(count for count in (layers, experts) if count is not None)

    @property
    def is_split(self) -> bool:
        """True if tensor ranks split the tensor."""
        return self.kind != "whole" and self.expert is None

    @property
    def size(self) -> int:
        """Number of parameters, on all tensor ranks together, without padding."""
        return sum(map(prod, self.shapes))

    @property
    def section_rows(self) -> Dimensions:
        """Numbers of rows of the sections, on all tensor ranks together."""
        return self.sections or tuple(rows for rows, *_ in self.shapes)
