"""Are two models the same, each a Hugging Face directory or a Megatron checkpoint of any layout? If not, the
exit status is 1.

python tools/check_checkpoint.py A B [--text TEXT.txt] [--tolerance 0]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from megatron_to_hf import model_of

from dapo.config import ConfigError
from dapo.model.shape import read_shape
from dapo.policy.weight_files import hf_tensors, open_weights
from dapo.verify import logprobs, tokens_of


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs=2, type=Path, metavar="MODEL")
    parser.add_argument("--text", type=Path, help="a file: compare the log-probs of its tokens")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="on tensors and log-probs; 0: bit for bit"
    )
    args = parser.parse_args(argv)
    try:
        described = [model_of(path) for path in args.models]
        a, b = map(read_shape, described)
        if differences := [
            f"{name}: {x!r} against {y!r}"
            for (name, x), y in zip(asdict(a).items(), asdict(b).values())
            if x != y
        ]:  # noqa: B905
            raise ConfigError(f"the architectures differ: {'; '.join(differences)}")
        tokens = tokens_of(args.text, described, a) if args.text else None
        worst = 0.0
        for (name, x), (_, y) in zip(
            *(hf_tensors(open_weights(p, a), a, torch.float32) for p in args.models), strict=True
        ):
            worst = max(worst, difference := float((x - y).abs().max()))
            if difference > args.tolerance:
                print(f"{name}: differs by up to {difference:.3g}")
        print(f"tensors: the largest difference is {worst:.3g}")
        if tokens is not None:
            x, y = (
                logprobs(path, model, a, tokens) for path, model in zip(args.models, described, strict=True)
            )
            worst = max(worst, difference := float((x - y).abs().max()))
            print(
                f"log-probs of {len(x)} tokens: mean {x.mean():.4f} and {y.mean():.4f}, the largest "
                f"difference is {difference:.3g}"
            )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(worst > args.tolerance)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
