"""Command lines of a run's SGLang servers: from the config, checked against the arguments that SGLang has."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import torch

from dapo.config import Config, ConfigError, nearest
from dapo.engine.control import KEY_VARIABLE
from dapo.engine.process import LOOPBACK, last_error
from dapo.plan import stack

PROXIES = ("http_proxy", "https_proxy", "all_proxy")
IMPORT_TIMEOUT = 300.0  # seconds for SGLang to be imported
OURS = {  # argument that engine.sglang may not set → what to do instead
    "model-path": "set policy.model",
    "port": "free ports are taken",
    "api-key": f"one is drawn for the run; for servers named in engine.urls set {KEY_VARIABLE}",
    "admin-api-key": "the API key does for control calls too",
    "config": "give its entries here",
    "nnodes": "start a server over several nodes yourself and name it in engine.urls",
}
CPU = {  # for a machine without CUDA; engine.sglang overrides
    "device": "cpu",
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "disable-overlap-schedule": True,
    "skip-server-warmup": True,
    "mem-fraction-static": 0.2,
    "sleep-on-idle": True,  # else an idle server keeps a core busy
}
NOT_ON_CPU = (
    "run.deterministic: SGLang has no deterministic inference on a CPU: what servers generate differs from "
    "run to run; with engine.kind=embedded it does not"
)
# On a CPU keep the memory of a bucket of weights for the next: fresh pages would take as long as the copy
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
# The API key reaches the command line inside the process, where `ps` does not see it
BOOT = f"""import os, runpy, sys
module, *arguments = sys.argv[1:]
sys.argv[1:] = [*arguments, "--api-key", os.environ.pop("{KEY_VARIABLE}")]
runpy.run_module(module, run_name="__main__", alter_sys=True)"""
# Prints every name of every argument → its main name and the kind of its value
LIST_ARGUMENTS = """import argparse, json
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(add_help=False)
ServerArgs.add_cli_args(parser)
known = {}
for action in parser._actions:
    names = [name[2:] for name in action.option_strings if name.startswith("--")]
    takes = "list" if action.nargs in ("+", "*") else "nothing" if action.nargs == 0 else "value"
    if isinstance(action, argparse.BooleanOptionalAction):
        names = [name for name in names if not name.startswith("no-")]
        takes = "yes or no"
    known |= {name: (names[0], takes) for name in names}
