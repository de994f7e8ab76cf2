"""Megatron's process groups for a run's layout."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state

from dapo.config import Parallel


def initialize_megatron(parallel: Parallel, **arguments: Any) -> None:
    """Make the process groups in Megatron's default order tp-cp-ep-dp-pp. `arguments`: more of Megatron's."""
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        **arguments,
    )
