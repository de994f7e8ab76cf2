"""The one line that says how a command ended.

A rank prints it. A rank that `dapo train` has launched leaves it to the launcher, which prints it last.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

# the file where the launcher looks for it, in the environment of its ranks: FOLDER/PROCESS.last-line
KEPT = "DAPO_LAST_LINE"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's, of each rank


def keep_in(folder: str) -> Path:
    """Have the ranks that this process launches leave their line in a file. Return it."""
    path = Path(folder) / f"{os.getpid()}.last-line"
    os.environ[KEPT] = str(path)
    return path


def say(line: str) -> None:
    """Print the line, or leave it to the launcher, if that is still there."""
    path = Path(os.environ.get(KEPT, "none"))
    if path.stem == str(os.getppid()):
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    else:
        print(line, file=sys.stderr, flush=True)


def said(path: Path) -> str | None:
    """Return the line that was left in a file first; None if there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[0]) if lines else None


def is_first_here() -> bool:
    """True on one rank of a machine that fails before the ranks know each other, so that it says why.

    Not always rank 0: torchrun ends it as soon as another rank has failed, and it may not fail at all.
    """
    if ERROR_FILE not in os.environ:
        return os.environ.get("RANK", "0") == "0"
    # torchrun's directory of this launch holds one for each of its ranks
    try:
        (Path(os.environ[ERROR_FILE]).parent.parent / "dapo-failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def of_bug(error: Exception, folder: Path) -> str:
    """Keep a bug's traceback in the run's directory, if there is one; else print it. Return the line."""
    trace = "".join(traceback.format_exception(error))
    path = folder / "traceback.txt"
    kind = type(error).__name__
    message = f"error: {kind}: {' '.join(str(error).split())}".removesuffix(": ")
    try:
        path.write_text(trace, encoding="utf-8")
    except OSError:
        print(trace, file=sys.stderr, flush=True)
        return f"{message}; the traceback is above"
    return f"{message}; the traceback is in {path}"
