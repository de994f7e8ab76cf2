"""The kernels are compiled for real GPUs on a machine without one, in processes of their own: Triton must not
be interpreted there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENV = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_no_kernel_spills_or_loses_its_128_bit_loads(tmp_path):
    out = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "kernel_report.py"), str(out)],
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = json.loads(out.read_text())
    assert {kernel["arch"] for kernel in kernels} == {80, 90, 100}
    assert {kernel["kernel"] for kernel in kernels} == {
        "row_statistics_kernel",
        "loss_gradient_kernel",
        "scale_kernel",
    }
    for kernel in kernels:
        assert kernel["stack"] == kernel["spills"] == 0, kernel
        assert kernel["loads_128"] > 0 or kernel["variant"] == "log-probs only", kernel
        # 1 + 1 / VEC per element, not 2: the maximum over VEC stays inside a thread
        if kernel["kernel"] == "row_statistics_kernel":
            elements, vec = kernel["block"] // (32 * kernel["warps"]), 8 if kernel["variant"] == "bf16" else 4
            # whole tiles, the last tile, the lanes' merge
            limit = 2 * (elements + elements // vec) + elements // vec + 8
            assert kernel["exponentials"] <= limit, kernel


def test_what_varies_from_call_to_call_or_rank_to_rank_does_not_compile_anew():
    code = (
        "from dapo_kernels import logits_triton as k\n"
        "for kernel in (k.row_statistics_kernel, k.loss_gradient_kernel):\n"
        "    assert {p.name for p in kernel.params if p.do_not_specialize} >= {'num_rows', 'start', "
        "'valid'}, kernel\n"
        "    assert {p.name for p in kernel.params if p.do_not_specialize_on_alignment} >= {'TARGETS', "
        "'MASK', 'STATISTICS'}, kernel\n"
    )
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"stack": 8, "spills": 4}, "8 bytes of stack"), ({"loads_128": 0}, "no 128-bit load")],
)
def test_a_fault_is_named(options, complaint):
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\nfrom kernel_report import Compiled\n"
        "good = dict(arch=90, kernel='k', variant='v', block=1, warps=1, registers=1, stack=0, spills=0, "
        "loads_128=1, loads=1,\n"
        "            stores_128=1, exponentials=1, shared=0)\n"
        f"assert not Compiled(**good).faults\nprint(Compiled(**(good | {options})).faults)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, check=True, capture_output=True, text=True)
    assert complaint in done.stdout
