"""Launches a run's ranks on this machine, as torchrun does, and says last, in one line, how they ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from typing import Any

from dapo.command import last_line

SECONDS_TO_SAVE = 600  # for ranks after a signal, before they are killed
LOST = "the steps since the last checkpoint are lost: the same command goes on from it"


def launch(argv: list[str], num_ranks: int) -> int:
    """Run `python -m dapo *argv` on `num_ranks` ranks. Return the first failure's exit status."""
    logging.disable(logging.ERROR)  # what torch's launcher reports says less than the ranks' line
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="dapo-") as folder:
        kept = last_line.keep_in(folder)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=f"dapo-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=SECONDS_TO_SAVE,
        )
        line, status = None, 0
        try:
            elastic_launch(config, sys.executable)("-u", "-m", "dapo", *argv)
        except ChildFailedError as error:
            line, status = _of_failures(error.failures)
        except SignalException as error:
            line, status = None, 128 + error.sigval.value
        line = line or last_line.said(kept)
        if status and not line:
            line = f"stopped with status {status}, and no rank said why; {LOST}"
    if line:
        print(line, file=sys.stderr, flush=True)
    return status


def _of_failures(failures: dict[int, Any]) -> tuple[str | None, int]:
    """Return what ended the ranks if a signal did that the launcher did not send, and the exit status."""
    for rank, failure in sorted(failures.items(), key=lambda item: item[1].timestamp):
        number = -failure.exitcode
        if number > 0 and number != signal.SIGTERM:
            name = signal.Signals(number).name
            hint = ", as the kernel does when memory is short" if number == signal.SIGKILL else ""
            return f"error: rank {rank} was ended by {name}{hint}; {LOST}", 1
    codes = [failure.exitcode for failure in failures.values() if failure.exitcode > 0]
    return None, codes[0] if codes else 1
