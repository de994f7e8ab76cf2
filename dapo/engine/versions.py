"""Servers describe themselves here, the one place that knows the differences between SGLang's versions.

Older ones take weights without a session, do not report the architecture that they serve, and give one weight
version for a whole response.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dapo.engine.control import Server, on_all
from dapo.plan import stack
from dapo.types import EngineError

RUN = (stack.SGLANG,)  # versions that the tests run; others may work
SERVER_INFO = {"tp_size": int, "pp_size": int, "dp_size": int, "device": str, "enable_memory_saver": bool}
UNKNOWN = "of unknown version"


@dataclass(frozen=True)
class Peer:
    """A server that takes weights."""

    server: Server
    tensor_ranks: int
    device: str
    has_sessions: bool  # it takes tensors and broadcasts between begin_ and end_weight_update only
    can_release: bool  # it was started to share its GPUs with the trainer, with --enable-memory-saver
    version: str


def inspect(servers: Sequence[Server]) -> list[Peer]:
    """Ask every server for its layout and version. Warn once about each version that the tests do not run.

    Raise EngineError if a server does not answer, or weights cannot be sent to its layout.
    """
    peers = on_all(servers, _inspect)
    for version in sorted({peer.version for peer in peers}):
        _warn_of(version)
    return peers


def _inspect(server: Server) -> Peer:
    info = server.get("/server_info", fields=SERVER_INFO)
    if (info["dp_size"], info["pp_size"]) != (1, 1) or info["tp_size"] < 1:
        layout = ", ".join(f"{name}-size {info[f'{name}_size']}" for name in ("tp", "dp", "pp"))
        raise EngineError(f"{server.url} has {layout}: start more servers, with tp-size alone")
    paths = server.get("/openapi.json", fields={"paths": dict})["paths"]
    return Peer(
        server,
        tensor_ranks=info["tp_size"],
        device=info["device"],
        has_sessions="/begin_weight_update" in paths,
        can_release=info["enable_memory_saver"],
        version=str(info.get("version", UNKNOWN)),
    )


def describe(server: Server) -> tuple[str, list[str] | None]:
    """Return one line about a server, and the architectures that it serves, None if it does not say."""
    about = server.get("/model_info")
    version = server.get("/server_info").get("version", UNKNOWN)
    return f"{server.url}: SGLang {version}, {about.get('model_path')}", about.get("architectures")


def weight_spans(meta: dict[str, Any], length: int) -> list[dict[str, Any]]:
    """Return [{version, start, end}, …] of a response of `length` tokens, from its meta_info."""
    return meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": length}]


@functools.cache  # once per version
def _warn_of(version: str) -> None:
    if version not in RUN:
        run = f"this trainer was run with {', '.join(RUN)} only"
        mend = f"with the server's Python, pip install {stack.HOW['sglang']}"
        print(f"warning: a server is SGLang {version}; {run}: {mend}", file=sys.stderr, flush=True)
