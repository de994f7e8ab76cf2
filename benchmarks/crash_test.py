"""Kill every process of a run with SIGKILL at random moments: does it resume each time as if never killed?

python benchmarks/crash_test.py [kills, default 50] [seed, default 0] [torchrun | forked, default torchrun]
[data | tensor, default data] [max_staleness, default 0]

One run is launched, killed and launched again until it has been killed that often. In turn it saves while
training waits, and in the background. Half of the moments are in the seconds after it has resumed, half are
inside a save. It must resume from its newest checkpoint, undamaged. Each file of every checkpoint that it
ever made must equal the file of a run that was never killed.

With max_staleness above 0 batches depend on timing, so there is no such run. Then all rollouts are dumped,
and after each kill the dumps and the newest checkpoint together must hold every group once: none is learnt
from twice, none is lost. No token may be older than max_staleness when it is learnt from.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from dapo import files
from dapo.report import curves
from dapo.rollout import dump
from dapo.rollout.saving import read_state
from dapo.watch.server import PR_SET_PDEATHSIG

ROOT = Path(__file__).parents[1]
OPTIONS = [  # small steps, each of them saved
    "run.save_every=1", "eval.data=null", "reward.workers=0", "rollout.prompts_per_step=4",
    "rollout.prompts_per_round=4", "rollout.max_response_length=24", "reward.overlong_cache=8",
    "optim.prompts_per_minibatch=2", "optim.lr=5e-5", "optim.warmup_steps=5", "optim.weight_decay=0.1",
    "rollout.max_empty_steps=100000",
]  # fmt: skip
FORECAST = ["rollout.forecast=skip", "rollout.first_wave=3", "rollout.stop_below=0.3"]
NUM_PROMPTS = 60  # so few come again soon: what is asked for follows the record of them
MORE = 4  # steps of the last launch: more than an earlier one may have made since its newest checkpoint
LONGEST = 2.0  # seconds from resuming to a kill that is aimed at no save
# of a checkpoint that is being written: the first file, the largest, the last
AIMS = ["rollouts.json", "policy/*.distcp", files.MANIFEST]
START_TIMEOUT = 900  # seconds for a launch to resume


class Launched(Protocol):
    """A run's processes."""

    def kill(self) -> None:
        """Send SIGKILL to all of them, and wait until all have ended."""
        ...

    def status(self) -> int | None:
        """Exit status; None while the run goes on."""
        ...


class Torchrun:
    """`dapo train` under torchrun: its agent and the ranks."""

    def __init__(self, processes: int, options: list[str], log: Path):
        torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {processes} -m dapo train"
        command = [sys.executable, *torchrun.split(), "examples/arithmetic/config.yaml", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
            )

    def kill(self) -> None:
        if self.process.poll() is not None:
            return
        tree = [agent := psutil.Process(self.process.pid), *agent.children(recursive=True)]
        for process in tree:
            process.kill()
        self.process.wait()
        assert not psutil.wait_procs(tree, timeout=30)[1], "processes run on after SIGKILL"

    def status(self) -> int | None:
        return self.process.poll()


class Forked:
    """The ranks of a run as children of this process, so that torch and Megatron are imported only once."""

    def __init__(self, processes: int, options: list[str], log: Path):
        import dapo.train  # noqa: F401  # before the ranks are forked

        log.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared = where | {"WORLD_SIZE": processes, "OMP_NUM_THREADS": 1}
        process = multiprocessing.get_context("fork").Process
        arguments = [(shared | {"RANK": i, "LOCAL_RANK": i}, options, log) for i in range(processes)]
        self.ranks = [process(target=self._run, args=each) for each in arguments]
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
    def _run(environment: dict[str, Any], options: list[str], log: Path) -> None:
        from dapo.__main__ import end, main

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # every rank ends with this process
        os.environ |= {name: str(value) for name, value in environment.items()}
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
        end(main(["train", str(ROOT / "examples/arithmetic/config.yaml"), *options]))


@dataclass
class Kill:
    """One launch, how it was killed, and what it left."""

    is_async: bool
    aim: str  # killed when this file of a checkpoint appears; empty: at any time
    started: int  # the step that it reported to resume from; 0: none
    newest: int = 0  # the newest checkpoint when it was killed
    left: list[str] = field(default_factory=list)  # files of a checkpoint that it was writing

    @property
    def moment(self) -> str:
        if not self.left:
            return "sampling, learning or deleting"
        is_written = files.MANIFEST in self.left
        return "saving, all written and not yet named" if is_written else "saving, before its last file"


