"""The environment of SGLang for CPU: made once, whole or not at all, and anew when what it is made of
changes. Without what pip does.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dapo.engine import versions
from dapo.plan import stack
from tests.sglang.environment import build as environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SGLang runs on Linux")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The commands of building it below tmp_path; none is run, but the folder appears."""
    ran: list[str] = []
    folder = tmp_path / "environment"

    def run(*command: str) -> None:
        ran.append(" ".join(command))
        time.sleep(0.05)  # so that two run at once
        (folder / "lib/python3.11/site-packages").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(environment, "FOLDER", folder)
    monkeypatch.setattr(environment, "PYTHON", folder / "bin/python")
    monkeypatch.setattr(environment, "run", run)
    return ran


def test_who_installs_the_servers_gets_what_the_tests_run() -> None:
    pinned = (environment.HERE / "requirements.txt").read_text().splitlines()
    ours = [line for line in pinned if line.startswith(("sglang==", "sglang-router=="))]
    listed = re.search(
        r'"sglang": \[(.*?)\]', (environment.HERE.parents[2] / "setup.py").read_text(), re.DOTALL
    )
    assert listed and re.findall(r'"(.*?)"', listed[1]) == ours
    assert [f"sglang=={version}" for version in versions.RUN] == ours[:1]


def test_every_import_is_found_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(environment.HERE))
    check = importlib.import_module("tests.sglang.environment.check")
    found = check.imported()
    assert "varlen_attn" in found["torch.nn.attention.varlen"], "inside a function"
    assert {"sglang.launch_server", "sglang_router.launch_router"} <= found.keys(), "named, and run"
    assert found["sglang.srt.server_args"] == {"ServerArgs"}, "in code that is text"
    assert not check.fault_of("json", {"dumps", "decoder"})
    assert check.fault_of("json", {"nothing"}).startswith(
        "ModuleNotFoundError: No module named 'json.nothing'"
    )


def test_constraints_name_what_is_asked_for() -> None:
    for version in ("3.11", "3.12"):
        pins = (environment.CONSTRAINTS.parent / f"python{version}.txt").read_text()
        for package, needed in stack.TRAINER.items():
            [pin] = re.findall(rf"^{package}==(.+)$", pins, re.MULTILINE) or ["0.19.2"]  # of Megatron on 3.11
            assert stack.fits(pin, needed), package
        assert "megatron-core==" in pins or version == "3.11"
    assert f"\nsglang=={stack.SGLANG}\n" in pins
    assert stack.HOW["torch"] in pins.splitlines() and "\ntransformer-engine==2.20.2\n" in pins


def test_it_is_made_once_torch_first_and_holds_the_standins(commands: list[str]) -> None:
    python = environment.build()
    venv, torch, rest = commands
    assert "-m venv" in venv and torch.endswith(environment.TORCH) and "--no-deps" in rest
    assert (python.parents[1] / "lib/python3.11/site-packages/sgl_kernel/__init__.py").is_file()
    assert environment.build() == python and len(commands) == 3


def test_two_at_once_make_it_once(commands: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: environment.build(), range(4)))
    assert len(commands) == 3


def test_cut_short_it_is_made_anew(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = environment.run

    def cut(*command: str) -> None:
        whole(*command)
        (environment.FOLDER / "half").touch()
        if "--no-deps" in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(environment, "run", cut)
    with pytest.raises(subprocess.CalledProcessError):
        environment.build()
    monkeypatch.setattr(environment, "run", whole)
    environment.build()
    assert len(commands) == 6 and not (environment.FOLDER / "half").exists()


def test_other_requirements_make_it_anew(commands: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    environment.build()
    monkeypatch.setattr(environment, "TORCH", "torch==9.9")
    environment.build()
    assert len(commands) == 6 and "torch==9.9" in commands[4]
