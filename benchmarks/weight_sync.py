"""Weights from a trainer to a real SGLang server, by each transport, against a raw copy of the same bytes on the same machine.

python benchmarks/weight_sync.py model DIR    a random Qwen2 of 0.7 GB, for the server to be started with
python benchmarks/weight_sync.py URL DIR      measure against that server
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from record import heading, save, spread, table
from safetensors.torch import load_file
from torch import Tensor

from dapo.engine import transports
from dapo.engine.server import Server
from dapo.engine.weight_sync import WeightSync, make_sync

RUNS = 5
BUCKET = 64 * 2**20
ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "examples/arithmetic/base"


def make_model(directory: Path) -> None:
    shape = dict(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=16, num_key_value_heads=4
    )
    config = transformers.Qwen2Config(**shape, tie_word_embeddings=False, max_position_embeddings=1024, eos_token_id=1, pad_token_id=0)
    transformers.Qwen2ForCausalLM(config).float().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory)


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def resident(key: str) -> int:
    """Of this process, in bytes: VmRSS now, VmHWM at most since `reset_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def chunks(num_bytes: int) -> Iterator[int]:
    while num_bytes:
        yield min(BUCKET, num_bytes)
        num_bytes -= min(BUCKET, num_bytes)


def receive(ports: Any, num_bytes: int, runs: int) -> None:
    """The other process of the raw broadcast."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", ports.get(), is_master=False, wait_for_workers=False)
    group = dist.ProcessGroupGloo(store, 1, 2, timedelta(minutes=30))
    memory = torch.empty(BUCKET, dtype=torch.uint8)
    for _ in range(runs):
        for size in chunks(num_bytes):
            group.broadcast(memory[:size], 0).wait()
        group.barrier().wait()


class RawBroadcast:
    """The same bytes from one process to another in gloo broadcasts of a bucket's size, and nothing else."""

    def __init__(self, num_bytes: int, runs: int):
        self.num_bytes, self.memory = num_bytes, torch.zeros(BUCKET, dtype=torch.uint8)
        ports = multiprocessing.get_context("spawn").Queue()
        self.process = multiprocessing.get_context("spawn").Process(target=receive, args=(ports, num_bytes, runs), daemon=True)
        self.process.start()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ports.put(self.store.port)
        self.group = dist.ProcessGroupGloo(self.store, 0, 2, timedelta(minutes=30))

    def __call__(self) -> None:
        for size in chunks(self.num_bytes):
            self.group.broadcast(self.memory[:size], 0).wait()
        self.group.barrier().wait()


class RawDisk:
    """The same bytes in files of a bucket's size: written, then read."""

    def __init__(self, directory: Path, num_bytes: int):
        self.files = [(directory / str(i), size) for i, size in enumerate(chunks(num_bytes))]
        self.memory = memoryview(torch.zeros(BUCKET, dtype=torch.uint8).numpy())  # type: ignore[arg-type]

    def write(self) -> None:
        for path, size in self.files:
            with open(path, "wb", buffering=0) as file:
                file.write(self.memory[:size])

    def read(self) -> None:
        for path, size in self.files:
            with open(path, "rb", buffering=0) as file:
                file.readinto(self.memory[:size])


class RawPickle:
    """The same bytes as tensors of a bucket's size: pickled, then unpickled."""

    def __init__(self, num_bytes: int):
        self.num_bytes, self.memory = num_bytes, torch.zeros(BUCKET, dtype=torch.uint8)
        self.pickled = b""

    def write(self) -> None:
        for size in chunks(self.num_bytes):
            self.pickled = pickle.dumps(self.memory[:size].clone(), protocol=4)

    def read(self) -> None:
        for _ in chunks(self.num_bytes):
            pickle.loads(self.pickled)


class Measured:
    """Syncs to one server, with what is spent on carrying, and of that on waiting for the server."""

    def __init__(self, sync: WeightSync, weights: dict[str, Tensor]):
        self.sync, self.weights = sync, weights
        self.whole, self.carry, self.server, self.extra = [], [], [], []  # type: ignore[var-annotated]
        self.waited = self.carried = 0.0
        commit = sync.transport.commit

        def timed_commit(version: int) -> None:
            commit(version)
            self.carried = time.perf_counter()

        sync.transport.commit = timed_commit  # type: ignore[method-assign]

    def wait(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time counted as waiting for the server."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.waited += time.perf_counter() - start

        return timed

    def once(self, version: int) -> None:
        before = resident("VmRSS")
        reset_peak()
        start = time.perf_counter()
        self.sync.prepare(version)
        prepared, self.waited = time.perf_counter(), 0.0
        self.sync.load(iter(self.weights.items()), version)
        self.whole.append(time.perf_counter() - start)
        self.carry.append(self.carried - prepared)
        self.server.append(self.waited)
        self.extra.append((resident("VmHWM") - before) / BUCKET)


def measure(kind: Any, server: Server, weights: dict[str, Tensor], raw: list[Callable[[], None]], **options: Any) -> list[str]:
    """A row of the table. `raw`: what the trainer's side is compared with, then what completes the copy."""
    measured = Measured(make_sync(kind, lambda: [server], **options), weights)
    settle, post = transports._settle, server.post
    if kind == "broadcast":
        transports._settle = measured.wait(settle)  # after a broadcast: the server loads what it has
    else:  # the calls that carry, or name, weights
        server.post = lambda path, *a, **o: (measured.wait(post) if "weights_from" in path else post)(path, *a, **o)  # type: ignore[method-assign]
    raw_seconds = []
    for run in range(RUNS + 1):  # the first only warms up
        measured.once(run)
        raw_seconds.append([seconds(function) for function in raw])
    measured.sync.close()
    transports._settle, server.post = settle, post  # type: ignore[method-assign]
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    ours = [c - s for c, s in zip(measured.carry, measured.server, strict=True)][1:]
    send, copy = [row[0] for row in raw_seconds][1:], [sum(row) for row in raw_seconds][1:]
    carry = measured.carry[1:]
    shares = [f"{statistics.median(a) / statistics.median(b):.0%}, {min(a) / min(b):.0%}" for a, b in ((send, ours), (copy, carry))]
    speed = spread([num_bytes / s / 1e9 for s in carry], 2)
    times = [spread(values, 2) for values in (measured.whole[1:], carry, measured.server[1:], send, copy)]
    return [kind, times[0], times[1], speed, *times[2:], *shares, spread(measured.extra[1:], 2)]


def main(url: str, model: Path) -> None:
    torch.set_num_threads(1)
    server = Server(url)
    weights = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    scratch = Path(tempfile.mkdtemp(dir=model.parent))
    disk, pickled = RawDisk(scratch, num_bytes), RawPickle(num_bytes)
    raw: dict[str, list[Callable[[], None]]] = {
        "broadcast": [RawBroadcast(num_bytes, RUNS + 1)],
        "disk": [disk.write, disk.read],
        "tensor": [pickled.write, pickled.read],
    }
    options: dict[str, Any] = dict(bucket_bytes=BUCKET, device=torch.device("cpu"), directory=scratch / "weights", model=model)
    rows = []
    for kind, copies in raw.items():
        rows.append(measure(kind, server, weights, copies, **options))
        print(*rows[-1], flush=True)
    shutil.rmtree(scratch)
    about = server.get("/server_info")
    text = heading("Weights to a real SGLang server on the same machine")
    text += (
        f"\nSGLang {about['version']} on {about['device']}, tp {about['tp_size']}. Load average when it ended: {os.getloadavg()[0]:.1f}. "
        f"{num_bytes / 1e9:.2f} GB of float32 in {len(weights)} tensors, the largest {max(t.nbytes for t in weights.values()) >> 20} MiB; "
        f"buckets of {BUCKET >> 20} MiB. {RUNS} syncs and {RUNS} raw copies by turns: median (least–most). "
        "The trainer is one process that has the full tensors: gathering them over ranks is not in this.\n\n"
        "*sync*: prepare to continue. *carry*: of that from the first tensor until the server has loaded the last. *server*: of that the "
        "trainer's waiting for it: broadcast: after the bytes have gone over; disk: for it to read the files; tensor: for it to take the "
        "call, some of it while the next bucket is filled. *raw send*: the same bytes and nothing else: gloo broadcasts of a bucket's size "
        "to another process; files of that size written; tensors of that size pickled. *raw copy*: files also read, tensors also "
        "unpickled. Shares: of the medians, of the least. *extra*: the trainer's peak resident memory during a sync above that before it, "
        "in buckets.\n\n"
    )
    header = ["", "sync s", "carry s", "carry GB/s", "server s", "raw send s", "raw copy s", "raw send / (carry − server)",
              "raw copy / carry", "extra"]  # fmt: skip
    save("weight_sync_cpu.md", text + table(header, rows))


if __name__ == "__main__":
    make_model(Path(sys.argv[2])) if sys.argv[1] == "model" else main(sys.argv[1], Path(sys.argv[2]).resolve())
