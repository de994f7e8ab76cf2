"""Environments of other trainers, outside the clone: made once by pip, from the pins in constraints/."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path

from tests.sglang.environment.build import make

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dapo"


def python_of(name: str) -> str:
    """Return the Python of this package's environment, which is there when this returns.

    It lies in $XDG_CACHE_HOME/dapo/peers-NAME-VERSION: `python_of("trl")` → "…/peers-trl-1.16.0/bin/python".
    """
    pins = ROOT / f"constraints/peers-{name}.txt"
    text = pins.read_text()
    version, torch = pinned(name, text), pinned("torch", text)
    folder = CACHE / f"peers-{name}-{version}"
    key = hashlib.sha256(f"{text} {sys.version_info[:2]}".encode()).hexdigest()[:16]
    # torch first: another requirement would choose its build
    installs = [f"torch=={torch}"], ["--requirement", str(pins)]
    make(folder, key, sys.executable, installs, "about two minutes")
    return str(folder / "bin/python")


def pinned(name: str, requirements: str) -> str:
    """Return the version of a package: `pinned("trl", "trl==1.16.0\\n")` → "1.16.0"."""
    [version] = re.findall(rf"^{re.escape(name)}==(\S+)$", requirements.replace("_", "-"), re.MULTILINE)
    return version
