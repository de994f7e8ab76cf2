"""config.json is read as Hugging Face reads it, and what is not understood is refused by name."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dapo import files
from dapo.config import ConfigError
from dapo.engine.weight_sync import make_sync
from dapo.model.families import read_shape
from dapo.model.files import stored_weights
from dapo.model.shape import ModelShape
from dapo.policy.weight_files import check_checkpoint, check_model
from tests.dapo.model.models import MODELS, write_model

FIXTURES = Path(__file__).parents[2] / "fixtures/0.1.0"
LAYERS = ["full_attention", "sliding_attention"]


def hf_shape(directory: Path) -> ModelShape:
    """As Hugging Face reads the same file."""
    hf = transformers.AutoConfig.from_pretrained(directory)
    return ModelShape(
        model_type=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        ffn_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        norm_eps=hf.rms_norm_eps,
        rope_theta=hf.rope_parameters["rope_theta"],
        is_tied=hf.tie_word_embeddings,
        num_experts=getattr(hf, "num_local_experts", 0),
        experts_per_token=getattr(hf, "num_experts_per_tok", 0),
        expert_ffn_size=getattr(hf, "moe_intermediate_size", 0),
        is_expert_sum_one=getattr(hf, "norm_topk_prob", False),
    )


@pytest.mark.parametrize("missing", [None, "head_dim", "rope_theta", "tie_word_embeddings"])
@pytest.mark.parametrize("name", MODELS)
def test_a_config_is_read_as_hugging_face_reads_it(name: str, missing: str | None, tmp_path: Path) -> None:
    path = write_model(tmp_path, name, rope_theta=2e6, rms_norm_eps=1e-5) / "config.json"
    values = json.loads(path.read_text())
    values.pop(missing, None)
    path.write_text(json.dumps(values))
    assert read_shape(tmp_path) == hf_shape(tmp_path)


def test_a_mistral_that_does_not_mention_its_window_has_hugging_faces(tmp_path: Path) -> None:
    path = write_model(tmp_path, "Mistral-Nemo") / "config.json"
    values = json.loads(path.read_text())
    del values["sliding_window"]
    path.write_text(json.dumps(values))
    assert transformers.AutoConfig.from_pretrained(tmp_path).sliding_window == 4096
    with pytest.raises(ConfigError, match="sliding_window=4096 is not supported"):
        read_shape(tmp_path)


def test_llama_without_kv_heads_has_as_many_as_heads(tmp_path: Path) -> None:
    write_model(tmp_path, "Llama-3-8B", num_key_value_heads=None)
    assert read_shape(tmp_path) == hf_shape(tmp_path)
    assert read_shape(tmp_path).num_kv_heads == 32


@pytest.mark.parametrize(
    ("raw", "heads"),
    [({"num_key_value_heads": 2, "num_attention_heads": 8}, 2), ({"num_attention_heads": 8}, 8), ({}, 1),
     ({"num_key_value_heads": None, "num_attention_heads": 8}, 8)],
)  # fmt: skip
def test_a_weight_sync_knows_the_kv_heads_of_any_architecture(
    raw: dict[str, int], heads: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    where = {"directory": tmp_path / "weights", "model": tmp_path, "device": torch.device("cpu")}
    sync = make_sync("disk", list, bucket_bytes=64, timeout=1, **where)
    assert sync.num_kv_heads == heads


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"model_type": "mixtral"},
            "model_type 'mixtral' is not supported; supported: qwen2, qwen3, qwen3_moe, qwen3_next, ",
        ),
        ({"num_experts": 128}, "field 'num_experts' is not understood"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None; expected a whole number of at least 1"),
        ({"num_key_value_heads": None}, "num_key_value_heads=None; expected a whole number"),
        ({"hidden_size": "3584"}, "hidden_size='3584'; expected a whole number"),
        ({"surprise": 1}, "field 'surprise' is not understood"),
        ({"partial_rotary_factor": 0.5}, "field 'partial_rotary_factor' is not understood"),
        ({"num_experts": 8}, "field 'num_experts' is not understood"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: 'silu'"),
        ({"attention_bias": True}, "attention_bias=True is not supported; supported: False"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True is not supported"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias=True is not supported"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"model_type": "llama", "pretraining_tp": 2}, "pretraining_tp=2 is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        (
            {"layer_types": LAYERS * 14},
            "layer_types ['full_attention', 'sliding_attention'] are not supported",
        ),
        ({"layer_types": [["full_attention"]]}, "layer_types [\"['full_attention']\"] are not supported"),
        ({"layer_types": 28}, "layer_types 28 are not supported"),
        ({"layer_types": []}, "layer_types [] are not supported"),
        ({"model_type": ["qwen2"]}, "model_type ['qwen2'] is not supported"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type ['yarn'] is not supported"),
        ({"use_mrope": True}, "use_mrope=True is not supported"),
        ({"model_type": "mistral"}, "sliding_window=131072 is not supported; supported: null"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type yarn wants the field 'original_max_position_embeddings'",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type yarn wants the field 'factor'"),
        (
            {"rope_scaling": {"type": "linear", "factor": math.inf}},
            "factor=inf; expected a number of at least 1",
        ),
        ({"rope_theta": math.inf}, "rope_theta=inf; expected a number above 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'; expected a number of at least 0"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06; expected a number of at least 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan; expected a number of at least 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'; expected true or false"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=28"),
        ({"num_key_value_heads": 56}, "num_key_value_heads=56 does not divide num_attention_heads=28"),
        ({"head_dim": 3}, "head_dim=3; expected an even number"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_shape(write_model(tmp_path, "Qwen2.5-7B", **changed))


def test_layer_types_that_are_null_are_absent(tmp_path: Path) -> None:
    write_model(tmp_path, "Qwen2.5-7B", layer_types=None)
    assert read_shape(tmp_path) == hf_shape(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "config.json: not JSON: Expecting property name"),
        (b"\xff\xfe", "config.json: not JSON: 'utf-8' codec"),
        (b"[]", "config.json: no JSON object; expected"),
        (b"null", "config.json: no JSON object; expected"),
    ],
)
def test_a_config_that_is_no_json_object_is_one_line(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    for read in (read_shape, lambda directory: next(stored_weights(directory))):
        with pytest.raises(ConfigError, match=re.escape(message)):
            read(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts": None}, "num_experts=None; expected a whole number of at least 1"),
        (
            {"num_experts": None, "num_local_experts": 64, "num_experts_per_tok": 65},
            "num_experts_per_tok=65 of num_experts=64",
        ),
        ({"num_local_experts": 64}, "num_experts=128, num_local_experts=64: remove the wrong one"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers=[0] is not supported; supported: []"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported; supported: 1"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob=True with num_experts_per_tok=1: every expert weighs 1"),
        (
            {"shared_expert_intermediate_size": 64},
            "field 'shared_expert_intermediate_size' is not understood",
        ),
    ],
)
def test_what_is_not_understood_of_experts_is_refused_by_name(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_shape(write_model(tmp_path, "Qwen3-30B-A3B", **changed))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        ({"rope_type": "linear", "factor": 2}, {"rope_type": "linear", "factor": 2}),
        (LLAMA3, LLAMA3),
        (
            YARN | {"mscale": 0.7},
            YARN
            | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "mscale": 0.7}
            | {"attention_factor": None, "mscale_all_dim": None},
        ),
    ],
    ids=str,
)
def test_a_manifest_keeps_the_shape_as_earlier_versions_did(given: Any, kept: Any, tmp_path: Path) -> None:
    """Checkpoints of version 0.1.0 hold rope_scaling as a dict of rope_type and all of its fields."""
    shape = read_shape(write_model(tmp_path, "Qwen2.5-7B", rope_scaling=given))
    assert hash(shape) == hash(read_shape(tmp_path))
    assert json.loads(json.dumps(asdict(shape)))["rope_scaling"] == kept
    files.write_manifest(tmp_path, {}, {"model": asdict(shape) | {"rope_scaling": kept}})
    check_model(tmp_path, shape)
    other = {"rope_type": "linear", "factor": 3}
    files.write_manifest(tmp_path, {}, {"model": asdict(shape) | {"rope_scaling": other}})
    with pytest.raises(ConfigError, match=re.escape(f"another model: rope_scaling={other} there")):
        check_model(tmp_path, shape)


@pytest.mark.parametrize("layout", ["tensor2", "pipeline2"])
def test_a_checkpoint_of_version_0_1_0_is_of_its_model(layout: str) -> None:
    run = FIXTURES / layout
    check_checkpoint(run / "run/checkpoints/step-000002", read_shape(run / "model"))
