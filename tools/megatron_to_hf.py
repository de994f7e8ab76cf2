"""Convert a run's checkpoint, or hf_to_megatron.py's, of any layout, to a Hugging Face directory.

One process, tensor by tensor.

    python tools/megatron_to_hf.py RUN/checkpoints/step-000100 TARGET [--model MODEL] [--dtype bfloat16]

Config, tokenizer and generation config come from MODEL, by default from policy.model of RUN/config.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hf_to_megatron import convert, parser

from dapo import config
from dapo.config import ConfigError
from dapo.model.shape import ModelShape
from dapo.policy.weight_files import hf_tensors, parts, save_hf
from dapo.policy.weights import StoredWeights


def model_of(checkpoint: Path) -> Path:
    """Return the Hugging Face directory that a checkpoint's config and tokenizer come from.

    Raises:
        ConfigError: none is known.
    """
    run = checkpoint.resolve().parent.parent / "config.yaml"
    if (checkpoint / "config.json").is_file():
        return checkpoint
    if run.is_file():
        return _model_of_run(run)
    raise ConfigError(
        f"{checkpoint} is in no run directory and has no config.json: its model is not known; "
        "megatron_to_hf.py takes it with --model"
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
    raise ConfigError(f"policy.model={model} of {path} is not there; megatron_to_hf.py takes it with --model")


def save(
    weights: StoredWeights,
    shape: ModelShape,
    dtype: torch.dtype,
    model: Path,
    target: Path,
    *,
    shard_bytes: int,
) -> None:
    tensors = [hf_tensors(weights, shape, dtype, part) for part in parts(shape)]
    save_hf(tensors, shape, dtype, model, target, shard_bytes=shard_bytes)


def main(argv: list[str]) -> int:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--model", type=Path, help="Hugging Face directory: config.json, tokenizer; its weights are not read"
    )
    return convert(arguments.parse_args(argv), lambda args: args.model or model_of(args.source), save)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
