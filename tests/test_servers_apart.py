"""Servers on nodes of their own, examples/qwen2.5_7b: server.sh is run with a stand-in for SGLang,
slurm.sbatch with one for SLURM.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dapo.engine.control import Server
from dapo.types import EngineError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SGLang runs on Linux")
ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples/qwen2.5_7b"


def write_command(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def two_free_ports() -> int:
    """The first of them."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def until(condition: Callable[[], Any], limit: float = 60) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_up(port: int) -> bool:
    try:
        return bool(Server(f"http://127.0.0.1:{port}").get("/model_info"))
    except EngineError:
        return False


def server_at(script: subprocess.Popen, port: int) -> psutil.Process | None:
    for process in psutil.Process(script.pid).children(recursive=True):
        try:
            if str(port) in process.cmdline():
                return process
        except psutil.Error:
            continue
    return None


def test_a_server_that_dies_takes_no_other_along_and_comes_back(tmp_path: Path) -> None:
    copy, programs = tmp_path / "examples/qwen2.5_7b/server.sh", tmp_path / ".venv/bin"
    copy.parent.mkdir(parents=True)
    programs.mkdir(parents=True)
    shutil.copy(SCRIPTS / "server.sh", copy)
    write_command(programs, "python", f'exec {sys.executable} "$@"')
    write_command(tmp_path, "python", "exit 9")  # of PATH: the clone's comes first
    (tmp_path / "model").mkdir()
    port = two_free_ports()
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "tests/sglang/fake"),
        "TMPDIR": str(tmp_path),
    }
    env |= {
        "MODEL": str(tmp_path / "model"),
        "DAPO_ENGINE_KEY": "secret",
        "GPUS": "4",
        "TP": "2",
        "FIRST_PORT": str(port),
    }
    command = [str(copy), "--mem-fraction-static", "0.85"]
    with open(tmp_path / "stderr", "w") as stderr:
        script = subprocess.Popen(command, env=env, stdout=stderr, stderr=stderr, start_new_session=True)
    try:
        until(lambda: is_up(port) and is_up(port + 1))
        first, second = server_at(script, port), server_at(script, port + 1)
        assert first and second
        assert [process.environ()["CUDA_VISIBLE_DEVICES"] for process in (first, second)] == ["0,1", "2,3"]
        line = " ".join(first.cmdline())
        assert (
            "--tp-size 2 --host 0.0.0.0" in line
            and "--mem-fraction-static 0.85" in line
            and "secret" not in line
        )
        [config] = tmp_path.glob("*/server.yaml")
        assert config.read_text() == 'api-key: "secret"\n' and config.stat().st_mode & 0o077 == 0

        first.kill()
        until(lambda: not is_up(port))
        until(lambda: is_up(port))
        assert second.is_running() and server_at(script, port).pid != first.pid  # type: ignore[union-attr]

        script.terminate()
        assert script.wait(30) == 143
        assert not is_up(port) and not is_up(port + 1) and not config.exists()
        assert f"the server at port {port} ended with status 137" in (tmp_path / "stderr").read_text()
    finally:
        os.killpg(script.pid, signal.SIGKILL)  # the stand-in's children, too


def test_a_job_gives_trainers_and_servers_their_nodes_and_ends_with_the_trainer(tmp_path: Path) -> None:
    write_command(tmp_path, "scontrol", "printf 'n%s\\n' 0 1 2 3")
    told = 'printf "%s\\n" "$*" "SERVERS=$SERVERS" "$HEAD $NODES $SRUN_CPUS_PER_TASK" >"$LOGS/$name"'
    which = '[[ "$*" == *server.sh* ]] && name=servers || name=trainer'
    srun = f"{which}\n{told}\n[[ $name == trainer ]] || exec sleep 60"
    write_command(tmp_path, "srun", f"{srun}\nuntil [[ -s $LOGS/servers ]]; do sleep 0.05; done\nexit 3")
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOGS": str(tmp_path),
        "SLURM_JOB_NODELIST": "n[0-3]",
        "TP": "4",
    }
    env |= {"SLURM_CPUS_PER_TASK": "96"}
    job = subprocess.run(["bash", SCRIPTS / "slurm.sbatch", "optim.lr=2e-6"], cwd=ROOT, env=env, timeout=30)
    assert job.returncode == 3, "the trainer's"
    servers, trainer = [(tmp_path / name).read_text().splitlines() for name in ("servers", "trainer")]
    assert "--nodes 2 --ntasks 2 --nodelist n2,n3 bash examples/qwen2.5_7b/server.sh" in servers[0]
    assert "--nodes 2 --ntasks 2 --nodelist n0,n1" in trainer[0] and trainer[0].endswith(
        "trainer optim.lr=2e-6"
    )
    assert trainer[1:] == ["SERVERS=n2:30000 n2:30001 n3:30000 n3:30001", "n0 2 96"]
    directives = [
        line for line in (SCRIPTS / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")
    ]
    assert {"#SBATCH --exclusive", "#SBATCH --ntasks-per-node=1"} <= set(directives)
    assert any(line.startswith("#SBATCH --cpus-per-task=") for line in directives)


SRUN = """
[[ "$*" == *server.sh* ]] && exec sleep 60
trap 'exit 1' TERM  # as torchrun ends
touch "$LOGS/trains"
for ((i = 0; i < 100; i++)); do sleep 0.1; [ -e "$LOGS/fails" ] && exit 1; done
"""


@pytest.mark.parametrize(
    ("how", "failures", "state", "is_queued"),
    [
        ("USR1", "9", "RUNNING", True),  # the time is up: whatever happened before
        ("fails", "2", "RUNNING", True),
        ("fails", "3", "RUNNING", False),
        ("TERM", "0", "COMPLETING", False),  # somebody cancels it
    ],
)
def test_a_job_whose_time_is_up_or_that_failed_is_queued_again(
    tmp_path: Path, how: str, failures: str, state: str, is_queued: bool
) -> None:
    for name in ("examples", ".venv"):  # what is written lies beside it
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "slurm-77.failures").write_text("a date\n" * int(failures))
    write_command(tmp_path, "scontrol", """echo "$*" >>"$LOGS/asked"; printf 'n%s\\n' 0 1 2 3""")
    write_command(tmp_path, "squeue", f"echo {state}")
    write_command(tmp_path, "srun", SRUN)
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOGS": str(tmp_path), "SLURM_JOB_NODELIST": "n[0-3]",
        "SLURM_JOB_ID": "77",
    }  # fmt: skip
    job = subprocess.Popen(["bash", SCRIPTS / "slurm.sbatch"], cwd=tmp_path, env=env)
    until((tmp_path / "trains").exists)
    if how == "fails":
        (tmp_path / "fails").touch()
    else:
        job.send_signal(getattr(signal, f"SIG{how}"))
    assert job.wait(30) == 1
    asked = (tmp_path / "asked").read_text().splitlines()
    assert ("requeue 77" in asked) is is_queued
