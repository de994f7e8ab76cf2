"""Stop, kill or signal every process of a run in every phase: does it go on, or end, and say so?

python benchmarks/faults.py [target …]: all of TARGETS, or those named. Two ranks on the CPU; servers are the
tests' stand-in for SGLang. A fault that a run survives is followed by the next one in the same run.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
SIGNALS = ("SIGSTOP", "SIGKILL", "SIGTERM", "SIGHUP")
ENDING = ("main rank", "other rank", "launcher")  # a fault of one of these ends most runs
SURVIVED = ("server", "server's guardian", "reward worker", "worker's guardian", "rank's guardian")
WHOLE_JOB = "whole job"  # SIGSTOP to every process at once, and SIGCONT after SUSPENDED seconds
TARGETS = (*ENDING, *SURVIVED, WHOLE_JOB)
PHASES = ("rollout", "scoring", "update", "sync", "checkpoint", "eval")
STALL = 6.0  # engine.stall_seconds
SUSPENDED = 4 * STALL
LONGEST = 90.0  # seconds for a run to end after a fault
EVAL_ROWS = 8
MARK = "DAPO_FAULTS_RUN"  # environment variable of every process of one launch
FOLDER, FAULTS = "DAPO_FAULTS_FOLDER", "DAPO_FAULTS"  # and what `prepare` reads
RANK = ["-u", "-m", "dapo"]  # how the launcher starts one
START = f"""import os, sys
if "RANK" in os.environ and sys.orig_argv[1:4] == {RANK}:
    import faults
    faults.prepare()
"""
OPTIONS = [
    "run.save_every=1", "rollout.prompts_per_step=4", "rollout.prompts_per_round=4",
    "rollout.max_response_length=24", "rollout.max_empty_steps=1000", "reward.overlong_cache=8",
    "reward.workers=1", "reward.time_limit=1",
    "optim.prompts_per_minibatch=4", "parallel.tensor=2", "eval.every=1", "eval.samples=1",
    f"engine.stall_seconds={STALL}",
]  # fmt: skip
WITH_SERVERS = ["engine.kind=sglang", "engine.weight_sync=disk", "reward.function=faults:is_even"]
SAYS = ("error: ", "interrupted", "stalled: ", "dapo: ")


@dataclass(frozen=True)
class Fault:
    """One signal to one process, at the beginning of a phase."""

    signal: str
    target: str
    phase: str

    def __str__(self) -> str:
        return ":".join((self.signal, self.target, self.phase))


@dataclass
class Outcome:
    """What became of a launch."""

    fired: list[str]
    statuses: dict[int, int]  # exit status of each rank that returned one
    status: int | None  # the launcher's; None if it did not end
    is_finished: bool  # all steps were made
    is_saved: bool  # it said so, and there is a checkpoint
    seconds: float  # from the last fault to the end of the last process of the run
    lines: list[str]  # what the program said about it
    survivors: list[str] = field(default_factory=list)
    printed: str = ""

    def verdict(self) -> str:
        if self.survivors:
            return "SURVIVORS"
        if self.status is None:
            return "HANGS"
        if self.is_finished:
            return "goes on"
        if not self.lines:
            return "SILENT"
        return "saved" if self.is_saved else "stopped"


def launch(faults: Sequence[Fault], *options: str, with_servers: bool = False) -> Outcome:
    """Train on two ranks and let the faults happen, one after another in steps of their own."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heldout = (ROOT / "examples/arithmetic/data/heldout.jsonl").read_text().splitlines()[:EVAL_ROWS]
        (folder / "heldout.jsonl").write_text("\n".join(heldout) + "\n")
        path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            MARK: mark,
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        if with_servers:
            path.insert(0, str(ROOT / "tests/sglang/fake"))
            options = (*WITH_SERVERS, *options)
        # every rank begins with `prepare`
        (folder / "sitecustomize.py").write_text(START)
        environment["PYTHONPATH"] = os.pathsep.join([name, *path])
        environment[FOLDER], environment[FAULTS] = name, json.dumps(list(map(str, faults)))
        steps = 2 * len(faults) + 4
        values = [*OPTIONS, f"run.steps={steps}", f"run.dir={folder / 'run'}",
                  f"eval.data={folder / 'heldout.jsonl'}", *options]  # fmt: skip
        config = "examples/arithmetic/config.yaml"
        command = [sys.executable, "-m", "dapo", "train", config, "--nproc", "2", *values]
        with (folder / "printed").open("w") as out:
            launcher = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,  # else a shell that ends sends SIGHUP to what is stopped
                preexec_fn=_default_signals,
            )  # fmt: skip
        is_ended = _wait(folder, launcher, mark, len(faults))
        fired = (folder / "fired").read_text().splitlines() if (folder / "fired").exists() else []
        last = float(fired[-1].split()[0]) if fired else time.time()
        seconds = time.time() - last
        survivors = _end_all(mark)
        printed = (folder / "printed").read_text(errors="replace")
        manifests = (folder / "run/checkpoints").glob("step-*/manifest.json")
        return Outcome(
            fired=[line.split(maxsplit=1)[1] for line in fired],
            statuses={rank: int((folder / f"status-{rank}").read_text())
                      for rank in (0, 1) if (folder / f"status-{rank}").exists()},
            status=launcher.returncode if is_ended else None,
            is_finished=(folder / "run/hf").exists(),
            is_saved="; saved in " in printed and any(manifests),
            seconds=seconds,
            lines=[line for line in printed.splitlines() if line.startswith(SAYS)],
            survivors=survivors,
            printed=printed,
        )  # fmt: skip


