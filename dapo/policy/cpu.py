"""Megatron-core adapted to machines without CUDA, or without Transformer Engine or flash-linear-attention.

Megatron-core 0.19.2 writes "cuda" in some 650 places, expects Transformer Engine's FusedAdam where it saves
optimizer state, and has no gated delta rule of its own for packed sequences. `install` puts a finder before
Python's own that rewrites those places while megatron.core's modules are imported; nothing on disk changes.
On a GPU machine with both packages nothing is rewritten. The version is pinned; a test counts every rule's
hits, so that an upgrade shows.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.abc
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

import torch
from torch.optim.adamw import adamw

from dapo.plan import stack

M_MMAP_THRESHOLD = -3  # malloc.h


class AdamW(torch.optim.Optimizer):
    """AdamW that counts its steps in the parameter groups, as Transformer Engine's FusedAdam does.

    torch.optim.AdamW keeps a step per parameter, which Megatron's distributed optimizer cannot load back. The
    arithmetic is torch's own.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, adam_w_mode: bool = True,
                 capturable: bool = False):  # fmt: skip
        assert adam_w_mode and not capturable, "decoupled weight decay only, and no CUDA graphs"
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            first, second = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
            count = int(group.get("step", 0))
            counts = [torch.tensor(float(count), device=p.device) for p in params]
            beta1, beta2 = group["betas"]
            options: Any = {name: group[name] for name in ("lr", "weight_decay", "eps")}
            options |= dict(beta1=beta1, beta2=beta2, fused=True, amsgrad=False, maximize=False)
            adamw(params, [p.grad for p in params], first, second, [], counts, **options)
            group["step"] = count + 1


class NoCuda:
    """Stands in for torch.cuda in rewritten Megatron modules."""

    @staticmethod
    def device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def nothing() -> None:
        pass

    class Null:
        """Stands in for CUDA events and streams, and for the stream context."""

        def __init__(self, *args: Any, **kwargs: Any): ...

        def __enter__(self) -> NoCuda.Null:
            return self

        def __exit__(self, *args: Any) -> None: ...

        def __eq__(self, other: object) -> bool:
            return isinstance(other, NoCuda.Null)  # there is one stream

        def __getattr__(self, name: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: 0.0 if name == "elapsed_time" else NoCuda.Null()


@dataclass(frozen=True)
class Rule:
    """Replace `pattern` by `replacement` in one module, or in all of megatron.core."""

    pattern: str
    replacement: str
    module: str | None = None

    def apply(self, source: str, module: str) -> tuple[str, int]:
        if self.module not in (None, module):
            return source, 0
        return re.subn(self.pattern, self.replacement, source)


RANDOM = "megatron.core.tensor_parallel.random"
MOE_UTILS = "megatron.core.transformer.moe.moe_utils"
OPTIMIZER = "megatron.core.optimizer"
DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"
HYBRID = "megatron.core.optimizer.cpu_offloading.hybrid_optimizer"
DELTA_NET = "megatron.core.ssm.gated_delta_net.common"
OUR_ADAM = "from dapo.policy.cpu import AdamW as Adam"
NO_CUDA = [
    Rule(r"\btorch\.cuda\.current_device\(\)", "_cpu.device()"),
    Rule(r"\btorch\.cuda\.synchronize\([^()]*\)", "_cpu.nothing()"),
    Rule(r"\btorch\.cuda\.empty_cache\(\)", "_cpu.nothing()"),
    Rule(r"""device\s*=\s*(['"])cuda\1""", "device=_cpu.device()"),
    Rule(r"""\.to\((['"])cuda\1\)""", ".to(_cpu.device())"),
    Rule(r"\.cuda\((?:_cpu\.device\(\)|[^()]*)\)", ".to(_cpu.device())"),
    Rule(r"torch\.cuda\.(Float|Half|BFloat16)Tensor", r"torch.\1Tensor"),
    Rule(r"\btorch\.cuda\.(manual_seed|get_rng_state|set_rng_state)\b", r"torch.\1"),
    Rule(r"pin_memory=True", "pin_memory=False"),
    Rule(r"\btorch\.cuda\.(Event|Stream|current_stream|default_stream|stream)\b", "_cpu.Null"),
    Rule(r"device_ids=\[[^\]]*\],?", ""),
    Rule(
        r"\ndef convert_cuda_rng_state\(",
        "\ndef _get_cuda_rng_state(device='cpu', clone=False, graph_safe=False):\n"
        "    return torch.get_rng_state()\n"
        "\ndef _set_cuda_rng_state(new_state, device=-1, graph_safe=False):\n"
        "    torch.set_rng_state(new_state)\n"
        r"\g<0>",
        RANDOM,
    ),
    # the tracker warns when a fork consumes CPU randomness: here that is the only randomness there is
    Rule(r"if not torch\.all\(cpu_rng_state == torch\.get_rng_state\(\)\)\.item\(\):", "if False:", RANDOM),
    # optimizer state in main memory: a parameter on the CPU is taken for the device's, its copy for the CPU's
    Rule(r"if param\.is_cuda:", "if not cpu_copy:", HYBRID),
    Rule(r"\bparam\.is_cuda\b", "True", HYBRID),
    Rule(r"\.cpu\(\)\.pin_memory\(\)", "", HYBRID),
    Rule(r"pin_memory=self\.pin_cpu_grads", "pin_memory=False", HYBRID),
    # the alltoall dispatcher needs the sizes of a split as a list, and makes it of a tensor on a GPU only
    Rule(r"torch\.is_tensor\(tensor\) and tensor\.is_cuda", "torch.is_tensor(tensor)", MOE_UTILS),
    # jit_fuser is torch.compile: 10-40 s per function on a CPU, and a quarter of the time of the imports
    Rule(r"\nenable_jit_fuser\(\)", "\ndisable_jit_fuser()", "megatron.core.jit"),
    Rule(r"\n *@torch\.compile(?=\n)", "", "megatron.core.transformer.moe.router"),
    # a pickled tensor would name a function of Megatron's, and servers refuse it
    Rule(r"\ntorch\.storage\._load_from_bytes = safe_load_from_bytes", "", "megatron.core"),
]
NO_TRANSFORMER_ENGINE = [
    Rule(r"from torch\.optim import AdamW as Adam\b", OUR_ADAM, OPTIMIZER),
    Rule(r"USING_PYTORCH_OPTIMIZER = True", "USING_PYTORCH_OPTIMIZER = False", OPTIMIZER),
    Rule(r"from torch\.optim import Adam as Adam\b", OUR_ADAM, DISTRIBUTED),
    # an absent Transformer Engine has no version to compare; only state in main memory passes the next check
    Rule(r"if not is_te_min_version\(\"2\.1\.0\"\):", "if True:", "megatron.core.optimizer.optimizer_config"),
    Rule(r"HAVE_APEX_OR_TE = False", "USING_TE_OPTIMIZER = True  # in its ways", DISTRIBUTED),
]
NO_FLA = [Rule(r"from fla\.[\w.]+ import ", "from dapo.policy.delta_rule import ", DELTA_NET)]


class _Loader(SourceFileLoader):
    rules: Sequence[Rule] = ()

    def get_code(self, fullname: str) -> CodeType:  # not from the .pyc, whose source is as on disk
        path = self.get_filename(fullname)
        source = self.get_data(path).decode()
        for rule in self.rules:
            source, _ = rule.apply(source, fullname)
        with warnings.catch_warnings(action="ignore"):  # of backslashes in its docstrings
            return self.source_to_code(source, path)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        module._cpu = NoCuda  # type: ignore[attr-defined]
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, rules: Sequence[Rule]):
        self.rules = rules

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "megatron.core" and not fullname.startswith("megatron.core."):
            return None
        # few models need fla, and to try it takes seconds: not before it is needed
        rules = [*self.rules, *([] if fullname != DELTA_NET or has_fla() else NO_FLA)]
        if not any(rule.module in (None, fullname) for rule in rules):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        spec.loader.rules = rules
        return spec


