"""Speed and memory of hf_to_megatron.py and megatron_to_hf.py on a random 4 GB model, beside copying it.

    python benchmarks/conversion.py [--layers 18] [--trials 3] [--directory DIR]

Copying is `cp -r` and an fsync of every file; both end with the bytes on the disk. Before every trial the
files to be read are dropped from the page cache and the directory written last is removed. Trials of copying
and converting alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from record import heading, save, spread, table

from dapo.files import ChunkFile, sum_of
from dapo.model.families import read_shape
from dapo.model.names import table as entries
from dapo.model.shape import ModelShape
from dapo.policy.write_weights import save_hf

ROOT = Path(__file__).parents[1]
CONFIG = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 2048,
    "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip
SHARD_BYTES = 2**30  # of every file written: peak memory must stay below that + 1 GiB
CONVERT = """
import resource, sys, time
begin = time.perf_counter(); sys.path.insert(0, "tools"); import {tool}; imported = time.perf_counter()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, worked = peak(), time.process_time()
status = {tool}.main(sys.argv[1:])
worked = time.process_time() - worked
print(time.perf_counter() - imported, imported - begin, before, peak(), worked)
sys.exit(status)
"""


def random_tensors(shape: ModelShape) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors of the same 2²⁴ numbers, rotated: drawing billions takes longer than converting them."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.empty(2**24, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    for entry in entries(shape, is_fused=True):
        for name, size in zip(entry.hf, entry.shapes, strict=True):
            turned = numbers.roll(int(torch.randint(len(numbers), (), generator=generator)))
            yield name, turned.repeat(-(-prod(size) // len(turned)))[: prod(size)].view(size)


def forget(directory: Path) -> int:
    """Drop the directory's files from the page cache. Return their size in bytes."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return sum(path.stat().st_size for path in paths)


def copy(source: Path, target: Path) -> float:
    forget(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def convert(tool: str, source: Path, target: Path) -> list[float]:
    """Return seconds to convert, to import; peak KiB after the import, at the end; CPU seconds to convert."""
    forget(source)
    command = [
        sys.executable,
        "-c",
        CONVERT.format(tool=tool),
        str(source),
        str(target),
        "--shard-size",
        f"{SHARD_BYTES >> 20}MiB",
    ]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def checksum_cost(directory: Path, num_bytes: int = 2**29) -> list[list[object]]:
    """Return GB per CPU second: writing tensors of 64 MiB, without and with a CRC-32; verifying a file."""
    tensor = torch.empty(2**25, dtype=torch.bfloat16).normal_()
    seconds = defaultdict(list)
    for _ in range(5):
        for name, is_summed in (("written, no checksum", False), ("written, checksum", True)):
            torch.serialization.set_crc32_options(is_summed)
            start = time.process_time()
            file = ChunkFile(directory / "file")
            for _ in range(num_bytes // tensor.nbytes):
                torch.save(tensor, file)  # type: ignore[arg-type]
            seconds[name].append(time.process_time() - start)
            file.close()
        start = time.process_time()
        sum_of(directory / "file")
        seconds["verified"].append(time.process_time() - start)
        (directory / "file").unlink()
    return [[name, spread([num_bytes / 1e9 / s for s in values], 2)] for name, values in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument(
        "--directory", type=Path, help="on the disk to measure; default: where temporary files go"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        root = Path(scratch)
        (root / "config").mkdir()
        (root / "config" / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": args.layers}))
        shape = read_shape(root / "config")
        save_hf(
            [random_tensors(shape)],
            shape,
            torch.bfloat16,
            root / "config",
            root / "hf",
            shard_bytes=SHARD_BYTES,
        )
        num_bytes = forget(root / "hf")
        found: dict[str, list[list[float]]] = defaultdict(list)
        for _ in range(args.trials):
            for tool, source, target in (
                ("hf_to_megatron", "hf", "megatron"),
                ("megatron_to_hf", "megatron", "back"),
            ):
                found["copy"].append([copy(root / source, root / "copy")])
                shutil.rmtree(root / "copy")
                shutil.rmtree(root / target, ignore_errors=True)
                found[tool].append(convert(tool, root / source, root / target))
        same = all(
            (root / "back" / path.name).read_bytes() == path.read_bytes()
            for path in (root / "hf").glob("*.safetensors")
        )
        checksums = checksum_cost(root)
    assert same, "the files that came back differ"
    speed = {name: [num_bytes / 1e9 / trial[0] for trial in trials] for name, trials in found.items()}
    rows = [
        [
            name,
            spread(speed[name], 2),
            f"{statistics.median(speed[name]) / statistics.median(speed['copy']):.0%}",
            spread([trial[0] for trial in trials], 1),
            *(
                [
                    spread([trial[1] for trial in trials], 1),
                    f"{max(trial[3] for trial in trials) / 2**20:.2f}",
                ]
                if len(trials[0]) > 1
                else "––"
            ),
            f"{trials[0][2] / 2**20:.2f}" if len(trials[0]) > 1 else "–",
            spread([trial[4] for trial in trials], 1) if len(trials[0]) > 1 else "–",
        ]
        for name, trials in found.items()
    ]
    header = [
        "",
        "GB/s",
        "of copying",
        "seconds",
        "importing, seconds more",
        "peak memory, GiB",
        "of that after importing",
        "CPU seconds",
    ]
    text = heading("Conversion of a model between Hugging Face and Megatron files")
    text += (
        f"\n{num_bytes / 1e9:.2f} GB of bfloat16, {shape.num_layers} layers, files of 1 GiB at most; one "
        f"process; median (min–max) of {args.trials} trials ({2 * args.trials} of copying); load of the "
        f"machine before the end {os.getloadavg()[0]:.1f}.\nRead from a cold page cache, ended by fsync. "
        "Memory is the peak resident set, mapped files included. There and back the files are equal to the "
        "byte.\n\n"
    )
    text += table(header, rows) + "\n## A checkpoint's checksums\n\n"
    text += "GB per CPU second of one thread, the disk's time left out; 5 trials.\n\n"
    save("conversion.md", text + table(["", "GB/s"], checksums))


if __name__ == "__main__":
    main()
