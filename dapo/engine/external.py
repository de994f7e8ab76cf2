"""Servers that someone else started (engine.urls): checked and used, never started or stopped here."""

from __future__ import annotations

import os
from collections.abc import Callable

from dapo.config import Config, ConfigError
from dapo.engine.arguments import check_tensor_ranks
from dapo.engine.control import KEY_VARIABLE, Server, on_all
from dapo.engine.versions import describe
from dapo.model.shape import read_config
from dapo.types import EngineError


class ExternalServers:
    """Implements Servers. One that does not answer before a sync is left out until it does before another."""

    def __init__(self, config: Config, say: Callable[[str], None]):
        self.config = config
        self.say = say
        urls = dict.fromkeys(url.rstrip("/") for url in config.engine.urls)  # each once
        self.servers = [Server(url) for url in urls]
        self.failures = {server.url: "" for server in self.servers}  # "" of one that answers

    @property
    def workers(self) -> list[Server]:
        return [server for server in self.servers if not self.failures[server.url]]

    @property
    def generate_urls(self) -> list[str]:
        return [worker.url for worker in self.workers]

    def key_of(self, url: str) -> str | None:
        return os.environ.get(KEY_VARIABLE)

    def wait(self) -> None:
        """Check every server, and report its version and model. Raise ConfigError if one cannot be used."""
        for server in self.servers:
            self.say(check_server(server, self.config))

    def refresh(self) -> bool:
        """Check every server. Return True if others answer than before; raise EngineError if none does."""
        found = dict(on_all(self.servers, self._failure_of))
        changed = [url for url, failure in found.items() if bool(failure) != bool(self.failures[url])]
        for url in changed:
            left_out = f"{found[url]}; left out until it answers at a sync of weights"
            self.say(left_out if found[url] else f"{url} answers again")
        self.failures = found
        self.check()
        return bool(changed)

    def lost(self) -> list[str]:
        return [url for url, failure in on_all(self.workers, self._failure_of) if failure]

    def serve(self) -> None: ...

    def check(self) -> None:
        if not self.workers:
            raise EngineError("no server is left: " + "; ".join(self.failures.values()))

    def restart(self, url: str, fault: str) -> None: ...

    def close(self) -> None: ...

    def _failure_of(self, server: Server) -> tuple[str, str]:
        try:
            check_server(server, self.config)
        except ConfigError as error:
            return server.url, str(error)
        return server.url, ""


def check_server(server: Server, config: Config) -> str:
    """Return one line about a server: its version and model.

    Raise ConfigError if it does not answer, or serves another architecture than the policy's; with
    run.deterministic, if it does not generate deterministically.
    """
    model = config.policy.model
    try:
        line, theirs = describe(server)
        info = server.get("/server_info") if config.run.deterministic else None
    except EngineError as error:
        hint = f"is it up, and {KEY_VARIABLE} set if it wants a key?"
        raise ConfigError(f"engine.urls: {error}; {hint}") from error
    ours = read_config(model).get("architectures")
    if theirs not in (ours, None):
        wrong = f"{server.url} serves {theirs}, policy.model={model} is {ours}"
        raise ConfigError(f"engine.urls: {wrong}: start it with that model")
    if info is not None:
        if info.get("enable_deterministic_inference") is not True:
            without = f"{server.url} runs without --enable-deterministic-inference"
            raise ConfigError(f"engine.urls: {without}, and run.deterministic=true needs it")
        check_tensor_ranks(config, info.get("tp_size", 1))
    return line
