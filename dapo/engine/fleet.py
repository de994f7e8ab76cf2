"""A run's SGLang servers: started, watched and stopped here, with a router in front of several.

None survives the trainer, however it ends: each has a guardian (watch/server.py). They listen on loopback and
need an API key drawn for the run, which appears neither in `ps` nor in a log. It is sent to a port only while
a process under the guardian listens there (listener.py).

A server that dies is restarted on another port, so that it gets no requests before the policy's weights: once
it is up `refresh` adds it to the workers, the weights are synced, and `serve` opens it to requests.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch

from dapo import http
from dapo.clock import heartbeat
from dapo.config import Config, ConfigError
from dapo.engine import arguments
from dapo.engine.control import Server
from dapo.engine.external import ExternalServers
from dapo.engine.listener import Taken
from dapo.engine.process import RESTARTS, ServerProcess, free_port
from dapo.engine.router import Router
from dapo.types import EngineError, Interrupted, WeightsLost

CHECK_EVERY = 0.5  # seconds
REPORT_EVERY = 10.0  # seconds
ROUTER_TIMEOUT = 60.0  # seconds for the router to start, or to take a server in


def make_servers(
    config: Config, say: Callable[[str], None] = print, is_interrupted: Callable[[], bool] = lambda: False
) -> Fleet | ExternalServers:
    """Return a run's servers: those in engine.urls, or its own, which start now. `say` gets lines of news."""
    return ExternalServers(config, say) if config.engine.urls else Fleet(config, say, is_interrupted)


