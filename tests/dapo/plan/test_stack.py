"""Which versions go together: a line for each that does not fit, with what is there, what is needed and the
command that mends it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dapo.__main__ import main
from dapo.plan import stack

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "examples/arithmetic/config.yaml"
PIP = f"{sys.executable} -m pip install"
GOOD = {"torch": "2.14.1", "megatron-core": "0.19.2", "transformers": "5.19.0"}


@pytest.fixture
def have(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make these versions look installed, and nothing else."""

    def set_versions(**versions: str) -> None:
        there = {name.replace("_", "-"): version for name, version in versions.items()}
        monkeypatch.setattr(stack, "installed", there.get)

    return set_versions


@pytest.mark.parametrize(
    ("version", "needed", "is_fit"),
    [
        ("2.11.0", ">=2.11", True),
        ("2.11.0a0+git1", ">=2.11", True),  # a vendor's build of it
        ("2.9.1", ">=2.11", False),
        ("2.14.1+cu130", "==2.14.1", True),
        ("5.19.0", ">=5,<6", True),
        ("6.0.0", ">=5,<6", False),
        ("0.19.2.post1", "==0.19.2", True),
        ("0.19.20", "==0.19.2", False),
    ],
)
def test_versions_are_compared_by_number(version: str, needed: str, is_fit: bool) -> None:
    assert stack.fits(version, needed) is is_fit


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"torch": "2.9.1"}, "torch 2.9.1 is installed, dapo needs torch>=2.11: PIP torch==2.14.1"),
        ({"torch": ""}, "no torch is installed, dapo needs torch>=2.11: PIP torch==2.14.1"),
        (
            {"megatron-core": "0.16.1"},
            "megatron-core 0.16.1 is installed, dapo needs megatron-core==0.19.2: PIP MEGATRON",
        ),
        (
            {"megatron-core": ""},
            "no megatron-core is installed, dapo needs megatron-core==0.19.2: PIP MEGATRON",
        ),
        (
            {"transformers": "4.57.0"},
            "transformers 4.57.0 is installed, dapo needs transformers>=5,<6: "
            "PIP 'transformers>=5,<6'",
        ),
    ],
)  # fmt: skip
def test_the_first_command_says_what_to_install(
    changed: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = GOOD | changed
    monkeypatch.setattr(stack, "installed", lambda package: there.get(package) or None)
    assert main(["train", str(CONFIG)]) == 2
    megatron = stack.HOW["megatron-core"]
    line = line.replace("PIP", PIP).replace("MEGATRON", megatron)
    assert capsys.readouterr().err == f"error: {line}\n"


def test_megatrons_command_suits_this_python() -> None:
    is_old = sys.version_info < (3, 12)
    assert ("--ignore-requires-python" in stack.HOW["megatron-core"]) is is_old


@pytest.mark.parametrize(
    ("there", "line"),
    [
        ({}, "no sglang is installed: PIP sglang==0.5.23"),
        (
            {"sglang": "0.5.23", "torch": "2.13.0", "transformers": "5.19.0"},
            "torch 2.13.0 is installed, sglang 0.5.23 needs torch==2.14.1: PIP sglang==0.5.23",
        ),
        (
            {"sglang": "0.5.23", "torch": "2.14.1+cu130"},
            "no transformers is installed, sglang 0.5.23 needs transformers==5.19.0: PIP sglang==0.5.23",
        ),
        ({"sglang": "0.5.23", "torch": "2.14.1+cu130", "transformers": "5.19.0"}, None),
    ],
)
def test_servers_need_what_sglang_pins(
    there: dict[str, str], line: str | None, have: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = ["aiohttp", "torch==2.14.1", "torchao==0.9.0", "transformers (==5.19.0)", 'torch==2; extra == "x"']
    monkeypatch.setattr(stack.metadata, "requires", lambda package: pins[:4])
    have(**there)
    assert stack.server_fault(has_cuda=True) == (line and line.replace("PIP", PIP))
    assert stack.server_fault(has_cuda=False) == (None if there else line.replace("PIP", PIP))  # type: ignore[union-attr]


@pytest.mark.parametrize("has_cuda", [False, True])
def test_a_server_that_would_import_a_broken_transformer_engine_is_not_started(
    has_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").write_text("raise FileNotFoundError('no shared\\nobject')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    there = {"sglang": "0.5.23", "torch": "2.14.1", "transformer-engine": "2.20.2"}
    monkeypatch.setattr(stack.metadata, "requires", lambda package: [])
    monkeypatch.setattr(stack, "installed", there.get)
    assert stack.server_fault(has_cuda) is None, "without Megatron-core nobody imports it"
    there["megatron-core"] = "0.19.2"
    assert stack.server_fault(has_cuda) == (
        "transformer-engine 2.20.2 cannot be imported with torch 2.14.1 (no shared object): "
        f"{PIP} {stack.HOW['transformer-engine']}"
    )
    (tmp_path / "transformer_engine/__init__.py").write_text("raise ImportError('undefined symbol')")
    assert stack.server_fault(has_cuda) is None, "Megatron-core goes on without it"


def test_what_pip_leaves_of_transformer_engine_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "transformer_engine"
    (folder / "common").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # a whole one anywhere else comes first
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    rest = f"{folder} is left of a removed package, and Megatron-core would use it: rm -r {folder}"
    assert stack.engine_fault() == stack.engine_fault(is_server=True) == rest


def test_it_runs_alone_in_a_servers_python(tmp_path: Path) -> None:
    code = Path(stack.__file__).read_text()
    said = subprocess.check_output([sys.executable, "-I", "-S", "-c", code, "cuda"], text=True)
    assert said == f"no sglang is installed: {PIP} sglang==0.5.23\n"


def test_setup_asks_for_the_same() -> None:
    asked = (ROOT / "setup.py").read_text()
    for package, needed in stack.TRAINER.items():
        assert re.search(rf'"{package}{re.escape(needed)}["; ]', asked), package
    assert f'"{stack.HOW["sglang"]}"' in asked
    assert stack.HOW["transformer-engine"].split("'")[1] in asked
