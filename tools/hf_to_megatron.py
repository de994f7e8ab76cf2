"""Convert a Hugging Face directory to a Megatron distributed checkpoint that any layout loads.

    python tools/hf_to_megatron.py MODEL TARGET [--dtype bfloat16] [--shard-size 4GiB]

One process, tensor by tensor. TARGET has policy/ (torch_dist), manifest.json, and MODEL's config, tokenizer
and generation config: `policy.model=TARGET` starts a run.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from dapo.config import ConfigError
from dapo.model.shape import read_shape
from dapo.policy.weight_files import open_weights, save_megatron
from dapo.types import StorageError


def parser(description: str) -> argparse.ArgumentParser:
    """Return the arguments of both directions."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    add, dtypes = made.add_argument, ["bfloat16", "float16", "float32"]
    add("source", type=Path)
    add("target", type=Path, help="must not exist; appears whole or not at all")
    add("--dtype", choices=dtypes, help="of the written tensors; default: the source's")
    add("--shard-size", type=num_bytes, default="4GiB", help="largest written file, such as 500MiB or 4GiB")
    return made


def num_bytes(text: str) -> int:
    """Parse a size: `num_bytes("1.5GiB")` → 1610612736."""
    found = re.fullmatch(r"([\d.]+)([KMG])i?B", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MiB or 4GiB")
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]])


def convert(
    args: argparse.Namespace, model_of: Callable[[argparse.Namespace], Path], save: Callable[..., None]
) -> int:
    """Call `save(weights, shape, dtype, model, target, shard_bytes=…)` with the weights of args.source.

    Return the exit status: 2 if what was asked for cannot be used, 1 if the disk fails; an error is one line.
    """
    try:
        model = model_of(args)
        shape = read_shape(model)
        weights = open_weights(args.source, shape)
        dtype = getattr(torch, args.dtype) if args.dtype else weights.dtype
        save(weights, shape, dtype, model, args.target, shard_bytes=args.shard_size)
    except (ConfigError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def main(argv: list[str]) -> int:
    return convert(parser(__doc__).parse_args(argv), lambda args: args.source, save_megatron)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