def _default_signals() -> None:
    """Undo nohup, and what a shell does to a process in the background."""
    for name in (signal.SIGHUP, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)


def _wait(folder: Path, launcher: subprocess.Popen[bytes], mark: str, num_faults: int) -> bool:
    """Wait until the launch has ended. Return False if it has not, LONGEST seconds after the last fault."""
    fired, since = 0, time.monotonic()
    while True:
        number = len((folder / "fired").read_text().splitlines()) if (folder / "fired").exists() else 0
        if number != fired:
            fired, since = number, time.monotonic()
            if WHOLE_JOB in (folder / "fired").read_text().splitlines()[-1]:
                _suspend(mark)
        if launcher.poll() is not None and not _marked(mark):
            return True
        ranks = [command for command in _marked(mark).values() if command[1:4] == RANK]
        if fired and not ranks and launcher.poll() is None:
            launcher.send_signal(signal.SIGCONT)  # it may be the one that was stopped
        if time.monotonic() - since > (LONGEST if fired else 2 * LONGEST):
            return False
        time.sleep(0.2)


def _suspend(mark: str) -> None:
    processes = list(_marked(mark))
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        time.sleep(SUSPENDED if number == signal.SIGSTOP else 0)


def _marked(mark: str) -> dict[int, list[str]]:
    """Return id → command of the processes of a launch that have not ended."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
            if process.environ().get(MARK) == mark and (command := process.cmdline()):
                found[process.pid] = command
    return found


def _end_all(mark: str) -> list[str]:
    """Kill what is left of a launch. Return the commands."""
    left = _marked(mark)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return [" ".join(command)[-100:] for command in left.values()]


def is_even(response: str, answer: str) -> bool:
    """The reward where the stand-in's servers answer."""
    return len(response) % 2 == 0


# in a rank


def prepare() -> None:
    """Let the main rank bring the faults about, and every rank keep its exit status."""
    from dapo import clock
    from dapo.reward.pool import Reward

    number, folder = int(os.environ["RANK"]), Path(os.environ[FOLDER])
    this, end = os.getpid(), os._exit

    def keep_and_end(status: int) -> None:
        if os.getpid() == this:  # and not a process that it has forked
            (folder / f"status-{number}").write_text(str(status))
        end(status)

    os._exit = keep_and_end  # type: ignore[assignment]
    (folder / f"pid-{number}").write_text(str(os.getpid()))
    if number == 0:
        trigger = Trigger(folder, json.loads(os.environ[FAULTS]))
        enter, score = clock._enter, Reward.score

        def enter_and_fire(phase: str) -> None:
            enter(phase)
            trigger(phase)

        def fire_and_score(self: Reward, *arguments: Any) -> None:
            trigger("scoring")
            score(self, *arguments)

        clock._enter = enter_and_fire
        Reward.score = fire_and_score  # type: ignore[method-assign]


