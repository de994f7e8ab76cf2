"""A run of two ranks is killed at random moments and starts again without a person: is it the run that nobody
killed, and what do the kills cost?

python benchmarks/unattended.py [kills, default 20] [seed, default 0] [machine | nodes | both, default both]

machine: `dapo train --restarts`; SIGKILL to one rank. nodes: two torchrun agents with --max-restarts, one
rank each; SIGKILL to a rank, to an agent, or to all of a node, also that of the main rank. An agent that has
ended is started again, as schedulers do; if it had the agents' store, all are, once the others have ended.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from crash_test import FORECAST, OPTIONS, ROOT, rows
from record import heading, save, spread, table

SAVE_EVERY = 3
STEPS_BETWEEN = 6  # at least so many new steps lie between two kills, or the run would never end
TIMEOUT = 600.0  # seconds for anything
RDZV = "--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id dapo --max-restarts 100"
# the first pause of ten seconds is for a cluster
LAUNCH = "import dapo.command.restart as r, dapo.__main__ as m; r.FIRST_PAUSE = 0.5; m.script()"


class Job:
    """What a scheduler keeps running: a launcher a node. The first node's has the store of all."""

    def __init__(self, nodes: int, options: list[str], log: Path):
        self.nodes, self.options, self.log = nodes, options, log
        self.replaced = 0  # nodes
        self.requeued = -1  # times that all nodes were started
        self.launchers: list[psutil.Popen] = []
        self._start()

    def _start(self) -> None:
        self.requeued += 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.launchers = [self._launch()]
        deadline = time.monotonic() + TIMEOUT
        while self.nodes > 1 and socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert time.monotonic() < deadline and self.launchers[0].poll() is None, self.log.read_text()
            time.sleep(0.1)
        self.launchers += [self._launch() for _ in range(1, self.nodes)]

    def _launch(self) -> psutil.Popen:
        dapo = ["train", "examples/arithmetic/config.yaml", *self.options]
        if self.nodes == 1:
            command = [sys.executable, "-c", LAUNCH, *dapo, "--nproc", "2", "--restarts", "100"]
        else:
            endpoint = f"--rdzv-endpoint=127.0.0.1:{self.port}"
            agent = ["-m", "torch.distributed.run", *RDZV.split(), endpoint]
            command = [sys.executable, *agent, "-m", "dapo", *dapo]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20"}
        with self.log.open("a") as out:
            return psutil.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def ranks(self) -> list[psutil.Process]:
        """Return the ranks' processes, by rank; none while there are too few."""
        found: dict[int, psutil.Process] = {}
        for launcher in self.launchers:
            try:
                for child in launcher.children():
                    if "RANK" in (environment := child.environ()):
                        found[int(environment["RANK"])] = child
            except psutil.Error:
                continue
        return [found[rank] for rank in sorted(found)] if len(found) == 2 else []

    def strike(self, chance: random.Random) -> str:
        """Kill something. Return what."""
        what = chance.choice(["rank", "rank", "agent", "node"] if self.nodes > 1 else ["rank"])
        ranks = self.ranks()
        victim = chance.randrange(len(ranks))
        whose = "of the main rank" if victim == 0 else "of the other rank"
        agent = ranks[victim].parent()
        if what == "rank":
            ranks[victim].kill()
        elif what == "agent":
            agent.kill()
        else:
            for process in [agent, *agent.children(recursive=True)]:
                process.kill()
        return f"{what} {whose}" if what != "rank" else ("main rank" if victim == 0 else "other rank")

    def look_after(self) -> float:
        """Start again what has failed. Return the seconds that nodes took to end without the first one."""
        failed = [i for i, launcher in enumerate(self.launchers) if launcher.poll() not in (None, 0)]
        if failed and 0 not in failed:
            self.replaced += len(failed)
            for i in failed:
                self.launchers[i] = self._launch()
            return 0.0
        if not failed:
            return 0.0
        begun = time.monotonic()
        # an agent that was started since the first has failed waits for it: it has no rank, and goes with it
        waiting = [launcher for launcher in self.launchers if not _has_ranks(launcher)]
        _, alive = psutil.wait_procs(
            [each for each in self.launchers if each not in waiting], timeout=TIMEOUT
        )
        for launcher in waiting:
            if launcher.poll() is None:
                launcher.kill()
            launcher.wait()
        assert not alive, f"a node goes on without the others: {self.log.read_text()[-6000:]}"
        seconds = time.monotonic() - begun
        self._start()
        return seconds

    def is_done(self) -> bool:
        return all(launcher.poll() == 0 for launcher in self.launchers)

    def kill(self) -> None:
        for launcher in self.launchers:
            if launcher.poll() is None:
                for process in [launcher, *launcher.children(recursive=True)]:
                    process.kill()
            launcher.wait()


def _has_ranks(launcher: psutil.Popen) -> bool:
    try:
        return any("RANK" in child.environ() for child in launcher.children())
    except psutil.Error:
        return False


