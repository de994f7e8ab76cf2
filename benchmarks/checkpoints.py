"""What saving and resuming cost beside writing and reading as many bytes, interleaved, on one process.

raw write: the same number of bytes from memory into one file, with its CRC-32, until they are on the disk.
raw read: all files of the checkpoint, block by block. Files are dropped from memory before each reading.

python benchmarks/checkpoints.py [trials, default 5]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from conversion import forget
from record import heading, save, spread, table

from dapo import config as configs
from dapo.checkpoint import Checkpoints
from dapo.mesh import Mesh
from dapo.model.families import read_shape
from dapo.policy.megatron import Policy

BLOCK = 16 * 2**20
LAYERS, HIDDEN, VOCABULARY = 12, 1024, 32_768  # 220 million parameters


class Nothing:
    """The main rank has no state beside the policy's."""

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...


def make_model(directory: Path) -> None:
    torch.manual_seed(0)
    shape = transformers.Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    transformers.Qwen2ForCausalLM(shape).save_pretrained(directory)


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Return wall seconds and CPU seconds of all threads."""
    start, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - cpu


def raw_write(path: Path, num_bytes: int) -> None:
    block, crc = memoryview(os.urandom(BLOCK)), 0
    with open(path, "wb", buffering=0) as file:
        for start in range(0, num_bytes, BLOCK):
            part = block[: min(BLOCK, num_bytes - start)]
            file.write(part)
            crc = zlib.crc32(part, crc)
        os.fsync(file.fileno())


def raw_read(directory: Path) -> None:
    block = memoryview(bytearray(BLOCK))
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def main(trials: int) -> None:
    rows: dict[str, list[tuple[float, float]]] = {}

    def measure(name: str, function: Callable[[], object]) -> None:
        rows.setdefault(name, []).append(seconds(function))

    with tempfile.TemporaryDirectory() as scratch:
        model, run_dir = Path(scratch) / "model", Path(scratch) / "run"
        make_model(model)
        path = Path(scratch) / "run.yaml"
        path.write_text(
            f"run: {{dir: {run_dir}, keep_checkpoints: 1}}\ndata: {{train: t}}\n"
            f"policy: {{model: {model}, dtype: float32}}\nparallel: {{tensor: 1}}\n"
        )
        config = configs.load(path)
        mesh, shape = Mesh(config.parallel), read_shape(model)
        policy = Policy(config, mesh)
        count = sum(p.numel() for chunk in policy.chunks for p in chunk.parameters())
        checkpoints, nothing = Checkpoints(config.run, mesh), Nothing()
        step = 0
        checkpoints.save(step, policy, nothing)
        for _ in range(trials):
            directory = run_dir / "checkpoints" / f"step-{step:06}"
            num_bytes = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
            measure("raw write and checksum", lambda n=num_bytes: raw_write(Path(scratch) / "raw", n))
            (Path(scratch) / "raw").unlink()
            step += 1
            measure("save", lambda step=step: checkpoints.save(step, policy, nothing))
            step += 1
            measure(
                "begin to save in the background",
                lambda step=step: checkpoints.save(step, policy, nothing, wait=False),
            )
            # an update that comes at once: after sampling there is less to copy
            measure("copy what is not written yet", policy._detach_save)
            measure("the rest of it", checkpoints._finish)
            directory = run_dir / "checkpoints" / f"step-{step:06}"
            forget(directory)
            measure("raw read", lambda directory=directory: raw_read(directory))
            forget(directory)

            def resume() -> None:
                again = Checkpoints(config.run, mesh)
                again.find(shape)
                again.load(policy, nothing)

            measure("resume", resume)
    bases = {
        "save": "raw write and checksum",
        "copy what is not written yet": "raw write and checksum",
        "resume": "raw read",
    }
    cells = []
    for name, found in rows.items():
        walls, cpus = zip(*found, strict=True)
        base = rows.get(bases.get(name, ""))
        ratios = (
            [f"{spread([x[i] / y[i] for x, y in zip(found, base, strict=True)], 2)}" for i in (0, 1)]
            if base
            else ["", ""]
        )
        cells.append([name, spread(walls, 2), ratios[0], spread(cpus, 2), ratios[1]])
    text = heading("Saving and resuming beside raw writing and reading")
    text += f"""
{count / 1e6:.0f} million float32 parameters, {num_bytes / 2**30:.2f} GiB: {num_bytes / count:.1f} bytes each.
Median (min–max) of {trials} interleaved trials; ratios are of the same trial.

"""
    text += table(["", "s", "× raw", "CPU s", "× raw"], cells)
    save("checkpoints.md", text)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
