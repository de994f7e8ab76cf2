"""kill -9 of every process of a run, at random moments, again and again: does every resume succeed, and is it
the run that nobody killed?

python benchmarks/crash_test.py [kills, default 50] [seed, default 0] [torchrun | forked, default torchrun]
[data | tensor, default data]

One run is launched, killed and launched again until it has been killed that often; it saves while training
waits and in the background, in turn. Half of the moments are anywhere in the seconds after it has gone on,
half inside a save. What it goes on from must be its newest checkpoint, whole; every checkpoint that it ever
made, file by file, must be the one of that step of a run that was left alone.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from dapo import files
from dapo.engine.guardian import PR_SET_PDEATHSIG

ROOT = Path(__file__).parents[1]
OPTIONS = [  # small steps, each of them saved
    "run.save_every=1", "eval.data=null", "reward.workers=0", "rollout.prompts_per_step=4", "rollout.prompts_per_round=4",
    "rollout.max_response_length=24", "reward.overlong_cache=8", "optim.prompts_per_minibatch=2", "optim.lr=5e-5", "optim.warmup_steps=5",
    "optim.weight_decay=0.1", "rollout.max_staleness=1",
]  # fmt: skip
LONGEST = 2.0  # seconds from going on to a kill that is aimed at no save
# of a checkpoint that is being written: the first file, the largest, the last
AIMS = ["rollouts.json", "policy/*.distcp", files.MANIFEST]
START_SECONDS = 900  # after so many a launch that does not go on has failed


class Launched(Protocol):
    """A run's processes."""

    def kill(self) -> None:
        """SIGKILL to all of them at once; none is left when it returns."""
        ...

    def status(self) -> int | None:
        """How it ended; None while it runs."""
        ...


class Torchrun:
    """`dapo train` under torchrun: its agent and the ranks."""

    def __init__(self, processes: int, options: list[str], log: Path):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "-m",
            "dapo",
            "train",
        ]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "examples/arithmetic/config.yaml", *options],
                cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def kill(self) -> None:
        if self.process.poll() is not None:
            return
        tree = [agent := psutil.Process(self.process.pid), *agent.children(recursive=True)]
        for process in tree:
            process.kill()
        self.process.wait()
        assert not psutil.wait_procs(tree, timeout=30)[1], "processes outlived a SIGKILL"

    def status(self) -> int | None:
        return self.process.poll()


class Forked:
    """The ranks of a run, as children of this process: torch and Megatron are imported once, and not for
    every launch.
    """

    def __init__(self, processes: int, options: list[str], log: Path):
        import dapo.train  # noqa: F401  # before the ranks are forked

        log.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = {
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
        }
        fork = multiprocessing.get_context("fork")
        self.ranks = [
            fork.Process(target=self._run, args=(rank, where, options, log)) for rank in range(processes)
        ]
        for rank in self.ranks:
            rank.start()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()

    def status(self) -> int | None:
        codes = [rank.exitcode for rank in self.ranks]
        return None if None in codes else max(map(abs, codes))

    @staticmethod
    def _run(rank: int, where: dict[str, Any], options: list[str], log: Path) -> None:
        import dapo.__main__

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives this process
        os.environ |= {
            name: str(value) for name, value in (where | {"RANK": rank, "LOCAL_RANK": rank}).items()
        }
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
        dapo.__main__.end(
            dapo.__main__.main(["train", str(ROOT / "examples/arithmetic/config.yaml"), *options])
        )


@dataclass
class Kill:
    """One launch, its end, and what it left."""

    is_async: bool
    aim: str  # the file of a checkpoint at whose appearing it is killed; empty: at any time
    started: int  # the step that it said it went on from; 0: none
    newest: int = 0  # the newest checkpoint when it was killed
    left: list[str] = field(default_factory=list)  # files of the checkpoint that it was writing, if it was

    @property
    def moment(self) -> str:
        if not self.left:
            return "sampling, learning or deleting"
        return (
            "saving, before its last file"
            if files.MANIFEST not in self.left
            else "saving, all written and not yet named"
        )


