"""Compare two models, each a Hugging Face directory or a Megatron checkpoint of any layout.

    python tools/check_checkpoint.py A B [--text TEXT.txt] [--tolerance 0] [--model MODEL]

MODEL has the config and the tokenizer of a checkpoint that does not show whose they are. The exit status is 1
if the models differ, 2 if one cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from hf_to_megatron import model_of

from dapo.config import ConfigError
from dapo.model.families import read_shape
from dapo.model.shape import ModelShape
from dapo.policy.weight_files import hf_tensors, open_weights
from dapo.verify import logprobs, tokens_of


def compare(models: list[Path], text: Path | None, tolerance: float, model: Path | None = None) -> float:
    """Print the differences. Return the largest one of a value. `model`: see --model."""
    described = [model_of(path, model) for path in models]
    shape = common_shape(*map(read_shape, described))
    tokens = tokens_of(text, described, shape) if text else None
    worst = 0.0
    a, b = (hf_tensors(open_weights(path, shape), shape, torch.float32) for path in models)
    for (name, x), (_, y) in zip(a, b, strict=True):
        difference = float((x - y).abs().max())
        worst = max(worst, difference)
        if difference > tolerance:
            print(f"{name}: differs by up to {difference:.3g}")
    print(f"tensors: the largest difference is {worst:.3g}")
    if tokens is None:
        return worst
    x, y = (logprobs(path, model, shape, tokens) for path, model in zip(models, described, strict=True))
    difference = float((x - y).abs().max())
    means = f"mean {x.mean():.4f} and {y.mean():.4f}"
    print(f"log-probs of {len(x)} tokens: {means}, the largest difference is {difference:.3g}")
    return max(worst, difference)


def common_shape(a: ModelShape, b: ModelShape) -> ModelShape:
    """Return the models' sizes. Raise ConfigError if they differ."""
    x, y = asdict(a), asdict(b)
    differences = [f"{name}: {x[name]!r} against {y[name]!r}" for name in x if x[name] != y[name]]
    if differences:
        raise ConfigError(f"the architectures differ: {'; '.join(differences)}")
    return a


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("models", nargs=2, type=Path, metavar="MODEL")
    add("--text", type=Path, help="a file: compare the log-probs of its tokens")
    add("--tolerance", type=float, default=0.0, help="on tensors and log-probs; 0: bit for bit")
    add("--model", type=Path, help="Hugging Face directory of a checkpoint that is in no run directory")
    args = parser.parse_args(argv)
    try:
        return int(compare(args.models, args.text, args.tolerance, args.model) > args.tolerance)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
