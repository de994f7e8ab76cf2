"""The router in front of a run's servers, for generation only: control calls go to each worker."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from dapo.config import Config
from dapo.engine.arguments import child_environment, module_command
from dapo.engine.control import Server
from dapo.engine.process import LOOPBACK, ServerProcess, free_port
from dapo.types import EngineError

OPTIONS = {
    "policy": "cache_aware",
    "health-check-interval-secs": 5,
    "health-check-timeout-secs": 60,  # a worker that is late may only be busy
    "health-failure-threshold": 2,
    "health-success-threshold": 1,
    "worker-startup-check-interval": 1,
    # a server refuses a retry under an id that it still knows: the client retries, with a new id
    "disable-retries": True,
    "cb-failure-threshold": 5,
    "cb-timeout-duration-secs": 10,
    "request-timeout-secs": 24 * 3600,  # a long response is no failure: the client has its own timeouts
    "prometheus-host": LOOPBACK,
    "log-level": "warn",
}


class Router(ServerProcess):
    """The router's process, and the workers it serves. `key` is its API key and the workers'."""

    def __init__(self, config: Config, key: str, worker_urls: Iterable[str]):
        self.config = config
        self.key = key
        log, environment = config.run.dir / "servers/router.log", child_environment(True, key)
        super().__init__("router", self._command_for(worker_urls), log, environment)

    def start_again(self, worker_urls: Iterable[str]) -> None:
        """Start it with these workers, at the same port if it could open that one."""
        self.command = self._command_for(worker_urls)
        self.start(free_port(self.port) if self.fault else self.port)

    def update(self, worker_urls: Iterable[str]) -> str:
        """Add and remove workers until it serves exactly these. Return "" if it does, else what is wrong."""
        router, wanted = Server(self.url, self.key, self.listener.require), set(worker_urls)
        try:
            listed = router.get("/workers", fields={"workers": list})["workers"]
            known = {str(worker.get("url")): worker for worker in listed if isinstance(worker, dict)}
            if wanted == {url for url, worker in known.items() if worker.get("is_healthy")}:
                return ""
            for url in wanted - known.keys():
                router.post("/workers", {"url": url, "api_key": self.key})
            for url in known.keys() - wanted:  # they died
                router.delete(f"/workers/{known[url].get('id')}")
        except EngineError as error:  # it died itself, and is restarted
            return str(error)
        return f"router {router.url} serves {sorted(known)}, not {sorted(wanted)}"

    def _command_for(self, worker_urls: Iterable[str]) -> list[str]:
        options = OPTIONS | {
            "host": LOOPBACK,
            "prometheus-port": free_port(),
            "worker-urls": list(worker_urls),
            # a prefix in the cache is not worth a longer queue than this
            "balance-abs-threshold": self.config.rollout.group_size,
            "balance-rel-threshold": 1.1,
        }
        python = str(self.config.engine.python or sys.executable)
        return module_command(python, "sglang_router.launch_router", options)
