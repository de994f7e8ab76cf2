"""Looks at this machine and its Python as a run would need them: what is there, what is wrong, the remedy."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from dapo.files import LONGEST_TMPDIR
from dapo.plan import stack

OPEN_FILES = 4096  # sockets to servers, weights and checkpoints of a large run
SHARED_MEMORY = 1 << 30  # bytes of /dev/shm: NCCL and the reward's workers use it; Docker gives 64 MiB
DISK = 20 << 30  # bytes: two checkpoints of a small model
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class Finding(NamedTuple):
    """One line: what was looked at, what was found. `wrong` keeps a run from working, `note` may matter."""

    state: Literal["ok", "note", "wrong"]
    what: str
    found: str


def examine() -> Iterator[Finding]:
    """Yield what is found, the most basic first."""
    yield _python()
    for package, needed in stack.TRAINER.items():
        fault = stack.fault(package, needed)
        yield Finding("wrong" if fault else "ok", package, fault or str(stack.installed(package)))
    if stack.installed("torch"):
        yield from _devices()
    yield _transformer_engine()
    yield _server()
    yield from _machine()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if stack.fits(version, stack.PYTHON):
        return Finding("ok", "python", f"{version}, {sys.executable}")
    return Finding("wrong", "python", f"{version} runs, dapo needs Python {stack.PYTHON}: make another venv")


def _devices() -> Iterator[Finding]:
    import torch

    if torch.version.cuda is None:
        yield Finding("note", "cuda", "torch is a build without CUDA: runs compute on the CPU")
        return
    if not torch.cuda.is_available():
        remedy = "is the driver installed, and the GPU passed to the container (--gpus all)?"
        yield Finding(
            "note", "cuda", f"torch is built for CUDA {torch.version.cuda} and sees no GPU: {remedy}"
        )
        return
    count = torch.cuda.device_count()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    name = torch.cuda.get_device_name(0)
    yield Finding("ok", "cuda", f"{torch.version.cuda}, {count} × {name} of {memory:.0f} GiB")
    yield Finding("ok", "nccl", ".".join(map(str, torch.cuda.nccl.version())))


def _transformer_engine() -> Finding:
    if fault := stack.engine_fault():
        return Finding("note", "transformer-engine", f"the plain layers are used: {fault}")
    version = stack.installed("transformer-engine")
    return Finding(
        "ok" if version else "note", "transformer-engine", version or "none: plain layers are used"
    )


def _server() -> Finding:
    if not stack.installed("sglang"):
        where = "none here: engine.kind=sglang then wants engine.python, or engine.urls"
        return Finding("note", "sglang", where)
    fault = stack.server_fault(has_cuda=Path("/dev/nvidiactl").exists())
    return Finding("wrong" if fault else "ok", "sglang", fault or str(stack.installed("sglang")))


def _machine() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free = f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB are free"
    yield Finding("ok", "machine", f"{cores} CPU cores, {free}")
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    better = 65536 if most == unlimited else min(most, 65536)
    yield _judged("open files", limit >= OPEN_FILES or limit == unlimited, f"{limit}", f"ulimit -n {better}")
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total
        remedy = "start the container with --shm-size=8g, or --ipc=host"
        yield _judged("shared memory", size >= SHARED_MEMORY, f"{size / 2**20:.0f} MiB", remedy)
    free_disk = shutil.disk_usage(".").free
    found = f"{free_disk / 2**30:.0f} GiB free in {Path.cwd()}"
    yield _judged("disk", free_disk >= DISK, found, "set run.dir to where there is more")
    folder = tempfile.gettempdir()
    is_short = len(os.fsencode(folder)) <= LONGEST_TMPDIR
    yield _judged("tmpdir", is_short, folder, f"set TMPDIR to a path of at most {LONGEST_TMPDIR} characters")
    for variable in (*PROXIES, *map(str.upper, PROXIES)):
        if value := os.environ.get(variable):
            host = value.rpartition("@")[2]  # without user and password
            yield Finding("note", "proxy", f"{variable}={host}: servers and rewards are called without it")


def _judged(what: str, is_enough: bool, found: str, remedy: str) -> Finding:
    return Finding("ok", what, found) if is_enough else Finding("note", what, f"{found}: {remedy}")


def describe(findings: list[Finding]) -> list[str]:
    """Return a line for each, and how many are wrong."""
    width = max(len(finding.what) for finding in findings)
    lines = [f"{each.state:5}  {each.what:{width}}  {each.found}" for each in findings]
    wrong = sum(finding.state == "wrong" for finding in findings)
    return [*lines, f"{wrong} to mend" if wrong else "ready"]