print("\\n" + json.dumps(known))"""

Known = dict[str, tuple[str, str]]
KINDS = ("value", "list", "nothing", "yes or no")  # of an argument's value


def server_options(config: Config, known: Known, has_cuda: bool) -> dict[str, Any]:
    """Return a server's arguments by name: those that follow from the config, then engine.sglang on top.

    Raise ConfigError if engine.sglang has an argument that SGLang does not know, or that is set here.
    """
    options: dict[str, Any] = {
        "model-path": str(config.policy.model),
        "host": LOOPBACK,
        "dtype": config.policy.dtype,
        "log-level-http": "warning",  # no line per request
    }
    if config.policy.routing_replay == "rollout":
        options["enable-return-routed-experts"] = True
    is_deterministic = config.run.deterministic and has_cuda
    if is_deterministic:
        options["enable-deterministic-inference"] = True
    if not has_cuda:
        longest = config.data.max_prompt_length + config.rollout.max_response_length
        most = config.engine.max_concurrent
        options |= CPU | {"max-running-requests": most, "max-total-tokens": most * longest}
    for name, value in config.engine.sglang.items():
        argument = name.replace("_", "-")
        if argument not in known:
            hint = nearest(argument, sorted(known))
            raise ConfigError(f"engine.sglang.{name}: SGLang has no such argument; {hint}")
        main, takes = known[argument]
        if main in OURS:
            raise ConfigError(f"engine.sglang.{name} is set by the run: {OURS[main]}")
        is_flag = takes in ("nothing", "yes or no")
        if is_flag != isinstance(value, bool) and value is not None:
            expected = "true or false" if is_flag else "a value"
            raise ConfigError(f"engine.sglang.{name}={value!r}: {expected} is expected")
        options[main] = value
        if takes == "yes or no":
            options[f"no-{main}"] = not value
    if is_deterministic:
        if not options["enable-deterministic-inference"]:
            asked = "engine.sglang.enable-deterministic-inference=false with run.deterministic=true"
            raise ConfigError(f"{asked}: leave it out")
        check_tensor_ranks(config, int(options.get("tp-size", 1)))
    return options


def check_tensor_ranks(config: Config, tensor_ranks: int) -> None:
    """Raise ConfigError if NCCL may not join the trainer and a deterministic server of so many GPUs."""
    if tensor_ranks > 1 and config.engine.weight_sync == "broadcast":
        why = f"one of tp-size {tensor_ranks} fixes its number of NCCL's channels, and the trainer does not"
        asked = "engine.weight_sync=broadcast with run.deterministic=true"
        raise ConfigError(f"{asked}: of servers {why}: set tensor, or disk")


def module_command(python: str, module: str, options: dict[str, Any]) -> list[str]:
    """Return the command that runs a module of SGLang. The API key is in its environment."""
    return [python, "-c", BOOT, module, *command_line(options)]


def command_line(options: dict[str, Any]) -> list[str]:
    """Return options as arguments: {"tp-size": 2, "tf32": True, "x": None} → ["--tp-size", "2", "--tf32"]."""
    arguments = []
    for name, value in options.items():
        if value is True:
            arguments.append(f"--{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            arguments += [f"--{name}", json.dumps(value)]
        elif value is not None and value is not False:
            arguments += [f"--{name}", str(value)]
    return arguments


def check_broadcast(config: Config, options: dict[str, Any], python: str) -> None:
    """Raise ConfigError if NCCL cannot join the trainer and servers with these options."""
    if config.engine.weight_sync != "broadcast":
        return
    if options.get("enable-memory-saver"):
        why = "NCCL joins no two processes on one GPU; set engine.weight_sync=tensor"
        raise ConfigError(f"engine.weight_sync=broadcast with engine.sglang.enable-memory-saver: {why}")
    ours, theirs = (nccl_version(path) for path in (sys.executable, python))
    if ours != theirs:
        why = f"engine.python={python} has NCCL {theirs}, the trainer {ours}, and only equal ones join"
        remedy = "install the same torch, or set engine.weight_sync=disk"
        raise ConfigError(f"engine.weight_sync=broadcast: {why}: {remedy}")


def nccl_version(python: str) -> str:
    if python == sys.executable:
        return ".".join(map(str, torch.cuda.nccl.version()))
    return _ask(python, "import torch; print('.'.join(map(str, torch.cuda.nccl.version())))", has_cuda=True)


def gpu_sets(servers: int, options: dict[str, Any], sees_main: bool = False) -> list[list[str]]:
    """Return each server's GPUs, as CUDA_VISIBLE_DEVICES names them. Raise ConfigError if there are too few.

    They begin after the trainer's, or at the first if the servers share the trainer's. With `sees_main` each
    server also sees the main rank's GPU, as its last, to read weights there.
    """
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = names or [str(i) for i in range(torch.cuda.device_count())]
    taken = 0 if options.get("enable-memory-saver") else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    copies = 1 if options.get("enable-dp-attention") else int(options.get("dp-size", 1))
    each = int(options.get("tp-size", 1)) * int(options.get("pp-size", 1)) * copies
    if taken + servers * each > len(names):
        raise ConfigError(
            f"engine.servers={servers} of {each} GPUs (tp-size × pp-size × dp-size in engine.sglang) after "
            f"the trainer's {taken}: here are {len(names)}; start fewer, or share the trainer's with "
            "engine.sglang.enable-memory-saver=true and engine.weight_sync=tensor"
        )
    sets = [names[taken + i * each : taken + (i + 1) * each] for i in range(servers)]
    return [own + ([names[0]] if sees_main and names[0] not in own else []) for own in sets]


def child_environment(has_cuda: bool, key: str | None = None) -> dict[str, str]:
    """Return our environment for a server or a router, without what must not reach it.

    These are torchrun's variables, as a server would take our rank for its own, and proxies, which would be
    sent prompts and key: servers are called without any, by each other too.
    """
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(torchrun) and name.lower() not in PROXIES
    }
    # a health check must not generate a token: during a sync none is generated
    environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    if key:
        environment[KEY_VARIABLE] = key
    return environment if has_cuda else KEEP_MEMORY | environment | {"SGLANG_USE_CPU_ENGINE": "1"}


def check_sglang(python: str, has_cuda: bool) -> None:
    """Raise ConfigError if `python` has no SGLang, or packages beside it that it cannot run with."""
    if fault := _ask(python, Path(stack.__file__).read_text(), has_cuda, *(["cuda"] if has_cuda else [])):
        raise ConfigError(f"engine.python={python}: {fault}")


@functools.cache
def known_arguments(python: str, has_cuda: bool) -> Known:
    """Return the arguments of the SGLang that `python` has. Raise ConfigError if it has none."""
    version = _ask(python, "import importlib.metadata; print(importlib.metadata.version('sglang'))", has_cuda)
    # in the user's cache: to import SGLang takes many seconds
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dapo"
    key = hashlib.sha256(f"{python} {version} {LIST_ARGUMENTS}".encode()).hexdigest()[:16]
    kept = folder / f"sglang-arguments-{key}.json"
    with contextlib.suppress(OSError, ValueError):  # there is none yet, or it is damaged
        return _parse(kept.read_bytes())
    answer = _ask(python, LIST_ARGUMENTS, has_cuda)
    try:
        known = _parse(answer.encode())
    except ValueError as error:
        listed = f"the arguments of its SGLang {version} cannot be listed: {error}"
        raise ConfigError(f"engine.python={python}: {listed}") from None
    with contextlib.suppress(OSError):  # it is asked again the next time
        folder.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}")
        new.write_text(answer)
        new.rename(kept)
    return known


def _parse(listed: bytes) -> Known:
    """Return what LIST_ARGUMENTS printed. Raise ValueError if this is something else."""
    known = orjson.loads(listed)
    rows = list(known.values()) if isinstance(known, dict) else []
    if not rows or not all(isinstance(row, list) and len(row) == 2 and row[1] in KINDS for row in rows):
        raise ValueError(f"it printed {listed[:99].decode()!r}")
    return {name: (str(main), str(takes)) for name, (main, takes) in known.items()}


def _ask(python: str, code: str, has_cuda: bool, *argv: str) -> str:
    """Return the last line that `code` prints, "" if it prints nothing."""
    option, command, env = f"engine.python={python}", [python, "-c", code, *argv], child_environment(has_cuda)
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=IMPORT_TIMEOUT)
    except OSError as error:
        raise ConfigError(f"{option}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{option} does not import SGLang within {error.timeout:.0f} s") from error
    if done.returncode:
        why = last_error(done.stderr.splitlines())
        mend = stack.mend("sglang", python=python)
        raise ConfigError(f"{option} has no SGLang that works: {why}: {mend}")
    return (done.stdout.splitlines() or [""])[-1]