def crash(
    directory: Path,
    num_kills: int,
    seed: int,
    layout: str,
    launcher: Callable[[int, list[str], Path], Launched],
) -> dict[str, Any]:
    """Kill a run `num_kills` times, let it end, and compare it with one that was never killed.

    There are two processes, data or tensor parallel, as `layout` says.

    Raises:
        AssertionError: a launch failed, or the runs differ; the message says where.
    """
    made: dict[int, dict[str, Any]] = {}  # step → sums of the files of its checkpoint

    def look(run: Path) -> None:
        for step in steps_of(run):
            if step != newest(run) and damage_of(run / "checkpoints" / _name(step)):
                continue  # an old one, half deleted
            sums = sums_of(run, step)
            assert made.setdefault(step, sums) == sums, f"step {step} was made twice, and differently"

    launch, log = _launching(directory, layout, launcher, FORECAST), directory / "log"
    kills, run = kill(directory, num_kills, seed, launch, look)
    whole = directory / "whole"
    undisturbed = launch([f"run.dir={whole}", f"run.steps={newest(run)}", "run.keep_every=1"], log)
    try:
        _wait_until_it_ends(undisturbed, log)
    finally:
        undisturbed.kill()
    differing = [step for step in made if sums_of(whole, step) != made[step]]
    assert not differing, f"checkpoints of steps {differing} are not those of the run that nobody killed"
    exported, expected_export = ((each / "hf/model.safetensors").read_bytes() for each in (run, whole))
    assert exported == expected_export, "the final parameters differ"
    assert rows(run) == rows(whole), "the metrics differ"
    return {"kills": kills, "compared": len(made), "steps": newest(run)}


def crash_ahead(
    directory: Path,
    num_kills: int,
    seed: int,
    layout: str,
    launcher: Callable[[int, list[str], Path], Launched],
    max_staleness: int,
) -> dict[str, Any]:
    """Kill a run that samples ahead `num_kills` times, and let it end. Its groups must all be there, once.

    There are two processes, data or tensor parallel, as `layout` says.

    Raises:
        AssertionError: a launch failed, or a group was learnt from twice, or lost; the message says which.
    """
    found: list[Groups] = []

    def look(run: Path) -> None:
        if newest(run):
            found.append(groups_of(run, max_staleness))

    options = [f"rollout.max_staleness={max_staleness}", "rollout.dump_share=1.0"]
    kills, run = kill(directory, num_kills, seed, _launching(directory, layout, launcher, options), look)
    assert [row["step"] for row in rows(run)] == [*range(newest(run) + 1)], "not each step once"
    counts = {"steps": newest(run), "looks": len(found), "max_staleness": max_staleness}
    return counts | {"kills": kills, "groups": found}


@dataclass
class Groups:
    """What became of the groups of a run, at its newest checkpoint."""

    decided: dict[int, int]  # id → the step whose batch it was in, kept or rejected
    ages: Counter[int]  # steps → samples of kept groups whose oldest token was so old
    finished: int  # open groups in the checkpoint with their samples
    unfinished: int


def groups_of(run: Path, max_staleness: int) -> Groups:
    """Read dumps and newest checkpoint of a run that dumps all rollouts and passes over no prompt.

    Raises:
        AssertionError: a group was decided twice, or is lost, or was too old when it was learnt from.
    """
    columns = {name: dump.COLUMNS[name] for name in ("kind", "group", "versions")}
    decided: dict[int, int] = {}
    ages: Counter[int] = Counter()
    for step in range(newest(run)):
        samples = dump.read_rows(dump.path_of(run / "rollouts", step), columns)
        for id in {sample["group"] for sample in samples}:
            assert id not in decided, f"group {id} is in the batches of steps {decided[id]} and {step}"
            decided[id] = step
        ages.update(
            step - min(version for version, *_ in sample["versions"])
            for sample in samples
            if sample["kind"] == "kept"
        )
    oldest = max(ages, default=0)
    assert oldest <= max_staleness, f"a token was {oldest} steps old when it was learnt from"
    checkpoint = run / "checkpoints" / _name(newest(run))
    waiting = {id for id, *_ in read_state(checkpoint)["carried"]}
    assert not waiting & decided.keys(), f"groups {waiting & decided.keys()} would be learnt from again"
    lost = {*range(max(decided))} - decided.keys() - waiting
    assert not lost, f"groups {lost} are lost"
    finished = {group.id for group in dump.read_groups(checkpoint / "carried.parquet")}
    assert finished <= waiting
    return Groups(decided, ages, len(finished), len(waiting - finished))


