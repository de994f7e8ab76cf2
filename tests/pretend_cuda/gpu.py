"""What a torch without CUDA lacks: torch.cuda, NCCL, handles between processes, and a GPU's own operations.

Each stands in for the real one as far as a run uses it, and reports what the real one would refuse.
"""

from __future__ import annotations

import functools
import queue
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import reductions
from torch.nn.attention import varlen

from tests.pretend_cuda import pretence
from tests.pretend_cuda.pretence import BACKENDS, MEMORY, REPLACED, THREAD, device_of, whole
from tests.pretend_cuda.report import REPORT

NUM_GPUS, GIB = 8, 2**30
TYPES = {
    "FloatTensor": torch.float32,
    "DoubleTensor": torch.float64,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
    "ByteTensor": torch.uint8,
}


def install() -> None:
    """Put the stand-ins in their places, and begin to pretend. Megatron and dapo are imported after it."""
    for name in ("transformer_engine", "flash_mla"):  # kernels of their own: the plain layers run here
        sys.modules[name] = None  # type: ignore[assignment]
    _install_cuda()
    _install_groups()
    _install_operations()
    pretence.install()


# --- torch.cuda ---


class Null:
    """Stands in for streams, events and contexts: there is one stream, and everything on it is done."""

    def __init__(self, *_: Any, **__: Any): ...

    def __enter__(self) -> Null:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        answers = {"elapsed_time": 0.0, "query": True, "is_capturing": False}
        return lambda *_, **__: answers.get(name, Null())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Null)

    __hash__ = object.__hash__


class _Type(type):
    """The type of torch.cuda.FloatTensor and the like."""

    dtype: torch.dtype

    def __call__(cls, data: Any) -> Tensor:
        if isinstance(data, Tensor):
            return data.to("cuda", cls.dtype)
        make = torch.empty if isinstance(data, int) else torch.tensor  # a size, or values
        return make(data, dtype=cls.dtype, device="cuda")

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == cls.dtype and value.is_cuda


def _install_cuda() -> None:
    generators = tuple(torch.Generator() for _ in range(NUM_GPUS))
    real = torch.Generator

    class Generators(type):
        def __call__(cls, device: Any = "cpu") -> torch.Generator:
            return real()

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, real)

    def choose(device: Any) -> None:
        THREAD.gpu = whole(device).index

    def generator(device: Any = "cuda") -> torch.Generator:
        return generators[whole(device).index]

    def set_state(state: Tensor, device: Any = "cuda") -> None:
        generator(device).set_state(state)

    def empty_cache() -> None:
        time.sleep(0.02)  # gloo's threads hold what they sent a moment longer
        MEMORY.give_back()

    properties = SimpleNamespace(
        name="pretended GPU", major=9, minor=0, total_memory=80 * GIB, multi_processor_count=132, uuid="GPU-0"
    )
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call, **_: call(),
        "device_count": lambda: NUM_GPUS,
        "current_device": lambda: THREAD.gpu,
        "set_device": choose,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "device": Null,
        "Stream": Null,
        "Event": Null,
        "stream": Null,
        "set_stream": lambda *_: None,
        "current_stream": Null,
        "default_stream": Null,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *_, **__: None,
        "ipc_collect": lambda: None,
        "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0),
        "empty_cache": empty_cache,
        "memory_allocated": lambda *_: MEMORY.allocated,
        "memory_reserved": lambda *_: MEMORY.reserved,
        "max_memory_allocated": lambda *_: MEMORY.largest,
        "max_memory_reserved": lambda *_: MEMORY.largest,
        "reset_peak_memory_stats": lambda *_: None,
        "memory_stats": lambda *_: defaultdict(int),
        "mem_get_info": lambda *_: (79 * GIB, 80 * GIB),
        "default_generators": generators,
        "manual_seed": lambda seed: generator().manual_seed(seed),
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": generator(device).get_state(),
        "set_rng_state": set_state,
    }
    for name, value in stand_ins.items():
        setattr(torch.cuda, name, value)
    torch.accelerator.current_stream = Null  # type: ignore[assignment]
    torch.accelerator.current_device_index = lambda: THREAD.gpu
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, stand_ins[name])
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *_, **__: None)
    for name, dtype in TYPES.items():
        setattr(torch.cuda, name, _Type(name, (), {"dtype": dtype}))
    torch.Generator = Generators("Generator", (), {})  # type: ignore[assignment, misc]
    torch.compile = _not_compiled  # type: ignore[assignment]


def _not_compiled(function: Any = None, **options: Any) -> Any:
    return function if function else functools.partial(_not_compiled, **options)


# --- process groups and NCCL ---


def _install_groups() -> None:
    make_world, make_group, barrier = dist.init_process_group, dist.new_group, dist.barrier

    def init_process_group(backend: str, **options: Any) -> None:
        make_world("gloo", **options)
        BACKENDS[dist.group.WORLD.group_name] = BACKENDS[""] = backend  # type: ignore[union-attr]

    def new_group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None, **options: Any
    ) -> Any:
        group = make_group(ranks, timeout, "gloo", **options)
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            BACKENDS[group.group_name] = backend or BACKENDS[""]
        return group

    dist.init_process_group = init_process_group
    dist.new_group = new_group
    dist.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)
    dist.ProcessGroupNCCL = NCCL  # type: ignore[attr-defined]


