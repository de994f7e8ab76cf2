from __future__ import annotations

import argparse


class ServerArgs:
    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Every kind of argument that SGLang has."""
        parser.add_argument("--model-path", "--model", required=True)
        parser.add_argument("--host")
        parser.add_argument("--port", type=int)
        parser.add_argument("--api-key")
        parser.add_argument("--tp-size", "--tensor-parallel-size", type=int)
        parser.add_argument("--cuda-graph-bs-decode", type=int, nargs="+")
        parser.add_argument("--sleep-on-idle", action="store_true")
        parser.add_argument("--enable-return-routed-experts", action="store_true")
        parser.add_argument("--enable-tf32-matmul", action=argparse.BooleanOptionalAction)
        for name in (
            "config",
            "dtype",
            "device",
            "attention-backend",
            "sampling-backend",
            "mem-fraction-static",
            "log-level-http",
        ):
            parser.add_argument(f"--{name}")
        for name in ("max-running-requests", "max-total-tokens"):
            parser.add_argument(f"--{name}", type=int)
        for name in ("disable-overlap-schedule", "skip-server-warmup"):
            parser.add_argument(f"--{name}", action="store_true")