class Trigger:
    """Sends the signals: each at the beginning of its phase, in the second step after the last one."""

    def __init__(self, folder: Path, faults: list[str]):
        self.folder = folder
        self.faults = [Fault(*text.split(":")) for text in faults]
        self.num_syncs = 0  # since the last fault

    def __call__(self, phase: str) -> None:
        self.num_syncs += phase == "sync"
        if not self.faults or phase != self.faults[0].phase or self.num_syncs < 4:  # two phases a sync
            return
        fault = self.faults.pop(0)
        self.num_syncs = 0
        target = self._find(fault.target) if fault.target != WHOLE_JOB else 0
        with (self.folder / "fired").open("a") as fired:
            fired.write(f"{time.time()} {fault}\n")
        if target:
            os.kill(target, getattr(signal, fault.signal))

    def _find(self, target: str) -> int:
        if target == "main rank":
            return os.getpid()
        if target == "other rank":
            return int((self.folder / "pid-1").read_text())
        if target == "launcher":
            return os.getppid()
        if target in ("reward worker", "worker's guardian"):
            [guardian] = [child.pid for child in multiprocessing.active_children() if child.name == "reward"]
            return (
                psutil.Process(guardian).children()[0].pid
                if target == "reward worker"
                else int(guardian or 0)
            )
        script = "watch/rank.py" if target == "rank's guardian" else "watch/server.py"
        alive = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
        guardian = next(p for p in alive if script in " ".join(p.cmdline()))
        time.sleep(max(0.0, guardian.create_time() + 1 - time.time()))  # it may just have been started again
        return guardian.children()[0].pid if target == "server" else guardian.pid


# the measurement


def measure(targets: Sequence[str]) -> Iterator[tuple[Fault, Outcome, bool]]:
    """Yield each fault, the outcome of its launch, and whether a later fault of that launch followed."""
    for target in targets:
        signals = SIGNALS if target != WHOLE_JOB else SIGNALS[:1]
        faults = [Fault(*each) for each in product(signals, [target], PHASES)]
        while faults:
            outcome = launch(
                faults[:1] if target in ENDING else faults, with_servers=target.startswith("server")
            )
            num_fired = max(len(outcome.fired), 1)
            done, faults = faults[:num_fired], faults[num_fired:]
            verdict = f"{outcome.verdict()} after {outcome.seconds:.0f} s"
            print(f"{done[-1]}: {verdict}, ranks {outcome.statuses}, {outcome.lines[-1:]}", flush=True)
            if outcome.verdict().isupper() or not outcome.fired:
                print(outcome.printed[-3000:], outcome.survivors, flush=True)
            yield from ((fault, outcome, fault != done[-1]) for fault in done)


def report(results: list[tuple[Fault, Outcome, bool]]) -> str:
    """Write a table of verdicts, a row for each process and signal."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    said = []
    for fault, outcome, is_followed in results:
        row = cells.setdefault((fault.target, fault.signal), {})
        row[fault.phase] = "goes on" if is_followed else f"{outcome.verdict()}, {outcome.seconds:.0f} s"
        if outcome.lines and not is_followed:
            said.append(f"- {fault}: {outcome.lines[-1]}")
    count = Counter(cell.split(",")[0] for row in cells.values() for cell in row.values())
    summary = ", ".join(f"{number} {verdict}" for verdict, number in count.most_common())
    rows = [[*names, *(row.get(phase, "") for phase in PHASES)] for names, row in cells.items()]
    about = (
        f"{sum(count.values())} faults, engine.stall_seconds={STALL:g}: {summary}. “saved”: the run "
        "ended with a checkpoint of its last step; “stopped”: they ended with an error line, and the "
        "steps since the last checkpoint are lost. Seconds are from the fault to the end of the last one. "
        "After each launch the machine was searched for processes that outlived it.\n"
    )
    table = record.table(["process", "signal", *PHASES], rows)
    lines = "The last line that each launch printed:\n\n" + "\n".join(said)
    heading = record.heading("What becomes of a run when one of its processes is stopped or killed")
    return "\n".join([heading, about, table, lines, ""])


if __name__ == "__main__":
    import record

    results = []
    for result in measure(sys.argv[1:] or TARGETS):
        results.append(result)
        # what there is, if this is ended early
        (record.RESULTS / "faults.md").write_text(report(results))
