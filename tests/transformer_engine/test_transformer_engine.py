"""Transformer Engine's layers where it cannot run: Megatron's own modules on a stand-in that has a real
version's names and keywords. Models and checkpoints go through them as through the plain layers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo.plan import stack
from dapo.policy import cpu
from tests.distributed.cases import CASES, Case
from tests.distributed.launch import measured

HERE = Path(__file__).parent
TRIED = re.findall(r'^    "(tp.*)",$', (HERE / "parity.py").read_text(), re.MULTILINE)


def result(name: str) -> dict[str, Any]:
    return measured("tests.transformer_engine.parity", 2)[name]  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", [case for case in CASES if case.name in TRIED], ids=lambda case: case.name)
def test_its_layers_equal_a_plain_model(case: Case) -> None:
    found, bounds = result(case.name), case.bounds
    assert found["round_trip"], "Hugging Face → Megatron → Hugging Face is not bit-exact"
    assert found["ratio"] == 0.0
    assert found["logprobs"] <= bounds.logprobs
    assert found["gradients"] <= bounds.gradients
    assert found["params"] <= bounds.params
    assert found["direction"] >= bounds.direction


def test_every_case_is_tried() -> None:
    assert len(TRIED) >= 7 and set(TRIED) <= {case.name for case in CASES}


def test_a_checkpoint_of_the_plain_layers_goes_through_them_unchanged() -> None:
    findings = result("moved")["findings"]
    assert [(found["what"], found["count"]) for found in findings] == [
        ("tensors, by name", 30), ("parameters", 10), ("moments", 20),
    ]  # fmt: skip
    assert not any(found["gap"] for found in findings)


def test_a_checkpoint_of_theirs_is_read_by_tools() -> None:
    found = result("saved")
    assert not found["wrong"]
    assert found["exported"] > 20, "Megatron-LM would read other weights"
    assert {
        "RMSNorm",
        "TEColumnParallelGroupedLinear",
        "TEDotProductAttention",
        "TELayerNormColumnParallelLinear",
        "TERowParallelGroupedLinear",
        "TERowParallelLinear",
    } == set(found["kinds"])


def test_the_standin_is_the_version_that_is_asked_for() -> None:
    version = json.loads((HERE / "signatures.json").read_text())["version"]
    assert f"=={version}'" in stack.HOW["transformer-engine"]
    [metadata] = (HERE / "standin").glob("*.dist-info/METADATA")
    assert f"\nVersion: {version}\n" in metadata.read_text()


BROKEN = {  # as the real one ends without its compiled parts → the reason that is given
    "no torch extension": ("raise FileNotFoundError('Could not find shared object file')", "Could not find"),
    "for another torch": ("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol"),
    "parts of several versions": ("raise AssertionError('package version mismatch')", "mismatch"),
    "the package alone": ("raise RuntimeError('Found empty `transformer-engine`\\nmeta package')", "empty"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_one_that_cannot_be_imported_is_named_and_not_used(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising, reason = BROKEN[how]
    make(tmp_path, "2.20.2", raising)
    assert not decide(tmp_path, monkeypatch)
    [line] = capsys.readouterr().err.splitlines()
    used = "warning: the plain layers are used: transformer-engine 2.20.2 cannot be imported with torch"
    assert line.startswith(f"{used} {stack.installed('torch')} (") and reason in line
    assert line.endswith(f"): {stack.mend('transformer-engine')}")
    assert not decide(tmp_path, monkeypatch, is_first=False)
    assert not capsys.readouterr().err, "once a machine"


def test_an_old_one_is_named_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "2.4.0", "")
    assert not decide(tmp_path, monkeypatch)
    start = "warning: the plain layers are used: transformer-engine 2.4.0 is installed, dapo needs "
    assert capsys.readouterr().err.startswith(f"{start}transformer-engine>=2.11: {sys.executable} -m pip")


def test_one_that_can_be_imported_is_used_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "2.20.2", "")
    assert decide(tmp_path, monkeypatch)
    assert not capsys.readouterr().err


def make(folder: Path, version: str, code: str) -> None:
    """Write a package of this name, whose torch part is `code`."""
    (folder / "transformer_engine/pytorch").mkdir(parents=True)
    (folder / "transformer_engine/__init__.py").write_text("")
    (folder / "transformer_engine/pytorch/__init__.py").write_text(code)
    (folder / "transformer_engine/pytorch/fp8.py").write_text("")
    about = folder / f"transformer_engine-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {version}\n")


def decide(folder: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool = True) -> bool:
    """Ask whether its layers are used, on a machine with a GPU and this package."""
    before = forget()
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setenv("LOCAL_RANK", "0" if is_first else "1")
        decided = cpu.has_transformer_engine.__wrapped__()
    forget()
    sys.modules.update(before)
    return decided


def forget() -> dict[str, Any]:
    """Forget the package's modules. Return them."""
    names = [name for name in sys.modules if name.startswith("transformer_engine")]
    return {name: sys.modules.pop(name) for name in names}


def test_the_half_of_it_that_can_be_imported_is_out_of_megatrons_way(tmp_path: Path) -> None:
    make(tmp_path, "2.20.2", "raise FileNotFoundError('Could not find shared object file')")
    code = (
        "import torch; torch.cuda.is_available = lambda: True; import dapo.policy; import transformer_engine"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert "ModuleNotFoundError: import of transformer_engine halted" in done.stderr
