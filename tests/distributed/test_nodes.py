"""Several machines, one torchrun agent each, as the launch script starts them: here both on this one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import ROOT, forked, measured, numbers

SCRIPT = "examples/qwen2.5_32b_paper/launch.sh"
SCONTROL = """#!/bin/bash
[ "$*" = "show hostnames n[0-1]" ] && printf '127.0.0.1\\nn1\\n'
"""
SRUN = """#!/bin/bash
# one task on each of two nodes
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
shift
tasks=()
for ((i = 0; i < 2; i++)); do
  SLURM_STEP_ID=0 SLURM_PROCID=$i "$@" &
  tasks+=($!)
done
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""


def environment(programs: Path, processes: int) -> dict[str, str]:
    """Return what each machine's shell has: a port, two nodes of so many processes, and our Python."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return os.environ | {
        "GPUS": str(processes), "PORT": str(port), "CONFIG": "examples/arithmetic/config.yaml",
        "OMP_NUM_THREADS": "1", "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip


def run(commands: list[list[str]], env: dict[str, str], folder: Path) -> None:
    """Run the commands at the same time; each must end well."""
    started = []
    for i, command in enumerate(commands):
        with open(folder / f"printed{i}", "w") as printed:
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=env, stdout=printed, stderr=subprocess.STDOUT)
            )
    try:
        status = [process.wait(timeout=300) for process in started]
    finally:
        for process in started:
            process.terminate()
    said = "".join((folder / f"printed{i}").read_text()[-3000:] for i in range(len(commands)))
    assert status == [0] * len(commands), said


def test_two_agents_of_one_process_train_to_the_numbers_of_one_agent_of_two(tmp_path: Path) -> None:
    one_agent = measured("tests.distributed.traces", 2, forked)["data-parallel"]
    env = environment(tmp_path, 1) | {"NODES": "2", "HEAD": "127.0.0.1"}
    command = ["bash", SCRIPT, f"run.dir={tmp_path / 'run'}", *one_agent["options"]]
    run([command] * 2, env, tmp_path)
    assert numbers(tmp_path / "run") == one_agent["numbers"]


def test_a_slurm_job_of_two_nodes_of_two_processes_trains_to_the_numbers_of_two(tmp_path: Path) -> None:
    """The layout tensor 2 × data 2, and SLURM's commands in place of SLURM."""
    for name, body in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    two = measured("tests.distributed.traces", 2, forked)["tensor-parallel"]
    env = environment(tmp_path, 2) | {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "n[0-1]",
    }
    run([["bash", SCRIPT, f"run.dir={tmp_path / 'run'}", *two["options"]]], env, tmp_path)
    four: dict[str, Any] = numbers(tmp_path / "run")
    for name, value in two["numbers"].items():
        if name != "weights" and "mismatch" not in name:  # a checksum; and differences of the last bits
            assert four[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
