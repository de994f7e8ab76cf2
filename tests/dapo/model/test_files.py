"""Which file of a Hugging Face directory holds which tensor."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dapo.config import ConfigError
from dapo.model.files import open_safetensors, read_tensor, stored_weights


def write(directory, **files):
    """`write(directory, a={"x": 1.0})` → a.safetensors with one tensor."""
    for name, tensors in files.items():
        save_file(
            {key: torch.tensor([value]) for key, value in tensors.items()}, directory / f"{name}.safetensors"
        )


def index(directory, where):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_without_an_index_all_files_count(tmp_path):
    write(tmp_path, a={"x": 1.0}, b={"y": 2.0})
    assert {name: path.name for name, path in open_safetensors(tmp_path).items()} == {
        "x": "a.safetensors",
        "y": "b.safetensors",
    }


def test_with_an_index_only_what_it_names_counts(tmp_path):
    write(tmp_path, a={"x": 1.0, "y": 3.0}, b={"y": 2.0}, z_left_over={"x": -1.0, "more": 0.0})
    index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    found = open_safetensors(tmp_path)
    assert {name: float(read_tensor(path, name)) for name, path in found.items()} == {"x": 1.0, "y": 2.0}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"x": "a.safetensors", "y": "c.safetensors"}, r"c\.safetensors is missing, one of 2 files"),
        (
            {"x": "b.safetensors"},
            r"b\.safetensors: tensor x is not in it, though model\.safetensors\.index\.json says so",
        ),
        (None, r"no index of safetensors files"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path, where, message):
    write(tmp_path, a={"x": 1.0}, b={"y": 2.0})
    index(tmp_path, where)
    with pytest.raises(ConfigError, match=message):
        open_safetensors(tmp_path)


def test_a_file_cut_short_is_named(tmp_path):
    write(tmp_path, a={"x": 1.0})
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=r"a\.safetensors: damaged or cut short"):
        open_safetensors(tmp_path)


def test_the_copied_head_of_a_tied_model_is_left_out(tmp_path):
    write(tmp_path, model={"model.embed_tokens.weight": 1.0, "lm_head.weight": 1.0})
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert [name for name, _ in stored_weights(tmp_path)] == ["model.embed_tokens.weight"]
