"""What a run's SGLang servers are started with: from the config, checked against the arguments that the
installed SGLang has.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dapo.config import Config, ConfigError, nearest
from dapo.engine.control import KEY_VARIABLE
from dapo.engine.process import LOOPBACK, last_error

ASK_LIMIT = 300.0  # seconds for SGLang to be imported
OURS = {  # what engine.sglang may not name → what to do instead
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
# On a CPU a bucket of weights lies in memory that the last one has left: fresh pages would take as long as
# the copy
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
# Every spelling of every argument → its main spelling and what it takes
LIST_ARGUMENTS = """import argparse, json
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser(add_help=False)
ServerArgs.add_cli_args(parser)
known = {}
for action in parser._actions:
    takes = "yes or no" if isinstance(action, argparse.BooleanOptionalAction) else "list" if action.nargs in ("+", "*") else "nothing" if action.nargs == 0 else "value"
    names = [name[2:] for name in action.option_strings if name.startswith("--") and not (takes == "yes or no" and name.startswith("--no-"))]
    known |= {name: (names[0], takes) for name in names}
print("\\n" + json.dumps(known))"""  # noqa: E501

Known = dict[str, tuple[str, str]]


def server_options(config: Config, known: Known, has_cuda: bool) -> dict[str, Any]:
    """A server's arguments by name: what follows from the config, then engine.sglang on top.

    Raises:
        ConfigError: engine.sglang names what SGLang does not know, or what is set here.
    """
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    options: dict[str, Any] = {
        "model-path": str(config.policy.model),
        "host": LOOPBACK,
        "dtype": config.policy.dtype,
        "log-level-http": "warning",  # not a line for each request
    }
    if not has_cuda:
        options |= CPU | {
            "max-running-requests": config.engine.max_concurrent,
            "max-total-tokens": config.engine.max_concurrent * longest,
        }
    for name, value in config.engine.sglang.items():
        spelling = name.replace("_", "-")
        if spelling not in known:
            raise ConfigError(
                f"engine.sglang.{name}: SGLang has no such argument; {nearest(spelling, sorted(known))}"
            )
        main, takes = known[spelling]
        if main in OURS:
            raise ConfigError(f"engine.sglang.{name} is set by the run: {OURS[main]}")
        if (takes in ("nothing", "yes or no")) != isinstance(value, bool) and value is not None:
            raise ConfigError(
                f"engine.sglang.{name}={value!r}: {'true or false' if takes != 'value' else 'a value'} is "
                "expected"
            )
        options[main] = value
        if takes == "yes or no":
            options[f"no-{main}"] = not value
    return options


def command_line(options: dict[str, Any]) -> list[str]:
    """`command_line({"tp-size": 2, "sleep-on-idle": True, "device": None})` → ["--tp-size", "2",
    "--sleep-on-idle"].
    """
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
    """Whether the trainer and servers of these options can join in an NCCL group.

    Raises:
        ConfigError: they share GPUs, or have different versions of NCCL; what to use instead.
    """
    if config.engine.weight_sync != "broadcast":
        return
    if options.get("enable-memory-saver"):
        raise ConfigError(
            "engine.weight_sync=broadcast with engine.sglang.enable-memory-saver: NCCL joins no two "
            "processes on one GPU; set "
            "engine.weight_sync=tensor"
        )
    ours, theirs = (nccl_version(path) for path in (sys.executable, python))
    if ours != theirs:
        raise ConfigError(
            f"engine.weight_sync=broadcast: engine.python={python} has NCCL {theirs}, the trainer {ours}, "
            "and only equal ones join: "
            "install the same torch, or set engine.weight_sync=disk"
        )


def nccl_version(python: str) -> str:
    if python == sys.executable:
        return ".".join(map(str, torch.cuda.nccl.version()))
    return _ask(python, "import torch; print('.'.join(map(str, torch.cuda.nccl.version())))", has_cuda=True)


def gpu_sets(servers: int, options: dict[str, Any], sees_main: bool = False) -> list[list[str]]:
    """Each server's GPUs, as CUDA_VISIBLE_DEVICES names them: those after the trainer's, or from the first
    on, if memory is handed over.

    `sees_main`: behind its own each also sees the main rank's GPU, to read weights there.

    Raises:
        ConfigError: there are not enough.
    """
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = names or [str(i) for i in range(torch.cuda.device_count())]
    taken = 0 if options.get("enable-memory-saver") else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    copies = 1 if options.get("enable-dp-attention") else int(options.get("dp-size", 1))
    each = int(options.get("tp-size", 1)) * int(options.get("pp-size", 1)) * copies
    if taken + servers * each > len(names):
        raise ConfigError(
            f"engine.servers={servers} of {each} GPUs (tp-size × pp-size × dp-size in engine.sglang) after "
            f"the trainer's {taken}: "
            f"here are {len(names)}; start fewer, or share the trainer's with "
            "engine.sglang.enable-memory-saver=true and "
            "engine.weight_sync=tensor"
        )
    sets = [names[taken + i * each : taken + (i + 1) * each] for i in range(servers)]
    return [own + ([names[0]] if sees_main and names[0] not in own else []) for own in sets]


def child_environment(has_cuda: bool) -> dict[str, str]:
    """Ours, without what torchrun says of our place: a server would take it for its own."""
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(torchrun)}
    # health must not take a generated token: during a sync there is none
    environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    return environment if has_cuda else KEEP_MEMORY | environment | {"SGLANG_USE_CPU_ENGINE": "1"}


@functools.cache
def known_arguments(python: str, has_cuda: bool) -> Known:
    """The arguments of the SGLang that `python` has. Asking takes it many seconds, so the answer is kept in
    the user's cache.

    Raises:
        ConfigError: it has none.
    """
    version = _ask(python, "import importlib.metadata; print(importlib.metadata.version('sglang'))", has_cuda)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dapo"
    kept = (
        folder
        / f"sglang-arguments-{hashlib.sha256(f'{python} {version} {LIST_ARGUMENTS}'.encode()).hexdigest()[:16]}.json"
    )
    if not kept.exists():
        answer = _ask(python, LIST_ARGUMENTS, has_cuda)
        folder.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}")
        new.write_text(answer)
        new.rename(kept)
    return {name: (main, takes) for name, (main, takes) in json.loads(kept.read_text()).items()}


def _ask(python: str, code: str, has_cuda: bool) -> str:
    """The last line that `code` prints."""
    try:
        done = subprocess.run(
            [python, "-c", code],
            env=child_environment(has_cuda),
            capture_output=True,
            text=True,
            timeout=ASK_LIMIT,
        )
    except OSError as error:
        raise ConfigError(f"engine.python={python}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"engine.python={python} does not import SGLang within {error.timeout:.0f} s"
        ) from error
    if done.returncode:
        raise ConfigError(
            f"engine.python={python} has no SGLang that works: {last_error(done.stderr.splitlines())}; pip "
            "install dapo[sglang]"
        )
    return done.stdout.splitlines()[-1]
