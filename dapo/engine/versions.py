"""Which SGLang a server is, and the one place that knows of differences between versions.

Older ones take weights without a session, do not say which architecture they serve, and name one weight
version for a whole response.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dapo.engine.control import Server, on_all
from dapo.types import EngineError

RUN = ("0.5.23",)  # what the tests run; other versions may do
ABOUT = {"tp_size": int, "pp_size": int, "dp_size": int, "device": str, "enable_memory_saver": bool}


@dataclass(frozen=True)
class Peer:
    """A server that takes weights."""

    server: Server
    tensor_ranks: int
    device: str
    # it takes tensors and broadcasts between begin_weight_update and end_weight_update only
    has_sessions: bool
    can_release: bool  # it was started to share its GPUs with the trainer, with --enable-memory-saver
    version: str


def meet(servers: Sequence[Server]) -> list[Peer]:
    """Ask every server what it is; say once of each version that was not run that it was not.

    Raises:
        EngineError: no answer, or a layout that weights cannot be sent to.
    """
    peers = on_all(servers, _meet)
    for version in sorted({peer.version for peer in peers}):
        _warn_of(version)
    return peers


def _meet(server: Server) -> Peer:
    info = server.get("/server_info", fields=ABOUT)
    if info["dp_size"] * info["pp_size"] > 1:
        raise EngineError(
            f"{server.url} has dp-size {info['dp_size']}, pp-size {info['pp_size']}: start more servers, "
            "with tp-size alone"
        )
    has_sessions = "/begin_weight_update" in server.get("/openapi.json", fields={"paths": dict})["paths"]
    version = str(info.get("version", "of unknown version"))
    return Peer(
        server,
        info["tp_size"],
        info["device"],
        has_sessions,
        can_release=info["enable_memory_saver"],
        version=version,
    )


def introduce(server: Server) -> tuple[str, list[str] | None]:
    """A server in words, and the architectures that it serves; None where it does not say."""
    about, version = (
        server.get("/model_info"),
        server.get("/server_info").get("version", "of unknown version"),
    )
    return f"{server.url}: SGLang {version}, {about.get('model_path')}", about.get("architectures")


def weight_spans(meta: dict[str, Any], length: int) -> list[dict[str, Any]]:
    """[{version, start, end}, …] of a response of `length` tokens, from its meta_info."""
    return meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": length}]


@functools.cache  # once
def _warn_of(version: str) -> None:
    if version not in RUN:
        print(
            f"warning: a server is SGLang {version}; this trainer was run with {', '.join(RUN)} only",
            file=sys.stderr,
            flush=True,
        )
