"""A server or the router as a child process, under a guardian (watch/server.py)."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dapo import http
from dapo.engine.listener import Listener
from dapo.watch import server as guardian

# seconds without a new line in its log after which a start has failed: large weights take long, and say so
SILENCE = 600.0
STOP_TIMEOUT = 10.0  # seconds
HEALTH_TIMEOUT = 2.0  # seconds
RESTARTS = 3  # in a row, of a server that dies again before it has served
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 30.0  # seconds before the second restart in a row, doubled each time
LOOPBACK = "127.0.0.1"


@dataclass(eq=False)
class ServerProcess:
    """A server or the router, with its guardian: `starting`, `up`, `serving`, or `dead` for good."""

    name: str
    command: Sequence[str]
    log: Path
    environment: dict[str, str]
    host: str = LOOPBACK

    def __post_init__(self) -> None:
        self.host = LOOPBACK if self.host in ("0.0.0.0", "::") else self.host
        self.failure = ""  # cause of its last death
        self.num_restarts = 0  # since it last served
        self.restart_at: float | None = None  # time.monotonic() of its next start, if one is planned
        self.start(free_port())

    def start(self, port: int) -> None:
        self.state: Literal["starting", "up", "serving", "dead"] = "starting"
        self.port = port
        self.started_at = self.wrote_at = time.monotonic()
        self.fault = ""  # why it must be restarted although it is alive
        self.url = f"http://{self.host}:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            self.begin = self.log_size = log.seek(0, os.SEEK_END)  # of this start's lines
        command = [sys.executable, "-I", guardian.__file__, str(os.getpid()), str(self.log)]
        command += [*self.command, "--port", str(port)]
        # in a session of its own it does not receive Ctrl-C
        self.process = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self.listener = Listener(self.url, self.process)

    def plan_restart(self) -> None:
        """Restart at once if it had served, after a pause if it died before that."""
        self.num_restarts = 1 if self.state == "serving" else self.num_restarts + 1
        pause = FIRST_PAUSE * 2 ** (self.num_restarts - 2) if self.num_restarts > 1 else 0.0
        self.restart_at = time.monotonic() + min(pause, LONGEST_PAUSE)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def is_up(self) -> bool:
        """Return True if it answers; raise Taken if another process listens at its port."""
        if not self.listener.is_held():
            return False
        try:
            status, _ = http.call("GET", f"{self.url}/health", timeout=HEALTH_TIMEOUT)
        except http.NoAnswer:
            return False
        return 200 <= status < 300 and not self.has_ended()

    def is_silent(self) -> bool:
        """Return True if its log has not changed for SILENCE seconds; asked at least that often."""
        with contextlib.suppress(OSError):  # the log was removed
            size = self.log.stat().st_size
            if size != self.log_size:
                self.log_size, self.wrote_at = size, time.monotonic()
        return time.monotonic() - self.wrote_at > SILENCE

    def lines(self) -> list[str]:
        """Return the lines that this start has written to the log."""
        try:
            with open(self.log, "rb") as log:
                log.seek(self.begin)
                text = log.read().decode("utf-8", "replace")
        except OSError as error:
            return [f"its log cannot be read: {error.strerror}"]
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()]

    def describe_progress(self) -> str:
        """Return one line: its name, the seconds since its start, its last line in the log."""
        # an indented line quotes code that warns
        lines = [line for line in self.lines() if not line[0].isspace()]
        last = re.sub(r"^\[[^\]]*\] *", "", lines[-1])[:100] if lines else "nothing in its log yet"
        return f"{self.name}, {time.monotonic() - self.started_at:.0f} s: {last}"

    def describe_failure(self) -> str:
        """Return one line: how it ended, and the last error in its log."""
        status = self.process.poll()
        if self.fault:
            how = self.fault
        elif status is None:
            how = f"said nothing for {SILENCE:.0f} s"
        elif 0 <= status <= 128:
            how = f"ended with status {status}"
        else:
            how = f"was killed by signal {max(-status, status - 128)}"
        return f"{self.name} {how}: {last_error(self.lines())}; see {self.log}"

    def ask_to_stop(self) -> None:
        self.process.terminate()

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the server dies with its guardian
            self.process.wait()


def last_error(lines: Sequence[str]) -> str:
    """Return the last line of a log that an exception or argparse wrote, else the last one."""
    for line in reversed(lines[-40:]):
        if re.match(r"[\w.]*(Error|Exception)\b|.*\berror: ", line):
            return line.strip()[:300]
    return lines[-1].strip()[:300] if lines else "its log is empty"


def free_port(avoid: int = 0) -> int:
    """Return a port, other than `avoid`, on which nothing listens."""
    while True:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = int(probe.getsockname()[1])
        if port != avoid:
            return port
