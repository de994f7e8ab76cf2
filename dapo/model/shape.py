"""A Hugging Face config.json → the model's sizes. What is not understood is refused by name. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo.config import ConfigError
from dapo.model.rope import Linear, RopeScaling, Yarn, parse_rope


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes, in one vocabulary for all architectures. Checkpoints' manifests hold its fields."""

    model_type: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    is_tied: bool
    rope_scaling: RopeScaling | None = None  # None: the rotary embedding is not stretched
    num_experts: int = 0  # of each layer; 0: a dense model
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    is_expert_sum_one: bool = False  # the weights of a token's experts are scaled to sum to 1


def read_config(directory: Path, name: str = "config.json") -> dict[str, Any]:
    """Read a JSON file of a Hugging Face directory. Raise ConfigError if there is none or it is broken."""
    path = directory / name
    if not path.is_file():
        expected = "expected a Hugging Face model directory"
        raise ConfigError(f"policy.model={directory}: no {name} there; {expected}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: no JSON object; expected a Hugging Face model's fields and their values")
    return raw


def kv_heads(raw: dict[str, Any]) -> int:
    """Number of KV heads that a config.json names: without such a field, of any architecture, one a head."""
    return int(raw.get("num_key_value_heads") or raw.get("num_attention_heads") or 1)


def max_tokens(directory: Path) -> int | None:
    """Number of tokens that the model has positions for, stretched ones too; None if config.json has none."""
    raw, path = read_config(directory), directory / "config.json"
    if raw.get("max_position_embeddings") is None:
        return None
    positions: int = read_sizes(path, raw, {"max_position_embeddings": "positions"})["positions"]
    _, scaling = parse_rope(path, {name: value for name, value in raw.items() if value is not None})
    if isinstance(scaling, Linear):
        return int(positions * scaling.factor)
    if isinstance(
        scaling, Yarn
    ):  # some models' files have the stretched number of positions, others the first
        return max(positions, int(scaling.original_max_position_embeddings * scaling.factor))
    return positions


def read_sizes(path: Path, raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the named fields, by their names in ModelShape. Raise ConfigError unless they are sizes."""
    for name in names:
        if type(value := raw.get(name)) is not int or value < 1:
            raise ConfigError(f"{path}: {name}={value!r}; expected a whole number of at least 1")
    return {ours: raw[name] for name, ours in names.items()}
