"""A Hugging Face config.json → the model's sizes. What is not understood is refused by name. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dapo.config import ConfigError
from dapo.model.rope import Linear, RopeScaling, Yarn, parse_rope, without_which


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1). Every head has a key and a value of its
    own, made of one short vector for all of them; and one key, the rotated part, is the same for all.
    """

    query_rank: int  # length of the vector that queries are made of
    kv_rank: int
    value_dim: int  # of a head; queries and keys have head_dim


@dataclass(frozen=True)
class DeltaNet:
    """Gated DeltaNet (arXiv:2412.06464), in place of attention in all layers but each `period`-th."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    period: int

    @property
    def keys(self) -> int:
        """Number of columns of all heads' keys, and of their queries."""
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Number of columns of all heads' values, and of their output's gates."""
        return self.num_value_heads * self.value_dim


@dataclass(frozen=True)
class SigmoidRouter:
    """A router of sigmoids (arXiv:2412.19437, section 2.1.2). A bias, which is not learnt, is added where
    experts are chosen; only those of the best groups can be, by the sum of a group's two best.
    """

    num_groups: int
    groups_per_token: int
    scale: float  # factor of the experts' weights


class LayerKind(NamedTuple):
    """The parts of a layer that can be others than in another layer of the model."""

    is_delta: bool  # a DeltaNet is in the place of attention
    has_experts: bool  # they are in the place of an MLP


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
    num_dense_layers: int = 0  # the first layers of a model with experts, which have an MLP in their place
    shared_ffn_size: int = 0  # of the expert that all tokens go to; 0: there is none
    is_shared_gated: bool = False  # that expert's output is multiplied by the sigmoid of a gate
    sigmoid_router: SigmoidRouter | None = None  # None: the router is a softmax
    rotary_dim: int | None = None  # of a head's dimensions, those that are rotated; None: all
    is_gated: bool = False  # attention's output is multiplied by the sigmoid of a gate
    is_zero_centred: bool = False  # norms multiply by 1 + their weight, but for those in a DeltaNet
    latent: Latent | None = None
    delta: DeltaNet | None = None

    @property
    def num_rotated(self) -> int:
        """Number of a head's dimensions that are rotated."""
        return self.rotary_dim or self.head_dim

    @property
    def value_dim(self) -> int:
        """Number of dimensions of a head's values."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def are_layers_alike(self) -> bool:
        """True if all layers have the same tensors: a checkpoint then keeps all layers' in one."""
        return not self.delta and not self.num_dense_layers

    def is_delta(self, layer: int) -> bool:
        """True if a DeltaNet is in the place of this layer's attention."""
        return self.delta is not None and (layer + 1) % self.delta.period != 0

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer >= self.num_dense_layers

    def kinds(self, layers: Iterable[int] | None = None) -> Counter[LayerKind]:
        """Count the kinds of some layers, by default of all."""
        counted = range(self.num_layers) if layers is None else layers
        return Counter(LayerKind(self.is_delta(layer), self.has_experts(layer)) for layer in counted)

    def chunks(self, pipeline: int, stage: int, virtual: int = 1) -> list[range]:
        """Return the layers of each chunk of a pipeline stage; `virtual`: number of chunks on a stage."""
        count = pipeline * virtual
        size = self.num_layers // count
        return [range(i * size, (i + 1) * size) for i in range(stage, count, pipeline)]


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


def of_text(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the language model: those of text_config too, where the model also sees pictures.

    A field of text_config has priority, but for model_type.
    """
    text = raw.get("text_config")
    own = {name: value for name, value in raw.items() if name != "text_config"}
    return own | {**text, "model_type": raw.get("model_type")} if isinstance(text, dict) else dict(raw)


def kv_heads(raw: dict[str, Any]) -> int:
    """Number of KV heads that a config.json names: without such a field, of any architecture, one a head."""
    raw = of_text(raw)
    return int(raw.get("num_key_value_heads") or raw.get("num_attention_heads") or 1)


def max_tokens(directory: Path) -> int | None:
    """Number of tokens that the model has positions for, stretched ones too; None if config.json has none."""
    raw, path = of_text(read_config(directory)), directory / "config.json"
    if raw.get("max_position_embeddings") is None:
        return None
    positions: int = read_sizes(path, raw, {"max_position_embeddings": "positions"})["positions"]
    given = {name: value for name, value in raw.items() if value is not None}
    _, scaling = parse_rope(path, without_which(given))
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
