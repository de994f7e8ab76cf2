"""The name table, against the tensors of Hugging Face's own models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from dapo.model.families import read_shape
from dapo.model.names import table
from tests.dapo.model.models import MODELS, write_model

DENSE = [name for name in MODELS if "A3B" not in name]


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("name", DENSE)
def test_names_and_shapes_are_those_of_hugging_faces_model(name: str, is_fused: bool, tmp_path: Path) -> None:
    write_model(tmp_path, name, num_hidden_layers=2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path)
        )
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}  # a tied head once
    entries = table(read_shape(tmp_path), is_fused)
    ours = {name: shape for entry in entries for name, shape in zip(entry.hf, entry.shapes, strict=True)}
    assert ours == theirs


def test_experts_have_entries_of_their_own_in_one_tensor_of_a_checkpoint(tmp_path: Path) -> None:
    shape = replace(read_shape(write_model(tmp_path, "Qwen3-30B-A3B")), num_layers=2, num_experts=3)
    entries = [entry for entry in table(shape, is_fused=True) if entry.key.endswith("linear_fc2.weight")]
    assert {entry.key for entry in entries} == {"decoder.layers.mlp.experts.experts.linear_fc2.weight"}
    assert [entry.place for entry in entries] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert entries[4].hf == ("model.layers.1.mlp.experts.1.down_proj.weight",)
    assert all(entry.shapes == ((2048, 768),) and not entry.is_split for entry in entries)