class Fleet:
    """Implements Servers with processes of its own, each with a log in <run.dir>/servers.

    Raise ConfigError if SGLang is missing or does not know an argument, or if there are too few GPUs.
    """

    def __init__(self, config: Config, say: Callable[[str], None], is_interrupted: Callable[[], bool]):
        self.config = config
        self.say = say
        self.is_interrupted = is_interrupted
        self.key = secrets.token_hex(24)
        self.local = self._start()
        self.router: Router | None = None  # starts once it can find the servers
        self._lock = threading.Lock()  # for the workers and the processes' states
        self._workers: list[Server] = []
        self._refreshed: list[str] = []  # urls of the workers at the last `refresh`
        self._router_url = ""  # then
        self._has_changed = False
        self._is_closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="servers", daemon=True)

    @property
    def workers(self) -> list[Server]:
        """Servers that have the policy's weights, or get them at the next sync."""
        with self._lock:
            return list(self._workers)

    @property
    def generate_urls(self) -> list[str]:
        return [self.router.url] if self.router else [worker.url for worker in self.workers]

    @property
    def processes(self) -> list[ServerProcess]:
        return [*self.local, self.router] if self.router else list(self.local)

    def key_of(self, url: str) -> str:
        """Return the key for a server or the router; raise NoAnswer if another process may be at its port."""
        for listener in [process.listener for process in self.processes]:
            if listener.url == url:
                listener.require()
                return self.key
        raise http.NoAnswer("it has been stopped")

    def wait(self) -> None:
        """Wait until every server and the router are up; if this raises, all are stopped.

        Raise ConfigError, with the last error in its log, if one died or fell silent; or Interrupted.
        """
        try:
            self._wait_until_up()
            # SGLang's router drops what asks for routes
            if len(self.local) > 1 and self.config.policy.routing_replay != "rollout":
                self.router = Router(self.config, self.key, [server.url for server in self.local])
                self._wait_until_up()
            for server in self.local:
                server.state = "serving"
            self._workers = [self._worker(server) for server in self.local]
            self._note_urls()
            self._watcher.start()
            self.serve()
        except (ConfigError, EngineError, Interrupted):
            self.close()
            raise

    def refresh(self) -> bool:
        """Add restarted servers that are up to the workers; without any worker, wait for one.

        Return True if the workers changed since the last call: then process groups must be made anew. Raise
        EngineError if no server is left.
        """
        while not self._add_restarted():
            if self.is_interrupted():
                raise Interrupted
            heartbeat()  # a start has a timeout of its own: the watcher ends one that fails or falls silent
            time.sleep(CHECK_EVERY)
        with self._lock:
            has_changed, self._has_changed = self._has_changed, False
            self._note_urls()
        self.check()
        return has_changed

    def lost(self) -> list[str]:
        """Return the workers that have died since the last `refresh`."""
        return [url for url in self._refreshed if url not in [worker.url for worker in self.workers]]

    def serve(self) -> None:
        """Open every worker to requests. Raise EngineError if the router does not take one in."""
        if not self.router:
            return
        deadline = time.monotonic() + ROUTER_TIMEOUT
        while wrong := self.router.update(worker.url for worker in self.workers):
            if time.monotonic() > deadline:
                raise EngineError(f"{wrong}, after {ROUTER_TIMEOUT:.0f} s; see {self.router.log}")
            time.sleep(CHECK_EVERY)

    def check(self) -> None:
        """Raise WeightsLost if nothing is generated until the next sync, EngineError if all are dead."""
        if self.router and self.router.url != self._router_url:
            raise WeightsLost(f"the router had to move to {self.router.url}, where it is found after a sync")
        if self.workers:
            return
        if any(server.state != "dead" for server in self.local):
            restarted = "those that were started again get them at the next sync"
            raise WeightsLost(f"no server has the policy's weights; {restarted}")
        raise EngineError("no server is left: " + "; ".join(server.failure for server in self.local))

    def restart(self, url: str, fault: str) -> None:
        """Let the watcher restart the server at `url`, which is alive but has this fault."""
        for process in self.local:
            if process.url == url and process.state == "serving":
                process.fault = fault

    def close(self) -> None:
        """Stop all processes."""
        self._is_closing.set()
        if self._watcher.is_alive():
            self._watcher.join()
        for process in self.processes:
            process.ask_to_stop()
        for process in self.processes:
            process.stop()

    def _start(self) -> list[ServerProcess]:
        config, engine = self.config, self.config.engine
        folder = config.run.dir / "servers"
        python = str(engine.python or sys.executable)
        has_cuda = torch.cuda.is_available()
        arguments.check_sglang(python, has_cuda)
        known = arguments.known_arguments(python, has_cuda) if engine.sglang else {}
        options = arguments.server_options(config, known, has_cuda)
        if config.run.deterministic and not has_cuda:
            self.say(arguments.NOT_ON_CPU)
        sets: list[list[str]] = [[]] * engine.servers
        if has_cuda:
            arguments.check_broadcast(config, options, python)
            sets = arguments.gpu_sets(engine.servers, options, sees_main=engine.weight_sync == "tensor")
        environment = arguments.child_environment(has_cuda, self.key)
        command = arguments.module_command(python, "sglang.launch_server", options)
        processes = []
        for i, gpus in enumerate(sets):
            name, log = f"server {i}", folder / f"server-{i}.log"
            visible = environment | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
            processes.append(ServerProcess(name, command, log, visible, options["host"]))
        return processes

    def _wait_until_up(self) -> None:
        reported_at = time.monotonic()
        while waiting := [process for process in self.processes if not self._is_up(process)]:
            if time.monotonic() - reported_at > REPORT_EVERY:
                reported_at = time.monotonic()
                first = waiting[0].describe_progress()
                self.say(f"waiting for {len(waiting)} of {len(self.processes)}: {first}")
            if self.is_interrupted():
                raise Interrupted
            time.sleep(CHECK_EVERY)

    def _is_up(self, process: ServerProcess) -> bool:
        """Return True if a process that starts with the run is up. Start it anew if its port was taken."""
        try:
            if process.is_up():
                return True
        except Taken as taken:
            process.num_restarts += 1
            if process.num_restarts > RESTARTS:
                raise ConfigError(
                    f"{process.name}: {taken}, like those of {RESTARTS} starts before"
                ) from None
            self._report(f"{process.name}: {taken}; starting it on another one")
            process.stop()
            process.start(free_port(process.port))
        if process.has_ended() or process.is_silent():
            raise ConfigError(process.describe_failure())
        return False

    def _note_urls(self) -> None:
        self._refreshed = [worker.url for worker in self._workers]
        self._router_url = self.router.url if self.router else ""

    def _worker(self, server: ServerProcess) -> Server:
        return Server(server.url, self.key, server.listener.require)

    def _add_restarted(self) -> bool:
        """Add servers that are up to the workers. Return False if there is none and one is starting."""
        with self._lock:
            for server in self.local:
                if server.state == "up":
                    server.state = "serving"
                    self._workers.append(self._worker(server))
                    self._has_changed = True
            return bool(self._workers) or not any(server.state == "starting" for server in self.local)

    def _watch(self) -> None:
        """Restart processes that die or stand still, but no server that dies repeatedly before it serves."""
        while not self._is_closing.wait(CHECK_EVERY):
            for process in self.processes:
                try:
                    if isinstance(process, Router):
                        self._check_router(process)
                    else:
                        self._check_server(process)
                except Taken as taken:  # before it could open its port
                    process.fault = f"could not start: {taken}"
                except (OSError, subprocess.SubprocessError) as error:
                    # no process can be made, for example: the next check finds it dead
                    self._report(f"{process.name} cannot be started: {error}")

    def _check_server(self, process: ServerProcess) -> None:
        if process.state == "dead":
            return
        if process.restart_at is not None:
            if time.monotonic() >= process.restart_at:
                process.restart_at = None
                process.start(free_port(process.port))
        elif process.fault or process.has_ended() or (process.state == "starting" and process.is_silent()):
            self._note_death(process)
        elif process.state == "starting" and process.is_up():
            process.state = "up"
            self._report(f"{process.name} is up again; it takes requests after the next sync of weights")

    def _check_router(self, router: Router) -> None:
        """Restart it as often as it dies: nothing is generated without it."""
        if (router.has_ended() or router.fault) and router.restart_at is None:
            router.stop()
            self._report(f"{router.describe_failure()}; starting it again")
            router.plan_restart()
        if router.restart_at is not None and time.monotonic() >= router.restart_at:
            router.restart_at = None
            router.start_again(worker.url for worker in self.workers)
        elif router.state != "serving" and router.is_up():
            router.state = "serving"

    def _note_death(self, process: ServerProcess) -> None:
        process.failure = process.describe_failure()
        process.plan_restart()
        is_restarted = process.num_restarts <= RESTARTS
        with self._lock:
            self._workers = [worker for worker in self._workers if worker.url != process.url]
            self._has_changed = True
            process.state = "starting" if is_restarted else "dead"
        process.stop()
        if self.router:
            self.router.update(worker.url for worker in self.workers)  # another process may take the port
        stays_dead = f"it has not served in {RESTARTS} restarts, so it stays dead"
        self._report(f"{process.failure}; {'starting it again' if is_restarted else stays_dead}")

    def _report(self, text: str) -> None:
        with contextlib.suppress(OSError):  # stdout may be closed, or the disk full
            self.say(text)
