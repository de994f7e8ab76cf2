"""What the public functions accept. Everything is refused before the first launch or collective, by a ValueError with the numbers.

What can be read off a tensor's shape and type is always checked. Values (targets, weights) are checked on the CPU only: on a GPU that
would wait for the device. There a target outside the vocabulary has log-prob −inf, and a NaN weight gives a NaN loss.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels.rows import Objective, Tokens

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_matrix(name: str, x: Tensor, axes: str) -> None:
    _require_tensor(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} has shape {list(x.shape)}; expected {axes}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} is {x.dtype}; expected one of {', '.join(map(str, FLOATS))}")
    _require_contiguous(name, x)


LOSS_INPUTS = ("old_logprobs", "advantages")


def check_tokens(tokens: Tokens, num_tokens: int, device: torch.device, vocab: int, required: tuple[str, ...] = LOSS_INPUTS) -> None:
    """Every per-token argument of [T] tokens whose targets are below `vocab`; `required`: what must be there beside targets and mask."""
    for name in ("targets", "mask", *required, "weights", "ref_logprobs"):
        x = getattr(tokens, name)
        if x is None and name in ("weights", "ref_logprobs"):
            continue
        _require_tensor(name, x)
        if x.shape != (num_tokens,):
            raise ValueError(f"{name} has shape {list(x.shape)}; expected [{num_tokens}], one for each token")
        if name in ("targets", "mask"):
            expected = torch.int64 if name == "targets" else torch.bool
            if x.dtype != expected:
                raise ValueError(f"{name} is {x.dtype}; expected {expected}")
        elif x.dtype not in FLOATS:
            raise ValueError(f"{name} is {x.dtype}; expected one of {', '.join(map(str, FLOATS))}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}; expected {device}, where the first argument is")
        _require_contiguous(name, x)
    if device.type == "cpu":
        _check_values(tokens, vocab)


def check_options(objective: Objective, has_reference: bool) -> None:
    if not 0 <= objective.clip_low <= 1:
        raise ValueError(f"clip_low is {objective.clip_low}; expected 0 to 1")
    if not 0 <= objective.clip_high < math.inf:
        raise ValueError(f"clip_high is {objective.clip_high}; expected a number ≥ 0")
    if objective.dual_clip is not None and not 1 < objective.dual_clip < math.inf:
        raise ValueError(f"dual_clip is {objective.dual_clip}; expected None or a number > 1")
    if not 0 <= objective.kl_coef < math.inf:
        raise ValueError(f"kl_coef is {objective.kl_coef}; expected a number ≥ 0")
    if objective.kl_coef and not has_reference:
        raise ValueError(f"kl_coef is {objective.kl_coef} and ref_logprobs is None; expected the reference's log-probs")


def check_vocabulary(name: str, columns: int, valid_vocab: int | None, temperature: float, tp_group: dist.ProcessGroup | None) -> int:
    """The number of ids that targets may have; `name` is the argument that is sharded by `columns`."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
    if tp_group is not None and not isinstance(tp_group, dist.ProcessGroup):
        raise ValueError(f"tp_group is a {type(tp_group).__name__}; expected a process group this rank is in, or None")
    ranks = 1 if tp_group is None else dist.get_world_size(tp_group)
    total = ranks * columns
    if columns == 0:
        raise ValueError(f"{name} holds 0 columns of the vocabulary; expected at least 1")
    if valid_vocab is None:
        return total
    if not 0 < valid_vocab <= total:
        raise ValueError(
            f"valid_vocab is {valid_vocab}, but {name} holds {columns} columns and tp_group {ranks} ranks; expected 1 to {total}"
        )
    return valid_vocab


def _check_values(tokens: Tokens, vocab: int) -> None:
    assert tokens.mask is not None
    targets = tokens.targets[tokens.mask]
    if targets.numel() and not (targets.min() >= 0 and targets.max() < vocab):
        wrong = targets[(targets < 0) | (targets >= vocab)]
        raise ValueError(f"targets holds {wrong[0].item()} inside the mask; expected 0 to {vocab - 1}")
    if tokens.weights is not None:
        weights = tokens.weights[tokens.mask]
        wrong = weights[~(weights >= 0)]  # NaN too
        if wrong.numel():
            raise ValueError(f"weights holds {wrong[0].item()} inside the mask; expected numbers ≥ 0")


def _require_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; expected a tensor")


def _require_contiguous(name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {list(x.stride())} for shape {list(x.shape)}; expected a contiguous tensor")
