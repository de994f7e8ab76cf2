"""Names of the table's tensors in Hugging Face files, which have several ways.

The language model of one that also sees pictures is below `model.language_model.`; some files have all of a
layer's experts in two tensors, gate and up in one. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dapo.model.families import FAMILIES
from dapo.model.shape import ModelShape

FUSED = re.compile(r"^(.+\.experts\.)(gate_up_proj|down_proj)(\.weight)?$")
NESTED = re.compile(r"^(model\.language_model|language_model\.model)\.")


@dataclass(frozen=True)
class Place:
    """A tensor's name in files; of a tensor with all experts, whose it is, and which of its rows."""

    name: str
    expert: int | None = None
    rows: tuple[int | None, int | None] = (None, None)

    @property
    def part(self) -> tuple[int | slice, ...]:
        """Index of the tensor in the one in files; (): it is the whole."""
        return () if self.expert is None else (self.expert, slice(*self.rows))


def places(found: Iterable[str], shape: ModelShape) -> tuple[dict[str, Place], dict[str, list[str]]]:
    """Return the place of each tensor by its name in the table; and, by what they belong to, the names of
    those in files that are no part of the language model.
    """
    family, ffn = FAMILIES[shape.model_type], shape.expert_ffn_size
    where: dict[str, Place] = {}
    aside: dict[str, list[str]] = {}
    for name in found:
        if owner := family.aside(shape, NESTED.sub("model.", name)):
            aside.setdefault(owner, []).append(name)
            continue
        plain = NESTED.sub("model.", name)
        if not (fused := FUSED.match(plain)):
            where[plain] = Place(name)
            continue
        halves: dict[str, tuple[int | None, int | None]] = {"down_proj": (None, None)}
        if fused[2] == "gate_up_proj":
            halves = {"gate_proj": (None, ffn), "up_proj": (ffn, None)}
        for expert in range(shape.num_experts):
            for half, rows in halves.items():
                where[f"{fused[1]}{expert}.{half}.weight"] = Place(name, expert, rows)
    return where, aside


def name_in_files(name: str, shape: ModelShape) -> str:
    """Return the name under which a tensor of the table is written."""
    prefix = FAMILIES[shape.model_type].prefix
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name
