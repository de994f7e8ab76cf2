"""The adaptation of Megatron-core: an upgrade shows in how often each rule hits."""

from __future__ import annotations

import importlib.metadata
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dapo.policy import cpu, delta_rule, model

# in the order of the rules
HITS = [199, 41, 11, 68, 1, 21, 18, 15, 26, 247, 2, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3]
RULES = [*cpu.NO_CUDA, *cpu.NO_TRANSFORMER_ENGINE, *cpu.NO_FLA]


def sources() -> dict[str, str]:
    """Return module name → source of all of megatron.core."""
    root = Path(str(importlib.metadata.distribution("megatron-core").locate_file("megatron/core")))
    found = {}
    for path in root.rglob("*.py"):
        parts = ["megatron", "core", *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def test_every_rule_hits_as_often_as_when_it_was_written() -> None:
    hits = [0] * len(RULES)
    for module, source in sources().items():
        for i, rule in enumerate(RULES):
            source, count = rule.apply(source, module)
            hits[i] += count
    assert hits == HITS, "Megatron-core has changed under the rules of policy/cpu.py: read each place again"


def test_the_plain_delta_rule_stands_in_for_fla_where_that_is_missing() -> None:
    from megatron.core.ssm.gated_delta_net import common, gdn

    assert common.HAVE_FLA
    for module, name in ((common, "l2norm"), (gdn, "causal_conv1d"), (gdn, "chunk_gated_delta_rule")):
        assert (getattr(module, name) is getattr(delta_rule, name)) != cpu.has_fla()


@pytest.mark.parametrize(
    ("fault", "has_cuda", "has_fla"),
    [
        ("", True, True),
        ("", False, False),
        *((f"raise {e}('why')", True, False) for e in ("ValueError", "OSError")),
    ],
)
def test_fla_is_used_where_it_can_be_imported(
    fault: str, has_cuda: bool, has_fla: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from megatron.core.ssm import gated_delta_net

    for module in ("", "modules", "modules/convolution", "modules/l2norm", "ops", "ops/gated_delta_rule"):
        (tmp_path / "fla" / module).mkdir()
        (tmp_path / "fla" / module / "__init__.py").write_text(fault if "rule" in module else "")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(cpu, "has_fla", cpu.has_fla.__wrapped__)
    try:
        spec = cpu._Finder([]).find_spec(cpu.DELTA_NET, gated_delta_net.__path__)
        imported = [name for name in sys.modules if name.split(".")[0] == "fla"]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
            del sys.modules[name]
    assert (spec is None) == has_fla  # then Python's own finder takes it, as it is
    assert bool(imported) == has_cuda
    assert ("fla cannot be imported (why)" in capsys.readouterr().err) == bool(fault)
    assert cpu._Finder([]).find_spec("megatron.core.optimizer", gated_delta_net.__path__) is None


def test_a_pickled_tensor_needs_no_megatron_where_it_is_read() -> None:
    assert model.TransformerConfig, "Megatron is imported"
    assert b"megatron" not in pickle.dumps(torch.ones(3))


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    monkeypatch.setattr("sys.meta_path", [])
    with pytest.raises(
        ImportError, match=r"megatron-core 0\.99\.0 is installed, dapo needs megatron-core==0\.19\.2: .*pip"
    ):
        cpu.install()


def test_adamw_equals_torch_and_keeps_its_step_in_the_group() -> None:
    torch.manual_seed(0)
    start = torch.randn(5, 3)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a = cpu.AdamW([ours], lr=1e-2, weight_decay=0.1)
    b = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        ours.grad = torch.randn(5, 3)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)
    assert a.param_groups[0]["step"] == 4
    assert set(a.state[ours]) == {"exp_avg", "exp_avg_sq"}


FREED = """
import sys, psutil, torch
from dapo.policy import cpu, model
def resident():
    return psutil.Process().memory_info().rss >> 20
if sys.argv[1] == "returned":
    cpu.return_freed_memory()
torch.ones(2**22).sum()  # glibc serves up to this size from its heap from now on
blocks = [torch.ones(2**21) for _ in range(64)]  # 8 MiB each
full = resident()
del blocks[::2]  # each between two that stay: what is free is never at the heap's end
print(full - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_freed_memory_is_returned() -> None:
    kept, returned = (
        int(subprocess.check_output([sys.executable, "-c", FREED, how], text=True))
        for how in ("kept", "returned")
    )
    assert kept < 32, "glibc returns it by itself: nothing was tested"
    assert returned > 240  # of 256
