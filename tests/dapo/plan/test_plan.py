"""What `dapo plan` counts, against what is known of real models; what it refuses, and what it advises.
Activations: tests/distributed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from dapo import config
from dapo.config import ConfigError
from dapo.model.files import stored_weights
from dapo.model.shape import ModelShape, padded_vocab, read_shape
from dapo.plan.memory import (
    BATCH_BYTES,
    CHUNK_BYTES,
    Rank,
    active_parameters,
    expert_parameters,
    num_parameters,
    stage_parameters,
)
from dapo.plan.plan import GIB, HARDWARE, Plan, describe, make_plan, remedies

ROOT = Path(__file__).parents[3]
PAPER = ROOT / "examples/qwen2.5_32b_paper/config.yaml"
EXPERTS = ROOT / "examples/qwen3_30b_a3b/config.yaml"


def sizes(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    return (
        dict(zip(names, (hidden, ffn, layers, heads, kv, vocab), strict=True))
        | {"tie_word_embeddings": False}
        | more
    )


MODELS = {  # config.json as published, and the parameters that its weights hold
    "Qwen2.5-0.5B": (
        sizes(896, 4864, 24, 14, 2, 151936, model_type="qwen2", tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen2.5-7B": (
        sizes(3584, 18944, 28, 28, 4, 152064, model_type="qwen2", use_mrope=False, sliding_window=131072),
        7_615_616_512,
    ),
    "Qwen2.5-32B": (
        sizes(5120, 27648, 64, 40, 8, 152064, model_type="qwen2", max_window_layers=64),
        32_763_876_352,
    ),
    "Qwen3-8B": (
        sizes(4096, 12288, 36, 32, 8, 151936, model_type="qwen3", head_dim=128, attention_bias=False),
        8_190_735_360,
    ),
    "Qwen3-30B-A3B": (
        sizes(
            2048,
            6144,
            48,
            32,
            4,
            151936,
            model_type="qwen3_moe",
            head_dim=128,
            attention_bias=False,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            router_aux_loss_coef=0.001,
            output_router_logits=False,
            max_window_layers=48,
            sliding_window=None,
        ),
        30_532_122_624,
    ),
    "Llama-3-8B": (
        sizes(4096, 14336, 32, 32, 8, 128256, model_type="llama", rope_theta=500000.0, rope_scaling=None),
        8_030_261_248,
    ),
    "Mistral-Nemo": (
        sizes(5120, 14336, 40, 32, 8, 131072, model_type="mistral", head_dim=128, sliding_window=None),
        12_247_782_400,
    ),
}
LAYERS = ["full_attention", "sliding_attention"]


def write_model(directory: Path, name: str, **changed: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODELS[name][0] | changed))
    return directory


def plan_of(
    folder: Path, model: str, *overrides: str, gpu: str = "h100", world: int | None = None, te: bool = False
) -> Plan:
    path = folder / "run.yaml"
    path.write_text(
        f"run: {{dir: r}}\ndata: {{train: t}}\npolicy: "
        f"{{model: {write_model(folder / model, model)}}}\nengine: {{kind: sglang}}\n"
    )
    return make_plan(config.load(path, list(overrides)), gpu, world, has_te=te)


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


def hf_shape(directory: Path) -> ModelShape:
    """As Hugging Face reads the same file."""
    hf = transformers.AutoConfig.from_pretrained(directory)
    return ModelShape(
        hf.model_type, hf.vocab_size, hf.hidden_size, hf.intermediate_size, hf.num_hidden_layers, hf.num_attention_heads,
        hf.num_key_value_heads, getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads, hf.rms_norm_eps,
        hf.rope_parameters["rope_theta"], hf.tie_word_embeddings, None, getattr(hf, "num_local_experts", 0),
        getattr(hf, "num_experts_per_tok", 0), getattr(hf, "moe_intermediate_size", 0), getattr(hf, "norm_topk_prob", False),
    )  # fmt: skip


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
    ("changed", "message"),
    [
        (
            {"model_type": "mixtral"},
            "model_type 'mixtral' is not supported; supported: qwen2, qwen3, qwen3_moe, llama, mistral",
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


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["parallel.expert=3"], None, "parallel.expert=3 does not divide the model's num_experts=128"),
        (["parallel.expert=16"], 24, "parallel.expert=16 does not divide the 24 ranks of a pipeline stage (world size 24 / "
                                     "parallel.pipeline=1), who share its experts"),
        (["parallel.expert=8"], 4, "parallel.expert=8 does not divide the 4 ranks of a pipeline stage"),
        (["policy.megatron.moe_aux_loss_coeff=0.001"], None, "policy.megatron.moe_aux_loss_coeff cannot be set: the objective is"),
        (["policy.megatron.moe_z_loss_coeff=0.1"], None, "policy.megatron.moe_z_loss_coeff cannot be set: the objective is the paper's"),
        (["policy.megatron.recompute_modules=[mlp]"], None, "mlp recomputes nothing where every layer has experts; moe does"),
    ],
)  # fmt: skip
def test_a_layout_of_experts_that_does_not_divide_is_refused_with_the_numbers(
    overrides: list[str], world: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_of(tmp_path, "Qwen3-30B-A3B", "parallel.tensor=4", *overrides, world=world)


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["parallel.tensor=3"], None, "parallel.tensor=3 does not divide the model's num_attention_heads=28; parallel.tensor=3 does not "
                                      "divide the model's num_key_value_heads=4; parallel.tensor=3 does not "
                                      "divide the model's "
                                      "intermediate_size=18944"),
        (["parallel.tensor=1", "parallel.pipeline=3"], None, "parallel.pipeline=3 does not divide the model's num_hidden_layers=28"),
        (["parallel.tensor=4"], 10, "world size 10 is not a multiple of parallel.tensor=4 × parallel.pipeline=1"),
        (["parallel.tensor=4", "policy.megatron.recompute_method=uniform", "policy.megatron.recompute_num_layers=5"], None,
         "policy.megatron.recompute_num_layers=5 does not divide a stage's layers=28"),
        (["parallel.tensor=4", "policy.megatron.recompute_granularity=full"], None,
         "policy.megatron.recompute_granularity=full wants recompute_method=uniform or block, and recompute_num_layers"),
        (["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=4"], None,
         "parallel.pipeline=2 × parallel.virtual_pipeline=4 does not divide the model's num_hidden_layers=28"),
        (["parallel.tensor=4", "parallel.pipeline=2", "parallel.virtual_pipeline=7", "policy.megatron.recompute_method=uniform",
          "policy.megatron.recompute_num_layers=4"], None,
         "policy.megatron.recompute_num_layers=4 does not divide a stage's chunk of layers=2"),
        (["parallel.tensor=4", "parallel.virtual_pipeline=2"], None, "parallel.virtual_pipeline=2 with parallel.pipeline=1: one stage has "
                                                                     "nobody to take turns with"),
        (["parallel.tensor=4", "parallel.context=2"], 12,
         "world size 12 is not a multiple of parallel.tensor=4 × parallel.pipeline=1 × parallel.context=2: launch 8 processes"),
        (["parallel.tensor=4", "parallel.context=2"], 0, "a world of 0 processes; expected at least 8"),
        (["parallel.tensor=4", "parallel.context=3", "policy.tokens_per_microbatch=22528"], None,
         "20480 = 22528 tokens, padded to a multiple of 2 × parallel.context=3: raise it"),
        (["parallel.tensor=4"], 0, "a world of 0 processes; expected at least 4"),
        (["parallel.tensor=4", "policy.megatron.recompute_modules=[layernorm]"], None, "layernorm cannot be recomputed by itself"),
        (["parallel.tensor=4", "parallel.expert=2"], None, "parallel.expert=2, but qwen2 has no experts: leave it 1"),
        (["parallel.tensor=4", "policy.megatron.recompute_modules=[moe]"], None, "moe, but there are no experts; the other is mlp"),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_divide_is_refused_with_the_numbers(
    overrides: list[str], world: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_of(tmp_path, "Qwen2.5-7B", *overrides, world=world)


def test_the_constants_are_those_of_the_kernels_and_of_the_batch() -> None:
    import numpy as np
    from dapo_kernels import linear_policy_loss  # noqa: F401  # the module hides behind the function of its name

    from dapo.learn.batch import build

    kernels = sys.modules["dapo_kernels.linear_policy_loss"]
    assert CHUNK_BYTES["cpu"] == kernels.CPU_CHUNK_BYTES
    assert CHUNK_BYTES["cuda"] == CHUNK_BYTES["transformer_engine"] == kernels.GPU_CHUNK_BYTES
    empty = build([], config.Parallel(tensor=64))
    arrays = [value for value in vars(empty).values() if isinstance(value, np.ndarray) and len(value) == 64]
    assert sum(array.itemsize for array in arrays) + 4 == BATCH_BYTES  # and old_logprobs


def test_memory_follows_the_layout(tmp_path: Path) -> None:
    def worst(*overrides: str, world: int | None = None) -> Rank:
        return plan_of(tmp_path, "Qwen2.5-7B", *overrides, world=world).worst

    whole, split = worst("parallel.tensor=1"), worst("parallel.tensor=4")
    assert abs(split.params / whole.params - 1 / 4) < 0.001
    # sequence parallelism: all but cos and sin
    assert abs(split.activations / whole.activations - 1 / 4) < 0.02
    assert worst("parallel.tensor=1", world=4).optimizer == whole.optimizer // 4
    assert worst("parallel.tensor=1", world=4).grads == whole.grads
    staged = plan_of(tmp_path, "Qwen2.5-7B", "parallel.tensor=1", "parallel.pipeline=4")
    assert [rank.in_flight for rank in staged.stages] == [4, 3, 2, 1]
    assert sum(rank.parameters for rank in staged.stages) == whole.parameters
    shared = worst("parallel.tensor=4", "parallel.context=2")
    assert shared.optimizer == split.optimizer // 2 and shared.grads == split.grads
    assert shared.tokens == split.tokens // 2 and shared.kept < 0.55 * split.kept, (
        "half, and the other half's keys and values"
    )
    turns = plan_of(
        tmp_path, "Qwen2.5-7B", "parallel.tensor=1", "parallel.pipeline=4", "parallel.virtual_pipeline=7"
    )
    assert [rank.in_flight for rank in turns.stages] == [31, 29, 27, 25], (
        "of a seventh of the stage's layers each"
    )
    assert [rank.parameters for rank in turns.stages] == [rank.parameters for rank in staged.stages]
    assert turns.microbatches % 4 == 0 and turns.stages[0].microbatches % 4 == 0
    assert turns.update_seconds < staged.update_seconds, "less waiting"
    assert 1.9 < worst("parallel.tensor=4", "policy.tokens_per_microbatch=65536").kept / split.kept < 2.1
    offload = (
        "optimizer_cpu_offload=true",
        "optimizer_offload_fraction=1.0",
        "use_precision_aware_optimizer=true",
    )
    assert (
        worst("parallel.tensor=4", *(f"policy.megatron.{field}" for field in offload)).optimizer
        == 0
        < split.optimizer
    )


def test_memory_and_work_follow_the_layout_of_experts(tmp_path: Path) -> None:
    def worst(*overrides: str, world: int = 16) -> Rank:
        return plan_of(tmp_path, "Qwen3-30B-A3B", "parallel.tensor=4", *overrides, world=world).worst

    one, eight = worst(), worst("parallel.expert=8")
    dense = one.parameters - one.expert_parameters
    assert (
        eight.expert_parameters == one.expert_parameters // 8
        and eight.parameters == dense + eight.expert_parameters
    )
    assert one.expert_data == 16 and eight.expert_data == 2, (
        "tensor ranks have whole experts, so they share their optimizer's state"
    )
    assert one.optimizer == 12 * (dense // 4 + one.expert_parameters // 16)
    assert eight.optimizer == 12 * (dense // 4 + eight.expert_parameters // 2), (
        "spread over ranks, not held more than once in a group"
    )
    assert eight.kept == one.kept, "as many tokens come as are sent"
    recompute = "policy.megatron.recompute_granularity=selective", "policy.megatron.recompute_modules=[moe]"
    assert worst("parallel.expert=8", *recompute).kept < 0.5 * eight.kept
    plan = plan_of(tmp_path, "Qwen3-30B-A3B", "parallel.tensor=4", "parallel.expert=8", gpu="a100", world=16)
    active = active_parameters(plan.shape)
    assert active == 3_353_032_704
    # the embedding is looked up
    least = 6 * (active - 151936 * 2048) * plan.tokens / (16 * 312e12 * HARDWARE["a100"].mfu)
    assert 1.6 * least < plan.update_seconds < 1.8 * least, (
        "attention over 11,264 tokens costs 0.7 of the matrices"
    )


def test_a_checkpoint_takes_the_main_memory_of_one_tensor_and_in_the_background_of_the_rank_s_share(
    tmp_path: Path,
) -> None:
    def plan(*overrides: str, gpu: str = "h100") -> Plan:
        return plan_of(
            tmp_path, "Qwen3-30B-A3B", "parallel.tensor=4", "parallel.expert=8", *overrides, gpu=gpu, world=16
        )

    table = 4 * 151936 // 4 * 2048
    assert plan().worst.main_memory == table
    assert (
        f"writing a checkpoint takes {8 * table / GIB:.0f} GiB of the main memory of a machine with 8 devices"
        in describe(plan())
    )
    background = plan("run.async_save=true").worst
    assert background.main_memory == background.optimizer + background.params // 4
    on_cpu, in_background = (plan(f"run.async_save={on}", gpu="cpu").worst for on in ("false", "true"))
    assert (
        in_background.activations == on_cpu.activations
        and in_background.peak == on_cpu.peak + in_background.copied_state
    )


def test_a_mixture_of_experts_that_does_not_fit_is_told_to_spread_them(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "Qwen3-30B-A3B", "parallel.tensor=4", "parallel.expert=2", gpu="h100", world=32)
    assert not plan.fits
    found = {text: changed for text, changed in remedies(plan)}
    assert any("parallel.expert=" in text for text in found), found
    assert any("recompute_modules=[moe]" in text or "granularity=full" in text for text in found), found
    assert all(changed.fits for changed in found.values())


def test_an_out_of_memory_case_names_what_makes_it_fit_and_it_does(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "Qwen2.5-32B", "parallel.pipeline=2", gpu="h800", world=128)
    assert not plan.fits
    lines = describe(plan)
    assert any(
        re.match(r"out of memory during a layer's backward pass on stage 0: \d+\.\d GiB too much", line)
        for line in lines
    )
    first = next(line for line in lines if line.startswith("fits with "))
    overrides = first.removeprefix("fits with ").partition(":")[0].split()
    assert overrides == [
        "policy.megatron.recompute_granularity=selective",
        "policy.megatron.recompute_modules=[mlp]",
    ]
    changed = plan_of(tmp_path, "Qwen2.5-32B", "parallel.pipeline=2", *overrides, gpu="h800", world=128)
    assert changed.fits
    assert changed.worst.peak / GIB < plan.room < plan.worst.peak / GIB


def test_where_no_single_change_is_enough_several_are_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "Qwen2.5-32B", "parallel.tensor=2", gpu="h100", world=8)
    found = remedies(plan)
    assert found
    for text, changed in found:
        overrides = [word for word in text.split() if "=" in word]
        again = plan_of(
            tmp_path, "Qwen2.5-32B", "parallel.tensor=2", *overrides, gpu="h100", world=changed.world
        )
        assert again.fits
        assert again.worst.peak == changed.worst.peak
    assert all(
        len([word for word in text.split() if "recompute_method" not in word and "num_layers" not in word])
        >= 2
        for text, _ in found
    )


def test_what_nothing_helps_is_said(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "Qwen2.5-32B", "parallel.tensor=1", gpu="cpu")
    assert not plan.fits
    assert remedies(plan) == []
    assert describe(plan)[-1] == "nothing known makes it fit: another device, or a smaller model"


def test_times_follow_the_hardware_and_the_work(tmp_path: Path) -> None:
    def seconds(*overrides: str, gpu: str = "h100", world: int = 8) -> float:
        return plan_of(
            tmp_path, "Qwen2.5-7B", "parallel.tensor=4", *overrides, gpu=gpu, world=world
        ).update_seconds

    assert seconds() > seconds(world=16) > seconds(world=16, gpu="b200")
    full = ("granularity=full", "method=uniform", "num_layers=1")
    assert 1.25 < seconds(*(f"policy.megatron.recompute_{field}" for field in full)) / seconds() < 1.34
    # 6 flops a parameter and token are the larger part
    plan = plan_of(tmp_path, "Qwen2.5-7B", "parallel.tensor=4", gpu="a100", world=8)
    least = 6 * 7.07e9 * plan.tokens / (8 * 312e12 * HARDWARE["a100"].mfu)
    assert least < plan.update_seconds < 1.4 * least


def test_what_is_not_counted_is_said(tmp_path: Path) -> None:
    overrides = [
        "parallel.tensor=4",
        "policy.megatron.fp8=hybrid",
        "policy.megatron.adam_eps=1e-6",
        "policy.dtype=float32",
    ]
    plan = plan_of(tmp_path, "Qwen2.5-7B", *overrides, world=4096)
    first, second, third = (line for line in describe(plan) if line.startswith("note"))
    assert "policy.megatron.fp8 is not counted" in first
    assert "float32 on a GPU" in second
    assert "an update has 512 samples for 1024 data-parallel ranks" in third


def test_the_mixture_of_experts_layout_fits_16_gpus_of_80_gb(tmp_path: Path) -> None:
    config_30b = config.load(EXPERTS, [f"policy.model={write_model(tmp_path, 'Qwen3-30B-A3B')}"])
    lines = "\n".join(describe(make_plan(config_30b, "h800", 16)))
    assert "30,532,122,624 parameters (3,353,032,704 for a token)" in lines
    assert "16 × H800 80GB = tensor 4 × pipeline 1 × data 4" in lines and "16 of 128 experts" in lines
    assert re.search(r"\nfits: \d+\.\d GiB to spare$", lines)


def test_the_paper_s_layout_fits_128_gpus_of_80_gb(tmp_path: Path) -> None:
    model = write_model(tmp_path, "Qwen2.5-32B")
    command = [sys.executable, "-X", "importtime", "-m", "dapo", "plan", str(PAPER), f"policy.model={model}"]
    done = subprocess.run(
        [*command, "--gpu", "h800", "--world-size", "128"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-500:]
    assert "32,763,876,352 parameters" in done.stdout
    assert "128 × H800 80GB = tensor 8 × pipeline 2 × data 8" in done.stdout
    assert re.search(r"\nfits: \d+\.\d GiB to spare\n$", done.stdout)
    assert "pydantic" in done.stderr and not re.search(r"\| +(torch|transformers|numpy)\n", done.stderr)


def test_the_paper_s_layout_is_built_on_the_meta_device_as_planned(tmp_path: Path) -> None:
    """All 64 layers: a rank of each stage, as Megatron builds it among 128, has the parameters that the plan
    counts and the table names.
    """
    write_model(tmp_path, "Qwen2.5-32B")
    shape = read_shape(tmp_path)
    expected = [sum(stage_parameters(shape, 8, 2, stage)) for stage in (0, 1)]
    assert (
        parameters_on_meta(PAPER, tmp_path, 128, "parallel.context=2", "parallel.virtual_pipeline=4")
        == [expected] * 2
    )


def test_the_mixture_of_experts_layout_is_built_on_the_meta_device_as_planned(tmp_path: Path) -> None:
    """All 48 layers: the first rank and the last of 16, each with its 16 experts."""
    shape = read_shape(write_model(tmp_path, "Qwen3-30B-A3B"))
    counts = [
        sum(stage_parameters(shape, 4, pipeline, pipeline - 1)) + expert_parameters(shape, pipeline, 8)
        for pipeline in (1, 2)
    ]
    first = sum(stage_parameters(shape, 4, 2, 0)) + expert_parameters(shape, 2, 8)
    built = parameters_on_meta(EXPERTS, tmp_path, 16, "parallel.pipeline=2", "parallel.virtual_pipeline=4")
    assert built == [[counts[0]] * 2, [first, counts[1]]]


def parameters_on_meta(path: Path, model: Path, world: int, *layout: str) -> list[list[int]]:
    """Of the first and the last rank, as the config has it and with the overrides `layout`."""
    command = [
        sys.executable,
        "-m",
        "tests.dapo.policy.layout_on_meta",
        str(path),
        str(model),
        str(world),
        *layout,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_the_command_ends_with_1_where_memory_runs_out_or_the_layout_is_wrong(tmp_path: Path) -> None:
    model = write_model(tmp_path, "Qwen2.5-32B")
    for override, expected in (
        ("parallel.tensor=1", "out of memory"),
        ("parallel.tensor=16", "error: parallel.tensor=16 does not divide"),
    ):
        command = [
            sys.executable,
            "-m",
            "dapo",
            "plan",
            str(PAPER),
            f"policy.model={model}",
            override,
            "--gpu",
            "h800",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert expected in done.stdout + done.stderr
