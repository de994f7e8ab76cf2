"""A router that knows its workers, and takes every one for healthy. It forwards nothing."""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
parser.add_argument("--worker-urls", nargs="*", default=[])
ARGUMENTS, _ = parser.parse_known_args()
WORKERS = {f"worker-{i}": url for i, url in enumerate(ARGUMENTS.worker_urls)}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(
            {"workers": [{"id": name, "url": url, "is_healthy": True} for name, url in WORKERS.items()]}
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        WORKERS[f"worker-{body['url']}"] = body["url"]
        self.answer({"status": "accepted"})

    def do_DELETE(self) -> None:
        del WORKERS[self.path.removeprefix("/workers/")]
        self.answer({"status": "accepted"})

    def answer(self, value: dict[str, object]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


ThreadingHTTPServer((ARGUMENTS.host, ARGUMENTS.port), Handler).serve_forever()
