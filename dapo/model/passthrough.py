"""The one typed parse of policy.megatron. No torch.

Its fields go to Megatron as they are, but for those in refused.md, which are refused: something else decides
them, or they would make wrong numbers in silence.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from dapo.config import ConfigError

# FP8 recipes whose scales come from the tensor itself; a rank's tokens and a matrix's sides are multiples of
# the values that share a scale, or that a matrix product takes at a time
FP8_MULTIPLES = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}
# refused.md has rows `| why | fields |`
_TABLE = Path(__file__).with_name("refused.md").read_text(encoding="utf-8")
_ROWS = re.findall(r"^\| (.+) \| (`.+`) \|$", _TABLE, re.MULTILINE)
REFUSED = {name: reason for reason, names in _ROWS for name in re.findall(r"`(\w+)`", names)}


@dataclass(frozen=True, config=ConfigDict(strict=True))
class Passthrough:
    """The fields of policy.megatron: those that our code reads too, with their defaults, and all of them."""

    verbatim: dict[str, Any]  # every field as it was given, for Megatron
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: list[str] | None = None
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = 0.0
    use_precision_aware_optimizer: bool = False
    moe_token_dispatcher_type: str = "alltoall"
    moe_router_fusion: bool = False
    fp8: str | None = None
    fp8_recipe: str = "delayed"

    @classmethod
    def of(cls, given: dict[str, Any]) -> Passthrough:
        """Parse `config.policy.megatron`; null is Megatron's default.

        Raises:
            ConfigError: a field is not the user's to set, and what to use instead; or it is of a wrong type.
        """
        for name in given:
            if name in REFUSED:
                raise ConfigError(f"policy.megatron.{name} cannot be set: {REFUSED[name]}")
        read = {name: value for name, value in given.items() if name in READ and value is not None}
        try:
            return cls(given, **read)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise ConfigError(f"policy.megatron.{name}={given[name]!r}: {first['msg'].lower()}") from None

    @property
    def is_allgather(self) -> bool:
        """True if every rank gathers all ranks' tokens for its experts: all must have equally many."""
        return self.moe_token_dispatcher_type == "allgather"

    @property
    def token_multiple(self) -> int:
        """Multiple to which each tensor rank's tokens of a microbatch are padded."""
        return FP8_MULTIPLES[self.fp8_recipe] if self.fp8 else 1

    @property
    def recomputed_together(self) -> int:
        """Number of layers that are recomputed at a time; or, with the method block, of those recomputed."""
        return self.recompute_num_layers or 1

    def recomputes(self, what: str) -> bool:
        """True if the backward pass computes it again: "full" for whole layers, or a module such as "mlp"."""
        if self.recompute_granularity == "selective":
            return what in (self.recompute_modules or ["core_attn"])
        return what == self.recompute_granularity


READ = {field.name for field in fields(Passthrough)} - {"verbatim"}  # type: ignore[arg-type]
