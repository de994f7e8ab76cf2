"""A run's SGLang servers: started, watched and stopped here, with a router before several; or started by someone else, and only used.

Nothing that is started here outlives the trainer, however it ends: every process has a guardian (supervise.py). It listens on loopback
and wants an API key drawn for the run, which shows neither in `ps` nor in a log.

A server that dies is started again, on another port, so that nobody can ask it before it has the policy's weights: `refresh` counts it
among the workers once it is up, the weights are synced, and `serve` opens it to requests. Until then the others do its work.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from dapo.config import Config, ConfigError, nearest
from dapo.engine import supervise
from dapo.engine.server import KEY_VARIABLE, Server
from dapo.types import EngineError, Interrupted

LOOK_EVERY = 0.5  # seconds
SAY_EVERY = 10.0  # seconds
SILENCE = 600.0  # seconds without a new line in its log before a starting server is given up: large weights take long, and say so
ROUTER_LIMIT = 60.0  # seconds for the router to start, or to take a server in
STOP_LIMIT = 10.0  # seconds
LOOPBACK = "127.0.0.1"

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
ROUTER = {  # for generation only: control calls go to each worker
    "policy": "cache_aware",
    "health-check-interval-secs": 5,
    "health-failure-threshold": 2,
    "health-success-threshold": 1,
    "worker-startup-check-interval": 1,
    "retry-max-retries": 3,  # at other workers; what still fails, the client asks again
    "retry-max-backoff-ms": 2000,
    "cb-failure-threshold": 5,
    "cb-timeout-duration-secs": 10,
    "request-timeout-secs": 24 * 3600,  # a long response is no failure: the client has its own limits
    "prometheus-host": LOOPBACK,
    "log-level": "warn",
}
# The key reaches the command line inside the process, where `ps` does not see it
BOOT = f"""import os, runpy, sys
module, *arguments = sys.argv[1:]
sys.argv[1:] = [*arguments, "--api-key", os.environ.pop("{KEY_VARIABLE}")]
runpy.run_module(module, run_name="__main__", alter_sys=True)"""
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


class Servers:
    """`workers` take control calls; `generate_urls` take requests: the router's, if there are several local workers.

    Local servers start at once, each with a log in <run.dir>/servers; `wait` for them. `say` is told line by line what happens.

    Raises:
        ConfigError: engine.sglang is not what this SGLang understands, there is no SGLang, or there are too few GPUs.
    """

    def __init__(self, config: Config, say: Callable[[str], None] = print, is_interrupted: Callable[[], bool] = lambda: False):
        self.config, self.say, self.is_interrupted = config, say, is_interrupted
        self._lock = threading.Lock()
        engine = config.engine
        if engine.urls and engine.sglang:
            raise ConfigError(
                "engine.sglang is for servers that the run starts: give those in engine.urls their arguments where they start"
            )
        self.key = os.environ.get(KEY_VARIABLE) if engine.urls else secrets.token_hex(24)
        self.local: list[_Process] = [] if engine.urls else self._start()
        self._workers = [Server(url, self.key) for url in engine.urls or [server.url for server in self.local]]
        self.router = self._start_router() if len(self.local) > 1 else None
        self._has_changed = False
        self._is_closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="servers", daemon=True)

    @property
    def workers(self) -> list[Server]:
        """Those that have the policy's weights, or get them at the next sync."""
        with self._lock:
            return list(self._workers)

    @property
    def generate_urls(self) -> list[str]:
        return [self.router.url] if self.router else [worker.url for worker in self.workers]

    def wait(self) -> None:
        """Until every server is up, and the router.

        Raises:
            ConfigError: one died, fell silent, or serves another model: in one line, with the last error in its log. All are stopped.
            Interrupted: the run is to stop.
        """
        if not self.local:
            for worker in self._workers:
                self.say(introduce(worker, self.config.policy.model))
            return
        try:
            self._wait_for([*self.local, *([self.router] if self.router else [])])
            self.serve()
        except (ConfigError, EngineError, Interrupted):
            self.close()
            raise
        for server in self.local:
            server.state = "serving"
        self._watcher.start()

    def refresh(self) -> bool:
        """Count the restarted servers that are up among the workers: called before a sync of weights, as `serve` is after it.

        Returns whether the workers are others than at the last call; then whatever joined them in a group must be made anew.

        Raises:
            EngineError: no server is left.
        """
        while True:
            with self._lock:
                for server in self.local:
                    if server.state == "up":
                        server.state = "serving"
                        self._workers.append(Server(server.url, self.key))
                        self._has_changed = True
                if self._workers or not any(server.state == "starting" for server in self.local):
                    has_changed, self._has_changed = self._has_changed, False
                    break
            if self.is_interrupted():
                raise Interrupted
            time.sleep(LOOK_EVERY)
        self.check()
        return has_changed

    def serve(self) -> None:
        """Open every worker to requests: all of them have the policy's weights now.

        Raises:
            EngineError: the router does not take one in.
        """
        if not self.router:
            return
        router, deadline = Server(self.router.url, self.key), time.monotonic() + ROUTER_LIMIT
        while True:
            wanted = {worker.url for worker in self.workers}  # one may die meanwhile
            known = {worker["url"]: worker for worker in router.get("/workers")["workers"]}
            if wanted == {url for url, worker in known.items() if worker["is_healthy"]}:
                return
            for url in wanted - known.keys():
                router.post("/workers", {"url": url, "api_key": self.key})
            for url in known.keys() - wanted:  # they died
                router.delete(f"/workers/{known[url]['id']}")
            if time.monotonic() > deadline:
                raise EngineError(f"router {router.url} serves {sorted(known)}, not {sorted(wanted)}, see {self.router.log}")
            time.sleep(LOOK_EVERY)

    def check(self) -> None:
        """Whether anyone can answer.

        Raises:
            EngineError: no server with the policy's weights is left: what each died of.
        """
        if not self.workers:
            raise EngineError("no server is left: " + "; ".join(server.failure for server in self.local))

    def close(self) -> None:
        """Stop whatever was started here."""
        self._is_closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        processes = [*self.local, *([self.router] if self.router else [])]
        for process in processes:
            process.ask_to_stop()
        for process in processes:
            process.stop()

    def _start(self) -> list[_Process]:
        config = self.config
        folder = config.run.dir / "servers"
        folder.mkdir(parents=True, exist_ok=True)
        python = str(config.engine.python or sys.executable)
        has_cuda = torch.cuda.is_available()
        options = server_options(config, known_arguments(python, has_cuda) if config.engine.sglang else {}, has_cuda)
        sets = [",".join(gpus) for gpus in gpu_sets(config.engine.servers, options)] if has_cuda else [""] * config.engine.servers
        environment = child_environment(has_cuda) | {KEY_VARIABLE: str(self.key)}
        command = [python, "-c", BOOT, "sglang.launch_server", *command_line(options)]
        return [
            _Process(f"server {i}", command, folder / f"server-{i}.log", environment | {"CUDA_VISIBLE_DEVICES": gpus}, options["host"])
            for i, gpus in enumerate(sets)
        ]

    def _start_router(self) -> _Process:
        environment = child_environment(has_cuda=True) | {KEY_VARIABLE: str(self.key)}
        return _Process("router", self._router_command(), self.config.run.dir / "servers/router.log", environment)

    def _router_command(self) -> list[str]:
        options = ROUTER | {
            "host": LOOPBACK,
            "prometheus-port": free_port(),
            "worker-urls": [worker.url for worker in self.workers],
            "balance-abs-threshold": self.config.rollout.group_size,  # a prefix in the cache is not worth a longer queue than this
            "balance-rel-threshold": 1.1,
        }
        return [str(self.config.engine.python or sys.executable), "-c", BOOT, "sglang_router.launch_router", *command_line(options)]

    def _wait_for(self, processes: Sequence[_Process]) -> None:
        told = time.monotonic()
        while waiting := [process for process in processes if not process.is_up()]:
            for process in waiting:
                if process.has_ended() or process.is_silent():
                    raise ConfigError(process.describe_failure())
            if time.monotonic() - told > SAY_EVERY:
                told = time.monotonic()
                self.say(f"waiting for {len(waiting)} of {len(processes)}: {waiting[0].describe_progress()}")
            if self.is_interrupted():
                raise Interrupted
            time.sleep(LOOK_EVERY)

    def _watch(self) -> None:
        """Start again what dies. What dies again before it has served is left dead."""
        while not self._is_closing.wait(LOOK_EVERY):
            for process in self.local:
                if process.state == "starting" and process.is_up():
                    process.state = "up"
                    self.say(f"{process.name} is up again; it takes requests after the next sync of weights")
                elif process.state != "dead" and (process.has_ended() or (process.state == "starting" and process.is_silent())):
                    self._restart(process)
            if self.router and self.router.has_ended():
                self.say(f"{self.router.describe_failure()}; starting it again")
                self.router.command = self._router_command()
                self.router.start(self.router.port)

    def _restart(self, process: _Process) -> None:
        process.failure = process.describe_failure()
        had_served = process.state == "serving"
        with self._lock:
            self._workers = [worker for worker in self._workers if worker.url != process.url]
            self._has_changed = True
            process.state = "starting" if had_served else "dead"
        process.stop()
        if had_served:
            self.say(f"{process.failure}; starting it again")
            process.start(free_port(process.port))
        else:
            self.say(f"{process.failure}; it had not served since it was started again, so it is given up")


