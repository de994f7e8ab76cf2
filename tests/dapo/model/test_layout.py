"""Layouts that cannot hold a model, and options that cannot train it, are refused with the numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dapo import config
from dapo.config import ConfigError
from dapo.model.families import read_shape
from dapo.model.layout import check_layout, check_length
from dapo.plan.plan import make_plan
from tests.dapo.model.models import plan_of, write_model

FULL = "policy.megatron.recompute_granularity=full"
UNIFORM = "policy.megatron.recompute_method=uniform policy.megatron.recompute_num_layers"
MODULES = "policy.megatron.recompute_modules"


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        ("parallel.expert=3", None, "parallel.expert=3 does not divide the model's num_experts=128"),
        ("parallel.expert=16", 24,
         "parallel.expert=16 does not divide the 24 ranks of a pipeline stage (world size 24 / "
         "parallel.pipeline=1), who share its experts"),
        ("parallel.expert=8", 4, "parallel.expert=8 does not divide the 4 ranks of a pipeline stage"),
        ("policy.megatron.moe_aux_loss_coeff=0.001", None,
         "policy.megatron.moe_aux_loss_coeff cannot be set: the objective is"),
        ("policy.megatron.moe_z_loss_coeff=0.1", None,
         "policy.megatron.moe_z_loss_coeff cannot be set: the objective is the paper's"),
        (f"{MODULES}=[mlp]", None, "mlp recomputes nothing where every layer has experts; moe does"),
    ],
)  # fmt: skip
def test_a_layout_of_experts_that_does_not_divide_is_refused_with_the_numbers(
    overrides: str, world: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_of(tmp_path, "Qwen3-30B-A3B", "parallel.tensor=4", *overrides.split(), world=world)


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        ("parallel.tensor=3", None,
         "parallel.tensor=3 does not divide the model's num_attention_heads=28; parallel.tensor=3 does not "
         "divide the model's num_key_value_heads=4; parallel.tensor=3 does not divide the model's "
         "intermediate_size=18944"),
        ("parallel.tensor=1 parallel.pipeline=3", None,
         "parallel.pipeline=3 does not divide the model's num_hidden_layers=28"),
        ("", 10, "world size 10 is not a multiple of parallel.tensor=4 × parallel.pipeline=1"),
        (f"{UNIFORM}=5", None, "policy.megatron.recompute_num_layers=5 does not divide a stage's layers=28"),
        (FULL, None, f"{FULL} wants recompute_method=uniform or block, and recompute_num_layers"),
        ("parallel.tensor=2 parallel.pipeline=2 parallel.virtual_pipeline=4", None,
         "parallel.pipeline=2 × parallel.virtual_pipeline=4 does not divide the model's num_hidden_layers"),
        (f"parallel.pipeline=2 parallel.virtual_pipeline=7 {UNIFORM}=4", None,
         "policy.megatron.recompute_num_layers=4 does not divide a stage's chunk of layers=2"),
        ("parallel.virtual_pipeline=2", None, "parallel.virtual_pipeline=2 with parallel.pipeline=1: "),
        ("parallel.context=2", 12,
         "world size 12 is not a multiple of parallel.tensor=4 × parallel.pipeline=1 × parallel.context=2: "
         "launch 8 processes"),
        ("parallel.context=2", 0, "a world of 0 processes; expected at least 8"),
        ("parallel.context=3 policy.tokens_per_microbatch=22528", None,
         "20480 = 22528 tokens, padded to a multiple of 2 × parallel.context=3: raise it"),
        ("", 0, "a world of 0 processes; expected at least 4"),
        (f"{MODULES}=[layernorm]", None, "layernorm cannot be recomputed by itself"),
        ("parallel.expert=2", None, "parallel.expert=2, but qwen2 has no experts: leave it 1"),
        (f"{MODULES}=[moe]", None, "moe, but there are no experts; the other is mlp"),
        ("policy.megatron.deterministic_mode=true", None, "cannot be set: use run.deterministic"),
        ("run.deterministic=true policy.megatron.tp_comm_overlap=true", None,
         "policy.megatron.tp_comm_overlap=true with run.deterministic=true: its sums come in any order"),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_divide_is_refused_with_the_numbers(
    overrides: str, world: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_of(tmp_path, "Qwen2.5-7B", "parallel.tensor=4", *overrides.split(), world=world)


OFFLOAD = "policy.megatron.optimizer_cpu_offload=true"
PRECISION = "policy.megatron.use_precision_aware_optimizer=true"
FRACTION = "policy.megatron.optimizer_offload_fraction"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (f"{FRACTION}=1.0", "use_precision_aware_optimizer=true: without it"),
        (f"{PRECISION} {FRACTION}=0.5", "offload_fraction=1.0: a part"),
        (PRECISION, "offload_fraction=1.0: a part"),
        (f"{PRECISION} {FRACTION}=1.0 policy.dtype=float32", "bfloat16: 32-bit"),
    ],
)
def test_optimizer_state_in_main_memory_in_a_way_that_cannot_resume_is_refused(
    overrides: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"policy.megatron.optimizer_cpu_offload wants .*{message}"):
        plan_of(tmp_path, "Qwen2.5-7B", "parallel.tensor=4", OFFLOAD, *overrides.split())


def test_all_that_is_wrong_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("{run: {dir: r}, data: {train: t}, policy: {model: m}}")
    wrong = config.load(path, ["parallel.tensor=3", "parallel.expert=2", f"{MODULES}=[moe]", OFFLOAD])
    with pytest.raises(ConfigError) as refused:
        check_layout(read_shape(write_model(tmp_path, "Qwen2.5-7B")), wrong)
    parts = ("num_attention_heads=28", "moe, but", "no experts: leave it 1", "optimizer_cpu_offload wants")
    assert "\n" not in str(refused.value) and all(part in str(refused.value) for part in parts)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("positions", "scaling", "most"),
    [
        (4096, None, 4096),
        (4096, YARN, 16384),
        (32768, YARN, 32768),
        (8192, LLAMA3, 8192),
        (4096, {"rope_type": "linear", "factor": 2}, 8192),
        (4096, {"type": "default"}, 4096),
    ],
)
def test_a_prompt_and_its_response_need_as_many_positions(
    positions: int, scaling: dict | None, most: int, tmp_path: Path
) -> None:
    write_model(tmp_path / "m", "Qwen2.5-7B", max_position_embeddings=positions, rope_scaling=scaling)
    path = tmp_path / "run.yaml"
    path.write_text(f"{{run: {{dir: r}}, data: {{train: t}}, policy: {{model: {tmp_path / 'm'}}}}}")
    lengths = [
        "parallel.tensor=4",
        "policy.tokens_per_microbatch=65536",
        "data.max_prompt_length=96",
        "reward.soft_overlong_punishment=false",
    ]
    check_length(config.load(path, [*lengths, f"rollout.max_response_length={most - 96}"]))
    too_long = config.load(path, [*lengths, f"rollout.max_response_length={most - 95}"])
    said = f"={most - 95} are {most + 1} positions, and policy.model={tmp_path / 'm'} has {most} "
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_length(too_long)
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_plan(too_long, "h100")


def test_a_model_that_names_no_positions_has_any_number(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{{run: {{dir: r}}, data: {{train: t}}, policy: {{model: {tmp_path / 'm'}}}}}")
    write_model(tmp_path / "m", "Qwen2.5-7B", max_position_embeddings=None)
    check_length(config.load(path))
    write_model(tmp_path / "m", "Qwen2.5-7B", max_position_embeddings="many")
    with pytest.raises(ConfigError, match="max_position_embeddings='many'; expected a whole number"):
        check_length(config.load(path))
