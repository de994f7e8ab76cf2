"""Launches a run's ranks on this machine, as torchrun does, and says last, in one line, how they ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

import psutil

from dapo.command.restart import Restarts
from dapo.types import reason
from dapo.watch import last_line
from dapo.watch.last_line import LOST, Ending

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
CHECK_EVERY = 0.25  # seconds between two looks for a signal


def launch(argv: list[str], num_ranks: int, restarts: Restarts) -> int:
    """Run `python -m dapo *argv` on `num_ranks` ranks, again after a failure if `restarts` says so.

    Return the exit status, the first failure's.
    """
    signals = _forward_signals()
    while True:
        try:
            ending = _launch([*argv, *restarts.overrides()], num_ranks, signals)
        except KeyboardInterrupt:  # no rank was there yet
            ending = Ending("interrupted; not saved", 128 + signals[0])
        if ending is None:
            return 0
        pause, line = restarts.after(ending)
        if pause is None:
            return last_line.say(line, ending.status, ending.is_echo)
        print(line, file=sys.stderr, flush=True)
        if _is_interrupted(signals, pause):
            return last_line.say("interrupted before it started again", 128 + signals[0])


def _is_interrupted(signals: list[int], seconds: float) -> bool:
    """Wait. Return True at once when a signal comes."""
    end = time.monotonic() + seconds
    with suppress(KeyboardInterrupt):  # `forward` finds no ranks
        while not signals and time.monotonic() < end:
            time.sleep(CHECK_EVERY)
    return bool(signals)


def _launch(argv: list[str], num_ranks: int, signals: list[int]) -> Ending | None:
    logging.disable(logging.ERROR)  # what torch's launcher reports says less than the ranks' line
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = [argument.replace("$", "$$") for argument in argv]  # torch replaces ${local_rank} in them
    with tempfile.TemporaryDirectory(prefix="dapo-", ignore_cleanup_errors=True) as folder:
        kept = last_line.keep_in(folder)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=f"dapo-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGQUIT",
        )
        try:
            elastic_launch(config, sys.executable)("-u", "-m", "dapo", *arguments)
        except ChildFailedError as error:
            return _ending(last_line.said(kept), error.failures, signals)
        except (OSError, RuntimeError) as error:
            return Ending(f"error: {num_ranks} ranks cannot be launched: {reason(error)}", 1)
    return None


def _forward_signals() -> list[int]:
    """Pass signals on to the ranks, which save and stop. Return the list of those that have come."""
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        ranks = psutil.Process().children()
        if not ranks:
            raise KeyboardInterrupt
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, forward)
    return received


def _ending(endings: list[Ending], failures: dict[int, Any], signals: list[int]) -> Ending:
    """Choose the ranks' own account of what happened; where there is none, say what the launcher saw."""
    for ending in endings:
        if not ending.is_echo:
            return ending
    if signals:
        return Ending("interrupted; not saved", 128 + signals[0])
    first = min(failure.timestamp for failure in failures.values())
    # those that end later were ended by the launcher, by SIGTERM, and half a minute later by SIGKILL
    at_once = {rank: failure for rank, failure in failures.items() if failure.timestamp <= first + 2}
    rank, failure = min(
        at_once.items(), key=lambda item: (item[1].exitcode > 0, item[1].exitcode == -signal.SIGTERM)
    )
    if failure.exitcode < 0:
        names = {number.value: number.name for number in signal.Signals}
        name = names.get(-failure.exitcode, f"signal {-failure.exitcode}")
        hint = ", as the kernel does when memory is short" if name == "SIGKILL" else ""
        return Ending(f"error: rank {rank} was ended by {name}{hint}; {LOST}", 1)
    for ending in endings:
        return ending
    return Ending(f"error: rank {rank} ended with status {failure.exitcode} and did not say why; {LOST}", 1)
