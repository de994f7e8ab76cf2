"""python -m tests.dapo.layout_on_meta CONFIG MODEL WORLD: the parameters of the first and the last rank, built without memory, as JSON.

One process that takes itself for one rank after the other: torch's fake process group answers every collective at once.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dapo import config as configs
from dapo.policy import hf_weights
from dapo.policy.model import build_model, transformer_config
from dapo.shape import read_shape


def main(path: str, model: str, world_size: str) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    world = int(world_size)
    config = configs.load(path, [f"policy.model={model}"])
    shape = read_shape(config.policy.model)
    counts = []
    for rank in (0, world - 1):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        parallel_state.initialize_model_parallel(
            config.parallel.tensor,
            config.parallel.pipeline,
            expert_model_parallel_size=config.parallel.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(0)
        with torch.device("meta"):
            built = build_model(shape, transformer_config(shape, config))
        weights = hf_weights.Weights(built, shape)
        names = {name for entry in weights.entries if (name := weights.local_name(entry)) is not None}
        assert names == set(weights.params), names ^ set(weights.params)
        assert all(parameter.is_meta for parameter in built.parameters())
        counts.append(sum(parameter.numel() for parameter in built.parameters()))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
