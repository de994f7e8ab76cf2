"""The ranks of a script as children of one process, so that torch and Megatron are imported only once.

python -m tests.distributed.forked N MODULE [ARGUMENT …]. A rank that fails ends the others.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import socket
import sys

import dapo.assemble  # noqa: F401  # before the ranks are forked

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main(num_processes: int, arguments: list[str]) -> int:
    """Run the ranks. Return the exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    ranks = set()
    for rank in range(num_processes):
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sys.argv[:] = arguments
            runpy.run_module(arguments[0], run_name="__main__")
            return 0
        ranks.add(pid)
    failed = False
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
