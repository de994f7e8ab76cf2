"""What the main rank and the ranks' store do at 8, 64, 512 and 1,024 ranks: start-up, an error, a step.

python benchmarks/control_plane.py [ranks of one mesh]

Real meshes of 2 to 64 forked ranks are measured, and joining of up to 1,024 clients of a real store; the rest
follows from what was counted.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist
from record import heading, save, table
from torch._C._distributed_c10d import Store, TCPStore

import dapo.mesh
from dapo import joining
from dapo.config import Parallel
from dapo.mesh import Mesh

REAL, SIZES = (2, 4, 8, 16, 32, 64), (8, 64, 512, 1024)
ROUNDS = 5
LONGEST = 100  # seconds of one mesh
# of one step without evaluation: prepare_weights, is_colocated, load, next_batch; see dapo/sampler.py
ON_MAIN, SHARE = 3, 4096
STORE = """
import sys
from torch._C._distributed_c10d import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


class Counting(Store):
    """A store that counts the requests, and the bytes of the values, that go to another."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner, self.requests, self.num_bytes = inner, Counter[str](), 0

    def _count(self, request: str, *values: Any) -> None:
        self.requests[request] += 1
        self.num_bytes += sum(map(len, values))

    def set(self, key: str, value: Any) -> None:
        self._count("set", value)
        self.inner.set(key, value)

    def get(self, key: str) -> bytes:
        value: bytes = self.inner.get(key)
        self._count("get", value)
        return value

    def add(self, key: str, value: int) -> int:
        self._count("add")
        return int(self.inner.add(key, value))

    def check(self, keys: list[str]) -> bool:
        self._count("check")
        return bool(self.inner.check(keys))

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self._count("wait")
        self.inner.wait(keys, *timeout)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        values: list[bytes] = self.inner.multi_get(keys)
        self._count("multi_get", *values)
        return values

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        self._count("multi_set", *values)
        self.inner.multi_set(keys, values)

    def set_timeout(self, timeout: timedelta) -> None:
        self.inner.set_timeout(timeout)

    def has_extended_api(self) -> bool:
        return True


class Server:
    """A store in a process of its own, as a launcher has it."""

    def __enter__(self) -> Server:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", STORE], **pipes)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())
        return self

    def client(self) -> Any:
        return TCPStore("127.0.0.1", self.port, is_master=False, wait_for_workers=False)

    def __exit__(self, *_: Any) -> None:
        self.process.communicate()


def in_step(store: Any, name: str, world: int) -> None:
    """Wait for all ranks, without gloo."""
    store.add(name, 1)
    while store.add(name, 0) < world:
        time.sleep(0.02)


def run_rank(server: Server, rank: int, world: int) -> None:
    """Make a mesh and use it; leave what this rank measured in the store."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    plain = server.client()
    counting = Counting(server.client())
    dapo.mesh.rendezvous = lambda url: iter([(counting, rank, world)])
    in_step(plain, "started", world)
    start = time.monotonic()
    mesh = Mesh(Parallel(tensor=1))
    found: dict[str, Any] = {"seconds": time.monotonic() - start}
    in_step(plain, "meshed", world)
    found |= {
        "requests": sum(counting.requests.values()),
        "bytes": counting.num_bytes,
        "keys": plain.num_keys() - 2,  # but for those of `in_step`
        "files": len(os.listdir("/proc/self/fd")),
    }
    sent = Counter[str]()
    count(sent)
    begin, cpu = time.monotonic(), time.process_time()
    for _ in range(ROUNDS):
        step(mesh)
    found |= {
        "step seconds": (time.monotonic() - begin) / ROUNDS,
        "step cpu": (time.process_time() - cpu) / ROUNDS,
        **{name: total / ROUNDS for name, total in sent.items()},
    }
    cpu = time.process_time()
    mesh.gather({"sum": [0] * 8})
    found["gather cpu"] = time.process_time() - cpu
    mesh.barrier()
    in_step(plain, "stepped", world)
    plain.set(f"raised/{rank}", str(time.monotonic()))
    cpu = time.process_time()
    try:
        mesh.on_main(fail)
    except Exception:  # noqa: BLE001
        found["error cpu"] = time.process_time() - cpu
        # one machine, one clock
        found["error seconds"] = time.monotonic() - float(plain.get("raised/0"))
    plain.set(f"found/{rank}", json.dumps(found))
    in_step(plain, "done", world)


def count(sent: Counter[str]) -> None:
    isend = dist.isend

    def counted(tensor: Any, *args: Any, **options: Any) -> Any:
        sent.update({"messages": 1, "sent": tensor.nbytes})
        return isend(tensor, *args, **options)

    dist.isend = counted


