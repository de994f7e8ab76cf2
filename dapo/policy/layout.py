"""The layout in Megatron's words: its process groups, and how pipeline stages that hold several chunks of
layers speak to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dapo.config import Parallel


def initialize_megatron(parallel: Parallel, **options: Any) -> None:
    """Megatron's process groups, in its default order tp-cp-ep-dp-pp; `options`: more of its arguments."""
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        **options,
    )


def interleaved(config: TransformerConfig, lengths: list[int]) -> dict[str, Any]:
    """The interleaved schedule's communicator, for microbatches of these lengths, and with it Megatron's own
    groups.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "embd", "pos_embd", "pp", "dp_cp"])
    return {"p2p_communicator": Turns(groups.pp, config, lengths), "pg_collection": groups}


class Turns(P2PCommunicator):  # type: ignore[misc]
    """Megatron's communicator among stages with several chunks, which knows the lengths of what it receives.

    Megatron would let a shape travel ahead of each tensor and wait for both directions. Two stages are each
    other's neighbours on both
    sides: shapes then meet in the wrong order, and ranks wait for each other. But all stages have the same
    microbatches, in a fixed order.
    """

    def __init__(self, group: dist.ProcessGroup, config: TransformerConfig, lengths: list[int]):
        super().__init__(group, config)
        self.lengths = lengths  # T/tp of each microbatch
        last = config.virtual_pipeline_model_parallel_size - 1
        # microbatch, chunk
        order = get_schedule_table(len(lengths), last + 1, config.microbatch_group_size_per_vp_stage)
        is_first, is_last = group.rank() == 0, group.rank() == group.size() - 1
        self.forward = iter([microbatch for microbatch, chunk in order if not (is_first and chunk == 0)])
        # chunks in reverse
        self.backward = iter([microbatch for microbatch, chunk in order if not (is_last and chunk == 0)])

    def _communicate_shapes(
        self,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int] | None, list[int] | None]:
        return self._next_shape(self.forward, recv_prev), self._next_shape(self.backward, recv_next)

    def _next_shape(self, order: Iterator[int], is_due: bool) -> list[int] | None:
        return [self.lengths[next(order)], 1, self.config.hidden_size] if is_due else None
