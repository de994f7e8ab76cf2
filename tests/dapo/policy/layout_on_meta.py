"""Print the numbers of parameters of the first and the last rank as JSON.

    python -m tests.dapo.policy.layout_on_meta CONFIG MODEL WORLD LAYOUT…

They are those of the config's own layout, and then of the overrides LAYOUT.

The model is built without memory, in one process that acts as one rank after the other: torch's fake process
group answers every collective at once.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dapo import config as configs
from dapo.model.families import read_shape
from dapo.policy.layout import initialize_megatron
from dapo.policy.model import build_model, transformer_config
from dapo.policy.weights import Weights


def main(path: str, model: str, world: str, *layout: str) -> None:
    layouts: list[list[str]] = [[], list(layout)]
    loaded = [configs.load(path, [f"policy.model={model}", *layout]) for layout in layouts]
    print(json.dumps([parameters(config, int(world)) for config in loaded]))


def parameters(config: configs.Config, world: int) -> list[int]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    shape = read_shape(config.policy.model)
    counts = []
    for rank in (0, world - 1):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        initialize_megatron(config.parallel, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0)
        with torch.device("meta"):
            chunks = build_model(shape, transformer_config(shape, config))
        weights = Weights(chunks, shape)
        names = {name for entry in weights.entries if (name := weights.local_name(entry)) is not None}
        assert names == set(weights.params), names ^ set(weights.params)
        assert all(parameter.is_meta for parameter in weights.params.values())
        counts.append(sum(parameter.numel() for parameter in weights.params.values()))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return counts


if __name__ == "__main__":
    main(*sys.argv[1:])