Launch = Callable[[list[str], Path], Launched]


def _launching(
    directory: Path, layout: str, launcher: Callable[[int, list[str], Path], Launched], options: list[str]
) -> Launch:
    data = directory / "some.jsonl"
    rows_of_data = (ROOT / "examples/arithmetic/data/train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(rows_of_data[:NUM_PROMPTS]))
    tensor = 2 if layout == "tensor" else 1
    always = [*OPTIONS, f"parallel.tensor={tensor}", f"data.train={data}", *options]
    return lambda more, log: launcher(2, [*always, *more], log)


def kill(
    directory: Path, num_kills: int, seed: int, launch: Launch, look: Callable[[Path], None]
) -> tuple[list[Kill], Path]:
    """Launch a run and kill it `num_kills` times, then let it end. Return the kills, and its directory.

    `look` is called with it each time when no process runs. The newest checkpoint must be whole then.
    """
    moments = random.Random(seed)
    run, log = directory / "killed", directory / "log"
    kills: list[Kill] = []
    for i in range(num_kills + 1):
        expected = newest(run)
        is_async = i % 2 == 1
        is_last = i == num_kills
        steps = expected + MORE if is_last else 100_000
        options = [f"run.dir={run}", f"run.steps={steps}", f"run.async_save={str(is_async).lower()}"]
        launched = launch(options, log)
        try:
            started = _wait_until_it_resumes(launched, run, log, expected)
            wrong = f"launch {i} resumed from step {started}; the newest checkpoint was {expected}"
            assert started == expected, f"{wrong}\n{log.read_text()}"
            if is_last:
                _wait_until_it_ends(launched, log)
            else:
                kills.append(Kill(is_async, moments.choice([*AIMS, "", "", ""]), started))
                _wait_for_the_moment(kills[-1], launched, run, moments)
                assert launched.status() is None, f"launch {i} ended by itself\n{log.read_text()}"
        finally:
            launched.kill()
        if newest(run):
            damage = damage_of(run / "checkpoints" / _name(newest(run)))
            assert damage is None, f"checkpoint {newest(run)} was published damaged: {damage}"
        look(run)
        if not is_last:
            kills[-1].newest = newest(run)
            unfinished = (run / "checkpoints").glob(".step-*")
            kills[-1].left = [p.name for hidden in unfinished for p in hidden.rglob("*") if p.is_file()]
    assert not list((run / "checkpoints").glob(".*")), "a checkpoint half-written was left"
    return kills, run


def _wait_until_it_resumes(launched: Launched, run: Path, log: Path, expected: int) -> int:
    """Return the step that the launch reports to resume from; 0 if it begins."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and launched.status() is None:
        found = re.search(r"^going on from step (\d+)", log.read_text(), re.MULTILINE)
        if found:
            return int(found[1])
        if not expected and (run / "metrics.jsonl").exists():
            return 0
        time.sleep(0.01)
    raise AssertionError(f"it ended, or did not resume within {START_TIMEOUT} s:\n{log.read_text()}")


def _wait_until_it_ends(launched: Launched, log: Path) -> None:
    deadline = time.monotonic() + 10 * START_TIMEOUT
    while launched.status() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert launched.status() == 0, log.read_text()


def _wait_for_the_moment(kill: Kill, launched: Launched, run: Path, moments: random.Random) -> None:
    if not kill.aim:
        time.sleep(moments.uniform(0, LONGEST))
        return
    first = newest(run) + moments.randint(1, 3)
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and launched.status() is None:
        for path in (run / "checkpoints").glob(f".step-*/{kill.aim}"):
            hidden = path.relative_to(run / "checkpoints").parts[0]
            if int(hidden.removeprefix(".step-").removesuffix(".partial")) >= first:
                return
        time.sleep(0.0005)


def newest(run: Path) -> int:
    return max(steps_of(run), default=0)


def steps_of(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]


def sums_of(run: Path, step: int) -> dict[str, Any]:
    """Return size and checksum of a checkpoint's files, except torch's table of contents: it is random."""
    directory = run / "checkpoints" / _name(step)
    sums = files.read_manifest(directory)["files"]
    whole = {name: sum if sum[1] else [*files.sum_of(directory / name)] for name, sum in sums.items()}
    return {name: whole[name] for name in whole if name != "policy/.metadata"}


def damage_of(checkpoint: Path) -> str | None:
    """Read all of a checkpoint. Return what is damaged, or None."""
    from dapo.policy.chunks import Reader  # Megatron takes seconds to import

    return files.damage(checkpoint) or Reader(checkpoint / "policy").damage()


def rows(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without times and memory."""
    measured = ("time/", "perf/")
    return [
        {name: value for name, value in row.items() if not name.startswith(measured)}
        for row in curves.read(run / "metrics.jsonl")
    ]


def _name(step: int) -> str:
    return f"step-{step:06}"


def main(
    num_kills: str = "50",
    seed: str = "0",
    launcher: str = "torchrun",
    layout: str = "data",
    max_staleness: str = "0",
) -> None:
    from record import save, table

    begun = time.perf_counter()
    launch = {"torchrun": Torchrun, "forked": Forked}[launcher]
    with tempfile.TemporaryDirectory() as directory:
        arguments = Path(directory), int(num_kills), int(seed), layout, launch
        found = crash_ahead(*arguments, int(max_staleness)) if int(max_staleness) else crash(*arguments)
    kills: dict[tuple[str, bool], list[Kill]] = defaultdict(list)
    for each in found["kills"]:
        kills[each.moment, each.is_async].append(each)
    body = []
    for moment, is_async in sorted(kills):
        some = kills[moment, is_async]
        how = "in the background" if is_async else "while training waits"
        num_aimed = sum(bool(kill.aim) for kill in some)
        body.append([moment, how, len(some), num_aimed, sum(kill.newest - kill.started for kill in some)])
    whom = "torchrun and every rank" if launcher == "torchrun" else "every rank, forked from one process"
    killed = f"""
{num_kills} of {num_kills} launches of 2 {layout}-parallel processes were killed (SIGKILL to {whom}),
resumed from their newest checkpoint and reached step {found["steps"]}."""
    minutes = f"{(time.perf_counter() - begun) / 60:.0f} minutes.\n\n"
    name, text = ahead(found, killed, minutes) if int(max_staleness) else exact(found, killed, minutes)
    header = ["killed while", "it saves", "kills", "aimed at a save", "steps saved since its start"]
    save(name, text + table(header, body))


def exact(found: dict[str, Any], killed: str, minutes: str) -> tuple[str, str]:
    """Return the name and the beginning of the page of `crash`."""
    from record import heading

    text = heading("A run that is killed at any moment resumes as if it had never been killed")
    text += f"""{killed} All {found["compared"]} checkpoints on
the way (parameters, moments, prompts to come) equal those of the uninterrupted run, by
the checksum of every file but torch's table of contents, which holds a random number; the exported model is
equal to the bit, the metrics are equal. {minutes}"""
    return "crash_test.md", text


def ahead(found: dict[str, Any], killed: str, minutes: str) -> tuple[str, str]:
    """Return the name and the beginning of the page of `crash_ahead`."""
    from record import heading, table

    last: Groups = found["groups"][-1]
    opened = [(each.finished, each.unfinished) for each in found["groups"]]
    num_finished, num_unfinished = map(sum, zip(*opened, strict=True))
    text = heading("A run that samples ahead and is killed at any moment learns from each group once")
    looks, most = found["looks"], found["max_staleness"]
    text += f"""{killed}
It samples ahead, in process, with rollout.max_staleness={most}. {looks} times, after each kill that left a
checkpoint and at the end, the dumps of all steps and the newest checkpoint were read: no group was in two
batches; each group from the first to the last that was decided was in one batch, or open in the checkpoint;
no token that was learnt from was older than {most} steps. These checkpoints held {num_finished} open groups
with their samples and {num_unfinished} without. In the end {len(last.decided)} groups were decided, and each
step is once in metrics.jsonl. {minutes}"""
    total = last.ages.total()
    body = [[age, count, f"{100 * count / total:.0f}"] for age, count in sorted(last.ages.items())]
    text += table(["age of the oldest token, steps", "samples learnt from", "%"], body) + "\n"
    return "crash_test_ahead.md", text


if __name__ == "__main__":
    main(*sys.argv[1:])
