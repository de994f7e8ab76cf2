"""A copy of the repository, as a clone would have it, with what is not committed yet."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[1]


def copy_repository(folder: Path, without: Collection[str] = ()) -> None:
    """Copy the files that git knows or would add into `folder`, but for the top-level folders `without`."""
    command = ["git", "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if name.partition("/")[0] not in without and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
