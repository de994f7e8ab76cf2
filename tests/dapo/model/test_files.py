"""Which file of a Hugging Face directory holds which tensor."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dapo.config import ConfigError
from dapo.model.files import SAMPLE, fingerprints, open_safetensors, read_tensor, stored_weights


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


def test_a_tensor_in_two_files_is_refused_without_an_index(tmp_path):
    write(tmp_path, a={"x": 1.0, "y": 1.0}, b={"y": 2.0})
    with pytest.raises(ConfigError, match=r"tensor y is in a\.safetensors and in b\.safetensors: remove one"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}]
)
def test_the_copied_head_of_a_tied_model_is_left_out(tmp_path, config):
    write(tmp_path, model={"model.embed_tokens.weight": 1.0, "lm_head.weight": 1.0, "inv_freq": 2.0})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [name for name, _ in stored_weights(tmp_path)] == ["inv_freq", "model.embed_tokens.weight"]


def test_another_head_of_a_tied_model_is_refused_and_of_an_untied_one_read(tmp_path):
    write(tmp_path, model={"model.embed_tokens.weight": 1.0, "lm_head.weight": 1.5})
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not model\.embed_tokens\.weight, though"):
        list(stored_weights(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    read = {name: float(tensor) for name, tensor in stored_weights(tmp_path)}
    assert read == {"model.embed_tokens.weight": 1.0, "lm_head.weight": 1.5}


@pytest.mark.parametrize(
    "name", ["model.rotary_emb.inv_freq", "model.layers.3.self_attn.rotary_emb.inv_freq"]
)
def test_frequencies_that_config_json_implies_are_left_out(tmp_path, name):
    write(tmp_path, model={"x": 1.0, name: 1.0})
    assert list(open_safetensors(tmp_path)) == ["x"]


def test_models_that_differ_in_config_names_sizes_or_sampled_bytes_have_other_fingerprints(tmp_path):
    def found():
        return tuple(fingerprints(tmp_path).values())

    assert found() == ("not there", "not there")
    (tmp_path / "config.json").write_text("{}")
    weights = bytearray(10 * SAMPLE)
    (tmp_path / "a.safetensors").write_bytes(weights)
    config, first = found()
    assert found() == (config, first)
    (tmp_path / "config.json").write_text("{ }")
    assert found()[0] != config and found()[1] == first
    seen = {first}
    for place in (0, 5 * SAMPLE, 10 * SAMPLE - 1):
        weights[place] = 1
        (tmp_path / "a.safetensors").write_bytes(weights)
        seen.add(found()[1])
    (tmp_path / "a.safetensors").write_bytes(weights[: 9 * SAMPLE])
    seen.add(found()[1])
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    seen.add(found()[1])
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "__0_0.distcp").write_bytes(b"")
    assert len(seen | {found()[1]}) == 7