def step(mesh: Mesh) -> None:
    """Call what a step calls of the mesh; a share is small, for it is no control traffic."""
    for _ in range(ON_MAIN):
        mesh.on_main(lambda: None)
    mesh.scatter(lambda: (np.zeros(SHARE // 8) for _ in range(mesh.data)))
    mesh.received()
    mesh.sum_by_key(dict.fromkeys("abcdefgh", 1.0))


def fail() -> None:
    raise KeyError("an error")


def real(world: int) -> dict[str, float]:
    """Measure a mesh of forked ranks: the main rank's values, sums of requests, the slowest rank's error."""
    import torch._dynamo  # noqa: F401  # else each rank imports it at first use

    with Server() as server:
        ranks = []
        for rank in range(world):
            process = os.fork()
            if not process:
                faulthandler.dump_traceback_later(LONGEST, exit=True)
                try:
                    run_rank(server, rank, world)
                except BaseException:  # noqa: BLE001
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            ranks.append(process)
        status = [os.waitpid(process, 0)[1] for process in ranks]
        assert status == [0] * world, "a rank failed, or all took too long"
        store = server.client()
        found = [json.loads(store.get(f"found/{rank}")) for rank in range(world)]
    sums = {name: sum(each[name] for each in found) for name in ("requests", "bytes")}
    return found[0] | sums | {"error seconds": max(each["error seconds"] for each in found)}


def join(world: int) -> tuple[float, int, int]:
    """Join with as many threads, each with a client of its own. Return seconds, requests, their bytes."""
    with Server() as server:
        stores = [Counting(server.client()) for _ in range(world)]
        begin = time.monotonic()
        threads = [
            threading.Thread(target=joining.join, args=(store, rank, world))
            for rank, store in enumerate(stores)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - begin
        requests = sum(sum(store.requests.values()) for store in stores)
        return seconds, requests, sum(store.num_bytes for store in stores)


def exponent(sizes: list[int], values: list[float]) -> float:
    """Fit values ∝ size^exponent by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def row(
    name: str,
    found: dict[int, dict[str, float]],
    key: str,
    scale: float = 1.0,
    exact: Callable[[int], float] | None = None,
) -> list[str]:
    """Write measured values; of sizes that were not, = before `exact`, or ≈ before what the growth gives."""
    sizes = [n for n in found if n >= 8]
    last, power = sizes[-1], exponent(sizes, [found[n][key] for n in sizes])
    cells = []
    for n in SIZES:
        if n in found:
            cells.append(shown(scale * found[n][key]))
        elif exact:
            cells.append(f"= {shown(scale * exact(n))}")
        else:
            cells.append(f"≈ {shown(scale * found[last][key] * (n / last) ** power)}")
    return [name, *cells, f"{power:.2f}"]


def shown(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(value))) if value else 0
    return f"{value:,.{min(digits, 4)}f}"


def main() -> None:
    joined = {}
    for n in SIZES:
        joined[n] = join(n)
        print(f"joined {n}: {joined[n]}", flush=True)
    found = {}
    for n in REAL:
        # forked by a process without threads
        printed = subprocess.run([sys.executable, __file__, str(n)], stdout=subprocess.PIPE, check=True)
        found[n] = json.loads(printed.stdout)
        print(n, found[n], flush=True)
    rows = [
        ["joining: seconds", *(shown(joined[n][0]) for n in SIZES), growth(joined, 0)],
        ["joining: requests to the store", *(shown(joined[n][1]) for n in SIZES), growth(joined, 1)],
        ["joining: bytes of values", *(shown(joined[n][2]) for n in SIZES), growth(joined, 2)],
        row("Mesh: seconds on the main rank", found, "seconds"),
        row("keys in the store", found, "keys", exact=lambda n: 5 * n),
        row("requests to the store, all ranks", found, "requests", exact=lambda n: 4 * n * n + joined[n][1]),
        row("MB of values from and to the store", found, "bytes", 1e-6, lambda n: 2 * n * n * (154 + 8 * n)),
        row("open files and sockets of the main rank", found, "files", exact=lambda n: 2 * n + 14),
        row("a step's messages from the main rank", found, "messages", exact=lambda n: 8 * (n - 1)),
        row("a step's kB from the main rank", found, "sent", 1e-3, lambda n: 5260 * (n - 1)),
        row("a step's control traffic, CPU seconds of the main rank", found, "step cpu"),
        row("… seconds, with all ranks on these cores", found, "step seconds"),
        row("gather of an object, CPU seconds of the main rank", found, "gather cpu"),
        row("an error to every rank, CPU seconds of the main rank", found, "error cpu"),
        row("… seconds, with all ranks on these cores", found, "error seconds"),
    ]
    text = heading("The control plane at 8 to 1,024 ranks")
    text += (
        "\nEvery rank is data-parallel: the most that the main rank can have to send. Joining: threads, each "
        "with a TCPStore client of its own, at every size. The rest: real meshes of forked ranks, "
        f"{', '.join(map(str, REAL))} of them; = is computed from the counts, which are exact; ≈ follows "
        "from that of 64 by the growth from 8 to 64 (last column: n in ranksⁿ). A share has 4 kB here. "
        "Seconds are of ranks that share these cores, and other programs ran beside them; CPU seconds of the "
        "main rank are what it needs on a machine of its own.\n\n"
    )
    save("control_plane.md", text + table(["", *(f"{n:,} ranks" for n in SIZES), "n"], rows) + READING)


def growth(joined: dict[int, tuple[float, int, int]], place: int) -> str:
    return f"{exponent(list(joined), [each[place] for each in joined.values()]):.2f}"


READING = """
What grows faster than the ranks is gloo's full mesh, of which there are two: the default group and the
control group. Each rank writes one key of 154 + 8 N bytes and reads every rank's, by two requests: 2 N² + N
requests and N² (154 + 8 N) bytes a group, counted at 2 to 16 ranks. At 1,024 that is 4.2 million requests and
17 GB from the store. A store on this machine answered 22,000 to 25,000 of them a second: about three minutes,
far more than the ≈ above, which 64 ranks are too few to show. gloo waits 30 minutes for its default group,
and 24 hours for the control group.

TORCH_GLOO_LAZY_INIT=1 leaves all of that out (N requests, no sockets until they are used), and was tried:
an operation with a rank that had ended before the two were connected had not failed after 40 s, where a full
mesh fails at once. So it is not used.

The main rank has two sockets a rank in these meshes, and the store's process, the launcher, three a rank
(with those of `signal` and `stalls`). At 512 ranks that is more than the usual limit of 1,024 open files: a
rank raises its own limit to the hard one, and the launcher needs `ulimit -n 8192` on the first machine.
"""

if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(real(int(sys.argv[1]))))
    else:
        main()
