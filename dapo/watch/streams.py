"""Standard output and error that never end a process: what nobody reads is dropped."""

from __future__ import annotations

import os
import sys
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any


class _Dropping(FileIO):
    """A file that drops what it cannot write: its reader is gone, or its disk is full."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def keep_open() -> None:
    """Replace stdout and stderr by streams that write what they can, in any encoding.

    A descriptor that was closed at the start leads to /dev/null: else the next file that is opened would get
    its number, and with it what libraries print.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        raw = _Dropping(number, "w", closefd=False)
        new = TextIOWrapper(
            BufferedWriter(raw),
            encoding=old.encoding if old else "utf-8",
            errors="replace",
            line_buffering=number == 2 or raw.isatty(),
        )
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)  # flushed when the interpreter ends
