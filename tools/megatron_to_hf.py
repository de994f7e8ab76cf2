"""Convert a checkpoint of any layout to a Hugging Face directory.

It is a run's, hf_to_megatron.py's or Megatron-LM's (torch_dist). One process, tensor by tensor.

    python tools/megatron_to_hf.py RUN/checkpoints/step-000100 TARGET [--model MODEL] [--dtype bfloat16]
    python tools/megatron_to_hf.py MEGATRON_LM/iter_0000100 TARGET --model MODEL

Config, tokenizer, generation config, and tensors beside the language model (a vision tower) come from MODEL,
by default from policy.model of RUN/config.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hf_to_megatron import convert, parser

from dapo.model.shape import ModelShape, read_config
from dapo.policy.weight_files import HFWeights, hf_tensors
from dapo.policy.weights import StoredWeights
from dapo.policy.write_weights import parts, save_hf


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
    kept = HFWeights(model, shape).kept() if any(model.glob("*.safetensors")) else {}
    if "vision_config" in read_config(model) and not kept:
        missing = f"the vision tower of its config.json is not in {model}: name a directory that has it"
        print(f"warning: {target} is the language model alone; {missing} with --model", file=sys.stderr)
    save_hf(tensors, shape, dtype, model, target, shard_bytes=shard_bytes, kept=kept)


def main(argv: list[str]) -> int:
    return convert(parser(__doc__).parse_args(argv), save)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
