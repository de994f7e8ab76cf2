"""Run by the Python that has SGLang: which of our tensors do its models take, bucket by bucket?

    python loaders.py DIRECTORY …

A directory has config.json and buckets.json, a list of the payloads of /update_weights_from_tensor. SGLang
makes the model in bfloat16 on the CPU, with NaN in every parameter. Prints a line of JSON for each directory:
"refused", the names of the buckets that set fewer or more numbers than they have; "unset", the parameters
with NaN in the end; "biases", those of sigmoid routers, with dtype and values.
"""

from __future__ import annotations

import base64
import json
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

import torch

# SGLang's model files look these up at import; they would run in a forward pass only
for kernel in ("fused_sigmoid_mul", "fused_qk_gemma_rmsnorm", "fused_qk_gemma_rmsnorm_with_gate",
               "fused_qkvzba_split_reshape_cat_contiguous"):  # fmt: skip
    setattr(torch.ops.sgl_kernel, f"{kernel}_cpu", None)


def make(directory: Path, is_first: bool) -> torch.nn.Module:
    """Make SGLang's model of a config.json, as a server on a CPU does."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
    from sglang.srt.distributed.bootstrap import init_layer_runtime, init_parallel_runtime
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.model_loader.loader import get_model_loader
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(
        model_path=str(directory), device="cpu", dtype="bfloat16", attention_backend="torch_native",
        sampling_backend="pytorch", disable_overlap_schedule=True, mem_fraction_static=0.2,
        skip_tokenizer_init=True,
    )  # fmt: skip
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    initialize_moe_config()
    if is_first:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        init_parallel_runtime(server_args=arguments, device="cpu", dist_port=port)
    load = LoadConfig(load_format="dummy")
    config = adjust_config_with_unaligned_cpu_tp(ModelConfig.from_server_args(arguments), load, 1)
    init_layer_runtime(model_config=config)
    made = get_model_loader(load, config).load_model(model_config=config, device_config=DeviceConfig("cpu"))
    return made  # type: ignore[no-any-return]


def tensors_of(payload: str) -> list[tuple[str, torch.Tensor]]:
    """Unpack a bucket by SGLang's own class."""
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    sent = pickle.loads(base64.b64decode(payload))
    return FlattenedTensorBucket(
        flattened_tensor=sent["flattened_tensor"], metadata=sent["metadata"]
    ).reconstruct_tensors()  # type: ignore[no-any-return]


def load(model: Any, payloads: list[str]) -> dict[str, Any]:
    params = dict(model.named_parameters())
    for param in params.values():
        param.data.fill_(float("nan"))

    def num_unset() -> int:
        return sum(int(param.isnan().sum()) for param in params.values())

    refused, left = [], num_unset()
    for payload in payloads:
        tensors = tensors_of(payload)
        try:
            model.load_weights(tensors)
        except Exception as error:  # noqa: BLE001  # SGLang's own, of any kind
            print(f"{tensors[0][0]}: {error!r}", file=sys.stderr)
        before, left = left, num_unset()
        if before - left != sum(tensor.numel() for _, tensor in tensors):
            refused += [name for name, _ in tensors]
    return {
        "refused": refused,
        "unset": [name for name, param in params.items() if param.isnan().any()],
        "biases": {
            name: [str(param.dtype), param.tolist()]
            for name, param in params.items()
            if name.endswith("correction_bias")
        },
    }


if __name__ == "__main__":
    for i, path in enumerate(map(Path, sys.argv[1:])):
        model = make(path, i == 0)
        print(json.dumps(load(model, json.loads((path / "buckets.json").read_text()))), flush=True)
