"""A run's SGLang servers: started, watched and stopped here, with a router before several; or started by
someone else, and only used.

Nothing that is started here outlives the trainer, however it ends: every process has a guardian
(guardian.py). It listens on loopback and wants an API key drawn for the run, which shows neither in `ps` nor
in a log.

A server that dies is started again, on another port, so that nobody can ask it before it has the policy's
weights: `refresh` counts it among the workers once it is up, the weights are synced, and `serve` opens it to
requests. Until then the others do its work. So it is with someone else's server, but for the starting: one
that does not answer is left out, from sync to sync, until it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dapo.clock import heartbeat
from dapo.config import Config, ConfigError
from dapo.engine import versions
from dapo.engine.arguments import (
    check_broadcast,
    child_environment,
    command_line,
    gpu_sets,
    known_arguments,
    server_options,
)
from dapo.engine.control import KEY_VARIABLE, Server, on_all
from dapo.engine.process import LOOPBACK, RESTARTS, ServerProcess, free_port
from dapo.types import EngineError, Interrupted, WeightsLost

LOOK_EVERY = 0.5  # seconds
SAY_EVERY = 10.0  # seconds
ROUTER_LIMIT = 60.0  # seconds for the router to start, or to take a server in

ROUTER = {  # for generation only: control calls go to each worker
    "policy": "cache_aware",
    "health-check-interval-secs": 5,
    "health-failure-threshold": 2,
    "health-success-threshold": 1,
    "worker-startup-check-interval": 1,
    # they would come under the same id, which a server refuses while it knows it; the client asks under a new
    # one
    "disable-retries": True,
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


class Servers:
    """`workers` take control calls; `generate_urls` take requests: the router's, if there are several local
    workers.

    Local servers start at once, each with a log in <run.dir>/servers; `wait` for them. `say` is told line by
    line what happens.

    Raises:
        ConfigError: engine.sglang is not what this SGLang understands, there is no SGLang, or there are too
            few GPUs.
    """

    def __init__(
        self,
        config: Config,
        say: Callable[[str], None] = print,
        is_interrupted: Callable[[], bool] = lambda: False,
    ):
        self.config, self.say, self.is_interrupted = config, say, is_interrupted
        self._lock = threading.Lock()
        engine = config.engine
        if engine.urls and engine.sglang:
            raise ConfigError(
                "engine.sglang is for servers that the run starts: give those in engine.urls their arguments "
                "where they start"
            )
        self.key = os.environ.get(KEY_VARIABLE) if engine.urls else secrets.token_hex(24)
        self.local: list[ServerProcess] = [] if engine.urls else self._start()
        # servers that someone else has started, and what is wrong with them
        self._guests = {url: "" for url in engine.urls}
        self._workers = [
            Server(url, self.key) for url in engine.urls or [server.url for server in self.local]
        ]
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
            ConfigError: one died, fell silent, or serves another model: in one line, with the last error in
                its log. All are stopped.
            Interrupted: the run is to stop.
        """
        if not self.local:
            for worker in self._workers:
                self.say(introduce(worker, self.config.policy.model))
            return
        try:
            self._wait_for([*self.local, *([self.router] if self.router else [])])
            for server in self.local:
                server.state = "serving"
            self._watcher.start()
            self.serve()
        except (ConfigError, EngineError, Interrupted):
            self.close()
            raise

    def refresh(self) -> bool:
        """Count the servers that are up, again or still, among the workers: called before a sync of weights,
        as `serve` is after it.

        Returns whether the workers are others than at the last call; then whatever joined them in a group
        must be made anew.

        Raises:
            EngineError: no server is left.
        """
        self._look_at_guests()
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
            heartbeat()  # a start has its own limit: the watcher gives up one that fails or falls silent
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
        deadline = time.monotonic() + ROUTER_LIMIT
        while lacking := self._tell_router(Server(self.router.url, self.key)):
            if time.monotonic() > deadline:
                raise EngineError(f"{lacking}, after {ROUTER_LIMIT:.0f} s; see {self.router.log}")
            time.sleep(LOOK_EVERY)

    def check(self) -> None:
        """Whether anyone can answer.

        Raises:
            WeightsLost: after the next sync someone can.
            EngineError: no server is left: what each died of.
        """
        if self.workers:
            return
        if any(server.state != "dead" for server in self.local):
            raise WeightsLost(
                "no server has the policy's weights; those that were started again get them at the next sync"
            )
        raise EngineError(
            "no server is left: "
            + "; ".join([*(server.failure for server in self.local), *self._guests.values()])
        )

    def restart(self, url: str, fault: str) -> None:
        """Have the watcher start the server at `url` again, which lives, but has this fault; if it is one of
        those started here.
        """
        for process in self.local:
            if process.url == url and process.state == "serving":
                process.fault = fault

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

    def _start(self) -> list[ServerProcess]:
        config = self.config
        folder = config.run.dir / "servers"
        folder.mkdir(parents=True, exist_ok=True)
        python = str(config.engine.python or sys.executable)
        has_cuda = torch.cuda.is_available()
        options = server_options(
            config, known_arguments(python, has_cuda) if config.engine.sglang else {}, has_cuda
        )
        sets = [""] * config.engine.servers
        if has_cuda:
            check_broadcast(config, options, python)
            sets = [
                ",".join(gpus)
                for gpus in gpu_sets(
                    config.engine.servers, options, sees_main=config.engine.weight_sync == "tensor"
                )
            ]
        environment = child_environment(has_cuda) | {KEY_VARIABLE: str(self.key)}
        command = [python, "-c", BOOT, "sglang.launch_server", *command_line(options)]
        return [
            ServerProcess(
                f"server {i}",
                command,
                folder / f"server-{i}.log",
                environment | {"CUDA_VISIBLE_DEVICES": gpus},
                options["host"],
            )
            for i, gpus in enumerate(sets)
        ]

    def _start_router(self) -> ServerProcess:
        environment = child_environment(has_cuda=True) | {KEY_VARIABLE: str(self.key)}
        return ServerProcess(
            "router", self._router_command(), self.config.run.dir / "servers/router.log", environment
        )

    def _router_command(self) -> list[str]:
        options = ROUTER | {
            "host": LOOPBACK,
            "prometheus-port": free_port(),
            "worker-urls": [worker.url for worker in self.workers],
            # a prefix in the cache is not worth a longer queue than this
            "balance-abs-threshold": self.config.rollout.group_size,
            "balance-rel-threshold": 1.1,
        }
        return [
            str(self.config.engine.python or sys.executable),
            "-c",
            BOOT,
            "sglang_router.launch_router",
            *command_line(options),
        ]

    def _tell_router(self, router: Server) -> str:
        """What the router lacks of serving the workers and nobody else, after it was told of them; "" if
        nothing.
        """
        wanted = {worker.url for worker in self.workers}  # one may die meanwhile
        try:
            listed = router.get("/workers", fields={"workers": list})["workers"]
            known = {str(worker.get("url")): worker for worker in listed if isinstance(worker, dict)}
            if wanted == {url for url, worker in known.items() if worker.get("is_healthy")}:
                return ""
            for url in wanted - known.keys():
                router.post("/workers", {"url": url, "api_key": self.key})
            for url in known.keys() - wanted:  # they died
                router.delete(f"/workers/{known[url].get('id')}")
        except EngineError as error:  # it has died itself, and is started again
            return str(error)
        return f"router {router.url} serves {sorted(known)}, not {sorted(wanted)}"

    def _wait_for(self, processes: Sequence[ServerProcess]) -> None:
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

    def _look_at_guests(self) -> None:
        def look(url: str) -> str:
            try:
                introduce(Server(url, self.key), self.config.policy.model)
            except ConfigError as error:
                return str(error)
            return ""

        found = dict(zip(self._guests, on_all(list(self._guests), look), strict=True))
        for url, failure in found.items():
            if bool(failure) != bool(self._guests[url]):
                self._has_changed = True
                self.say(
                    f"{failure}; left out until it answers at a sync of weights"
                    if failure
                    else f"{url} answers again"
                )
        if self._guests:
            self._guests, self._workers = (
                found,
                [Server(url, self.key) for url, failure in found.items() if not failure],
            )

    def _watch(self) -> None:
        """Start again what dies or stands still. What dies again and again before it has served is left
        dead.
        """
        while not self._is_closing.wait(LOOK_EVERY):
            for process in [*self.local, *([self.router] if self.router else [])]:
                try:
                    self._look_at_router(process) if process is self.router else self._look_at(process)
                except (
                    OSError,
                    subprocess.SubprocessError,
                ) as error:  # no process can be made, or the like: the next look sees it dead
                    self._tell(f"{process.name} cannot be started: {error}")

    def _look_at(self, process: ServerProcess) -> None:
        if process.state == "dead":
            return
        if process.restart_at is not None:
            if time.monotonic() >= process.restart_at:
                process.restart_at = None
                process.start(free_port(process.port))
        elif process.state == "starting" and process.is_up():
            process.state = "up"
            self._tell(f"{process.name} is up again; it takes requests after the next sync of weights")
        elif process.has_failed() or (process.state == "starting" and process.is_silent()):
            self._note_death(process)

    def _look_at_router(self, router: ServerProcess) -> None:
        """Never given up: nothing is generated without it."""
        if router.state != "serving" and router.is_up():
            router.state = "serving"
        if router.has_ended() and router.restart_at is None:
            self._tell(f"{router.describe_failure()}; starting it again")
            router.plan_restart()
        if router.restart_at is not None and time.monotonic() >= router.restart_at:
            router.restart_at, router.command = None, self._router_command()
            router.start(router.port)

    def _note_death(self, process: ServerProcess) -> None:
        process.failure = process.describe_failure()
        process.plan_restart()
        goes_on = process.num_restarts <= RESTARTS
        with self._lock:
            self._workers = [worker for worker in self._workers if worker.url != process.url]
            self._has_changed = True
            process.state = "starting" if goes_on else "dead"
        process.stop()
        given_up = f"it has not served since it was started again {RESTARTS} times, so it is given up"
        self._tell(f"{process.failure}; {'starting it again' if goes_on else given_up}")

    def _tell(self, text: str) -> None:
        # nobody listens, or the disk is full: servers are watched all the same
        with contextlib.suppress(OSError):
            self.say(text)


def introduce(server: Server, model: Path) -> str:
    """What a server that someone else has started is, in words.

    Raises:
        ConfigError: it does not answer, or serves another architecture than the policy's.
    """
    try:
        words, theirs = versions.introduce(server)
    except EngineError as error:
        raise ConfigError(
            f"engine.urls: {error}; is it up, and {KEY_VARIABLE} set if it wants a key?"
        ) from error
    ours = json.loads((model / "config.json").read_text()).get("architectures")
    if theirs not in (ours, None):
        raise ConfigError(
            f"engine.urls: {server.url} serves {theirs}, policy.model={model} is {ours}: start it with that "
            "model"
        )
    return words
