"""Megatron-LM's own checkpoints of a GPTModel (torch_dist): where they are, and what they say of the model.

A directory of them has iter_0000100/ or release/, and a file that names the newest. Tensors have the names of
dapo/model/names.py. Beside them lie the arguments of its command line, an object of any classes, of which no
code is run; and states of Transformer Engine's modules, which it wants to find even where they are empty.
"""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dapo.config import ConfigError
from dapo.model.entries import Dimensions, Entry
from dapo.model.families import FAMILIES
from dapo.model.rope import Linear, Llama3, Yarn
from dapo.model.shape import ModelShape
from dapo.policy.chunks import UNREADABLE, Damaged, Reader
from dapo.types import reason

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # weights alone: training starts with iteration 0, and no optimizer is looked for
EMPTY = torch.empty(0, dtype=torch.uint8)  # the state of a module of Transformer Engine without FP8
ATTENTION = "self_attention.core_attention"  # the only module of Transformer Engine without a tensor
NOT_OF_TRANSFORMER_ENGINE = ("embedding.word_embeddings", "output_layer", "mlp.router")


def find(directory: Path) -> Path | None:
    """Return the folder of the tensors: `directory` itself, or the one that its tracker names; None: neither.

    Raises:
        ConfigError: the tracker names none.
    """
    tracker = directory / TRACKER
    if (directory / ".metadata").is_file():
        return directory
    if not tracker.is_file():
        return None
    newest = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if newest != RELEASE and not (newest.isascii() and newest.isdigit()):
        raise ConfigError(f"{tracker}: {newest[:40]!r} is no iteration, nor {RELEASE!r}")
    return directory / (newest if newest == RELEASE else f"iter_{int(newest):07}")


def arguments(shape: ModelShape) -> dict[str, Any]:
    """Return Megatron-LM's arguments that say what a model computes, by the names of all its versions.

    A rotary embedding stretched in Yarn's way has more of them, which are left out.
    """
    if shape.latent or shape.delta:
        known = "Megatron-LM's own checkpoints are known of models with plain attention in all layers only"
        raise ConfigError(f"{shape.model_type}: {known}; Hugging Face's files and a run's checkpoints are")
    scaling, family = shape.rope_scaling, FAMILIES[shape.model_type]
    found: dict[str, Any] = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        group_query_attention=True,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        norm_epsilon=shape.norm_eps,
        layernorm_epsilon=shape.norm_eps,
        apply_layernorm_1p=False,
        layernorm_zero_centered_gamma=False,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=family.has_qkv_bias,
        qk_layernorm=family.has_qk_norm,
        position_embedding_type="yarn" if isinstance(scaling, Yarn) else "rope",
        rotary_base=shape.rope_theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=isinstance(scaling, Llama3),
        untie_embeddings_and_output_weights=not shape.is_tied,
    )
    if isinstance(scaling, Llama3):
        found["rope_scaling_factor"] = scaling.factor
    if isinstance(scaling, Linear):
        found["rotary_seq_len_interpolation_factor"] = scaling.factor
    if not shape.num_experts:
        return found | {"ffn_hidden_size": shape.ffn_size}
    return found | dict(
        num_experts=shape.num_experts,
        moe_ffn_hidden_size=shape.expert_ffn_size,
        moe_router_topk=shape.experts_per_token,
        moe_router_pre_softmax=not shape.is_expert_sum_one,
    )


def common_state(shape: ModelShape) -> dict[str, Any]:
    """Return what Megatron-LM reads beside the tensors. It asks for no optimizer and no random state."""
    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    others = {"ckpt_format": "torch_dist", "no_save_optim": True, "no_save_rng": True}
    args = argparse.Namespace(**arguments(shape), **layout, **others)
    return {"args": args, "checkpoint_version": 3.0, "iteration": 0}


def extra_states(entries: list[Entry], shape: ModelShape) -> Iterator[tuple[str, Dimensions, Dimensions]]:
    """Yield (name, index, counts) of the states that Transformer Engine's modules want: see Writer."""
    layers, count = range(shape.num_layers), (shape.num_layers,)
    found: set[tuple[str, Dimensions, Dimensions]] = {
        (f"decoder.layers.{ATTENTION}", (layer,), count) for layer in layers
    }
    for entry in entries:
        if entry.megatron.rpartition(".")[0] not in NOT_OF_TRANSFORMER_ENGINE:
            found.add((entry.key.rpartition(".")[0], entry.place, entry.counts(shape)))
    for name, place, counts in sorted(found):
        yield f"{name}._extra_state", place or (0,), counts or (1,)


def check_arguments(reader: Reader, shape: ModelShape) -> None:
    """Compare the arguments in a checkpoint, if it has any, with `shape`: tensors do not show rope and heads.

    Raises:
        ConfigError: they differ, and in which; or they cannot be read.
    """
    there = read_arguments(reader)
    if not there.get("group_query_attention", True):
        there |= {"group_query_attention": True, "num_query_groups": there.get("num_attention_heads")}
    here = arguments(shape)
    differ = [name for name in here if there.get(name) is not None and there[name] != here[name]]
    if differ:
        both = "; ".join(f"{name}={there[name]!r} there, {here[name]!r} here" for name in differ)
        raise ConfigError(f"{reader.directory} is a checkpoint of another model than config.json's: {both}")


def read_arguments(reader: Reader) -> dict[str, Any]:
    """Return the arguments of the command line that wrote a checkpoint; {}: it has none.

    Raises:
        Damaged: they cannot be read.
    """
    if (archive := reader.common_state()) is None:
        return {}
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as entries:
            [pickled] = [info for info in entries.infolist() if info.filename.endswith("/data.pkl")]
            state = _Unpickler(io.BytesIO(entries.read(pickled))).load()
        state = state[0] if isinstance(state, list) else state  # the one of all ranks
        found = state.get("args")
    except (*UNREADABLE, pickle.UnpicklingError, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{reader.directory}: what is no tensor cannot be read: {reason(error)}") from error
    return found.fields if isinstance(found, _Named) else {}


class _Named(dict[Any, Any]):
    """Stands for whatever class or function a pickle names, and for what it makes: it does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key
    fields: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> _Named:
        made = super().__new__(cls)
        made.fields = {}
        return made

    def __init__(self, *args: Any, **kwargs: Any): ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields = state

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    """Reads plain values; of others, what they hold. It imports nothing and calls nothing."""

    def find_class(self, module: str, name: str) -> type[_Named]:
        return _Named

    def persistent_load(self, id: Any) -> None:
        """Leave out a tensor's numbers."""
