"""Are two models the same, each a Hugging Face directory or a Megatron checkpoint of any layout? If not, the exit status is 1.

python tools/check_checkpoint.py A B [--text TEXT.txt] [--tolerance 0]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from megatron_to_hf import model_of

from dapo.assemble import load_tokenizer
from dapo.config import ConfigError
from dapo.engine.embedded import as_stored
from dapo.policy.weight_files import hf_tensors, open_weights
from dapo.shape import ModelShape, read_shape


def tokens_of(text: Path, models: list[Path], shape: ModelShape) -> torch.Tensor:
    """[1, n] ids of the file's tokens, which are the same to every model.

    Raises:
        ConfigError: they are not, or too few, or none of the vocabulary; a tokenizer or the file cannot be read.
    """
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {text} cannot be read: {error}") from error
    a, b = (load_tokenizer(model_of(model))(words).input_ids for model in models)
    if a != b:
        place = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))  # noqa: B905
        raise ConfigError(f"the tokenizers differ: --text {text} is {len(a)} tokens to one, {len(b)} to the other, unlike from {place} on")
    if len(a) < 2:
        raise ConfigError(f"--text {text} has too few tokens, {len(a)}: the first has no log-prob, so there must be two")
    if max(a) >= shape.vocab_size:
        raise ConfigError(f"--text {text} has token {max(a)}, the models have a vocabulary of {shape.vocab_size}: not their tokenizer")
    return torch.tensor([a])


@torch.no_grad()
def logprobs(source: Path, shape: ModelShape, tokens: torch.Tensor) -> torch.Tensor:
    """log π(token | those before) of all tokens but the first, in float32: [1, n] → [n − 1]."""
    model = model_of(source)
    hf = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model), dtype=torch.float32).eval()
    params = dict(as_stored(hf.named_parameters()))
    for name, tensor in hf_tensors(open_weights(source, shape), shape, torch.float32):
        params[name].copy_(tensor)
    return hf(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]  # type: ignore[no-any-return]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs=2, type=Path, metavar="MODEL")
    parser.add_argument("--text", type=Path, help="a file: compare the log-probs of its tokens")
    parser.add_argument("--tolerance", type=float, default=0.0, help="on tensors and log-probs; 0: bit for bit")
    args = parser.parse_args(argv)
    try:
        a, b = (read_shape(model_of(path)) for path in args.models)
        if differences := [f"{name}: {x!r} against {y!r}" for (name, x), y in zip(asdict(a).items(), asdict(b).values()) if x != y]:  # noqa: B905
            raise ConfigError(f"the architectures differ: {'; '.join(differences)}")
        tokens = tokens_of(args.text, args.models, a) if args.text else None
        worst = 0.0
        for (name, x), (_, y) in zip(*(hf_tensors(open_weights(p, a), a, torch.float32) for p in args.models), strict=True):
            worst = max(worst, difference := float((x - y).abs().max()))
            if difference > args.tolerance:
                print(f"{name}: differs by up to {difference:.3g}")
        print(f"tensors: the largest difference is {worst:.3g}")
        if tokens is not None:
            x, y = (logprobs(path, a, tokens) for path in args.models)
            worst = max(worst, difference := float((x - y).abs().max()))
            print(f"log-probs of {len(x)} tokens: mean {x.mean():.4f} and {y.mean():.4f}, the largest difference is {difference:.3g}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return int(worst > args.tolerance)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
