"""Faults planted into a run: mistakes that only a GPU would show. The run goes on; each must be found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from dapo.engine import broadcast
from dapo.mesh import Mesh
from dapo.policy import metrics, torch_dist
from dapo.policy.layers import PackedAttention
from dapo.policy.megatron import Policy
from dapo.policy.weights import Weights


@contextlib.contextmanager
def planted() -> Iterator[None]:
    """Plant all faults."""
    with contextlib.ExitStack() as stack:

        def wrap(owner: Any, name: str, fault: Callable[..., Any]) -> None:
            real = getattr(owner, name)
            stack.enter_context(
                mock.patch.object(owner, name, lambda *args, **kwargs: fault(real, *args, **kwargs))
            )

        wrap(PackedAttention, "forward", _attend_with_cpu_mask)
        wrap(metrics, "update_sums", _add_up_on_cpu)
        wrap(Weights, "broken", _read_by_numpy)
        wrap(Mesh, "max", _reduce_on_gpu)
        wrap(broadcast.Broadcast, "_broadcast", _broadcast_from_cpu)
        wrap(Policy, "place", _add_of_two_gpus)
        wrap(Policy, "backward", _add_in_any_order)
        wrap(broadcast.Broadcast, "_finish", _finish_and_ask)
        wrap(torch_dist._File, "write", _write_on_the_first_gpu)
        stack.enter_context(mock.patch.object(torch.cuda, "empty_cache", lambda: None))
        yield


def _attend_with_cpu_mask(real: Any, attention: Any, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    mask = torch.ones(len(query), dtype=torch.bool)
    query = query.masked_fill(~mask[:, None, None], 0)
    return real(attention, query, *args, **kwargs)  # type: ignore[no-any-return]


def _add_up_on_cpu(real: Any, *args: Any, **kwargs: Any) -> Any:
    if args:
        torch.zeros(()).add_(args[0].loss.detach())
    return real(*args, **kwargs)


def _read_by_numpy(real: Any, weights: Weights) -> Any:
    next(iter(weights.params.values())).detach().float().numpy()
    return real(weights)


def _reduce_on_gpu(real: Any, mesh: Mesh, value: float) -> Any:
    dist.all_reduce(torch.tensor([value], device=mesh.device), group=mesh.control)
    return real(mesh, value)


def _broadcast_from_cpu(real: Any, transport: Any, group: Any, data: Tensor) -> Any:
    return real(transport, group, data.cpu())


def _add_of_two_gpus(real: Any, policy: Policy, batch: Any) -> Any:
    placed = real(policy, batch)
    tensor = placed.minibatches[0][0].advantages
    tensor + tensor.to(torch.device("cuda", 7))
    return placed


def _add_in_any_order(real: Any, policy: Policy, minibatch: Any) -> Any:
    minibatch[0].advantages.cumsum(0)
    return real(policy, minibatch)


def _finish_and_ask(real: Any, transport: Any, group: Any) -> None:
    work = group.work.result()
    real(transport, group)
    with contextlib.suppress(NotImplementedError):
        work.is_success()


def _write_on_the_first_gpu(real: Any, *args: Any) -> Any:
    with mock.patch.object(torch.cuda, "set_device", lambda device: None):
        return real(*args)
