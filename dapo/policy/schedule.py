"""Microbatches on their way: onto the device, and through the pipeline's stages by Megatron's schedule.

T = packed tokens of a microbatch on a context rank, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import repeat
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dapo.clock import heartbeat, timed
from dapo.learn.batch import Microbatch
from dapo.policy.replay import Routes
from dapo.policy.rope import describe_pack
from dapo.types import token_fields

R = TypeVar("R")
# that finalize_model_grads sums over
GROUPS = ("tp", "cp", "embd", "pos_embd", "pp", "dp_cp", "tp_dp_cp")


def on_device(microbatch: Microbatch[np.ndarray], device: torch.device) -> Microbatch[Tensor]:
    """Copy a microbatch's arrays onto the device."""
    names = [*token_fields(type(microbatch)), "cu_seqlens", "response_starts"]
    if microbatch.routes is not None:
        names.append("routes")
    arrays = {name: torch.from_numpy(getattr(microbatch, name)) for name in names}
    moved = {name: array.to(device, non_blocking=True) for name, array in arrays.items()}
    return replace(microbatch, **moved)  # type: ignore[arg-type, return-value]


def hidden_states(
    model: torch.nn.Module, config: TransformerConfig, microbatch: Microbatch[Tensor]
) -> Tensor:
    """Run a stage's model over a microbatch: [T, 1, H]."""
    packed = describe_pack(microbatch.cu_seqlens, microbatch.longest, microbatch.positions)
    # Megatron's 16-bit wrapper would widen the hidden states
    keep_dtype = {"fp32_output": False} if config.bf16 else {}
    tokens, positions = microbatch.tokens[None], microbatch.positions[None]
    return model(tokens, positions, None, packed_seq_params=packed, **keep_dtype)  # type: ignore[no-any-return]


def run(
    models: list[torch.nn.Module],
    config: TransformerConfig,
    microbatches: list[Microbatch[Tensor]],
    finish: Callable[[Microbatch[Tensor], Tensor], tuple[Tensor, R]],
    forward_only: bool,
    routes: Routes | None = None,
) -> list[R]:
    """Run Megatron's pipeline schedule over the microbatches.

    `finish` takes a microbatch and its hidden states [T, H]; it returns a loss to differentiate and a result.
    `routes`: those that are replayed.
    Returns the result of each microbatch on the last stage; elsewhere nothing.
    """

    def forward_step(
        data: Iterator[tuple[int, Microbatch[Tensor]]], model: torch.nn.Module
    ) -> tuple[Tensor, Any]:
        heartbeat()
        chunk, microbatch = next(data)

        def loss(hidden: Tensor) -> tuple[Tensor, Tensor, R]:
            total, result = finish(microbatch, hidden[:, 0])
            # the loss is a sum already: with 0 tokens Megatron divides it by nothing
            return total, torch.zeros((), dtype=torch.int, device=hidden.device), result

        with routes.forward(chunk, microbatch) if routes else nullcontext():
            return hidden_states(model, config, microbatch), loss

    lengths = [len(microbatch.tokens) for microbatch in microbatches]
    return get_forward_backward_func()(  # type: ignore[no-any-return]
        forward_step_func=forward_step,
        data_iterator=[zip(repeat(chunk), microbatches) for chunk in range(len(models))],
        model=models,
        num_microbatches=len(microbatches),
        seq_length=lengths[0],  # not used: lengths travel with the activations
        micro_batch_size=1,
        forward_only=forward_only,
        **(_interleaved(config, lengths) if len(models) > 1 else {}),
    )


def sum_grads(*args: Any, **kwargs: Any) -> None:
    """Do what Megatron does when all gradients of this rank are computed: sum them over ranks.

    The phase holds the wait for slower ranks, and nothing that this rank has still to compute.
    """
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    _finalize(*args, **kwargs)


_finalize = timed("reduce")(finalize_model_grads)


def _interleaved(config: TransformerConfig, lengths: list[int]) -> dict[str, Any]:
    """Return the interleaved schedule's communicator, and with it Megatron's own groups."""
    groups = ProcessGroupCollection.use_mpu_process_groups([*GROUPS])
    split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    communicator = InterleavedCommunicator(groups.pp, config, [length // split for length in lengths])
    return {"p2p_communicator": communicator, "pg_collection": groups}


class InterleavedCommunicator(P2PCommunicator):  # type: ignore[misc]
    """Megatron's communicator among stages with several chunks, which knows the lengths of what it receives.

    Megatron would send a shape ahead of each tensor and wait for both directions. Two stages are each other's
    neighbours on both sides: shapes then arrive in the wrong order, and ranks wait for each other. But all
    stages have the same microbatches, in a fixed order.
    """

    def __init__(self, group: dist.ProcessGroup, config: TransformerConfig, lengths: list[int]):
        super().__init__(group, config)
        self.lengths = lengths  # T/tp of each microbatch
        last = config.virtual_pipeline_model_parallel_size - 1
        # (microbatch, chunk), in the order of the forward passes; backward passes take the chunks in reverse
        order = get_schedule_table(len(lengths), last + 1, config.microbatch_group_size_per_vp_stage)
        is_first, is_last = group.rank() == 0, group.rank() == group.size() - 1
        self.forward = iter([microbatch for microbatch, chunk in order if not (is_first and chunk == 0)])
        self.backward = iter([microbatch for microbatch, chunk in order if not (is_last and chunk == 0)])

    def _communicate_shapes(
        self, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int] | None, list[int] | None]:
        return self._next_shape(self.forward, recv_prev), self._next_shape(self.backward, recv_next)

    def _next_shape(self, order: Iterator[int], is_due: bool) -> list[int] | None:
        return [self.lengths[next(order)], 1, self.config.hidden_size] if is_due else None
