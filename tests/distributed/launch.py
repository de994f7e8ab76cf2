"""Launches torchrun once for many cases: importing torch and Megatron costs every process ten seconds."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def torchrun(
    num_processes: int, *command: str, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script or `-m module` on `num_processes` ranks, one thread each; stdout has all it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return _run([*launcher, *command], timeout, **env)


def forked(num_processes: int, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """As torchrun, but the ranks are children of one process that has imported torch and Megatron."""
    assert command[0] == "-m"
    return _run(["-m", "tests.distributed.forked", str(num_processes), *command[1:]], timeout)


def _run(arguments: list[str], timeout: float, **env: str) -> subprocess.CompletedProcess[str]:
    # a process that a signal ends shows the Python stack of each thread
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | env
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def numbers(run: Path) -> dict[str, Any]:
    """Return the metrics of a run's first step without times, and a checksum of its final weights."""
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    values = {name: value for name, value in row.items() if not name.startswith(("time/", "perf/"))}
    return values | {"weights": hashlib.sha256((run / "hf" / "model.safetensors").read_bytes()).hexdigest()}


Launch = Callable[..., subprocess.CompletedProcess[str]]


def measured(module: str, num_processes: int, launch: Launch = torchrun) -> dict[str, Any]:
    """Return the results by name of `python -m module OUT.json`, launched once per number of processes."""
    printed, results = _launched(module, num_processes, launch)
    assert results is not None, printed
    return results


@functools.cache
def _launched(module: str, num_processes: int, launch: Launch) -> tuple[str, dict[str, Any] | None]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out.json"
        try:
            done = launch(num_processes, "-m", module, str(out), timeout=900)
        except subprocess.TimeoutExpired as error:
            return f"{error}: {str(error.stdout)[-6000:]}", None
        if done.returncode:
            return done.stdout[-6000:], None
        return done.stdout, {result["name"]: result for result in json.loads(out.read_text())}
