"""Processes that a fork server starts: forks of a process that has neither threads, nor CUDA, nor torch."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import signal
import time
from multiprocessing.process import BaseProcess
from typing import Any

context = multiprocessing.get_context("forkserver")


def start(process: BaseProcess) -> None:
    """Start a process of `context`. Raise OSError or EOFError if the fork server cannot."""
    for _ in range(50):
        with contextlib.suppress(ConnectionError, EOFError):
            process.start()
            return
        time.sleep(0.1)  # the fork server was killed a moment ago, and multiprocessing takes it for alive
    process.start()


def without_signals(path: str, *arguments: Any) -> None:
    """Call the function at `path`, "module:name", in a process that Ctrl-C and its like do not end.

    They reach the process that started it too, which decides. Imported late: an import takes a while.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    module, _, name = path.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)
