"""The one line that says how a command ended, and its exit status.

A rank prints the line. A rank that `dapo train` has launched leaves both to the launcher.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# the file where the launcher looks for it, in the environment of its ranks: FOLDER/PROCESS.last-line
KEPT = "DAPO_LAST_LINE"
LOST = "the steps since the last checkpoint are lost: the same command goes on from it"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's, of each rank


class Ending(NamedTuple):
    """Says how a rank has ended. `is_echo`: because another one did; `is_final`: it would end so again."""

    line: str
    status: int
    is_echo: bool = False
    is_final: bool = False


def keep_in(folder: str) -> Path:
    """Have the ranks that this process launches leave their endings in a file. Return it."""
    path = Path(folder) / f"{os.getpid()}.last-line"
    os.environ[KEPT] = str(path)
    return path


def say(line: str, status: int, is_echo: bool = False, is_final: bool = False) -> int:
    """Print the line, or leave it to the launcher, if that is still there. Return the status."""
    if is_launched():
        path = Path(os.environ[KEPT])
        with suppress(OSError), path.open("a", encoding="utf-8") as file:  # no folder, or a full disk
            file.write(json.dumps([line, status, is_echo, is_final]) + "\n")
            return status
    with suppress(OSError, ValueError):  # nobody reads stderr any more
        print(line, file=sys.stderr, flush=True)
    return status


def said(path: Path) -> list[Ending]:
    """Return what was left in a file, the first ending first."""
    endings = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):  # the disk was full
            endings.append(Ending(*json.loads(line)))
    return endings


def is_launched() -> bool:
    """True if this process is a rank that `dapo train` has launched and still watches."""
    return Path(os.environ.get(KEPT, "none")).stem == str(os.getppid())


def is_orphan() -> bool:
    """True if this process was launched by a `dapo train` that has ended."""
    return KEPT in os.environ and "RANK" in os.environ and not is_launched()


def is_first_here() -> bool:
    """True on one rank of a machine, which reports what failed before the ranks know each other.

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


def of_bug(error: BaseException, folder: Path) -> str:
    """Keep a bug's traceback in the run's directory, if there is one; else print it. Return the line."""
    trace = "".join(traceback.format_exception(error))
    path = folder / "traceback.txt"
    message = f"error: {type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    try:
        path.write_text(trace, encoding="utf-8")
    except OSError:
        print(trace, file=sys.stderr, flush=True)
        return f"{message}; the traceback is above"
    return f"{message}; the traceback is in {path}"
