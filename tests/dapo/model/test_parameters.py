"""Numbers of parameters, counted from the name table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from dapo.model.families import read_shape
from dapo.model.layout import padded_vocab
from dapo.model.parameters import active_parameters, expert_parameters, num_parameters, stage_parameters
from dapo.model.shape import LayerKind, ModelShape
from tests.dapo.model.models import DIFFERING, MODELS, write_model


@pytest.mark.parametrize("name", [*MODELS, *DIFFERING])
def test_parameters_are_those_of_the_real_models(name: str, tmp_path: Path) -> None:
    expected = (MODELS | DIFFERING)[name][1]
    assert num_parameters(read_shape(write_model(tmp_path, name))) == expected


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-8B", "Qwen3-30B-A3B", "Llama-3-8B"])
def test_all_ranks_together_hold_the_whole_model_once(
    name: str, layout: tuple[int, int], tmp_path: Path
) -> None:
    """But for what is meant to be there more often: padding, a tied head of its own on the last stage."""
    tensor, pipeline = layout
    shape = read_shape(write_model(tmp_path, name))
    held = sum(held_by_stage(shape, tensor, pipeline, stage) for stage in range(pipeline))
    padding = (padded_vocab(shape, tensor) - shape.vocab_size) * shape.hidden_size
    copies = padded_vocab(shape, tensor) * shape.hidden_size if shape.is_tied and pipeline > 1 else 0
    assert held - copies - padding * (1 if shape.is_tied else 2) == num_parameters(shape)


@pytest.mark.parametrize("virtual", [1, 3])
@pytest.mark.parametrize("name", ["Qwen3_5TextConfig", "Qwen3NextConfig", "Glm4MoeLiteConfig"])
def test_all_ranks_together_hold_a_model_whose_layers_differ(name: str, virtual: int, tmp_path: Path) -> None:
    shape = published(tmp_path, name, num_hidden_layers=12)
    stages = [held_by_stage(shape, 2, 4, stage, virtual) for stage in range(4)]
    padding = (padded_vocab(shape, 2) - shape.vocab_size) * shape.hidden_size
    assert sum(stages) - 2 * padding == num_parameters(shape)
    kinds = [shape.kinds(layer for chunk in shape.chunks(4, stage, virtual) for layer in chunk)
             for stage in range(4)]  # fmt: skip
    assert sum(kinds, Counter()) == shape.kinds()
    tables = (padded_vocab(shape, 2) * shape.hidden_size, shape.hidden_size)
    layers = [stages[0] - tables[0], stages[1], stages[2], stages[3] - sum(tables)]
    for i in range(4):
        for j in range(i):
            assert (layers[i] == layers[j]) == (kinds[i] == kinds[j])


def test_chunks_of_a_stage_are_apart(tmp_path: Path) -> None:
    """The stages take turns, chunk by chunk; every fourth layer has attention."""
    shape = published(tmp_path, "Qwen3_5TextConfig", num_hidden_layers=12)
    assert shape.chunks(2, 0, virtual=3) == [range(0, 2), range(4, 6), range(8, 10)]
    attention = [[shape.kinds(chunk) for chunk in shape.chunks(4, stage, virtual=3)] for stage in range(4)]
    has_attention = [LayerKind(is_delta=False, has_experts=False) in kinds[0] for kinds in attention]
    assert has_attention == [False, False, False, True]
    staged = [LayerKind(False, False) in shape.kinds(*shape.chunks(4, stage)) for stage in range(4)]
    assert staged == [False, True, True, True]


@pytest.mark.parametrize(
    "name",
    ["Qwen3_5TextConfig", "Qwen3_5MoeTextConfig", "Qwen3NextConfig", "DeepseekV3Config", "Glm4MoeLiteConfig"],
)
def test_parameters_of_models_whose_layers_differ_are_those_of_transformers(
    name: str, tmp_path: Path
) -> None:
    shape = published(tmp_path, name)
    assert len(shape.kinds()) == 2
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)())
    assert num_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())


def test_a_token_uses_a_few_of_the_experts(tmp_path: Path) -> None:
    """37 billion of DeepSeek-V3's, as published, and the embedding, of which it uses one row."""
    shape = read_shape(write_model(tmp_path, "DeepSeek-V3"))
    assert active_parameters(shape) - 129280 * 7168 == 36_625_603_584


def published(directory: Path, name: str, **changed: int) -> ModelShape:
    getattr(transformers, name)(**changed).save_pretrained(directory)
    return read_shape(directory)


def held_by_stage(shape: ModelShape, tensor: int, pipeline: int, stage: int, virtual: int = 1) -> int:
    """Return the number of parameters that the ranks of a stage hold, each once: 8 share its experts."""
    split, whole = stage_parameters(shape, tensor, pipeline, stage, virtual)
    return tensor * split + whole + 8 * expert_parameters(shape, pipeline, 8, stage, virtual)
