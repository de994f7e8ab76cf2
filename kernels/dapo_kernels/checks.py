"""Checks of the public functions' arguments: a ValueError with the numbers comes before the first kernel or
collective.

The values of targets and weights are checked too, on every device: a call waits for a GPU once, for the
verdict and the mask; with cu_seqlens once more.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels.rows import Kind, Objective, Tokens, Vocabulary

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_matrix(name: str, x: Tensor, axes: str) -> None:
    """Raise ValueError unless `x` is a contiguous matrix of floats; `axes` names its shape."""
    _require_tensor(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected {axes}")
    _require_dtype(name, x, FLOATS)
    _require_contiguous(name, x)


def check_tokens(
    tokens: Tokens, num_tokens: int, device: torch.device, vocab: int, has_loss: bool = True
) -> Tensor:
    """Raise ValueError unless every tensor is [T] of `num_tokens` and targets are ids below `vocab`. Without
    a loss old log-probs and advantages may be absent.

    Returns the mask, on the CPU.
    """
    given: dict[str, Tensor | None] = {"targets": tokens.targets, "mask": tokens.mask}
    if has_loss:
        given |= {"old_logprobs": tokens.old_logprobs, "advantages": tokens.advantages}
    if tokens.weights is not None:
        given["weights"] = tokens.weights
    if tokens.penalty is not None:
        given["ref_logprobs"] = tokens.penalty.ref_logprobs
    dtypes = {"targets": (torch.int64,), "mask": (torch.bool,)}
    for name, x in given.items():
        x = _require_tensor(name, x)
        if x.shape != (num_tokens,):
            raise ValueError(f"{name} has shape {list(x.shape)}; expected [{num_tokens}], one for each token")
        _require_dtype(name, x, dtypes.get(name, FLOATS))
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}; expected {device}, where the first argument is")
        _require_contiguous(name, x)
    if tokens.sequences is not None:
        _check_cu_seqlens(tokens.sequences.cu_seqlens, num_tokens, device)
    return _check_values(tokens, vocab)


def check_objective(objective: Objective, tokens: Tokens) -> None:
    """Raise ValueError where a constant is out of its range, or the kind of loss does not fit the rest."""
    if objective.kind not in get_args(Kind):
        raise ValueError(f"kind is {objective.kind!r}; expected one of {', '.join(get_args(Kind))}")
    if objective.kind != "dapo" and objective.dual_clip is not None:
        raise ValueError(f"dual_clip is {objective.dual_clip} with kind {objective.kind!r}; expected None")
    if (tokens.sequences is not None) != (objective.kind == "gspo"):
        expected = "None" if tokens.sequences is not None else "where the sequences begin"
        raise ValueError(f"cu_seqlens does not fit kind {objective.kind!r}; expected {expected}")
    if not 0 <= objective.clip_low <= 1:
        raise ValueError(f"clip_low is {objective.clip_low}; expected 0 to 1")
    if not 0 <= objective.clip_high < math.inf:
        raise ValueError(f"clip_high is {objective.clip_high}; expected a number ≥ 0")
    if objective.dual_clip is not None and not 1 < objective.dual_clip < math.inf:
        raise ValueError(f"dual_clip is {objective.dual_clip}; expected None or a number > 1")


def check_vocabulary(name: str, columns: int, vocabulary: Vocabulary) -> int:
    """Return the number of ids that targets may have; the argument `name` holds a rank's `columns`.

    Raises:
        ValueError: a setting of the vocabulary is out of its range.
    """
    group, valid_vocab = vocabulary.tp_group, vocabulary.valid_vocab
    if not 0 < vocabulary.temperature < math.inf:
        raise ValueError(f"temperature is {vocabulary.temperature}; expected a number > 0")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"tp_group is a {type(group).__name__}; expected a process group this rank is in, or None"
        )
    ranks = 1 if group is None else dist.get_world_size(group)
    total = ranks * columns
    if columns == 0:
        raise ValueError(f"{name} holds 0 columns of the vocabulary; expected at least 1")
    if valid_vocab is None:
        return total
    if not 0 < valid_vocab <= total:
        raise ValueError(
            f"valid_vocab is {valid_vocab}, but {name} holds {columns} columns and tp_group {ranks} ranks; "
            f"expected 1 to {total}"
        )
    return valid_vocab


def _check_cu_seqlens(x: object, num_tokens: int, device: torch.device) -> None:
    """Raise ValueError unless the sequences make up all tokens. Waits for the device."""
    x = _require_tensor("cu_seqlens", x)
    _require_dtype("cu_seqlens", x, (torch.int32, torch.int64))
    if x.device != device or x.dim() != 1:
        raise ValueError(f"cu_seqlens is {list(x.shape)} on {x.device}; expected [sequences + 1] on {device}")
    bounds = x.tolist()
    if bounds != sorted(bounds) or bounds[:1] != [0] or bounds[-1] != num_tokens:
        shown = f"{bounds[:1]} … {bounds[-1:]}"
        raise ValueError(f"cu_seqlens is {shown}; expected numbers that rise from 0 to {num_tokens}")


def _check_values(tokens: Tokens, vocab: int) -> Tensor:
    """Check targets and weights inside the mask. Returns the mask on the CPU: one copy brings it together
    with the verdict on each token.
    """
    assert tokens.mask is not None
    is_wrong = {"targets": (tokens.targets < 0) | (tokens.targets >= vocab)}
    if tokens.weights is not None:
        is_wrong["weights"] = ~((tokens.weights >= 0) & (tokens.weights < math.inf))  # NaN too
    verdicts = torch.stack([tokens.mask, *is_wrong.values()]).cpu()
    mask, wrong = verdicts[0], verdicts[1:] & verdicts[0]
    if wrong.any():
        row, token = (int(i) for i in wrong.nonzero()[0])
        name = list(is_wrong)[row]
        value = getattr(tokens, name)[token].item()
        expected = f"0 to {vocab - 1}" if name == "targets" else "finite numbers ≥ 0"
        raise ValueError(f"{name} holds {value} inside the mask, at token {token}; expected {expected}")
    return mask


def _require_tensor(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; expected a tensor")
    return x


def _require_dtype(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        any_of = "one of " if len(dtypes) > 1 else ""
        raise ValueError(f"{name} is {x.dtype}; expected {any_of}{', '.join(map(str, dtypes))}")


def _require_contiguous(name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        strides, shape = list(x.stride()), list(x.shape)
        raise ValueError(f"{name} has strides {strides} for shape {shape}; expected a contiguous tensor")
