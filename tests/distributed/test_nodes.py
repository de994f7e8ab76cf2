"""Several machines, one torchrun agent each, as the launch script starts them: here both on this one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.distributed.launch import ROOT, measured, numbers


def test_two_agents_of_one_process_train_to_the_numbers_of_one_agent_of_two(tmp_path: Path) -> None:
    one_agent = measured("tests.distributed.traces", 2)["data-parallel"]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    env = os.environ | {
        "NODES": "2", "GPUS": "1", "HEAD": "127.0.0.1", "PORT": str(port),
        "CONFIG": "examples/arithmetic/config.yaml",
        "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    command = [
        "bash",
        "examples/qwen2.5_32b_paper/launch.sh",
        f"run.dir={tmp_path / 'run'}",
        *one_agent["options"],
    ]
    agents = []
    for i in range(2):
        with open(tmp_path / f"agent{i}", "w") as printed:
            agents.append(
                subprocess.Popen(command, cwd=ROOT, env=env, stdout=printed, stderr=subprocess.STDOUT)
            )
    try:
        status = [agent.wait(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
    assert status == [0, 0], "".join((tmp_path / f"agent{i}").read_text()[-3000:] for i in range(2))
    assert numbers(tmp_path / "run") == one_agent["numbers"]
