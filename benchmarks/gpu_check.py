"""Check and measure one GPU, in stages, the most valuable first.

    python benchmarks/gpu_check.py --out DIR [--wheels WHEELS] [STAGE …]
    python benchmarks/gpu_check.py --out DIR --tiny    # a rehearsal on a CPU

The first two stages end within 4 minutes, all within 9. Each has a time limit, beyond what the stages before
it have left of theirs; one that is still running then is killed with all that it has started, and the next
begins. DIR receives every figure when it is measured (figures.jsonl, summary.md: see figures.py), the pages
of the benchmarks, and in log.txt all that was printed. Exit status 1: something failed; the end of summary.md
says what. It needs no network; WHEELS holds what the machine lacks (make gpu-wheels), DAPO_COMMIT what is
measured, where there is no git.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import figures
from record import ROOT, commit

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
MODULES = """torch triton megatron.core transformers tokenizers safetensors numpy pyarrow psutil tensorboard
    rich matplotlib pydantic yaml aiohttp orjson mpmath pytest"""


@dataclass(frozen=True)
class Stage:
    """Commands that run side by side, and the seconds that they may take."""

    name: str
    seconds: float
    commands: list[list[str]]


def stages(tiny: bool) -> list[Stage]:
    def script(name: str, *arguments: str) -> list[str]:
        return [sys.executable, f"benchmarks/{name}.py", *arguments, *(["--tiny"] if tiny else [])]

    def tests(expression: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-p", "figures", "-p", "no:cacheprovider"]
        return [*command, "-m", "gpu", "tests/gpu", "-k", expression]

    learning = ["learns and float32", "learns and main_memory", "learns and not float32 and not main_memory"]
    slack = 4 if tiny else 1  # it is the order that is rehearsed, on any machine
    return [
        Stage("train-0.5b", 150 * slack, [script("train_gpu", "--size", "0.5b")]),
        Stage("loss", 90 * slack, [script("policy_loss", "--first", "--rounds", "3")]),
        Stage("kernels", 60 * slack, [tests("not learns and not planned")]),
        Stage("loss-rest", 90 * slack, [script("policy_loss", "--short", "--rounds", "3")]),
        Stage("train-1.5b", 80 * slack, [script("train_gpu", "--size", "1.5b")]),
        Stage("learning", 70 * slack, [tests(expression) for expression in [*learning, "planned"]]),
    ]


def check(stages: list[Stage], out: Path, environment: dict[str, str]) -> int:
    """Run the stages and print the summary. Return the exit status."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / figures.FILE).exists():
        print(f"error: {out} holds an earlier check: choose another directory", file=sys.stderr)
        return 2
    # what a stage has started becomes this process's child when its parent has ended
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    os.environ["DAPO_OUT"] = str(out.resolve())
    figures.write("commit", note=f"{commit()}; {datetime.date.today()}; {os.cpu_count()} CPU cores")
    until = time.monotonic()
    try:
        for stage in stages:
            until += stage.seconds
            os.environ["DAPO_STAGE"] = stage.name
            print(f"{stage.name}: {until - time.monotonic():.0f} s", flush=True)
            run(stage, until, out, environment)
    finally:
        end_children()
        print(figures.summarize(out))
    return int(any(figure["failed"] for figure in figures.newest(out)))


def run(stage: Stage, until: float, out: Path, environment: dict[str, str]) -> None:
    """Run the stage's commands side by side, and write how it ended."""
    start = time.monotonic()
    with (
        (out / "log.txt").open("ab") as log,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
    ):
        before = log.tell()
        environment = os.environ | environment | {"TMPDIR": scratch, "PYTHONUNBUFFERED": "1"}
        processes = [
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            for command in stage.commands
        ]
        while time.monotonic() < until and any(process.poll() is None for process in processes):
            time.sleep(0.05)
        statuses = [process.poll() for process in processes]
        end_children()
    if None in statuses:
        why = f"killed after {time.monotonic() - start:.0f} s, its limit"
    else:
        lines = (out / "log.txt").read_bytes()[before:].decode(errors="replace").split("\n")
        last = next((line.strip(" =") for line in reversed(lines) if line.strip()), "it printed nothing")
        why = f"exit status {max(statuses, key=abs)}: {last[:200]}" if any(statuses) else "done"
    figures.write("ended", time.monotonic() - start, "s", why, failed=why != "done")


def end_children() -> None:
    """Kill all that was started here, in sessions of their own too, and wait until it is gone."""
    deadline = time.monotonic() + 10  # a process in a driver's call ends when that returns
    while (running := descendants()) and time.monotonic() < deadline:
        for process in running:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def descendants() -> list[int]:
    """Return the running processes below this one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *_ = path.read_text(errors="replace").rpartition(")")[2].split()
            if state not in "ZX":
                parents[int(path.parent.name)] = int(parent)
    found = [os.getpid()]
    for process in found:  # it grows
        found += [child for child, parent in parents.items() if parent == process]
    return found[1:]


def is_installed(module: str) -> bool:
    with suppress(ModuleNotFoundError):  # its package is missing
        return importlib.util.find_spec(module) is not None
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a directory for the figures")
    parser.add_argument("--wheels", type=Path, help="a directory of wheels that this machine lacks")
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU, with tiny sizes")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="only these")
    args = parser.parse_args()
    chosen = [stage for stage in stages(args.tiny) if stage.name in args.stages or not args.stages]
    if unknown := set(args.stages) - {stage.name for stage in chosen}:
        known = " ".join(stage.name for stage in stages(args.tiny))
        parser.error(f"no stage is called {' '.join(sorted(unknown))}: there are {known}")
    with tempfile.TemporaryDirectory() as site:
        wheels = sorted(args.wheels.glob("*.whl")) if args.wheels else []
        if args.wheels and not wheels:
            parser.error(f"{args.wheels} holds no wheels: see make gpu-wheels")
        for wheel in wheels:
            zipfile.ZipFile(wheel).extractall(site)
        sys.path.insert(0, site)
        if missing := [name for name in MODULES.split() if not is_installed(name)]:
            print(f"error: not installed: {' '.join(missing)}: see make gpu-wheels", file=sys.stderr)
            return 2
        path = [site, ROOT, ROOT / "kernels", ROOT / "benchmarks", os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(map(str, path)).rstrip(os.pathsep)}
        if not args.tiny:  # models are built on the CPU
            environment["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        return check(chosen, args.out, environment)


if __name__ == "__main__":
    sys.exit(main())
