"""Compile the kernels ahead of time for sm_80, sm_90 and sm_100 and report on the code; no GPU is needed.

    python benchmarks/kernel_report.py [OUT.json]

Ends with an error if a kernel keeps anything on the stack or lost its 128-bit loads: either would cost a
multiple of its time. (The compiler's own LOCAL counter is 0 even where registers are spilled; instructions
are counted.)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# both are read when Triton is imported
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
from dapo_kernels import logits_triton
from dapo_kernels.launch import TABLE, Launch
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped,import-not-found,unused-ignore]
from triton.compiler import ASTSource  # type: ignore[import-untyped,import-not-found,unused-ignore]

ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
ITEMSIZE = {"bf16": 2, "fp32": 4}
FORWARD_ONLY = "log-probs only"  # reads statistics, no logits
# arguments that the caller's padding makes divisible by 16
ALIGNED = ("LOGITS", "GRADIENT", "logits_stride", "gradient_stride", "stride", "columns")
# the pointers that a launch passes as None where the flag is False
FLAGS = {
    "HAS_MASK": ["MASK"],
    "HAS_WEIGHTS": ["WEIGHTS"],
    "IS_CISPO": [],
    "HAS_DUAL_CLIP": [],
    "HAS_REFERENCE": ["REFERENCE"],
    "HAS_LOSS": ["OLD", "ADVANTAGES"],
    "HAS_GRADIENT": ["GRADIENT"],
}


@dataclass(frozen=True)
class Variant:
    """One way of calling a kernel."""

    kernel: str
    name: str
    logits: str  # element type
    gradient: str
    constants: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """The code of one variant on one architecture."""

    arch: int
    kernel: str
    variant: str
    block: int
    warps: int
    registers: int
    stack: int  # bytes
    spills: int  # instructions that store to or load from local memory
    loads_128: int  # instructions, as all that follow
    loads: int
    stores_128: int
    exponentials: int
    shared: int  # bytes

    @property
    def faults(self) -> list[str]:
        """One line for each property that would make the kernel slow."""
        found = []
        if self.stack or self.spills:
            found.append(f"{self.stack} bytes of stack, {self.spills} spilling instructions")
        if not self.loads_128 and self.variant != FORWARD_ONLY:
            found.append("no 128-bit load")
        name = f"sm_{self.arch} {self.kernel} ({self.variant}, block {self.block})"
        return [f"{name}: {fault}" for fault in found]


def variants() -> list[Variant]:
    """Return the ways of calling that are compiled: the usual ones, and those with every option."""
    nothing, everything = dict.fromkeys(FLAGS, False), dict.fromkeys(FLAGS, True) | {"IS_CISPO": False}
    plain = nothing | {"HAS_WEIGHTS": True, "HAS_LOSS": True, "HAS_GRADIENT": True}
    statistics = [
        Variant("row_statistics_kernel", dtype, dtype, dtype, {"HAS_MASK": True, "VEC": 16 // size})
        for dtype, size in ITEMSIZE.items()
    ]
    loss = [
        Variant("loss_gradient_kernel", f"{name}, tp {world}", logits, gradient, options | {"WORLD": world})
        for name, logits, gradient, options, world in [
            ("bf16", "bf16", "bf16", plain, 1),
            ("bf16, every option", "bf16", "bf16", everything, 8),
            ("fp32", "fp32", "fp32", plain, 1),
            ("fp32, every option", "fp32", "fp32", everything, 8),
            ("fp32 to bf16", "fp32", "bf16", plain, 1),
            ("fp32 to bf16, cispo", "fp32", "bf16", plain | {"IS_CISPO": True}, 1),
        ]
    ]
    loss.append(Variant("loss_gradient_kernel", FORWARD_ONLY, "bf16", "bf16", nothing | {"WORLD": 8}))
    return [*statistics, *loss, *(Variant("scale_kernel", dtype, dtype, dtype, {}) for dtype in ITEMSIZE)]


def compile_all() -> Iterator[Compiled]:
    """Compile every variant with every launch of the table, on every architecture."""
    for arch in ARCHITECTURES:
        for variant in variants():
            column = 1 if variant.kernel == "row_statistics_kernel" else 2
            for launch in dict.fromkeys(line[column] for line in TABLE[arch]):
                yield compile_one(arch, variant, launch)  # type: ignore[arg-type]


def compile_one(arch: int, variant: Variant, launch: Launch) -> Compiled:
    """Compile one variant and count what its machine code holds."""
    function = getattr(logits_triton, variant.kernel)
    constants = variant.constants | {"BLOCK": launch.block}
    for flag, pointers in FLAGS.items():
        constants |= {name: None for name in pointers if constants.get(flag) is False}
    names = list(function.arg_names)
    signature = {name: "constexpr" if name in constants else _type(name, variant) for name in names}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name in ALIGNED},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.warps})
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output("cuobjdump", "-res-usage", str(cubin))
        code = _output("nvdisasm", "-c", str(cubin))
    resources = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    assert resources is not None, usage

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return Compiled(
        arch=arch,
        kernel=variant.kernel,
        variant=variant.name,
        block=launch.block,
        warps=launch.warps,
        registers=int(resources[1]),
        stack=int(resources[2]),
        spills=count(r"\b(?:STL|LDL)\b"),
        loads_128=count(r"LDG\.E[.\w]*\.128"),
        loads=count(r"\bLDG\b"),
        stores_128=count(r"STG\.E[.\w]*\.128"),
        exponentials=count(r"MUFU\.EX2"),
        shared=compiled.metadata.shared,
    )


def _type(name: str, variant: Variant) -> str:
    if name == "LOGITS":
        return f"*{variant.logits}"
    if name == "GRADIENT":
        return f"*{variant.gradient}"
    pointers = {"TARGETS": "*i64", "MASK": "*u8", "FLAGS": "*u8"}
    if name.isupper():
        return pointers.get(name, "*fp32")
    if name.endswith("stride"):
        return "i64"
    return "i32" if name in ("num_rows", "columns", "valid", "start") else "fp32"


def _output(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def main() -> None:
    columns = [f.name for f in fields(Compiled)]
    print(f"triton {triton.__version__}\n\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    results = []
    for compiled in compile_all():
        results.append(compiled)
        print("| " + " | ".join(map(str, asdict(compiled).values())) + " |", flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps([asdict(compiled) for compiled in results], indent=1))
    faults = [fault for compiled in results for fault in compiled.faults]
    sys.exit("\n".join(faults) if faults else 0)


if __name__ == "__main__":
    main()
