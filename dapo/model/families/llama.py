"""Llama 3: the plain decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dapo.model.families.family import Family


class Llama(Family):
    def filled(self, raw: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        """See Family. Others have to say num_key_value_heads: Qwen's default of 32 fits hardly any model."""
        return {"num_key_value_heads": sizes["num_heads"]} | super().filled(raw, sizes)


LLAMA = Llama("llama")
