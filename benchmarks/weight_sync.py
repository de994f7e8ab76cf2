"""Weights from a trainer to a real SGLang server, by each transport, against a raw copy of the same bytes on
the same machine.

OMP_NUM_THREADS=1 python benchmarks/weight_sync.py PYTHON DIR [pause]

starts a server as a run does, of the SGLang that PYTHON has (`make sglang-cpu` prints one), with a random
Qwen2 of 0.7 GB, made in DIR. With "pause" only how long the server pauses, also with weights from a slow
source.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import statistics
import subprocess
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

from dapo.config import Config
from dapo.engine.control import Server
from dapo.engine.fleet import make_servers
from dapo.engine.weight_sync import make_sync

RUNS = 7
WARM_UP = 3  # runs: a virtual machine is slow to hand out memory that it has not used before
GATHER = 2.0  # seconds that a slow source takes for all weights, as gathering a large model does
CASES = [
    ("broadcast", 24, 0.0),
    ("broadcast", 64, 0.0),
    ("broadcast", 96, 0.0),
    ("broadcast", 128, 0.0),
    ("disk", 64, 0.0),
    ("tensor", 64, 0.0),
]  # transport, MiB of a bucket, seconds of the source
PAUSE_CASES = [(kind, 64, gather) for kind in ("broadcast", "disk") for gather in (0.0, GATHER)]
TAKER = """
import sys, torch
from collections import defaultdict
from math import prod
from tests.sglang.weight_server import WeightServer

class Taker(WeightServer):
    memory = defaultdict(lambda: torch.ones(1 << 27, dtype=torch.uint8))
    def _from_broadcast(self, body):
        pairs = zip(body["shapes"], body["dtypes"])
        size = sum(prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in pairs)
        name = body["group_name"]
        self.groups[name].broadcast(self.memory[name][:size], 0).wait()
        return {}

torch.set_num_threads(1)
with Taker() as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""
ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "examples/arithmetic/base"


