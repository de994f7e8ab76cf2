"""The wheel and the source distribution hold all that is needed, and run where the repository is not."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.checkout import copy_repository

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, built from the files that git knows."""
    folder = tmp_path_factory.mktemp("built")
    copy_repository(folder / "source", without=("tests", "benchmarks", "docs"))
    build = "import setuptools.build_meta as b; b.build_wheel('..'); b.build_sdist('..')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=folder / "source", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    [wheel] = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(built / "installed")
    return built / "installed"


def files_below(folder: Path, *suffixes: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in suffixes}


def test_the_wheel_holds_every_module_and_what_modules_read(installed: Path) -> None:
    names = ".py", ".md", ".html", ".typed"
    assert files_below(installed / "dapo", *names) == files_below(ROOT / "dapo", *names)
    assert files_below(installed / "dapo_kernels", *names) == files_below(
        ROOT / "kernels/dapo_kernels", *names
    )
    assert not (installed / "kernels").exists(), "Hugging Face's kernels has this name"
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {
        "dapo",
        "dapo_kernels",
    }


def test_the_source_distribution_holds_the_examples_and_no_caches(built: Path) -> None:
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("LICENSE", "README.md", "CITATION.cff", "examples/arithmetic/config.yaml", "dapo/train.py"):
        assert name in names
    assert "kernels/dapo_kernels/reference.py" in names
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], ["train", "--help"], ["config", "lr"], ["metrics", "entropy"],
     ["plan", str(ROOT / "examples/arithmetic/config.yaml"), "--gpu", "cpu",
      f"policy.model={ROOT / 'examples/arithmetic/base'}"]],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_the_wheel_runs_from_anywhere(arguments: list[str], installed: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); import dapo.__main__ as m; import dapo.config; "
    )
    code += f"assert dapo.config.__file__.startswith({str(installed)!r}), dapo.config.__file__; m.script()"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr


def test_the_citation_has_the_package_s_version(built: Path) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    [wheel] = built.glob("*.whl")
    assert wheel.name.split("-")[:2] == ["dapo_rl", citation["version"]]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
