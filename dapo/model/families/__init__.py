"""The architectures that are known, by the model_type of a Hugging Face config.json.

A family is one file here: what its config.json says, which fields Megatron is given, and how its tensors are
called. To add one: its file, its line below, and a row in the parity table (tests/distributed/cases.py). If
Megatron has other layers for it, their specification is in policy/layers.py.
"""

from __future__ import annotations

from pathlib import Path

from dapo.config import ConfigError
from dapo.model.families.deepseek_v3 import DEEPSEEK_V3
from dapo.model.families.family import Family
from dapo.model.families.glm4_moe_lite import GLM4_MOE_LITE
from dapo.model.families.llama import LLAMA
from dapo.model.families.mistral import MISTRAL
from dapo.model.families.qwen2 import QWEN2
from dapo.model.families.qwen3 import QWEN3
from dapo.model.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_5_TEXT
from dapo.model.families.qwen3_moe import QWEN3_MOE
from dapo.model.families.qwen3_next import QWEN3_NEXT
from dapo.model.shape import ModelShape, of_text, read_config

KNOWN = (
    QWEN2, QWEN3, QWEN3_MOE, QWEN3_NEXT, QWEN3_5, QWEN3_5_TEXT, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, LLAMA,
    MISTRAL, DEEPSEEK_V3, GLM4_MOE_LITE,
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.model_type: family for family in KNOWN}

__all__ = ["FAMILIES", "Family", "read_shape"]


def read_shape(directory: Path) -> ModelShape:
    """Read the model's sizes from the config.json of a Hugging Face directory.

    Raises:
        ConfigError: no config.json, an unknown architecture, a missing size, a field that is not understood.
    """
    raw, path = read_config(directory), directory / "config.json"
    family = FAMILIES.get(kind) if isinstance(kind := raw.get("model_type"), str) else None
    if family is None:
        raise ConfigError(f"{path}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    text = of_text(raw)
    inner, outer = text.get("tie_word_embeddings"), raw.get("tie_word_embeddings")
    if outer is not None and inner not in (None, outer):
        both = f"tie_word_embeddings={outer}, and {inner} in text_config"
        raise ConfigError(f"{path}: {both}: remove the wrong one")
    family.check(path, text)
    return ModelShape(**family.fields(path, text))