SENT: dict[str, queue.SimpleQueue[Tensor]] = {}  # copies of what a group's rank 0 sent, by the group's number


class NCCL:
    """Stands in for a group of ProcessGroupNCCL whose rank 0 this is.

    The others learn its number from the store and take what it sends from SENT.
    """

    class Options(Null):
        pass

    def __init__(self, store: Any, rank: int, size: int, options: Any):
        assert rank == 0 and size > 1
        number = str(len(SENT))
        self.sent = SENT[number] = queue.SimpleQueue()
        store.set("number", number)

    def broadcast(self, tensor: Tensor, root: int) -> Work:
        device = device_of(tensor)
        if device.type != "cuda":
            REPORT.find("group", f"broadcast of a tensor on {device} by NCCL")
        elif device.index != THREAD.gpu:
            REPORT.find("thread", f"broadcast of a tensor on {device} in a thread whose GPU is {THREAD.gpu}")
        self.sent.put(tensor.detach().cpu())
        return Work()

    def abort(self) -> None: ...


class Work:
    """Stands in for WorkNCCL: complete also after an error, which `wait` raises; is_success always raises."""

    def __init__(self, error: str = ""):
        self.error = error

    def is_completed(self) -> bool:
        return True

    def wait(self) -> bool:
        if self.error:
            raise dist.DistBackendError(self.error)
        return True

    def is_success(self) -> bool:
        REPORT.find("nccl", "WorkNCCL.is_success")
        raise NotImplementedError("WorkNCCL::isSuccess() is deprecated")


# --- operations, kernels, handles ---


def _install_operations() -> None:
    aten = torch.ops.aten
    REPLACED[aten.mm.dtype_out] = lambda a, b, dtype, *, out: out.copy_(_product(a, b, dtype, out))
    REPLACED[aten.addmm.dtype_out] = lambda total, a, b, dtype, *, out, **_: out.copy_(
        total + _product(a, b, dtype, out)
    )
    REPLACED[aten.histc.default] = lambda x, *args, **kwargs: aten.histc(x.float(), *args, **kwargs).to(
        x.dtype
    )
    varlen.varlen_attn = varlen_attn
    reductions.reduce_tensor = reduce_tensor
    # Triton's kernels run on a GPU only; their twin takes and returns the same
    import dapo_kernels
    from dapo_kernels import logits_torch

    sys.modules["dapo_kernels.logits_triton"] = logits_torch
    dapo_kernels.logits_triton = logits_torch  # type: ignore[attr-defined]


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor) -> Tensor:
    """Multiply 16-bit factors into float32, as only CUDA does."""
    if {a.dtype, b.dtype} not in ({torch.bfloat16}, {torch.float16}) or {dtype, out.dtype} != {torch.float32}:
        REPORT.find("kernel", f"mm of {a.dtype} and {b.dtype} into {dtype}")
    return a.float() @ b.float()


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """Attend run by run as flash attention does: of each run the last query sees all keys."""
    devices = {device_of(tensor) for tensor in (query, key, value, queries, keys)}
    is_causal = window_size == (-1, 0)
    if (
        len(devices) > 1
        or query.dtype not in (torch.bfloat16, torch.float16)
        or {queries.dtype, keys.dtype} != {torch.int32}
        or not all(isinstance(longest, int) for longest in (max_q, max_k))
        or max(int(keys.diff().max()), int(queries.diff().max())) > max(max_q, max_k)
        or query.shape[1] != key.shape[1]
        or not is_causal
    ):
        REPORT.find("kernel", f"varlen_attn of {query.dtype} {queries.dtype} on {devices}, {window_size}")
    parts = []
    runs = (x.split(cu.diff().tolist()) for x, cu in ((query, queries), (key, keys), (value, keys)))
    for q, k, v in zip(*runs, strict=True):
        scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * (scale or q.shape[-1] ** -0.5)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
        parts.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(parts)


HANDLES: dict[bytes, Tensor] = {}  # tensors that another process may open


def reduce_tensor(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """Return what pickle stores of a CUDA tensor: 14 arguments; number 6 is its GPU, number 7 the handle."""
    if not tensor.is_cuda:
        REPORT.find("host memory", "a CUDA handle of a tensor in main memory")
    elif tensor.device.index != THREAD.gpu:
        REPORT.find("thread", f"a handle of {tensor.device} in a thread whose GPU is {THREAD.gpu}")
    handle = str(len(HANDLES)).encode()
    HANDLES[handle] = tensor
    return rebuild_tensor, (*[None] * 6, tensor.get_device(), handle, *[None] * 6)


def rebuild_tensor(*arguments: Any) -> Tensor:
    """Open a handle; what comes of it is a copy, and the handle is closed."""
    tensor, HANDLES[arguments[7]] = HANDLES[arguments[7]], torch.empty(0)
    return pretence.copied(tensor, pretence.CPU, tensor.dtype)