def crash(
    directory: Path,
    num_kills: int,
    seed: int,
    layout: str,
    launcher: Callable[[int, list[str], Path], Launched],
) -> dict[str, Any]:
    """Kill a run `num_kills` times, let it end, and compare it with one that was left alone. What differs is
    an assertion's message.

    Two processes; `layout`: "data", each with a share of the samples and of the optimizer's state, or
    "tensor".
    """

    def launch(options: list[str], log: Path) -> Launched:
        return launcher(2, [f"parallel.tensor={2 if layout == 'tensor' else 1}", *options], log)

    moments, run, log = random.Random(seed), directory / "killed", directory / "log"
    kills: list[Kill] = []
    made: dict[int, dict[str, Any]] = {}  # step → sums of the files of its checkpoint
    for i in range(num_kills + 1):
        expected = newest(run)
        is_last = i == num_kills
        steps = expected + 2 if is_last else 100_000
        options = [
            *OPTIONS,
            f"run.dir={run}",
            f"run.steps={steps}",
            f"run.async_save={str(i % 2 == 1).lower()}",
        ]
        launched = launch(options, log)
        try:
            started = _wait_until_it_goes_on(launched, run, log, expected)
            assert started == expected, (
                f"launch {i} went on from step {started}; the newest checkpoint was "
                f"{expected}\n{log.read_text()}"
            )
            if is_last:
                _wait_until_it_ends(launched, log)
            else:
                kills.append(
                    Kill(is_async=i % 2 == 1, aim=moments.choice([*AIMS, "", "", ""]), started=started)
                )
                _wait_for_the_moment(kills[-1], launched, run, moments)
                assert launched.status() is None, f"launch {i} ended by itself\n{log.read_text()}"
        finally:
            launched.kill()
        for step in steps_of(run):
            if step == newest(run):
                assert (damage := files.damage(run / "checkpoints" / _name(step))) is None, (
                    f"checkpoint {step} was published damaged: {damage}"
                )
            elif files.damage(run / "checkpoints" / _name(step)) is not None:
                continue  # an old one, half deleted
            sums = sums_of(run, step)
            assert made.setdefault(step, sums) == sums, f"step {step} was made twice, and differently"
        if not is_last:
            kills[-1].newest = newest(run)
            kills[-1].left = [
                path.name
                for hidden in (run / "checkpoints").glob(".step-*")
                for path in hidden.rglob("*")
                if path.is_file()
            ]
    whole = directory / "whole"
    undisturbed = launch([*OPTIONS, f"run.dir={whole}", f"run.steps={newest(run)}", "run.keep_every=1"], log)
    try:
        _wait_until_it_ends(undisturbed, log)
    finally:
        undisturbed.kill()
    differing = [step for step in made if sums_of(whole, step) != made[step]]
    assert not differing, f"checkpoints of steps {differing} are not those of the run that nobody killed"
    assert (run / "hf/model.safetensors").read_bytes() == (whole / "hf/model.safetensors").read_bytes(), (
        "the final parameters differ"
    )
    assert rows(run) == rows(whole), "the metrics differ"
    assert not list((run / "checkpoints").glob(".*")), "a checkpoint half-written was left"
    return {"kills": kills, "compared": len(made), "steps": newest(run)}


def _wait_until_it_goes_on(launched: Launched, run: Path, log: Path, expected: int) -> int:
    """The step that the launch says it goes on from; 0 where it begins."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and launched.status() is None:
        said = [line for line in log.read_text().splitlines() if line.startswith("going on from step ")]
        if said:
            return int(said[0].split()[4])
        if not expected and (run / "metrics.jsonl").exists():
            return 0
        time.sleep(0.01)
    raise AssertionError(f"it ended, or did not go on within {START_SECONDS} s:\n{log.read_text()}")


def _wait_until_it_ends(launched: Launched, log: Path) -> None:
    deadline = time.monotonic() + 10 * START_SECONDS
    while launched.status() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert launched.status() == 0, log.read_text()


def _wait_for_the_moment(kill: Kill, launched: Launched, run: Path, moments: random.Random) -> None:
    if not kill.aim:
        time.sleep(moments.uniform(0, LONGEST))
        return
    first, deadline = newest(run) + moments.randint(1, 3), time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and launched.status() is None:
        writing = [
            path.relative_to(run / "checkpoints").parts[0]
            for path in (run / "checkpoints").glob(f".step-*/{kill.aim}")
        ]
        if any(int(name.removeprefix(".step-").removesuffix(".partial")) >= first for name in writing):
            return
        time.sleep(0.0005)


def newest(run: Path) -> int:
    return max(steps_of(run), default=0)


def steps_of(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]


def sums_of(run: Path, step: int) -> dict[str, Any]:
    """Of the files of a checkpoint: all but the table of contents, in which torch keeps a random number."""
    sums = files.read_manifest(run / "checkpoints" / _name(step))["files"]
    return {name: sums[name] for name in sums if name != "policy/.metadata"}


def rows(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of every step but its times and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))} for line in lines
    ]


def _name(step: int) -> str:
    return f"step-{step:06}"


def main(num_kills: str = "50", seed: str = "0", launcher: str = "torchrun", layout: str = "data") -> None:
    from record import heading, save, table

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        found = crash(
            Path(directory),
            int(num_kills),
            int(seed),
            layout,
            {"torchrun": Torchrun, "forked": Forked}[launcher],
        )
    kills = found["kills"]
    body = []
    for moment, is_async in sorted({(kill.moment, kill.is_async) for kill in kills}):
        of = [kill for kill in kills if (kill.moment, kill.is_async) == (moment, is_async)]
        kind = "in the background" if is_async else "while training waits"
        body.append(
            [
                moment,
                kind,
                len(of),
                sum(bool(kill.aim) for kill in of),
                sum(kill.newest - kill.started for kill in of),
            ]
        )
    text = heading("Killed at any moment, a run goes on as if it had not been")
    whom = "torchrun and every rank" if launcher == "torchrun" else "every rank, forked from one process"
    text += f"\n{num_kills} of {num_kills} launches of 2 {layout}-parallel processes were killed (SIGKILL to {whom}), "
    text += f"went on from their newest checkpoint and came to step {found['steps']}. All {found['compared']} checkpoints met on the way, "
    text += "parameters, moments, prompts to come, groups carried over, are the uninterrupted run's of that step, by the checksum of every "
    text += (
        "file but torch's table of contents, which holds a random number; the exported model is equal to the "
        "bit, the metrics are equal. "
    )
    text += f"{(time.perf_counter() - begun) / 60:.0f} minutes.\n\n"
    save(
        "crash_test.md",
        text
        + table(
            ["killed while", "it saves", "kills", "aimed at a save", "steps saved since its start"], body
        ),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
