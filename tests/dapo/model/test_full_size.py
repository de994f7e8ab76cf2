"""Published sizes, without their weights: every name that transformers would write has its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from dapo.model.families import FAMILIES, read_shape
from dapo.model.parameters import num_parameters
from tests.distributed.launch import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import hf_to_megatron

MTP = ("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight")
BEYOND = "model.layers.{}.eh_proj.weight"
# the classes' defaults are a published model's
SIZES: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "Qwen3.5-9B": (transformers.Qwen3_5TextConfig, "Qwen3_5ForCausalLM", MTP),
    "Qwen3.5-9B with its vision tower": (transformers.Qwen3_5Config, "Qwen3_5ForConditionalGeneration", MTP),
    "Qwen3.5-35B-A3B": (transformers.Qwen3_5MoeTextConfig, "Qwen3_5MoeForCausalLM", ()),
    "Qwen3.5-35B-A3B with its vision tower": (
        transformers.Qwen3_5MoeConfig, "Qwen3_5MoeForConditionalGeneration", MTP,
    ),
    "Qwen3-Next-80B-A3B": (transformers.Qwen3NextConfig, "Qwen3NextForCausalLM", MTP),
    "DeepSeek-V3": (transformers.DeepseekV3Config, "DeepseekV3ForCausalLM", (BEYOND.format(61),)),
    "GLM-4.7-Flash": (transformers.Glm4MoeLiteConfig, "Glm4MoeLiteForCausalLM", (BEYOND.format(47),)),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_names_and_counts_are_transformers_own(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, kind, beside = SIZES[name]
    with torch.device("meta"):
        model = getattr(transformers, kind)(config()).to(torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    written = {n: tuple(t.shape) for n, t in revert_weight_conversion(model, model.state_dict()).items()}
    empty_files(tmp_path, written | dict.fromkeys(beside, (2, 2)))
    shape = read_shape(tmp_path)
    own = [n for n in written if not FAMILIES[shape.model_type].aside(shape, n, beside)]
    buffers = sum("correction_bias" in n for n in own)
    counted = sum(p.numel() for n, p in model.named_parameters() if "visual" not in n)
    assert num_parameters(shape) == counted
    assert hf_to_megatron.main([str(tmp_path), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert f"{counted:,} parameters: {len(own):,} tensors" in out
    assert f"; {2 * counted + 4 * buffers * shape.num_experts:,} bytes" in out
    aside = len(beside) + len(written) - len(own)
    assert ("left out" in err) == (aside > 0)
    assert not beside or beside[0].partition(".")[0] in err


def test_a_name_without_a_place_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.Qwen3_5TextConfig(num_hidden_layers=4)
    with torch.device("meta"):
        model = transformers.Qwen3_5ForCausalLM(config)
    config.save_pretrained(tmp_path)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    for changed, said in (
        ({"model.layers.0.linear_attn.in_proj_z.bias": (4096,)}, "1 tensors have no place"),
        ({"model.layers.0.linear_attn.A_log": (31,)}, r"A_log has shape (31,), config.json means (32,)"),
    ):
        empty_files(tmp_path, shapes | changed)
        assert hf_to_megatron.main([str(tmp_path), "--dry-run"]) == 2
        assert said in capsys.readouterr().err


def empty_files(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write safetensors files of bfloat16 zeros, 4 GiB each at most, that take no room on the disk."""
    headers: list[dict[str, Any]] = [{}]
    end, where = 0, {}
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if end + size > 4 * 2**30:
            headers.append({})
            end = 0
        where[name] = f"model-{len(headers)}.safetensors"
        headers[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    for number, header in enumerate(headers, start=1):
        text = json.dumps(header).encode()
        with open(folder / f"model-{number}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(tensor["data_offsets"][1] for tensor in header.values()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
