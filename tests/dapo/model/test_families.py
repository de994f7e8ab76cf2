"""A family of models is one file: what it says is all that the rest knows of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dapo.config import ConfigError
from dapo.model.families import FAMILIES, Family, read_shape
from dapo.model.names import table
from dapo.model.parameters import num_parameters
from tests.dapo.model.models import MODELS, plan_of, write_model

ROOT = Path(__file__).parents[3]


def test_a_toy_family_is_an_entry_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", Family("toy", has_qkv_bias=True, has_qk_norm=True))
    monkeypatch.setitem(MODELS, "Toy", (MODELS["Qwen2.5-7B"][0] | {"model_type": "toy"}, 0))
    shape = read_shape(write_model(tmp_path / "toy", "Toy"))
    assert shape.model_type == "toy"
    of_layer = {name for entry in table(shape, is_fused=True) if entry.layer == 3 for name in entry.hf}
    own = {"q_proj.bias", "k_proj.bias", "v_proj.bias", "q_norm.weight", "k_norm.weight"}
    qwen2 = read_shape(write_model(tmp_path / "qwen2", "Qwen2.5-7B"))
    assert {f"model.layers.3.self_attn.{name}" for name in own} <= of_layer
    norms = 2 * shape.head_dim * shape.num_layers
    assert num_parameters(shape) == num_parameters(qwen2) + norms
    assert FAMILIES["toy"].megatron(shape) == {"add_qkv_bias": True, "qk_layernorm": True}
    assert plan_of(tmp_path, "Toy", "parallel.tensor=4").worst.parameters > 0
    with pytest.raises(ConfigError, match="field 'num_experts' is not understood"):
        read_shape(write_model(tmp_path / "wrong", "Toy", num_experts=4))


def test_an_unknown_family_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    for kind in ("toy", None, ["qwen2"]):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(
            ConfigError, match=r"model_type .* is not supported; supported: qwen2, qwen3, qwen3_moe"
        ):
            read_shape(tmp_path)


def test_a_familys_name_stands_in_its_own_file_alone() -> None:
    """But for the architectures whose forward pass of one token the embedded engine computes itself."""
    names = re.compile(rf"""["']({"|".join(FAMILIES)})["']""")
    files = [path.relative_to(ROOT) for path in (ROOT / "dapo").rglob("*.py")]
    naming = {str(path) for path in files if names.search((ROOT / path).read_text())}
    for name in FAMILIES:
        own = [path for path in naming if re.search(rf"""["']{name}["']""", (ROOT / path).read_text())]
        [family] = [path for path in own if path != "dapo/engine/one_token.py"]
        assert family.startswith("dapo/model/families/") and name.startswith(Path(family).stem)
