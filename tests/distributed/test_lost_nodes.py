"""Two machines, one torchrun agent each, in network namespaces: the network is cut, a machine dies, the one
with the agents' store dies. The others end in time with the reason, and the same command goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed.launch import ROOT, torchrun

STEPS = 200
OPTIONS = [
    "eval.data=null", "reward.workers=0", "rollout.prompts_per_step=4", "rollout.prompts_per_round=4",
    "rollout.max_response_length=24", "reward.overlong_cache=8", "optim.prompts_per_minibatch=2",
    "run.save_every=1", "engine.stall_seconds=5", "parallel.tensor=1",
]  # fmt: skip
MACHINES = {"a": "10.77.0.1", "b": "10.77.0.2"}  # the first has the agents' store
WIRES = {"a": "to-b", "b": "to-a"}
TIMEOUT = 180.0  # seconds


def network(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wire() -> Iterator[str]:
    """The name of two namespaces with a wire between them, without the letter of the machine."""
    name = f"dapo{uuid.uuid4().hex[:6]}"
    if shutil.which("ip") is None or network("netns", "add", f"{name}a").returncode:
        pytest.skip("network namespaces want root and iproute2")
    try:
        network("netns", "add", f"{name}b")
        ends = ["link", "add", "to-b", "netns", f"{name}a", "type", "veth", "peer", "name", "to-a"]
        assert network(*ends, "netns", f"{name}b").returncode == 0
        for machine, address in MACHINES.items():
            inside = ["-n", f"{name}{machine}"]
            network(*inside, "addr", "add", f"{address}/24", "dev", WIRES[machine])
            network(*inside, "link", "set", WIRES[machine], "up")
            network(*inside, "link", "set", "lo", "up")
        yield name
    finally:
        for machine in MACHINES:
            network("netns", "del", f"{name}{machine}")


def started(wire: str, folder: Path, run: Path) -> dict[str, psutil.Popen]:
    """Start both machines' agents; return once a step is made."""
    done = steps(run)
    agents = {}
    for machine, address in MACHINES.items():
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": WIRES[machine],
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "30",
        }
        where = f"--rdzv-endpoint {MACHINES['a']}:29511 --rdzv-conf is_host={machine == 'a'}"
        agent = f"-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d {where}"
        command = [*agent.split(), "--local-addr", address, "-m", "dapo", "train"]
        options = [f"run.dir={run}", f"run.steps={STEPS}", *OPTIONS]
        with (folder / machine).open("w") as printed:
            agents[machine] = psutil.Popen(
                ["ip", "netns", "exec", f"{wire}{machine}", sys.executable, *command,
                 "examples/arithmetic/config.yaml", *options],
                cwd=ROOT, env=env, stdout=printed, stderr=subprocess.STDOUT,
            )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT
    while steps(run) <= done:
        assert time.monotonic() < deadline, (folder / "a").read_text()[-3000:]
        time.sleep(0.1)
    return agents


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill(agent: psutil.Popen) -> None:
    """As if its machine lost its power."""
    for process in [agent, *agent.children(recursive=True)]:
        process.kill()
    agent.wait()


def ended(agent: psutil.Popen, printed: Path) -> str:
    """Wait until the agent has ended. Return what its rank said last."""
    status = agent.wait(TIMEOUT)
    lines = printed.read_text().splitlines()
    said = [line for line in lines if line.startswith(("error: ", "interrupted"))]
    assert status != 0 and said, lines[-40:]
    return said[-1]


def test_a_run_goes_on_after_each_way_to_lose_a_machine(wire: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    agents = started(wire, tmp_path, run)
    begun = time.monotonic()
    network("-n", f"{wire}b", "link", "set", "to-a", "down")
    said = ended(agents["a"], tmp_path / "a")
    assert "no progress" in said or "cannot be reached" in said or "stopped" in said, said
    assert time.monotonic() - begun < 60, "12 × engine.stall_seconds"
    while agents["b"].children(recursive=True) and time.monotonic() - begun < 90:
        time.sleep(0.5)
    ranks = [p for p in agents["b"].children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    assert not ranks, "the rank that was cut off goes on"
    kill(agents["b"])
    network("-n", f"{wire}b", "link", "set", "to-a", "up")

    agents = started(wire, tmp_path, run)
    kill(agents["b"])
    said = ended(agents["a"], tmp_path / "a")
    assert "another rank's process has ended" in said, said

    agents = started(wire, tmp_path, run)
    kill(agents["a"])
    said = ended(agents["b"], tmp_path / "b")
    assert "has ended" in said, said

    going_on = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] + 3
    options = [*OPTIONS, f"run.steps={going_on}"]
    dapo = ["-m", "dapo", "train", "examples/arithmetic/config.yaml", *options]
    for directory in (run, tmp_path / "undisturbed"):
        done = torchrun(2, *dapo, f"run.dir={directory}")
        assert done.returncode == 0, done.stdout[-3000:]
    killed, undisturbed = (d / "hf/model.safetensors" for d in (run, tmp_path / "undisturbed"))
    assert killed.read_bytes() == undisturbed.read_bytes()