def make_model(directory: Path) -> None:
    shape = dict(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    config = transformers.Qwen2Config(
        **shape, tie_word_embeddings=False, max_position_embeddings=1024, eos_token_id=1, pad_token_id=0
    )
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


def chunks(num_bytes: int, size: int) -> Iterator[slice]:
    for start in range(0, num_bytes, size):
        yield slice(start, min(start + size, num_bytes))


def receive(ports: Any, num_bytes: int, bucket: int, runs: int) -> None:
    """The other process of the raw broadcast: first the bytes alone, then with putting them in their
    place.
    """
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", ports.get(), is_master=False, wait_for_workers=False)
    group = dist.ProcessGroupGloo(store, 1, 2, timedelta(minutes=30))
    memory, places = torch.ones(bucket, dtype=torch.uint8), torch.ones(num_bytes, dtype=torch.uint8)
    for run in range(2 * runs):
        for chunk in chunks(num_bytes, bucket):
            part = memory[: chunk.stop - chunk.start]
            group.broadcast(part, 0).wait()
            if run % 2:
                places[chunk] = part
        group.barrier().wait()


class RawBroadcast:
    """The same bytes from one process to another in gloo broadcasts of a bucket's size, and nothing else;
    then also put in their place.
    """

    def __init__(self, num_bytes: int, bucket: int, runs: int):
        self.data, self.bucket = torch.ones(num_bytes, dtype=torch.uint8), bucket
        ports = multiprocessing.get_context("spawn").Queue()
        self.process = multiprocessing.get_context("spawn").Process(
            target=receive, args=(ports, num_bytes, bucket, runs), daemon=True
        )
        self.process.start()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ports.put(self.store.port)
        self.group = dist.ProcessGroupGloo(self.store, 0, 2, timedelta(minutes=30))

    def send_and_copy(self) -> tuple[float, float]:
        # the second time the other process puts them in their place
        return seconds(self._send), seconds(self._send)

    def _send(self) -> None:
        for chunk in chunks(len(self.data), self.bucket):
            self.group.broadcast(self.data[chunk], 0).wait()
        self.group.barrier().wait()


class RawDisk:
    """The same bytes in new files of a bucket's size, those before removed; then also read."""

    def __init__(self, directory: Path, num_bytes: int, bucket: int):
        self.directory, self.bucket, self.runs = directory, bucket, 0
        self.data = memoryview(torch.ones(num_bytes, dtype=torch.uint8).numpy())  # type: ignore[arg-type]

    def send_and_copy(self) -> tuple[float, float]:
        send = seconds(self._write)
        return send, send + seconds(self._read)

    def _write(self) -> None:
        self.runs += 1
        (self.directory / f"raw{self.runs}").mkdir()
        for i, chunk in enumerate(chunks(len(self.data), self.bucket)):
            with open(self.directory / f"raw{self.runs}" / str(i), "wb", buffering=0) as file:
                file.write(self.data[chunk])
        shutil.rmtree(self.directory / f"raw{self.runs - 1}", ignore_errors=True)

    def _read(self) -> None:
        for i, chunk in enumerate(chunks(len(self.data), self.bucket)):
            with open(self.directory / f"raw{self.runs}" / str(i), "rb", buffering=0) as file:
                file.readinto(self.data[chunk])


class RawPickle:
    """The same bytes as tensors of a bucket's size: pickled, then unpickled."""

    def __init__(self, num_bytes: int, bucket: int):
        self.data, self.bucket = torch.ones(num_bytes, dtype=torch.uint8), bucket
        self.pickled = b""

    def send_and_copy(self) -> tuple[float, float]:
        send = seconds(self._write)
        return send, send + seconds(self._read)

    def _write(self) -> None:
        for chunk in chunks(len(self.data), self.bucket):
            self.pickled = pickle.dumps(self.data[chunk].clone(), protocol=4)

    def _read(self) -> None:
        for _ in chunks(len(self.data), self.bucket):
            pickle.loads(self.pickled)


def source(weights: dict[str, Tensor], gather: float) -> Iterator[tuple[str, Tensor]]:
    """The weights; each after a sleep in proportion to its size, `gather` seconds for all."""
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    for name, tensor in weights.items():
        if gather:
            time.sleep(gather * tensor.nbytes / num_bytes)
        yield name, tensor


@contextlib.contextmanager
def taker() -> Iterator[Server]:
    """A process that takes weights by SGLang's calls and does nothing with them: what is left is the
    carrying.
    """
    with subprocess.Popen(
        [sys.executable, "-c", TAKER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdin
        yield Server(process.stdout.readline().strip())
        process.stdin.close()


def measure(
    kind: Any, mib: int, gather: float, server: Server, weights: dict[str, Tensor], scratch: Path, model: Path
) -> list[str]:
    """A row of the table."""
    num_bytes, bucket = sum(tensor.nbytes for tensor in weights.values()), mib << 20
    raws: dict[str, Callable[[], Any]] = {
        "broadcast": lambda: RawBroadcast(num_bytes, bucket, RUNS + WARM_UP),
        "disk": lambda: RawDisk(Path(tempfile.mkdtemp(dir=scratch)), num_bytes, bucket),
        "tensor": lambda: RawPickle(num_bytes, bucket),
    }
    raw = raws[kind]()
    options: dict[str, Any] = dict(bucket_bytes=bucket, device=torch.device("cpu"), timeout=600)
    sync = make_sync(kind, lambda: [server], directory=scratch / "weights", model=model, **options)
    commit, post = sync.transport.commit, server.post
    carried, waits, paused = list[float](), list[float](), list[float]()

    def timed_commit(version: int) -> None:
        commit(version)
        carried.append(time.perf_counter())

    def timed_post(path: str, *arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        answer = post(path, *arguments, **keywords)
        if path == "/pause_generation":
            paused.append(start)
        elif path == "/continue_generation":
            paused[-1] = time.perf_counter() - paused[-1]
        waits.append(time.perf_counter() - start if "weights_from" in path else 0.0)
        return answer

    sync.transport.commit, server.post = timed_commit, timed_post  # type: ignore[method-assign]
    rows = []
    for version in range(RUNS + WARM_UP):
        waits.clear()
        before = resident("VmRSS")
        reset_peak()
        start = time.perf_counter()
        sync.prepare(version)
        prepared = time.perf_counter()
        sync.load(source(weights, gather), version)
        rows.append(
            (
                time.perf_counter() - start,
                paused[-1],
                carried[-1] - prepared,
                sum(waits),
                (resident("VmHWM") - before) / bucket,
                *raw.send_and_copy(),
            )
        )
    sync.close()
    server.post = post  # type: ignore[method-assign]
    whole, pause, carry, waited, extra, send, copy = zip(*rows[WARM_UP:], strict=True)
    shares = [f"{statistics.median(of) / statistics.median(carry):.0%}" for of in (send, copy)]
    speed = spread([num_bytes / s / 1e9 for s in carry], 2)
    times = [spread(values, 2) for values in (send, copy)]
    server_time = "—" if kind == "broadcast" else spread(waited, 2)  # there they overlap
    return [
        kind,
        str(mib),
        spread(whole, 2),
        spread(pause, 2),
        f"{statistics.median(pause) / statistics.median(whole):.0%}",
        spread(carry, 2),
        speed,
        server_time,
        *times,
        *shares,
        spread(extra, 2),
    ]


def main(python: str, directory: Path, only: str = "") -> None:
    model = directory / "model"
    if not model.exists():
        make_model(model)
    engine = {"kind": "sglang", "python": python, "max_concurrent": 4}
    options = {"run": {"dir": directory / "run"}, "data": {"train": directory / "none"}, "engine": engine}
    servers = make_servers(Config.model_validate(options | {"policy": {"model": model, "dtype": "float32"}}))
    try:
        servers.wait()
        measure_all(servers.workers[0], model, only == "pause")
    finally:
        servers.close()


def measure_all(server: Server, model: Path, only_pause: bool) -> None:
    torch.set_num_threads(1)
    weights = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
    scratch = Path(tempfile.mkdtemp(dir=model.parent))
    rows = []
    with taker() as other:
        for kind, mib, gather in PAUSE_CASES if only_pause else CASES:
            is_carried = kind == "broadcast" and not only_pause
            receivers = {"": server} | ({", nothing loaded": other} if is_carried else {})
            for name, receiver in receivers.items():
                row = measure(kind, mib, gather, receiver, weights, scratch, model)
                rows.append([row[0] + (f", source of {gather:.0f} s" if gather else name), *row[1:]])
                print(*rows[-1], flush=True)
    shutil.rmtree(scratch)
    about, num_bytes = server.get("/server_info"), sum(tensor.nbytes for tensor in weights.values())
    text = heading("Weights to a real SGLang server on the same machine")
    text += (
        f"\nSGLang {about['version']} on {about['device']}, tp {about['tp_size']}. Load average when it "
        f"ended: {os.getloadavg()[0]:.1f}. "
        f"{num_bytes / 1e9:.2f} GB of float32 in {len(weights)} tensors, the largest "
        f"{max(t.nbytes for t in weights.values()) >> 20} MiB. "
        f"{RUNS} syncs and raw copies by turns, after {WARM_UP} that are not counted: median (least–most). "
        "The trainer is one process that has the full tensors: gathering them over ranks is not in this.\n\n"
        "*nothing loaded*: to a process that takes weights by SGLang's calls and does nothing with them. "
        "*MiB*: of a bucket. "
        "*sync*: prepare to continue. *server pause*: from the first call that pauses generation until it "
        "goes on; *of sync*: of the medians. *source of … s*: tensors come from a generator that sleeps so "
        "long in all, as gathering over ranks may take. "
        "*carry*: of the sync from the first tensor until the server has loaded the last. "
        "*server*: how long the calls took that carry weights, or name files. "
        "*raw send*: the same bytes and nothing else: gloo broadcasts of a bucket's size from the weights' "
        "memory into one buffer of "
        "another process; new files of a bucket's size, those before removed; tensors of a bucket's size "
        "pickled. *raw copy*: the other "
        "process also copies each buffer to its place; files are also read; tensors unpickled. Shares: of "
        "the medians. *extra*: the "
        "trainer's peak resident memory during a sync above that before it, in buckets.\n\n"
    )
    header = [
        "",
        "MiB",
        "sync s",
        "server pause s",
        "of sync",
        "carry s",
        "carry GB/s",
        "server s",
        "raw send s",
        "raw copy s",
    ]
    header += ["send / carry", "copy / carry", "extra"]
    save("weight_sync_pause_cpu.md" if only_pause else "weight_sync_cpu.md", text + table(header, rows))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve(), *sys.argv[3:])
