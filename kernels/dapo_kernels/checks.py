"""What the public functions accept. Everything else is refused before the first kernel or collective, by a
ValueError with the numbers.

Values are looked at too (targets, weights), on every device: that is the one wait for a GPU in a call, and
brings the mask along.
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


def check_tokens(
    tokens: Tokens, num_tokens: int, device: torch.device, vocab: int, required: tuple[str, ...] = LOSS_INPUTS
) -> Tensor:
    """Every per-token argument of [T] tokens whose targets are below `vocab`; `required`: what must be there
    beside targets and mask.

    Returns the mask, on the CPU.
    """
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
    return _check_values(tokens, vocab)


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
        raise ValueError(
            f"kl_coef is {objective.kl_coef} and ref_logprobs is None; expected the reference's log-probs"
        )


def check_vocabulary(
    name: str, columns: int, valid_vocab: int | None, temperature: float, tp_group: dist.ProcessGroup | None
) -> int:
    """The number of ids that targets may have; `name` is the argument that is sharded by `columns`."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
    if tp_group is not None and not isinstance(tp_group, dist.ProcessGroup):
        raise ValueError(
            f"tp_group is a {type(tp_group).__name__}; expected a process group this rank is in, or None"
        )
    ranks = 1 if tp_group is None else dist.get_world_size(tp_group)
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


def _check_values(tokens: Tokens, vocab: int) -> Tensor:
    """Targets and weights inside the mask. Returns the mask on the CPU: the verdict on each token travels
    with it.
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
        expected = f"0 to {vocab - 1}" if name == "targets" else "finite numbers ≥ 0"
        raise ValueError(
            f"{name} holds {getattr(tokens, name)[token].item()} inside the mask, at token {token}; expected "
            f"{expected}"
        )
    return mask


def _require_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; expected a tensor")


def _require_contiguous(name: str, x: Tensor) -> None:
    if not x.is_contiguous():
        raise ValueError(
            f"{name} has strides {list(x.stride())} for shape {list(x.shape)}; expected a contiguous tensor"
        )
