"""Serves the report of runs that go on: the page loads itself again when one of them has written more.

dapo report RUN [RUN …] --serve
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dapo.config import ConfigError
from dapo.report import page
from dapo.rollout import record
from dapo.types import reason

HOST = "127.0.0.1"  # nobody else may look at it; from elsewhere: ssh -L
POLICY = "default-src 'none'"  # begins the page's own content security policy
SCRIPT = """<script>
let before = null;
setInterval(async () => {
  const now = await fetch("/state").then(answer => answer.text(), () => before);
  if (before !== null && now !== before) location.reload();
  before = now;
}, 2000);
</script>"""
WAITING = "<!doctype html><meta charset=utf-8><title>dapo</title><p>{}</p><body></body>"


def state(directories: Sequence[Path]) -> str:
    """Return a text that changes when a run has written a step, its record of prompts or samples."""
    names = "metrics.jsonl", "rollouts", record.NAME
    paths = [directory / name for directory in directories for name in names]
    return " ".join(str(path.stat().st_mtime_ns) if path.exists() else "-" for path in paths)


def live(directories: Sequence[Path], samples_mib: float) -> str:
    """Return the page with the script that loads it again; of a run without a step, the reason."""
    try:
        text, _ = page.make(directories, samples_mib)
    except ConfigError as error:
        text = WAITING.format(html.escape(reason(error)))
    return text.replace(POLICY, f"{POLICY}; connect-src 'self'", 1).replace("</body>", f"{SCRIPT}</body>", 1)


def make_server(directories: Sequence[Path], samples_mib: float, port: int) -> ThreadingHTTPServer:
    """Bind a port of this machine, 0 for a free one. Raise ConfigError if it is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = {"/": lambda: live(directories, samples_mib), "/state": lambda: state(directories)}
            host, path = self.headers.get("Host", "").lower().split(":")[0], self.path.partition("?")[0]
            if host not in (HOST, "localhost") or path not in known:  # another name: another site's page asks
                self.send_error(404)
                return
            content = known[path]().encode()
            self.send_response(200)
            self.send_header("Content-Type", f"text/{'html' if path == '/' else 'plain'}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None: ...

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ConfigError(f"--port {port}: {error.strerror}: name another one, or 0 for any") from error


def serve(directories: Sequence[Path], samples_mib: float, port: int, say: Callable[[str], object]) -> None:
    """Serve until Ctrl-C."""
    page.check_size(samples_mib)
    for directory in directories:
        if not directory.is_dir():
            raise ConfigError(f"{directory} is not a directory: name the run.dir of a run")
    with make_server(directories, samples_mib, port) as server:
        say(f"http://{HOST}:{server.server_port}/ until Ctrl-C")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("")
