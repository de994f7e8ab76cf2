"""A server with a child of its own, like SGLang's scheduler. A model folder that holds a file `broken` ends
it; while it holds a file `hung`, nothing is generated, and all else goes on."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sglang.srt.server_args import ServerArgs

parser = argparse.ArgumentParser(prog="sglang serve")
ServerArgs.add_cli_args(parser)
ARGUMENTS = parser.parse_args()
ABOUT = {
    "model_path": ARGUMENTS.model_path,
    "architectures": ["Qwen2ForCausalLM"],
    "version": "0.5.23",
    "weight_version": "default",
}
ABOUT |= {
    "tp_size": 1,
    "pp_size": 1,
    "dp_size": 1,
    "device": "cpu",
    "enable_memory_saver": False,
    "paths": {},
}  # whatever is asked for


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(ABOUT)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ABOUT["weight_version"] = body.get("new_version", ABOUT["weight_version"])
        if "rid" in body and self.path == "/generate":
            self.generate(body)
            return
        self.answer(
            {
                "port": ARGUMENTS.port,
                "authorization": self.headers["Authorization"],
                "success": True,
                "status": "ok",
            }
        )

    def generate(self, body: dict[str, Any]) -> None:
        from tests.sglang import fake_server

        while Path(ARGUMENTS.model_path, "hung").exists():
            time.sleep(0.1)
        answer = fake_server.answer(body, str(ABOUT["weight_version"]))
        [stop, *_] = body["sampling_params"]["stop_token_ids"]
        if stop != fake_server.STOP:  # a model of few tokens
            few = {fake_server.STOP: stop}
            tokens = [few.get(token, 10 + token % 10) for token in answer["output_ids"]]
            meta = answer["meta_info"]
            meta["output_token_logprobs"] = [[-1.0, token, None] for token in tokens]
            meta["finish_reason"] |= {"matched": stop} if tokens[-1] == stop else {}
            answer["output_ids"] = tokens
        self.answer(answer)

    def answer(self, value: dict[str, object]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


print(f"server_args={vars(ARGUMENTS)}", flush=True)
if Path(ARGUMENTS.model_path, "broken").exists():
    raise OSError(f"{ARGUMENTS.model_path} holds no model")
server = ThreadingHTTPServer((ARGUMENTS.host, ARGUMENTS.port), Handler)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
server.serve_forever()
