"""The keyword arguments that the losses share: their types, and `pack`. rows.py describes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import cleandoc
from typing import Any, Required, TypedDict, TypeVar

import torch.distributed as dist
from torch import Tensor

from dapo_kernels.rows import Kind, Objective, Penalty, Tokens
from dapo_kernels.sequences import Sequences

Function = TypeVar("Function", bound=Callable[..., object])


class VocabularyOptions(TypedDict, total=False):
    """Keywords of a `Vocabulary`."""

    temperature: float
    tp_group: dist.ProcessGroup | None
    valid_vocab: int | None


class HeadOptions(VocabularyOptions, total=False):
    """Keywords of a `Head`."""

    sequence_parallel: bool
    fp32_logits: bool
    chunk_bytes: int | None


class ObjectiveOptions(TypedDict, total=False):
    """Keywords of an `Objective`, and those of `Tokens` and `Penalty` that may be absent."""

    clip_low: Required[float]
    clip_high: Required[float]
    dual_clip: float | None
    kind: Kind
    cu_seqlens: Tensor | None
    cp_group: dist.ProcessGroup | None
    weights: Tensor | None
    ref_logprobs: Tensor | None
    kl_coef: float


class LossOptions(ObjectiveOptions, VocabularyOptions):
    """Keywords of a loss on logits."""


class LinearLossOptions(ObjectiveOptions, HeadOptions):
    """Keywords of a loss on hidden states."""


def pack(
    targets: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    options: Mapping[str, Any], allowed: type,
) -> tuple[Tokens, Objective, dict[str, Any]]:  # fmt: skip
    """Pack a loss's arguments, and return the options that are left: those of its `Vocabulary` or `Head`.

    Raises:
        TypeError: an option is not a keyword of `allowed`, or clip_low or clip_high is missing.
        ValueError: kl_coef is negative, or not 0 without ref_logprobs; or cp_group without cu_seqlens.
    """
    if unknown := [name for name in options if name not in allowed.__annotations__]:
        expected = ", ".join(sorted(allowed.__annotations__))
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}; expected some of {expected}")
    rest = dict(options)
    bounds = {name: rest.pop(name) for name in ("clip_low", "clip_high", "dual_clip", "kind") if name in rest}
    penalty = _penalty(rest.pop("kl_coef", 0.0), rest.pop("ref_logprobs", None))
    cu_seqlens, group = rest.pop("cu_seqlens", None), rest.pop("cp_group", None)
    if cu_seqlens is None and group is not None:
        raise ValueError("cp_group is given and cu_seqlens is None; expected where the sequences begin")
    sequences = None if cu_seqlens is None else Sequences(cu_seqlens, group)
    weights = rest.pop("weights", None)
    tokens = Tokens(targets, mask, old_logprobs, advantages, weights, penalty, sequences)
    return tokens, Objective(**bounds), rest


def explain(*packed: type) -> Callable[[Function], Function]:
    """Append the descriptions of packed arguments to a docstring, so that `help` names every argument."""

    def explained(function: Function) -> Function:
        function.__doc__ = "\n\n".join(cleandoc(x.__doc__ or "") for x in (function, *packed))
        return function

    return explained


def _penalty(kl_coef: float, ref_logprobs: Tensor | None) -> Penalty | None:
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"kl_coef is {kl_coef}; expected a number ≥ 0")
    if ref_logprobs is not None:
        return Penalty(kl_coef, ref_logprobs)
    if kl_coef:
        raise ValueError(f"kl_coef is {kl_coef} and ref_logprobs is None; expected the reference's log-probs")
    return None
