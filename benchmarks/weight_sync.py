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

from dapo.engine.server import Server
from dapo.engine.weight_sync import make_sync

RUNS = 7
BUCKET = 64 * 2**20
TOKENIZER = Path(__file__).parents[1] / "examples/arithmetic/base"


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
    group = dist.ProcessGroupGloo(store, 1, 2, timedelta(seconds=60))
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
        self.process = multiprocessing.get_context("spawn").Process(target=receive, args=(ports, num_bytes, runs))
        self.process.start()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ports.put(self.store.port)
        self.group = dist.ProcessGroupGloo(self.store, 0, 2, timedelta(seconds=60))

    def __call__(self) -> None:
        for size in chunks(self.num_bytes):
            self.group.broadcast(self.memory[:size], 0).wait()
        self.group.barrier().wait()


def raw_disk(directory: Path, num_bytes: int, memory: Tensor) -> None:
    """Write the same bytes in files of a bucket's size, and read them."""
    view = memoryview(memory.numpy())
    for i, size in enumerate(chunks(num_bytes)):
        with open(directory / str(i), "wb", buffering=0) as file:
            file.write(view[:size])
    for i, _ in enumerate(chunks(num_bytes)):
        with open(directory / str(i), "rb", buffering=0) as file:
            file.readinto(view)


def raw_pickle(num_bytes: int, memory: Tensor) -> None:
    """Pickle the same bytes as tensors of a bucket's size, and unpickle them."""
    for size in chunks(num_bytes):
        pickle.loads(pickle.dumps(memory[:size].clone(), protocol=4))


def main(url: str, model: Path) -> None:
    torch.set_num_threads(1)
    server = Server(url)
    weights = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    largest = max(tensor.nbytes for tensor in weights.values())
    scratch, memory = Path(tempfile.mkdtemp(dir=model.parent)), torch.zeros(BUCKET, dtype=torch.uint8)
    raw: dict[str, Callable[[], None]] = {
        "disk": lambda: raw_disk(scratch, num_bytes, memory),
        "broadcast": RawBroadcast(num_bytes, RUNS + 1),
        "tensor": lambda: raw_pickle(num_bytes, memory),
    }
    rows = []
    for kind in ("disk", "broadcast", "tensor"):
        sync = make_sync(
            kind,  # type: ignore[arg-type]
            lambda: [server],
            bucket_bytes=BUCKET,
            device=torch.device("cpu"),
            directory=scratch / "weights",
            model=model,
        )
        measured = Measured(sync, weights)
        raw_seconds = []
        for run in range(RUNS + 1):  # the first one only warms up
            measured.once(run)
            raw_seconds.append(seconds(raw[kind]))
        sync.close()
        rows.append([kind, *measured.columns(num_bytes, raw_seconds[1:])])
    shutil.rmtree(scratch)
    server_info = server.get("/server_info")
    text = heading("Weights to a real SGLang server")
    text += (
        f"\nSGLang {server_info['version']} on {server_info['device']}, tp {server_info['tp_size']}, on the same machine; "
        f"{os.getloadavg()[0]:.1f} processes wanted to run when it ended. {num_bytes / 1e9:.2f} GB of float32 in {len(weights)} tensors, the largest "
        f"{largest / 2**20:.0f} MiB; buckets of {BUCKET >> 20} MiB. {RUNS} syncs and {RUNS} raw copies of each kind by turns: median "
        "(least–most). The trainer is one process that has the full tensors: gathering them over ranks is not in this.\n\n"
        "*sync*: from the first call to the last, prepare to continue. *carry*: of that from the first bucket until the last has been "
        "loaded by the server. *raw*: the same bytes and nothing else: gloo broadcasts of a bucket's size to another process; files of a "
        "bucket's size written and read; tensors of a bucket's size pickled and unpickled. *share*: raw / carry. *extra*: the trainer's "
        "peak resident memory during a sync above that before it, in buckets.\n\n"
    )
    save("weight_sync_cpu.md", text + table(["", "sync s", "carry s", "carry GB/s", "raw s", "raw GB/s", "share", "extra"], rows))


class Measured:
    """Syncs, timed, with the part that carries the weights by itself."""

    def __init__(self, sync: Any, weights: dict[str, Tensor]):
        self.sync, self.weights = sync, weights
        self.whole: list[float] = []
        self.carry: list[float] = []
        self.extra: list[float] = []
        commit = sync.transport.commit

        def timed_commit(version: int) -> None:
            commit(version)
            self.carried = time.perf_counter()

        sync.transport.commit = timed_commit

    def once(self, version: int) -> None:
        before = resident("VmRSS")
        reset_peak()
        start = time.perf_counter()
        self.sync.prepare(version)
        prepared = time.perf_counter()
        self.sync.load(iter(self.weights.items()), version)
        self.whole.append(time.perf_counter() - start)
        self.carry.append(self.carried - prepared)
        self.extra.append((resident("VmHWM") - before) / BUCKET)

    def columns(self, num_bytes: int, raw: list[float]) -> list[str]:
        carry, share = self.carry[1:], statistics.median(raw) / statistics.median(self.carry[1:])
        speed = [spread([num_bytes / s / 1e9 for s in times], 2) for times in (carry, raw)]
        return [spread(self.whole[1:], 2), spread(carry, 2), speed[0], spread(raw, 2), speed[1], f"{share:.0%}", spread(self.extra[1:], 2)]


if __name__ == "__main__":
    make_model(Path(sys.argv[2])) if sys.argv[1] == "model" else main(sys.argv[1], Path(sys.argv[2]).resolve())
