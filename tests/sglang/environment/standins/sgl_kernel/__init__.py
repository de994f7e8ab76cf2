"""SGLang's CPU kernels come without a wheel. SGLang imports them by name; text models call one of them,
written here in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch


def assign_req_to_token_pool_cpu(
    rows: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    slots: torch.Tensor,
    row_length: int | None = None,
) -> None:
    """table[row, start:end] ← the next end − start of the KV cache's `slots`, for every request's (row,
    start, end).
    """
    lengths = (ends - starts).tolist()
    for row, start, part in zip(
        rows.tolist(), starts.tolist(), slots[: sum(lengths)].split(lengths), strict=True
    ):
        table[row, start : start + len(part)] = part


class HostMemory:
    """CUDA's runtime, as far as it registers host memory: here nothing is to be done."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0


if not torch.cuda.is_available():  # SGLang registers the buffer of routed experts on every device
    torch.cuda.cudart = HostMemory


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def absent(*arguments: object, **options: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not among the stand-ins of this environment")

    return absent
