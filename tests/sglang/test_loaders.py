"""SGLang's models take every tensor of ours, by name, shape and dtype.

Its CPU build lacks the kernels with which newer models would generate, but makes the models, and loads them.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from dapo.config import ConfigError
from dapo.engine.arguments import child_environment
from dapo.engine.buckets import buckets
from dapo.engine.transports import _payloads
from dapo.engine.weight_sync import make_sync
from dapo.model.families import FAMILIES, read_shape
from dapo.model.names import table
from tests.distributed.reference import make_hf
from tests.sglang.conftest import QWEN2

# fields of config.json that SGLang wants and transformers 5 does not write
LEFT_OUT: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3_moe": {},
    "qwen3_5_text": {"full_attention_interval": 2},
    "qwen3_5_moe_text": {"full_attention_interval": 2},
    "qwen3_5": {"full_attention_interval": 2},
    "qwen3_5_moe": {"full_attention_interval": 2},
    "qwen3_next": {"full_attention_interval": 2},
    "deepseek_v3": {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe_lite": {"moe_layer_freq": 1, "first_k_dense_replace": 1},
}
# SGLang's CPU build pads experts to a multiple of 32 columns, so that it sets more than it is sent
ALIGNED = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
UNKNOWN = "model.layers.1.mlp.nowhere.weight"
# beside text_config in a model with a vision tower
BESIDE = {
    "qwen3_5": {"architectures": ["Qwen3_5ForConditionalGeneration"]},
    "qwen3_5_moe": {"architectures": ["Qwen3_5MoeForConditionalGeneration"]},
}
VISION = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=64, patch_size=4,
              num_position_embeddings=16, deepstack_visual_indexes=[])  # fmt: skip


def test_every_tensor_is_taken_by_name_and_a_routers_bias_in_float32(
    sglang_python: Path, tmp_path: Path
) -> None:
    sent = {family: make_buckets(family, tmp_path / family) for family in LEFT_OUT}
    command = [sglang_python, Path(__file__).with_name("loaders.py"), *(tmp_path / name for name in sent)]
    environment = child_environment(has_cuda=False) | {"PYTHONPATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(sent), done.stderr[-3000:]
    for (family, tensors), line in zip(sent.items(), lines, strict=True):
        found = json.loads(line)
        assert found["refused"] == [UNKNOWN], (family, done.stderr[-3000:])
        assert [name for name in found["unset"] if not name.startswith("visual.")] == [], family
        biases = {name: tensor for name, tensor in tensors.items() if name.endswith("correction_bias")}
        assert found["biases"] == {
            name: ["torch.float32", tensor.tolist()] for name, tensor in biases.items()
        }
        assert bool(biases) == (family in ("deepseek_v3", "glm4_moe_lite"))


def make_buckets(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """Write config.json, and a policy's tensors in buckets as small as can be. Return the tensors.

    One more is there, of a name that no model has.
    """
    make_hf(f"{family}_text" if family in BESIDE else family, False, folder, layers=2, vocab=64)
    config = json.loads((folder / "config.json").read_text())
    config |= LEFT_OUT[family] | {name: size for name, size in ALIGNED.items() if name in config}
    if family in BESIDE:
        config = BESIDE[family] | {"model_type": family, "text_config": config, "vision_config": VISION}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(shape, dtype=torch.float32 if entry.is_buffer else torch.bfloat16)
        for entry in table(read_shape(folder), is_fused=True)
        for name, shape in zip(entry.hf, entry.shapes, strict=True)
    }
    sent = tensors | {UNKNOWN: torch.ones(3)}
    payloads = [_payloads(bucket, 1)[0] for bucket in buckets(sent.items(), 1, torch.device("cpu"))]
    (folder / "buckets.json").write_text(json.dumps(payloads))
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_families_whose_checksums_are_not_known_are_refused_by_name(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | {"model_type": family}))

    def make(verify: bool) -> None:
        make_sync(
            "tensor", list, bucket_bytes=600, device=torch.device("cpu"), directory=tmp_path / "weights",
            model=tmp_path, timeout=10, verify=verify,
        ).close()  # fmt: skip

    make(verify=False)
    if family in {"qwen2", "qwen3", "qwen3_moe", "llama", "mistral"}:
        make(verify=True)
    else:
        with pytest.raises(ConfigError, match=f"engine.verify_weights=true: .* of a {family} are not known"):
            make(verify=True)
