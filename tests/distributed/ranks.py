"""Prepares a rank that makes one policy after another, as the tests' scripts do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def prepare_rank() -> None:
    """Compute with one thread, and make one process group of the same ranks.

    Megatron makes some 25 groups for a policy, gloo keeps threads for each, and neither is freed: backward
    hooks keep a policy for ever.
    """
    torch.set_num_threads(1)
    make, made = dist.new_group, dict[tuple[tuple[int, ...], Any], Any]()

    def shared(
        ranks: list[int] | None = None, timeout: Any = None, backend: Any = None, **options: Any
    ) -> Any:
        key = tuple(ranks or ()), backend
        if key not in made:
            made[key] = make(ranks, timeout, backend, **options)
        return made[key]

    dist.new_group = shared
