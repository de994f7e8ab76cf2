"""Make the environment of a real SGLang for CPU, outside the clone, and print its Python: `python build.py`,
or `make sglang-cpu`.

It lies in $XDG_CACHE_HOME/dapo/sglang-0.5.23-cpu, 2.8 GB, about three minutes; from then on nothing is done
until what it is made of changes. TORCH and PIP_ARGS as in the Makefile: which torch, and where from. Cut
short it is made anew, two at once wait for each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dapo/sglang-0.5.23-cpu"
PYTHON = FOLDER / "bin/python"
CONSTRAINTS = HERE.parents[2] / f"constraints/python3.{min(sys.version_info.minor, 12)}.txt"
TORCH = os.environ.get("TORCH") or re.findall(r"^torch==.*$", CONSTRAINTS.read_text(), re.MULTILINE)[0]
PIP_ARGS = shlex.split(os.environ.get("PIP_ARGS", ""))


def build() -> Path:
    """The environment's Python; the environment is there when this returns.

    Raises:
        CalledProcessError: pip failed; what it said is on stderr.
    """
    # torch first: another requirement would choose its build
    installs = [*PIP_ARGS, TORCH], ["--no-deps", "--requirement", str(HERE / "requirements.txt")]
    make(FOLDER, key(), sys.executable, installs, "about three minutes")
    [packages] = FOLDER.glob("lib/python*/site-packages")
    shutil.copytree(HERE / "standins", packages, dirs_exist_ok=True)
    return PYTHON


def make(
    folder: Path, key: str, python: str, installs: Iterable[Sequence[str]], how_long: str, anew: bool = True
) -> None:
    """Make a virtual environment of `python` by calls of pip, unless one with this key is there; one of
    another key is removed before, or if not `anew` changed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when we end, however that may be
        ready = folder / ".ready"
        if ready.is_file() and ready.read_text() == key:
            return
        print(f"making {folder}: {how_long}, once", file=sys.stderr, flush=True)
        ready.unlink(missing_ok=True)
        if anew:
            shutil.rmtree(folder, ignore_errors=True)
        run(python, "-m", "venv", str(folder))
        for arguments in installs:
            pip = str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"
            run(*pip, *arguments)
        ready.write_text(key)


def key() -> str:
    """What the packages in it depend on: changed, it is made anew."""
    made_of = f"{TORCH} {sys.version_info[:2]} ".encode() + (HERE / "requirements.txt").read_bytes()
    return hashlib.sha256(made_of).hexdigest()[:16]


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    print(build())