class _Process:
    """A server or the router, with its guardian: `starting`, `up`, `serving`, or `dead` for good."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: dict[str, str], host: str = LOOPBACK):
        self.name, self.command, self.log, self.environment = name, command, log, environment
        self.host = LOOPBACK if host in ("0.0.0.0", "::") else host
        self.failure = ""  # what it last died of
        self.start(free_port())

    def start(self, port: int) -> None:
        self.state: Literal["starting", "up", "serving", "dead"] = "starting"
        self.port, self.started = port, time.time()
        self.url = f"http://{self.host}:{port}"
        with open(self.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            self.begin = log.tell()  # of this start's lines
        guardian = [sys.executable, "-I", supervise.__file__, str(os.getpid()), str(self.log)]
        command = [*guardian, *self.command, "--port", str(port)]
        self.process = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True)  # Ctrl-C is ours

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return not self.has_ended()
        except (OSError, http.client.HTTPException):
            return False

    def is_silent(self) -> bool:
        return time.time() - max(self.started, self.log.stat().st_mtime) > SILENCE

    def lines(self) -> list[str]:
        with open(self.log, "rb") as log:
            log.seek(self.begin)
            text = log.read().decode("utf-8", "replace")
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()]

    def describe_progress(self) -> str:
        told = [line for line in self.lines() if not line[0].isspace()]  # an indented one quotes the code that warns
        last = re.sub(r"^\[[^\]]*\] *", "", told[-1])[:100] if told else "nothing in its log yet"
        return f"{self.name}, {time.time() - self.started:.0f} s: {last}"

    def describe_failure(self) -> str:
        status = self.process.poll()
        if status is None:
            how = f"said nothing for {SILENCE:.0f} s"
        else:
            how = f"ended with status {status}" if 0 <= status <= 128 else f"was killed by signal {max(-status, status - 128)}"
        return f"{self.name} {how}: {last_error(self.lines())}; see {self.log}"

    def ask_to_stop(self) -> None:
        self.process.terminate()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()  # and with the guardian what it guards
            self.process.wait()


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
        options |= CPU | {"max-running-requests": config.engine.max_concurrent, "max-total-tokens": config.engine.max_concurrent * longest}
    for name, value in config.engine.sglang.items():
        spelling = name.replace("_", "-")
        if spelling not in known:
            raise ConfigError(f"engine.sglang.{name}: SGLang has no such argument; {nearest(spelling, sorted(known))}")
        main, takes = known[spelling]
        if main in OURS:
            raise ConfigError(f"engine.sglang.{name} is set by the run: {OURS[main]}")
        if (takes in ("nothing", "yes or no")) != isinstance(value, bool) and value is not None:
            raise ConfigError(f"engine.sglang.{name}={value!r}: {'true or false' if takes != 'value' else 'a value'} is expected")
        options[main] = value
        if takes == "yes or no":
            options[f"no-{main}"] = not value
    return options


def command_line(options: dict[str, Any]) -> list[str]:
    """`command_line({"tp-size": 2, "sleep-on-idle": True, "device": None})` → ["--tp-size", "2", "--sleep-on-idle"]."""
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


def last_error(lines: Sequence[str]) -> str:
    """The line of a log that says why: the last exception's, or argparse's, if it is among the last lines; else the last one."""
    for line in reversed(lines[-40:]):
        if re.match(r"[\w.]*(Error|Exception)\b|.*\berror: ", line):
            return line.strip()[:300]
    return lines[-1].strip()[:300] if lines else "its log is empty"


def gpu_sets(servers: int, options: dict[str, Any]) -> list[list[str]]:
    """Each server's GPUs, as CUDA_VISIBLE_DEVICES names them: those after the trainer's, or from the first on, if memory is handed over.

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
            f"engine.servers={servers} of {each} GPUs (tp-size × pp-size × dp-size in engine.sglang) after the trainer's {taken}: "
            f"here are {len(names)}; start fewer, or share the trainer's with engine.sglang.enable-memory-saver=true"
        )
    return [names[taken + i * each : taken + (i + 1) * each] for i in range(servers)]


