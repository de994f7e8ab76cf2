"""A torch without CUDA that pretends to have GPUs, so that a whole run shows what would fail on one.

Data stay in main memory. A block on a tensor's storage says which GPU it lies on; views share it. Python is
given that GPU as the tensor's device (Calls). Below that, every operation is checked as CUDA would check it
(Operations): no tensors of two devices in one, no GPU's tensor in a group for control traffic, or in a thread
that has not chosen the GPU. What is wrong is reported, and computed all the same. gpu.py has the rest.

Not seen: races between streams, kernels, and what C++ itself asks for a device.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretend_cuda.report import REPORT

CPU = torch.device("cpu")
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_"}  # between any two devices
# take a CPU's scalar (a tensor without dimensions) with a GPU's tensors, as pointwise operations do
TAKE_SCALARS = {"aten::fill_", "aten::masked_fill", "aten::masked_fill_", "aten::where", "aten::lerp"}
# take their second argument, indices, from a CPU too
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


# of a floating-point tensor on a GPU torch has no deterministic form of them
IN_ANY_ORDER = {"aten::cumsum", "aten::cumsum_", "aten::histc", "aten::kthvalue", "aten::put_"}
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}


class Memory:
    """Counts this process's bytes on its GPU as torch's allocator would: what is freed stays reserved."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.largest = 0

    def add(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.reserved = max(self.reserved, self.allocated)
        self.largest = max(self.largest, self.allocated)

    def give_back(self) -> None:
        self.reserved = self.allocated


MEMORY = Memory()


class Block:
    """The memory on a GPU that a storage stands for; it lives as long as the storage."""

    def __init__(self, device: torch.device, num_bytes: int):
        self.device, self.num_bytes = device, num_bytes
        MEMORY.add(num_bytes)

    def __del__(self) -> None:
        MEMORY.add(-self.num_bytes)


class Thread(threading.local):
    """What is a thread's own."""

    gpu = 0  # that it has chosen: each begins with the first
    calls = 0  # of torch, from Python, that it is in
    is_in_backward = False


THREAD = Thread()


def device_of(tensor: Tensor) -> torch.device:
    with torch._C.DisableTorchFunction():
        block = getattr(tensor.untyped_storage(), "block", None)
    return block.device if block else CPU


def place(tensor: Tensor, device: torch.device) -> None:
    """Say where a new tensor's storage lies."""
    storage = tensor.untyped_storage()
    if device_of(tensor) != device:
        storage.block = Block(device, storage.nbytes()) if device.type == "cuda" else None


def whole(device: Any) -> torch.device:
    """Return a device as torch names it: a number, and "cuda" alone, is a GPU, the thread's own one."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    device = torch.device(device)
    return torch.device("cuda", THREAD.gpu) if device.type == "cuda" and device.index is None else device


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)


# --- every operation ---

REPLACED: dict[Any, Callable[..., Any]] = {}  # operations that a CPU lacks; gpu.py adds them


class Operations(TorchDispatchMode):
    """Checks every operation on a tensor of a GPU; what it makes lies on that GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            given = [*tensors_in(args), *tensors_in(kwargs)]
            gpu = next((device for device in map(device_of, given) if device.type == "cuda"), None)
            if func.namespace == "c10d":
                check_collective(func, args, given)
            if gpu is None:
                made = func(*args, **kwargs)
                if THREAD.is_in_backward and not THREAD.calls and not given:
                    # C++ makes zeros, say, where it saw a tensor: it was given the wrong device
                    for tensor in tensors_in(made):
                        place(tensor, whole("cuda"))
                return made
            REPORT.operations += 1
            if gpu.index != THREAD.gpu:
                REPORT.find("thread", f"{func} on {gpu} in a thread whose GPU is {THREAD.gpu}")
            check_order(func._schema.name, given[0])
            if func.namespace != "c10d" and func._schema.name not in COPIES:
                check_devices(func, args, kwargs, given, gpu)
            made = REPLACED.get(func, func)(*args, **kwargs)
            known = {tensor.untyped_storage()._cdata for tensor in given}
            for tensor in tensors_in(made):
                if tensor.untyped_storage()._cdata not in known:
                    place(tensor, gpu)
            return made


def check_devices(func: Any, args: Any, kwargs: Any, given: list[Tensor], gpu: torch.device) -> None:
    name = func._schema.name
    indices = {id(tensor) for tensor in tensors_in(args[1])} if name in INDEXED else set()
    takes_scalars = torch.Tag.pointwise in func.tags or name in TAKE_SCALARS | INDEXED
    for tensor in given:
        device = device_of(tensor)
        if device == gpu:
            continue
        is_scalar = tensor.dim() == 0 and takes_scalars and id(tensor) not in written(func, args, kwargs)
        if device == CPU and (is_scalar or id(tensor) in indices):
            continue
        shown = ", ".join(f"{str(t.dtype)[6:]} {list(t.shape)} on {device_of(t)}" for t in given)
        REPORT.find("devices", f"{name}: {shown}")
        return


def check_order(name: str, first: Tensor) -> None:
    """Find what torch refuses where deterministic algorithms are asked for."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    if name in IN_ANY_ORDER and first.is_floating_point():
        REPORT.find("order", name)
    if name in PRODUCTS and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        REPORT.find("order", f"{name} without CUBLAS_WORKSPACE_CONFIG")


def written(func: Any, args: Any, kwargs: Any) -> set[int]:
    """Return the ids of the tensors that an operation writes to."""
    positions, names = _written_arguments(func)
    values = [*(args[i] for i in positions if i < len(args)), *(kwargs.get(name) for name in names)]
    return {id(tensor) for value in values for tensor in tensors_in(value)}


@functools.cache
def _written_arguments(func: Any) -> tuple[list[int], list[str]]:
    arguments = func._schema.arguments
    found = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    return found, [arguments[i].name for i in found]


# --- process groups: all of them are gloo's ---

# name of a group → what was asked for: "gloo", "nccl", "cpu:gloo,cuda:nccl"; "" → that of the group of all
BACKENDS: dict[str, str] = {}


def check_collective(func: Any, args: Any, given: list[Tensor]) -> None:
    """Find a tensor that its group could not carry: NCCL carries GPUs' and no others."""
    given = [tensor for tensor in given if tensor.numel()]
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if "ProcessGroup" in str(argument.type) and given:
            backend = BACKENDS.get(dist.ProcessGroup.unbox(value).group_name, BACKENDS[""])
            devices = {device_of(tensor).type for tensor in given}
            missing = devices - {"gloo": {"cpu"}, "nccl": {"cuda"}}.get(backend, {"cpu", "cuda"})
            if missing or len(devices) > 1:
                REPORT.find("group", f"{func} of tensors on {sorted(devices)} in a group over {backend}")


# --- every call from Python ---


def move(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return _Move.apply(tensor, device, dtype)  # type: ignore[no-any-return]


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        ctx.device, ctx.dtype = device_of(tensor), tensor.dtype
        return copied(tensor, device, dtype or tensor.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return copied(grad, ctx.device, ctx.dtype), None, None


def copied(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        made = tensor.detach().to(dtype, copy=True)
    place(made, device)
    return made


def _device(tensor: Tensor) -> torch.device:
    device = device_of(tensor)
    return device if device.type == "cuda" else tensor.device  # that may be "meta"


def _to(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """Do what Tensor.to does: it takes a device, a type, both, or another tensor that has them."""
    for name in {"device", "other"} & kwargs.keys():
        args = (kwargs.pop(name), *args)
    if args and isinstance(args[0], Tensor):
        args = (_device(args[0]), args[0].dtype, *args[1:])
    elif args and type(args[0]) is int:
        args = (whole(args[0]), *args[1:])
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device = whole(device) if device else _device(tensor)
    if device != _device(tensor) and device.type in ("cpu", "cuda"):
        return move(tensor, device, dtype)
    options: dict[str, Any] = {} if device.type in ("cpu", "cuda") else {"device": device}
    options |= {"memory_format": memory_format} if memory_format else {}
    return tensor.to(dtype=dtype or tensor.dtype, copy=copy, **options)


def _type(tensor: Tensor, dtype: Any = None, **_: Any) -> Any:
    if dtype is None:
        return tensor.type().replace("torch.", "torch.cuda." if _device(tensor).type == "cuda" else "torch.")
    return tensor.type(dtype) if isinstance(dtype, torch.dtype) else dtype(tensor)


def _numpy(tensor: Tensor, *args: Any, force: bool = False, **_: Any) -> Any:
    if _device(tensor).type == "cuda" and not force:
        REPORT.find("host memory", f"numpy's view of a tensor on {_device(tensor)}")
    return tensor.detach().numpy() if force else tensor.numpy()


def _pin_memory(tensor: Tensor, *_: Any) -> Tensor:
    if _device(tensor).type == "cuda":
        REPORT.find("host memory", f"pin_memory of a tensor on {_device(tensor)}")
    return tensor.clone()


def _made_there(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function that makes tensors on a device."""
    device = whole(kwargs["device"])
    if device.type not in ("cpu", "cuda"):
        return func(*args, **kwargs)
    THREAD.calls += 1
    made = func(*args, **kwargs | {"device": CPU})
    THREAD.calls -= 1
    known = {tensor.untyped_storage()._cdata for tensor in [*tensors_in(args), *tensors_in(kwargs)]}
    if isinstance(made, Tensor) and made.untyped_storage()._cdata in known:  # as_tensor: another's data
        return made if device_of(made) == device else move(made, device)
    for tensor in tensors_in(made):
        place(tensor, device)
    return made


ANSWERS: dict[Any, Callable[..., Any]] = {  # calls that are not passed on to torch as they are
    Tensor.device.__get__: _device,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda tensor: _device(tensor).type == "cuda",  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda tensor: _device(tensor).type == "cpu",  # type: ignore[attr-defined]
    Tensor.get_device: lambda tensor: _device(tensor).index if _device(tensor).index is not None else -1,
    Tensor.to: _to,
    Tensor.cuda: lambda tensor, device=None, *_, **__: _to(tensor, "cuda" if device is None else device),
    Tensor.cpu: lambda tensor, *_, **__: _to(tensor, CPU),
    Tensor.type: _type,
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.pin_memory: _pin_memory,
    Tensor.is_pinned: lambda *_, **__: False,
    Tensor.record_stream: lambda *_: None,
}


class Calls(TorchFunctionMode):
    """Answers Python's questions for devices, and makes and moves tensors as if there were GPUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ANSWERS:
            return ANSWERS[func](*args, **kwargs)
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        if kwargs.get("device") is not None:
            return _made_there(func, args, kwargs)
        THREAD.calls += 1
        try:
            return func(*args, **kwargs)
        finally:
            THREAD.calls -= 1


def install() -> None:
    """Begin to pretend, in this thread and in every one that starts later; nothing ends it."""
    run_thread, run_backward = threading.Thread.run, torch.autograd._engine_run_backward

    def run(self: threading.Thread) -> None:
        with Calls(), Operations():
            run_thread(self)

    def backward(*args: Any, **kwargs: Any) -> Any:
        before = THREAD.calls, THREAD.is_in_backward
        THREAD.calls, THREAD.is_in_backward = 0, True
        # Tensor.backward is a call too, within which torch no longer asks
        with nullcontext() if torch._C._len_torch_function_stack() else Calls():
            try:
                return run_backward(*args, **kwargs)
            finally:
                THREAD.calls, THREAD.is_in_backward = before

    threading.Thread.run = run  # type: ignore[method-assign]
    torch.autograd._engine_run_backward = backward  # type: ignore[attr-defined]
    torch.autograd.set_multithreading_enabled(False)  # the engine's own threads do not pretend
    Calls().__enter__()
    Operations().__enter__()
