"""Names of the table's tensors in Hugging Face files, which have several ways.

The language model of one that also sees pictures is below `model.language_model.`; some files have all of a
layer's experts in two tensors, gate and up in one. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dapo.config import ConfigError
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

    Raises:
        ConfigError: two tensors have the same place.
    """
    family, ffn = FAMILIES[shape.model_type], shape.expert_ffn_size
    found = list(found)
    plain_names = {NESTED.sub("model.", name) for name in found}
    where: dict[str, Place] = {}
    aside: dict[str, list[str]] = {}
    for name in found:
        plain = NESTED.sub("model.", name)
        if owner := family.aside(shape, plain, plain_names):
            aside.setdefault(owner, []).append(name)
            continue
        if not (fused := FUSED.match(plain)):
            _put(where, plain, Place(name))
            continue
        halves: dict[str, tuple[int | None, int | None]] = {"down_proj": (None, None)}
        if fused[2] == "gate_up_proj":
            halves = {"gate_proj": (None, ffn), "up_proj": (ffn, None)}
        for expert in range(shape.num_experts):
            for half, rows in halves.items():
                _put(where, f"{fused[1]}{expert}.{half}.weight", Place(name, expert, rows))
    return where, aside


def _put(where: dict[str, Place], name: str, place: Place) -> None:
    """Raise ConfigError if another tensor has the same place."""
    if name in where:
        raise ConfigError(f"tensors {where[name].name} and {place.name} are the same one: remove one of them")
    where[name] = place


def name_in_files(name: str, shape: ModelShape) -> str:
    """Return the name under which a tensor of the table is written."""
    prefix = FAMILIES[shape.model_type].prefix
    return prefix + name.removeprefix("model.") if name.startswith("model.") else name