def child_environment(has_cuda: bool) -> dict[str, str]:
    """Ours, without what torchrun says of our place: a server would take it for its own."""
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(torchrun)}
    environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"  # health must not take a generated token: during a sync there is none
    return environment if has_cuda else environment | {"SGLANG_USE_CPU_ENGINE": "1"}


@functools.cache
def known_arguments(python: str, has_cuda: bool) -> Known:
    """The arguments of the SGLang that `python` has. Asking takes it many seconds, so the answer is kept in the user's cache.

    Raises:
        ConfigError: it has none.
    """
    version = _ask(python, "import importlib.metadata; print(importlib.metadata.version('sglang'))", has_cuda)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dapo"
    kept = folder / f"sglang-arguments-{hashlib.sha256(f'{python} {version} {LIST_ARGUMENTS}'.encode()).hexdigest()[:16]}.json"
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
            [python, "-c", code], env=child_environment(has_cuda), capture_output=True, text=True, timeout=ROUTER_LIMIT * 5
        )
    except OSError as error:
        raise ConfigError(f"engine.python={python}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"engine.python={python} does not import SGLang within {error.timeout:.0f} s") from error
    if done.returncode:
        raise ConfigError(
            f"engine.python={python} has no SGLang that works: {last_error(done.stderr.splitlines())}; pip install dapo[sglang]"
        )
    return done.stdout.splitlines()[-1]


def introduce(server: Server, model: Path) -> str:
    """What a server that someone else has started is.

    Raises:
        ConfigError: it does not answer, or serves another architecture than the policy's.
    """
    try:
        about, version = server.get("/model_info"), server.get("/server_info").get("version", "of unknown version")
    except EngineError as error:
        raise ConfigError(f"engine.urls: {error}; is it up, and {KEY_VARIABLE} set if it wants a key?") from error
    ours = json.loads((model / "config.json").read_text()).get("architectures")
    theirs = about.get("architectures", ours)  # older versions do not say
    if theirs != ours:
        raise ConfigError(f"engine.urls: {server.url} serves {theirs}, policy.model={model} is {ours}: start it with that model")
    return f"{server.url}: SGLang {version}, {about.get('model_path')}"


def free_port(avoid: int = 0) -> int:
    """A port that nothing listens on, other than `avoid`."""
    while True:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = int(probe.getsockname()[1])
        if port != avoid:
            return port
