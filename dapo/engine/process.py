"""A server or the router as a child process: started under a guardian (guardian.py), looked at, described,
stopped.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dapo.engine import guardian

# seconds without a new line in its log before a starting server is given up: large weights take long, and say
# so
SILENCE = 600.0
STOP_LIMIT = 10.0  # seconds
RESTARTS = 3  # in a row, of a server that dies again before it has served
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 30.0  # seconds before the second of them, doubled from one to the next
LOOPBACK = "127.0.0.1"


class ServerProcess:
    """A server or the router, with its guardian: `starting`, `up`, `serving`, or `dead` for good."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: dict[str, str], host: str = LOOPBACK
    ):
        self.name, self.command, self.log, self.environment = name, command, log, environment
        self.host = LOOPBACK if host in ("0.0.0.0", "::") else host
        self.failure = ""  # what it last died of
        self.num_restarts = 0  # since it last served
        self.restart_at: float | None = None  # time.monotonic(), where it waits for its next start
        self.start(free_port())

    def start(self, port: int) -> None:
        self.state: Literal["starting", "up", "serving", "dead"] = "starting"
        self.port, self.started = port, time.time()
        self.fault = ""  # for which it is to be started again, though it lives
        self.url = f"http://{self.host}:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            self.begin = log.tell()  # of this start's lines
        command = [sys.executable, "-I", guardian.__file__, str(os.getpid()), str(self.log)]
        command += [*self.command, "--port", str(port)]
        self.process = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, start_new_session=True
        )  # Ctrl-C is ours

    def plan_restart(self) -> None:
        """At once where it had served, after a pause where it died on its way there."""
        self.num_restarts = 1 if self.state == "serving" else self.num_restarts + 1
        pause = (
            min(FIRST_PAUSE * 2 ** (self.num_restarts - 2), LONGEST_PAUSE) if self.num_restarts > 1 else 0.0
        )
        self.restart_at = time.monotonic() + pause

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def has_failed(self) -> bool:
        return bool(self.fault) or self.has_ended()

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return not self.has_ended()
        except (OSError, http.client.HTTPException):
            return False

    def is_silent(self) -> bool:
        try:
            told = self.log.stat().st_mtime
        except OSError:  # someone has removed it
            told = 0.0
        return time.time() - max(self.started, told) > SILENCE

    def lines(self) -> list[str]:
        try:
            with open(self.log, "rb") as log:
                log.seek(self.begin)
                text = log.read().decode("utf-8", "replace")
        except OSError as error:
            return [f"its log cannot be read: {error.strerror}"]
        return [line for line in re.split(r"[\r\n]+", text) if line.strip()]

    def describe_progress(self) -> str:
        # an indented one quotes the code that warns
        told = [line for line in self.lines() if not line[0].isspace()]
        last = re.sub(r"^\[[^\]]*\] *", "", told[-1])[:100] if told else "nothing in its log yet"
        return f"{self.name}, {time.time() - self.started:.0f} s: {last}"

    def describe_failure(self) -> str:
        status = self.process.poll()
        if self.fault:
            how = self.fault
        elif status is None:
            how = f"said nothing for {SILENCE:.0f} s"
        else:
            how = (
                f"ended with status {status}"
                if 0 <= status <= 128
                else f"was killed by signal {max(-status, status - 128)}"
            )
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


def last_error(lines: Sequence[str]) -> str:
    """The line of a log that says why: the last exception's, or argparse's, if it is among the last lines;
    else the last one.
    """
    for line in reversed(lines[-40:]):
        if re.match(r"[\w.]*(Error|Exception)\b|.*\berror: ", line):
            return line.strip()[:300]
    return lines[-1].strip()[:300] if lines else "its log is empty"


def free_port(avoid: int = 0) -> int:
    """A port that nothing listens on, other than `avoid`."""
    while True:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = int(probe.getsockname()[1])
        if port != avoid:
            return port