def return_freed_memory() -> None:
    """Make malloc return large freed blocks to the system: a run then holds what its plan counts.

    glibc by itself keeps freed blocks of up to 32 MiB, a quarter more of a large model's memory.
    MALLOC_MMAP_THRESHOLD_ in the environment has priority.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(M_MMAP_THRESHOLD, 2**20)


@functools.cache
def has_transformer_engine() -> bool:
    """True if there is a GPU, and Transformer Engine is installed and whole; else the plain layers are used,
    and a line says why if it is not whole. It is tried once.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None:
        return False
    fault = stack.engine_fault()
    if fault and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: the plain layers are used: {fault}", file=sys.stderr, flush=True)
    return fault is None


@functools.cache
def has_fla() -> bool:
    """True if there is a GPU, and what Megatron imports of flash-linear-attention can be imported; else
    policy/delta_rule.py is used, and a line says why if it is there. It is tried once.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("fla") is None:
        return False
    try:
        for module in ("modules.convolution", "modules.l2norm", "ops.gated_delta_rule"):
            importlib.import_module(f"fla.{module}")
    except (ImportError, ValueError, OSError, RuntimeError, AttributeError, AssertionError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            why = " ".join(str(error).split()) or type(error).__name__
            print(f"warning: the plain delta rule is used: fla cannot be imported ({why})", file=sys.stderr)
        return False
    return True


def install() -> None:
    """Adapt Megatron-core to what this machine lacks, before its first import. A second call changes nothing.

    Raises:
        ImportError: the rules were written for another version of Megatron-core.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if fault := stack.fault("megatron-core", stack.TRAINER["megatron-core"]):
        raise ImportError(fault)
    rules = [] if torch.cuda.is_available() else list(NO_CUDA)
    rules += [] if has_transformer_engine() else NO_TRANSFORMER_ENGINE
    if rules:
        assert "megatron.core" not in sys.modules, "dapo.policy must be imported before megatron.core"
    if not has_transformer_engine():  # to import it raises ImportError then, which Megatron expects
        for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
            del sys.modules[name]  # the half that could be imported
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    # SGLang's: without a driver it raises OSError, Megatron expects ImportError
    if not torch.cuda.is_available():
        sys.modules["flash_mla"] = None  # type: ignore[assignment]
    sys.meta_path.insert(0, _Finder(rules))
