"""A model with a vision tower: its language model learns, the rest stays; and files with fused experts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dapo import config as configs
from dapo import mesh as meshes
from dapo.config import ConfigError
from dapo.model.families import read_shape
from dapo.model.names import table
from dapo.policy.megatron import Policy
from dapo.policy.weight_files import HFWeights
from tests.dapo.policy.test_megatron import one_rank
from tests.distributed.launch import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import hf_to_megatron
import megatron_to_hf

TEXT: dict[str, Any] = dict(
    vocab_size=160, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=24, layer_types=["linear_attention", "full_attention"], tie_word_embeddings=True,
)  # fmt: skip
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=40
)
VISION = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
              num_position_embeddings=16)  # fmt: skip


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a vision tower and a head that guesses several tokens."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("seeing")
    config = transformers.Qwen3_5Config(
        text_config=TEXT | {"intermediate_size": 96}, vision_config=VISION, tie_word_embeddings=True
    )
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    of_others = {"mtp.fc.weight": torch.randn(64, 128).bfloat16(), "model.visual.ids": torch.arange(7)}
    save_file(load_file(file) | of_others, file, {"format": "pt"})
    return folder


@pytest.fixture
def alone() -> Iterator[None]:
    with one_rank():
        yield


def is_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@pytest.mark.usefixtures("alone")
def test_what_is_no_part_of_the_language_model_is_left_out_and_exported_as_it_was(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"run.dir={tmp_path / 'run'}", f"policy.model={seeing}"]
    config = configs.load(ROOT / "examples/arithmetic/config.yaml", options)
    mesh = meshes.Mesh(config.parallel)
    policy = Policy(config, mesh)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert "tensors of the vision tower, first model.visual.blocks.0." in line
    assert "1 tensors of multi-token prediction, first mtp.fc.weight; exports have them as they are" in line
    assert {name.partition(".")[0] for name, _ in policy.weights()} == {"model"}
    policy.save_hf(tmp_path / "exported")
    assert is_same(
        load_file(seeing / "model.safetensors"), load_file(tmp_path / "exported/model.safetensors")
    )
    found, about = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(
        tmp_path / "exported", output_loading_info=True
    )
    assert not about["missing_keys"] and found.num_parameters() > 0
    refusing = configs.load(
        ROOT / "examples/arithmetic/config.yaml", [*options, "policy.other_tensors=refuse"]
    )
    policy.config = refusing
    with pytest.raises(
        ConfigError, match=r"policy\.other_tensors=refuse: .* left out: \d+ tensors of the vision"
    ):
        policy._stored_weights()


def test_the_tools_keep_it_where_the_model_has_it(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hf_to_megatron.main([str(seeing), str(tmp_path / "megatron")]) == 0
    back = [str(tmp_path / "megatron"), str(tmp_path / "back"), "--model", str(seeing)]
    assert megatron_to_hf.main(back) == 0
    assert "vision tower" not in capsys.readouterr().err.partition("left out")[0]
    assert is_same(load_file(seeing / "model.safetensors"), load_file(tmp_path / "back/model.safetensors"))


def test_the_tools_say_so_where_the_model_has_it_not(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hf_to_megatron.main([str(seeing), str(tmp_path / "megatron")]) == 0
    assert megatron_to_hf.main([str(tmp_path / "megatron"), str(tmp_path / "back")]) == 0
    assert "back is the language model alone; the vision tower" in capsys.readouterr().err
    assert not any("visual" in name for name in load_file(tmp_path / "back/model.safetensors"))


def test_two_names_of_one_tensor_are_refused(seeing: Path, tmp_path: Path) -> None:
    tensors = load_file(seeing / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.language_model.norm.weight"].clone()
    (tmp_path / "config.json").write_bytes((seeing / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.language_model\.norm\.weight.* are the same one"):
        HFWeights(tmp_path, read_shape(tmp_path))


def test_what_the_tools_cannot_write_is_refused_before_they_begin(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hf_to_megatron.main([str(seeing), str(tmp_path / "target"), "--megatron-lm"]) == 2
    assert "Megatron-LM's own checkpoints are known of models with plain attention" in capsys.readouterr().err
    assert hf_to_megatron.main([str(seeing)]) == 2
    assert "no target is named" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_experts_in_one_tensor_are_read_as_those_apart(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.Qwen3_5MoeTextConfig(**TEXT, **EXPERTS)
    transformers.Qwen3_5MoeForCausalLM(config).save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    apart = {
        n: t
        for e in table(shape, True)
        for n, t in zip(e.hf, HFWeights(tmp_path, shape).read(e), strict=True)
    }
    fused = dict(apart)
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([fused.pop(f"{name}{i}.{part}_proj.weight") for i in range(4)])
            for part in ("gate", "up", "down")
        )
        fused |= {f"{name}gate_up_proj": torch.cat([gate, up], dim=1), f"{name}down_proj": down}
    (tmp_path / "model.safetensors").unlink()
    stored = {name.replace("model.", prefix, 1): tensor.contiguous() for name, tensor in fused.items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"has shape \(4, 64, 48\), config.json means 3 experts"):
        HFWeights(tmp_path, replace(shape, num_experts=3))
    weights = HFWeights(tmp_path, shape)
    weights.check_shapes(shape)
    found = {n: t for e in table(shape, True) for n, t in zip(e.hf, weights.read(e), strict=True)}
    assert is_same(found, apart)
