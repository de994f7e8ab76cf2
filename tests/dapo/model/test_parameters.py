"""Numbers of parameters, counted from the name table."""

from __future__ import annotations

from pathlib import Path

import pytest

from dapo.model.families import read_shape
from dapo.model.layout import padded_vocab
from dapo.model.parameters import expert_parameters, num_parameters, stage_parameters
from tests.dapo.model.models import MODELS, write_model


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_real_models(name: str, tmp_path: Path) -> None:
    assert num_parameters(read_shape(write_model(tmp_path, name))) == MODELS[name][1]


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-8B", "Qwen3-30B-A3B", "Llama-3-8B"])
def test_all_ranks_together_hold_the_whole_model_once(
    name: str, layout: tuple[int, int], tmp_path: Path
) -> None:
    """But for what is meant to be there more often: padding, a tied head of its own on the last stage."""
    tensor, pipeline = layout
    shape = read_shape(write_model(tmp_path, name))
    stages = [stage_parameters(shape, tensor, pipeline, stage) for stage in range(pipeline)]
    held = sum(tensor * split + whole for split, whole in stages) + pipeline * 8 * expert_parameters(
        shape, pipeline, 8
    )
    padding = (padded_vocab(shape, tensor) - shape.vocab_size) * shape.hidden_size
    copies = padded_vocab(shape, tensor) * shape.hidden_size if shape.is_tied and pipeline > 1 else 0
    assert held - copies - padding * (1 if shape.is_tied else 2) == num_parameters(shape)
