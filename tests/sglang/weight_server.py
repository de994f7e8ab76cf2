"""A server that takes weights as SGLang does, in a thread of this process, and that fails on demand: for
fault injection only.

`server.faults["/begin_weight_update"] = [None, "refuse"]`: the first such call goes well, the second is
refused, later ones go well. "refuse" answers 400, "silence" nothing while the server lives, "die" closes
every connection and takes no more, "slow" sends a byte now and then; what the others answer is in
`MALFORMED`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

SESSION = ("/begin_weight_update", "/end_weight_update")
MALFORMED = {  # status, bytes that are announced, what comes of them
    "500": (500, 0, b'{"error": {"message": "out of memory"}}'),
    "503": (503, 0, b"not ready"),
    "half a 500": (500, 1000, b'{"error": {"mess'),
    "garbage": (200, 0, b"<html>\xff\x00 It works!</html>"),
    "half a JSON": (200, 0, b'{"success": true, "mess'),
    "half a body": (200, 1000, b'{"success": true, "mess'),
    "empty": (200, 0, b""),
    "deep JSON": (200, 0, b"[" * 100_000),
    "half a character": (200, 0, rb'{"success": true, "message": "\ud800"}'),
}


REFUSED = b'{"success": false, "message": "out\\nof\\nmemory' + 9999 * b" again" + b'"}'


class Refusal(Exception):
    pass


class WeightServer:
    def __init__(self, has_sessions: bool = True, has_memory_saver: bool = False):
        self.has_sessions, self.has_memory_saver = has_sessions, has_memory_saver
        self.sglang = "0.5.23"
        self.faults: dict[str, list[str | None]] = {}
        self.calls: list[str] = []  # paths of what was posted, /resume_memory_occupation with its tags
        self.weights: dict[str, torch.Tensor] = {}
        self.version, self.is_open, self.is_paused = "default", False, False
        self.groups: dict[str, Any] = {}
        self.is_dead = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        report = self.http.handle_error
        # a dead server prints nothing
        self.http.handle_error = lambda *where: None if self.is_dead.is_set() else report(*where)  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> WeightServer:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_dead.is_set():
            self.die()

    def die(self) -> None:
        self.is_dead.set()
        self.http.shutdown()
        self.http.server_close()
        self.groups.clear()

    def get(self, path: str) -> dict[str, Any]:
        return {
            "/server_info": {
                "tp_size": 1,
                "pp_size": 1,
                "dp_size": 1,
                "device": "cpu",
                "enable_memory_saver": self.has_memory_saver,
            }
            | {"version": self.sglang},
            "/openapi.json": {"paths": dict.fromkeys(SESSION if self.has_sessions else ())},
            "/model_info": {"weight_version": self.version},
            "/health": {},
            "/v1/loads": {"loads": []},
        }[path]

    def answer(self, path: str) -> bytes:
        """To a call that went well, in SGLang's words."""
        if path in ("/pause_generation", "/continue_generation"):
            return b'{"message": "Generation paused successfully.", "status": "ok"}'
        if path == "/flush_cache":
            return b"Cache flushed.\nPlease check backend logs for more details."
        return b"null" if path.endswith("_memory_occupation") else b'{"success": true, "message": "Success"}'

    def post(self, path: str, body: dict[str, Any]) -> None:
        if path == "/begin_weight_update":
            _refuse_if(self.is_open, "a weight-update session is already open")
            self.is_open = True
        elif path == "/end_weight_update":
            _refuse_if(not self.is_open, "no weight-update session is open")
            self.is_open = False
        elif path in ("/pause_generation", "/continue_generation"):
            self.is_paused = path == "/pause_generation"
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/init_weights_update_group":
            self.groups[body["group_name"]] = _join(body)
        elif path == "/destroy_weights_update_group":
            _refuse_if(body["group_name"] not in self.groups, "The group to be destroyed does not exist.")
            del self.groups[body["group_name"]]
        elif path.startswith("/update_weights_from_"):
            assert self.is_paused, "weights were sent to a server that generates"
            _refuse_if(
                self.has_sessions and not self.is_open and path != "/update_weights_from_disk",
                "must run between begin and end",
            )
            self.weights |= {"disk": _from_disk, "distributed": self._from_broadcast, "tensor": _from_tensor}[
                path.split("_")[-1]
            ](body)

    def _from_broadcast(self, body: dict[str, Any]) -> dict[str, torch.Tensor]:
        shapes, dtypes = body["shapes"], [getattr(torch, dtype) for dtype in body["dtypes"]]
        sizes = [
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        data = torch.empty(sum(sizes), dtype=torch.uint8)
        self.groups[body["group_name"]].broadcast(data, 0).wait()
        return {
            n: d.view(dt).reshape(s)
            for n, d, dt, s in zip(body["names"], data.split(sizes), dtypes, shapes, strict=True)
        }


def _join(body: dict[str, Any]) -> Any:
    """As `init_process_group` helpers do: the store's keys are prefixed three times."""
    store: Any = dist.TCPStore(
        body["master_address"], body["master_port"], body["world_size"], False, timedelta(seconds=20)
    )
    name = body["group_name"]
    for prefix in (name, f"{name}/", "cpu/"):
        store = dist.PrefixStore(prefix, store)
    return dist.ProcessGroupGloo(store, body["rank_offset"], body["world_size"], timedelta(seconds=20))


def _from_tensor(body: dict[str, Any]) -> dict[str, torch.Tensor]:
    [payload] = body["serialized_named_tensors"]
    bucket = pickle.loads(base64.b64decode(payload))
    return {
        m.name: bucket["flattened_tensor"][m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape)
        for m in bucket["metadata"]
    }


def _from_disk(body: dict[str, Any]) -> dict[str, torch.Tensor]:
    directory = Path(body["model_path"])
    files = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    loaded = {file: load_file(directory / file) for file in set(files.values())}
    return {name: loaded[file][name] for name, file in files.items()}


def _refuse_if(condition: bool, message: str) -> None:
    if condition:
        raise Refusal(message)


def _handler(server: WeightServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            if not self._fail():
                self._answer(200, server.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.calls.append(
                self.path + ("".join(f" {tag}" for tag in body["tags"]) if "tags" in body else "")
            )
            if not self._fail():
                try:
                    server.post(self.path, body)
                except (Refusal, RuntimeError) as error:
                    self._answer(400, {"success": False, "message": str(error)})
                else:
                    self._send(200, server.answer(self.path))

        def _fail(self) -> bool:
            """Fail as `faults` says for this call. Return True if it does."""
            faults = server.faults.get(self.path)
            fault = faults.pop(0) if faults else None
            if fault == "silence":
                server.is_dead.wait(20)
                self.close_connection = True
            elif fault == "die":
                server.die()
                self.close_connection = True
            elif fault == "refuse":
                self._answer(400, {"success": False, "message": "not today"})
            elif fault == "slow":
                self._send(200, b" ", announced=1000)
                with contextlib.suppress(OSError):
                    while not server.is_dead.wait(0.1):
                        self.wfile.write(b" ")
            elif fault:
                status, announced, data = MALFORMED.get(fault, (200, 0, REFUSED))
                self._send(status, data, announced)
                self.close_connection = True
            return fault is not None

        def _answer(self, status: int, value: dict[str, Any]) -> None:
            self._send(status, json.dumps(value).encode())

        def _send(self, status: int, data: bytes, announced: int = 0) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(announced or len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None: ...

    return Handler
