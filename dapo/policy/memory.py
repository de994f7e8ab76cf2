"""The GPU memory that only updates need, given back while servers generate on the same GPU.

Gradients are computed anew, so their buffers are freed. The optimizer's state waits in page-locked main
memory, which is kept for the next time. Parameters stay: weights are sent from them, again if servers die.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from dapo.config import ConfigError
from dapo.policy.optimizer_state import initialize, parts

ALIGNED = 512  # bytes: every tensor in main memory begins at a multiple
# what else a precision-aware optimizer may keep, 8-bit or scaled, stays where its scales are
MOVED = (torch.float32, torch.bfloat16)


class UpdateMemory:
    """Gradient buffers and optimizer state of a rank: `release` and `resume` change where they are, no value.

    Megatron's `offload_to_cpu` does not do: it copies through pageable memory, and views of parameters
    come back as copies.
    """

    def __init__(self, models: list[Any], optimizer: Any, device: torch.device):
        buffers = [buffer for model in models for buffer in (*model.buffers, *model.expert_parallel_buffers)]
        self._optimizer, self._device = optimizer, device
        self._grads = [buffer.grad_data.untyped_storage() for buffer in buffers]
        self._sizes = [grads.nbytes() for grads in self._grads]
        self._params = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
        self._host: Tensor | None = None
        self._moved: list[tuple[Tensor, Tensor]] = []  # (tensor, its place in main memory), while released
        self.is_released = False

    @torch.no_grad()
    def release(self) -> None:
        """Free the gradients, move the optimizer's state to main memory: a save reads it there.

        Raises:
            ConfigError: there is too little main memory.
        """
        if self.is_released:
            return
        self._optimizer.zero_grad()  # its gradients are views of the buffers
        tensors = self._state()
        starts = list(accumulate((-(-t.nbytes // ALIGNED) * ALIGNED for t in tensors), initial=0))
        if self._host is None:
            self._host = _page_locked(starts[-1], self._device)
        self._moved = []
        for tensor, start in zip(tensors, starts, strict=False):
            place = self._host[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            self._moved.append((tensor, place.copy_(tensor, non_blocking=True)))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for tensor, place in self._moved:
            tensor.data = place
        for grads in self._grads:
            grads.resize_(0)  # views of it stay views
        self.is_released = True

    @torch.no_grad()
    def resume(self) -> None:
        """Bring back what `release` moved. Gradients hold anything until they are set to 0."""
        if not self.is_released:
            return
        for tensor, place in self._moved:
            tensor.data = torch.empty_like(place, device=self._device).copy_(place, non_blocking=True)
        for grads, size in zip(self._grads, self._sizes, strict=True):
            grads.resize_(size)
        self._moved, self.is_released = [], False

    def _state(self) -> list[Tensor]:
        """Return main parameters and moments on the device, but for those that are views of the model's."""
        found: list[Any] = []
        for part in parts(self._optimizer):
            if isinstance(part.optimizer, HybridDeviceOptimizer):  # in main memory already
                continue
            initialize(part)  # so that the next update makes none
            found += [p for group in part.optimizer.param_groups for p in group["params"]]
            found += [value for state in part.optimizer.state.values() for value in state.values()]
        tensors = [t for t in found if type(t) in (Tensor, torch.nn.Parameter) and t.dtype in MOVED]
        return [
            t for t in tensors
            if t.device == self._device and t.untyped_storage().data_ptr() not in self._params
        ]  # fmt: skip


def _page_locked(size: int, device: torch.device) -> Tensor:
    """Return main memory that a GPU can copy to and from by itself."""
    try:
        host = torch.empty(size, dtype=torch.uint8)
        # torch's own way to lock pages rounds up to a power of 2
        lock = torch.cuda.cudart().cudaHostRegister if device.type == "cuda" and size else lambda *_: 0
        if code := int(lock(host.data_ptr(), size, 0)):
            raise RuntimeError(f"CUDA error {code}")
    except RuntimeError as error:
        wanted = f"{size / 2**30:.1f} GiB of page-locked main memory on each rank"
        purpose = "for the optimizer's state while servers generate on the trainer's GPUs"
        remedy = "take more data-parallel ranks, or give the servers GPUs of their own"
        raise ConfigError(f"{wanted}, {purpose}: {str(error).splitlines()[0]}: {remedy}") from error
    return host
