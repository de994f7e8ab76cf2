"""Convert a Hugging Face directory to a Megatron distributed checkpoint that any layout loads.

    python tools/hf_to_megatron.py SOURCE TARGET [--dtype bfloat16] [--shard-size 4GiB] [--megatron-lm]
    python tools/hf_to_megatron.py SOURCE --dry-run

One process, tensor by tensor. SOURCE may be a checkpoint as well: a run's, or Megatron-LM's with --model.
TARGET has policy/ (torch_dist), manifest.json, and SOURCE's config, tokenizer and generation config:
`policy.model=TARGET` starts a run. With --megatron-lm it has release/ and
latest_checkpointed_iteration.txt instead: Megatron-LM starts from --load TARGET.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from dapo import config
from dapo.config import ConfigError
from dapo.model.families import read_shape
from dapo.model.names import table
from dapo.model.parameters import num_parameters
from dapo.model.shape import ModelShape
from dapo.policy.weight_files import HFWeights, MegatronWeights, open_weights
from dapo.policy.write_weights import save_megatron
from dapo.types import StorageError


def parser(description: str) -> argparse.ArgumentParser:
    """Return the arguments of both directions."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    add, dtypes = made.add_argument, ["bfloat16", "float16", "float32"]
    add("source", type=Path)
    add("target", type=Path, nargs="?", help="must not exist; appears whole or not at all")
    add("--model", type=Path, help="Hugging Face directory: config.json, tokenizer, a vision tower")
    add("--dtype", choices=dtypes, help="of the written tensors; default: the source's")
    add("--dry-run", action="store_true", help="check names and shapes; read no tensor, write nothing")
    add("--shard-size", type=num_bytes, default="4GiB", help="largest written file, such as 500MiB or 4GiB")
    return made


def num_bytes(text: str) -> int:
    """Parse a size: `num_bytes("1.5GiB")` → 1610612736."""
    found = re.fullmatch(r"([\d.]+)([KMG])i?B", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MiB or 4GiB")
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]])


def model_of(checkpoint: Path, otherwise: Path | None = None) -> Path:
    """Return the Hugging Face directory that a checkpoint's config and tokenizer come from.

    `otherwise`: that of a checkpoint that does not show it.

    Raises:
        ConfigError: none is known.
    """
    run = checkpoint.resolve().parent.parent / "config.yaml"
    if (checkpoint / "config.json").is_file():
        return checkpoint
    if run.is_file():
        return _model_of_run(run)
    if otherwise:
        return otherwise
    raise ConfigError(
        f"{checkpoint} is in no run directory and has no config.json: its model is not known; "
        "name it with --model"
    )


def _model_of_run(path: Path) -> Path:
    """Return policy.model of a run's config.yaml: a relative one from the run's start, or from here.

    Where it was started is seen from run.dir, if that is relative, too.
    """
    loaded = config.load(path)
    folder, model = loaded.run.dir.parts, loaded.policy.model
    is_seen = not loaded.run.dir.is_absolute() and path.parent.parts[-len(folder) :] == folder
    started = path.parents[len(folder)] if is_seen else Path()
    for base in (started, Path()):
        if (base / model).is_dir():
            return base / model
    raise ConfigError(f"policy.model={model} of {path} is not there; name it with --model")


def convert(args: argparse.Namespace, save: Callable[..., None]) -> int:
    """Call `save(weights, shape, dtype, model, target, shard_bytes=…)` with the weights of args.source.

    Return the exit status: 2 if what was asked for cannot be used, 1 if the disk fails; an error is one line.
    """
    try:
        model = args.model or model_of(args.source)
        shape = read_shape(model)
        weights = open_weights(args.source, shape)
        dtype = getattr(torch, args.dtype) if args.dtype else weights.dtype
        if isinstance(weights, HFWeights) and weights.left_out:
            print(weights.left_out, file=sys.stderr)
        if args.dry_run:
            print(_described(weights, shape, dtype))
            return 0
        if args.target is None:
            raise ConfigError("no target is named: say where to write, or --dry-run")
        save(weights, shape, dtype, model, args.target, shard_bytes=args.shard_size)
    except (ConfigError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _described(weights: HFWeights | MegatronWeights, shape: ModelShape, dtype: torch.dtype) -> str:
    """Check every tensor's shape, and return how many there are."""
    if isinstance(weights, HFWeights):
        weights.check_shapes(shape)
    entries = table(shape, is_fused=True)
    in_files = sum(len(entry.hf) for entry in entries)
    in_checkpoint = len({key for entry in entries for key in entry.keys})
    size = sum(entry.size * (4 if entry.is_buffer else dtype.itemsize) for entry in entries)
    return (
        f"{shape.model_type}, {num_parameters(shape):,} parameters: {in_files:,} tensors of a Hugging Face "
        f"directory are {in_checkpoint:,} of a Megatron checkpoint; {size:,} bytes as {str(dtype)[6:]}"
    )


def main(argv: list[str]) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--megatron-lm", action="store_true", help="write what Megatron-LM itself loads")
    args = arguments.parse_args(argv)
    return convert(args, partial(save_megatron, for_megatron_lm=args.megatron_lm))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
