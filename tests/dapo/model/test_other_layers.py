"""Models with a DeltaNet, latent attention, layers that differ: what config.json says; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from dapo.config import ConfigError
from dapo.model.families import FAMILIES, read_shape
from dapo.model.names import table
from dapo.model.shape import DeltaNet, Latent, SigmoidRouter, kv_heads, max_tokens

DELTA = {
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 16,
    "linear_value_head_dim": 24, "num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 160,
}  # fmt: skip
EXPERTS = {
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 40,
}  # fmt: skip
LATENT = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 40, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "kv_lora_rank": 32,
    "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 32,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "norm_topk_prob": True,
}  # fmt: skip
OLD_YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
# as its file on the hub has them
PUBLISHED = LATENT | {
    "model_type": "deepseek_v3", "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "seq_aux": True, "aux_loss_alpha": 0.0001, "ep_size": 1, "num_nextn_predict_layers": 1,
    "rope_theta": 10000, "rope_scaling": OLD_YARN, "max_position_embeddings": 163840, "pretraining_tp": 1,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def write(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def as_saved(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(config.to_json_string())
    return fields


def qwen35(**changed: Any) -> dict[str, Any]:
    made = as_saved(transformers.Qwen3_5TextConfig(**DELTA, intermediate_size=96))
    return {name: value for name, value in (made | changed).items() if value is not None}


def test_a_delta_net_is_in_three_layers_of_four(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, qwen35()))
    assert shape.delta == DeltaNet(4, 8, 16, 24, conv_width=4, period=4)
    assert [shape.is_delta(layer) for layer in range(8)] == 2 * [True, True, True, False]
    assert (shape.num_rotated, shape.head_dim, shape.is_gated, shape.is_zero_centred) == (8, 32, True, True)
    assert not shape.are_layers_alike
    keys = {entry.key for entry in table(shape, is_fused=True) if entry.layer == 3}
    assert "decoder.layers.3.self_attention.linear_qkv.weight" in keys
    in_proj = next(e for e in table(shape, True) if e.megatron == "self_attention.in_proj.weight")
    sections = {"query": 64, "key": 64, "value": 192, "z": 192, "beta": 8, "alpha": 8}
    assert in_proj.keys == {
        f"decoder.layers.0.self_attention.in_proj.weight.{name}": rows for name, rows in sections.items()
    }


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_the_language_model_of_one_that_sees_pictures(kind: str, tmp_path: Path) -> None:
    text = qwen35(**EXPERTS) if "moe" in kind else qwen35()
    text |= {"model_type": f"{kind}_text", "tie_word_embeddings": True, "max_position_embeddings": 777}
    if "moe" in kind:
        del text["intermediate_size"]
    alone = read_shape(write(tmp_path, text))
    outer = {"model_type": kind, "text_config": text, "vision_config": {}, "image_token_id": 3}
    both = read_shape(write(tmp_path, outer))
    assert both.__dict__ | {"model_type": f"{kind}_text"} == alone.__dict__
    assert both.is_tied and kv_heads(outer) == 2 and max_tokens(tmp_path) == 777
    family = FAMILIES[kind]
    assert family.aside(both, "model.visual.blocks.0.attn.qkv.weight", ()) == "the vision tower"
    assert family.aside(both, "mtp.fc.weight", ()) == "multi-token prediction"
    assert family.aside(both, "model.layers.0.mlp.gate.weight", ()) is None
    inner = {name: value for name, value in text.items() if name != "tie_word_embeddings"}
    write(tmp_path, outer | {"tie_word_embeddings": True, "text_config": inner})
    assert read_shape(tmp_path).is_tied
    write(tmp_path, outer | {"tie_word_embeddings": False})
    with pytest.raises(ConfigError, match="tie_word_embeddings=False, and True in text_config: remove"):
        read_shape(tmp_path)


def test_latent_attention_as_published(tmp_path: Path) -> None:
    shape = read_shape(write(tmp_path, PUBLISHED))
    assert shape.latent == Latent(query_rank=48, kv_rank=32, value_dim=32)
    assert (shape.head_dim, shape.num_rotated, shape.value_dim) == (40, 16, 32)
    assert shape.sigmoid_router == SigmoidRouter(num_groups=4, groups_per_token=2, scale=2.5)
    assert (shape.num_dense_layers, shape.shared_ffn_size, shape.is_expert_sum_one) == (1, 80, True)
    assert [shape.has_experts(layer) for layer in range(4)] == [False, True, True, True]
    beyond = "model.layers.4.eh_proj.weight", "model.layers.4.mlp.gate.weight"
    family = FAMILIES["deepseek_v3"]
    assert [family.aside(shape, name, beyond) for name in beyond] == 2 * ["multi-token prediction"]
    assert family.aside(shape, beyond[1], ()) is None, "a layer that config.json does not count"
    megatron = FAMILIES["deepseek_v3"].megatron(shape)
    assert megatron["moe_layer_freq"] == [0, 1, 1, 1] and megatron["moe_router_bias_update_rate"] == 0.0
    biases = [e for e in table(shape, is_fused=True) if e.is_buffer]
    assert [e.key for e in biases] == [f"decoder.layers.{i}.mlp.router.expert_bias" for i in (1, 2, 3)]
    listed = ["dense"] + 3 * ["sparse"]
    glm = as_saved(transformers.Glm4MoeLiteConfig(**LATENT)) | {"mlp_layer_types": listed}
    assert read_shape(write(tmp_path, glm)).num_dense_layers == 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"partial_rotary_factor": 0.3, "rope_parameters": None},
            r"partial_rotary_factor=0\.3; expected an even",
        ),
        ({"linear_num_value_heads": 6}, "linear_num_key_heads=4 does not divide linear_num_value_heads=6"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim=0; expected a whole number"),
        (
            {"layer_types": 7 * ["linear_attention"] + ["sliding_attention"]},
            "layer_types .* are not supported",
        ),
        (
            {"layer_types": 2 * (2 * ["linear_attention"] + 2 * ["full_attention"])},
            "in every n-th of 8 layers",
        ),
        ({"partial_rotary_factor": float("nan"), "rope_parameters": None}, "partial_rotary_factor=nan"),
        ({"attn_output_gate": False}, "attn_output_gate=False is not supported; supported: True"),
        ({"num_experts": 8}, "field 'num_experts' is not understood"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ],
)
def test_what_is_not_understood_of_a_delta_net(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    fields = {name: value for name, value in (qwen35() | changed).items() if value is not None}
    with pytest.raises(ConfigError, match=said):
        read_shape(write(tmp_path, fields))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"q_lora_rank": None}, "q_lora_rank=None; expected a whole number"),
        ({"num_key_value_heads": 2}, "latent attention has a key for each head"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False is not supported; supported: True"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ({"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        ({"rope_interleave": False}, "rope_interleave=False is not supported"),
        ({"topk_group": 1}, r"num_experts_per_tok=4 with topk_group=1 is not supported; .* twice topk_group"),
        ({"topk_group": 5}, "n_group=4 with topk_group=5"),
        ({"n_group": 3}, "n_group=3 with topk_group=2 does not divide n_routed_experts=16"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 of topk_group=2 groups of 4 experts"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor=0; expected a number above 0"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace=4; expected a whole number below"),
        ({"rope_scaling": OLD_YARN | {"mscale": 0.5}}, "mscale=0.5, mscale_all_dim=1.0 are not supported"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 4096}},
            "mscale=None, mscale_all_dim=None are not supported",
        ),
        ({"qk_head_dim": 99}, "qk_head_dim=99; expected an even number, and 40"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim=15, .* expected an even number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"quantization_config": {"fmt": "e4m3"}}, "field 'quantization_config' is not understood"),
        ({"index_topk": 2048}, "field 'index_topk' is not understood"),
        ({"num_local_experts": 3}, "n_routed_experts=16, num_local_experts=3: remove the wrong one"),
    ],
)
def test_what_is_not_understood_of_latent_attention(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        read_shape(write(tmp_path, PUBLISHED | changed))


def test_what_is_left_out_has_hugging_faces_default(tmp_path: Path) -> None:
    left = {"routed_scaling_factor", "n_group", "topk_group", "n_shared_experts", "first_k_dense_replace",
            "rms_norm_eps", "norm_topk_prob"}  # fmt: skip
    fields = {name: value for name, value in PUBLISHED.items() if name not in left}
    fields |= {"n_routed_experts": 64, "num_experts_per_tok": 8}
    for kind, config in (
        ("deepseek_v3", transformers.DeepseekV3Config()),
        ("glm4_moe_lite", transformers.Glm4MoeLiteConfig()),
    ):
        shape = read_shape(write(tmp_path, fields | {"model_type": kind}))
        router = SigmoidRouter(config.n_group, config.topk_group, config.routed_scaling_factor)
        assert (shape.sigmoid_router, shape.norm_eps) == (router, config.rms_norm_eps)
        assert shape.shared_ffn_size == config.n_shared_experts * shape.expert_ffn_size
        dense = 3 if kind == "deepseek_v3" else config.mlp_layer_types.count("dense")
        assert shape.num_dense_layers == dense
    fields = as_saved(transformers.Qwen3NextConfig(**DELTA, **EXPERTS, intermediate_size=96))
    del fields["norm_topk_prob"]
    assert read_shape(write(tmp_path, fields)).is_expert_sum_one
    fields = qwen35(**EXPERTS, model_type="qwen3_5_moe_text")
    assert read_shape(write(tmp_path, fields)).is_expert_sum_one
    with pytest.raises(ConfigError, match="norm_topk_prob=False is not supported; supported: True"):
        read_shape(write(tmp_path, fields | {"norm_topk_prob": False}))


def test_no_field_is_both_understood_and_fixed() -> None:
    """The value of a fixed one is not compared then."""
    assert [name for name, family in FAMILIES.items() if family.understood & set(family.fixed)] == []


def test_layers_with_an_mlp_after_those_with_experts_are_refused(tmp_path: Path) -> None:
    glm = as_saved(transformers.Glm4MoeLiteConfig(**LATENT))
    glm |= {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}
    with pytest.raises(
        ConfigError, match=r"mlp_layer_types .* are not supported; supported: dense in the first"
    ):
        read_shape(write(tmp_path, glm))
