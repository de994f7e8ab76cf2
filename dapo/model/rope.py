"""Stretching of the rotary embedding beyond the context that the model was first trained on.

A field that is absent, or null, has Hugging Face's default. dapo/policy/rope.py computes the frequencies.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from dapo.config import ConfigError


@dataclass(frozen=True)
class Linear:
    rope_type: str = field(default="linear", init=False)
    factor: float


@dataclass(frozen=True)
class Llama3:
    rope_type: str = field(default="llama3", init=False)
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float


@dataclass(frozen=True)
class Yarn:
    rope_type: str = field(default="yarn", init=False)
    factor: float
    original_max_position_embeddings: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


RopeScaling = Linear | Llama3 | Yarn
ROPE_TYPES = {"default": None, "linear": Linear, "llama3": Llama3, "yarn": Yarn}


# which dimensions are rotated, not how far: a family reads them
WHICH = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")


def without_which(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json as parse_rope wants them: without WHICH among rope_parameters."""
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict):
        return raw
    return raw | {"rope_parameters": {key: value for key, value in rope.items() if key not in WHICH}}


def parse_rope(path: Path, raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return (rope_theta, how the embedding is stretched; None: not at all) from the fields `raw` of `path`.

    They are in `rope_parameters`; or, as older files have them, in `rope_scaling` beside `rope_theta`.

    Raises:
        ConfigError: a field is unknown, missing or out of range, or is given twice with two values.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    described, where = raw.get(name, {}), f"{path}: {name}"
    if name == "rope_scaling" and raw.get("rope_parameters", described) != described:
        both = f"rope_scaling={described!r}, but rope_parameters={raw['rope_parameters']!r}"
        raise ConfigError(f"{path}: {both}: remove the wrong one")  # Hugging Face would forget its rope_theta
    if not isinstance(described, dict):
        raise ConfigError(f"{where}={described!r}; expected a rope_type and its fields")
    # null means absent, but not for `truncate`
    given = {key: value for key, value in described.items() if value is not None or key == "truncate"}
    theta = given.pop("rope_theta", raw.get("rope_theta", 10_000.0))
    if raw.get("rope_theta", theta) != theta:
        both = f"rope_theta={raw['rope_theta']!r}, but {theta!r} in {name}"
        raise ConfigError(f"{path}: {both}: remove the wrong one")
    _check_value(where, "rope_theta", theta)
    return float(theta), _scaling(where, given)


def _scaling(where: str, given: dict[str, Any]) -> RopeScaling | None:
    """Check the fields of one kind of stretching; `where` begins the message of an error."""
    old_name = given.pop("type", "default")
    kind = given.pop("rope_type", old_name)
    if kind not in tuple(ROPE_TYPES):  # not hashed: it may be a list
        raise ConfigError(f"{where}: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    scaling = ROPE_TYPES[kind]
    known = {f.name: f.default for f in fields(scaling) if f.init} if scaling else {}
    for name in sorted(set(given) - set(known)):
        raise ConfigError(f"{where}: rope_type {kind} has no field {name!r}; known: {', '.join(known)}")
    for name, default in known.items():
        if name in given:
            _check_value(where, name, given[name])
        elif default is MISSING:
            raise ConfigError(f"{where}: rope_type {kind} wants the field {name!r}")
    if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        low = given["low_freq_factor"]
        raise ConfigError(f"{where}: low_freq_factor={low} is not below high_freq_factor")
    return scaling(**given) if scaling else None


def _check_value(where: str, name: str, value: Any) -> None:
    """Raise ConfigError if a field's value is of the wrong type or out of its range."""
    is_right, expected = type(value) in (int, float) and 0 < value < math.inf, "a number above 0"
    if name == "truncate":
        is_right, expected = type(value) is bool, "true or false"
    elif name == "factor":
        is_right, expected = is_right and value >= 1, "a number of at least 1"
    if not is_right:
        raise ConfigError(f"{where}: {name}={value!r}; expected {expected}")