def steps(run: Path) -> int:
    return max((row["step"] for row in rows(run)), default=-1) + 1


def unattended(nodes: int, kills: int, seed: int, directory: Path) -> dict[str, Any]:
    """Kill a run of so many nodes so often. Raise AssertionError if it is not the run that nobody killed."""
    chance, killed, whole = random.Random(seed), directory / "killed", directory / "whole"
    log, total = directory / "log", kills * STEPS_BETWEEN + 2 * STEPS_BETWEEN
    common = [
        *OPTIONS,
        *FORECAST,
        "rollout.max_empty_steps=1000",
        f"run.save_every={SAVE_EVERY}",
        f"run.steps={total}",
        "run.keep_checkpoints=2",
    ]
    start = time.monotonic()
    job = Job(nodes, [*common, f"run.dir={killed}"], log)
    struck: list[str] = []
    lost: list[int] = []  # steps made anew after each kill
    back: list[float] = []  # seconds from a kill to the first new step
    others: list[float] = []  # seconds until the other nodes had ended
    try:
        aim, began = STEPS_BETWEEN, time.monotonic()
        while not job.is_done():
            assert time.monotonic() - began < TIMEOUT, log.read_text()[-5000:]
            if waited := job.look_after():
                others.append(waited)
            made = steps(killed)
            if len(struck) < kills and made >= aim and len(job.ranks()) == 2:
                time.sleep(chance.uniform(0, 1.0))
                made = steps(killed)
                if len(job.ranks()) < 2:
                    continue
                struck.append(job.strike(chance))
                moment = time.monotonic()
                aim = _wait_for_a_new_step(job, killed, made, moment, others, log) + STEPS_BETWEEN - 1
                back.append(time.monotonic() - moment)
                lost.append(made - made // SAVE_EVERY * SAVE_EVERY)
                began = time.monotonic()
            time.sleep(0.05)
    finally:
        job.kill()
    seconds = time.monotonic() - start
    undisturbed = Job(nodes, [*common, f"run.dir={whole}"], log)
    begun = time.monotonic()
    try:
        while not undisturbed.is_done():
            assert time.monotonic() - begun < TIMEOUT and not undisturbed.look_after(), log.read_text()[
                -5000:
            ]
            time.sleep(0.1)
    finally:
        undisturbed.kill()
    ideal = time.monotonic() - begun
    final, expected = ((each / "hf/model.safetensors").read_bytes() for each in (killed, whole))
    assert final == expected, "the final parameters differ"
    assert rows(killed) == rows(whole), "the metrics differ"
    replaced = f"{job.replaced} nodes, {job.requeued} times all"
    return {
        "struck": Counter(struck), "requeued": replaced, "steps": total, "lost": lost, "back": back,
        "others": others, "ratio": ideal / seconds,
    }  # fmt: skip


def _wait_for_a_new_step(
    job: Job, run: Path, made: int, moment: float, others: list[float], log: Path
) -> int:
    """Wait until the run has made more steps than before the kill. Return their number."""
    while steps(run) <= made and not job.is_done():
        assert time.monotonic() - moment < TIMEOUT, log.read_text()[-5000:]
        if waited := job.look_after():
            others.append(waited)
        time.sleep(0.05)
    return steps(run)


def main(kills: str = "20", seed: str = "0", which: str = "both") -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    modes = {"machine": 1, "nodes": 2}
    found = {}
    for name, nodes in modes.items():
        if which in (name, "both"):
            with tempfile.TemporaryDirectory() as directory:
                found[name] = unattended(nodes, int(kills), int(seed), Path(directory))
            save("unattended.md", report(found))  # what follows may fail


def report(found: dict[str, dict[str, Any]]) -> str:
    text = heading("A run that is killed at random moments and starts again without a person")
    text += f"""
SIGKILL at random moments; a checkpoint every {SAVE_EVERY} steps; final parameters and metrics are equal to
those of the run that nobody killed, to the bit. The ratio is the undisturbed run's seconds, of one start and
tiny steps, over the killed run's: a cluster's is 1 − (kills × (half a save interval + one start)) / its time.

"""
    body = []
    for name, result in found.items():
        struck = ", ".join(f"{n} × {what}" for what, n in sorted(result["struck"].items()))
        body.append([
            name, struck, result["requeued"], f"{spread(result['lost'], 0)} (at most {SAVE_EVERY})",
            spread(result["back"], 1), spread(result["others"] or [0.0], 1), f"{result['ratio']:.2f}",
        ])  # fmt: skip
    header = [
        "",
        "killed",
        "started anew by the scheduler",
        "steps made again",
        "s from a kill to a new step",
    ]
    header += ["s until the other nodes had ended", "effective training time ratio"]
    return text + table(header, body)


if __name__ == "__main__":
    main(*sys.argv[1:])
