"""Which of Megatron's fields a run may set, and which are refused by name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from dapo import policy  # noqa: F401  # adapts Megatron before it is imported
from dapo.config import ConfigError, load
from dapo.model.families import read_shape
from dapo.model.passthrough import READ, REFUSED, Passthrough
from dapo.plan.plan import make_plan
from dapo.policy import model

ROOT = Path(__file__).parents[3]
OVERRIDABLE = {  # what the policy sets and a run may set otherwise: which kernels compute the same
    "gradient_accumulation_fusion", "masked_softmax_fusion", "bias_activation_fusion",
    "bias_dropout_fusion", "apply_rope_fusion", "persist_layer_norm", "moe_token_dispatcher_type",
}  # fmt: skip


def config_of(*options: str) -> Any:
    return load(
        ROOT / "examples/arithmetic/config.yaml",
        [f"policy.model={ROOT / 'examples/arithmetic/base'}", *options],
    )


def test_every_refused_field_is_megatrons() -> None:
    classes = model.TransformerConfig, model.OptimizerConfig, model.DistributedDataParallelConfig
    assert set(REFUSED) <= {field.name for config in classes for field in dataclasses.fields(config)}


def test_what_the_policy_sets_is_not_silently_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = config_of(), set()

    class Watched(model.TransformerConfig):
        def __init__(self, **fields: Any):
            seen.update(fields)
            super().__init__(**fields)

    monkeypatch.setattr(model, "TransformerConfig", Watched)
    model.transformer_config(read_shape(config.policy.model), config)
    assert len(seen) > 30
    assert seen - set(REFUSED) == OVERRIDABLE


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("tensor_model_parallel_size=2", "use parallel.tensor"),
        ("virtual_pipeline_model_parallel_size=2", "use parallel.virtual_pipeline"),
        ("context_parallel_size=2", "use parallel.context"),
        ("sequence_parallel=false", "on whenever parallel.tensor is above 1"),
        ("calculate_per_token_loss=false", "the loss is a sum over tokens"),
        ("average_in_collective=true", "the loss is a sum over tokens"),
        ("cross_entropy_loss_fusion=true", "the loss is a sum over tokens"),
        ("grad_reduce_in_fp32=false", "gradients are summed in float32"),
        ("batch_p2p_comm=true", "one message at a time"),
        ("overlap_p2p_comm=true", "one message at a time"),
        ("deallocate_pipeline_outputs=true", "one message at a time"),
        ("variable_seq_lengths=false", "of any length"),
        ("num_layers_in_first_pipeline_stage=1", "weights find their places"),
        ("hidden_dropout=0.1", "nothing is dropped"),
        ("window_size=[128,0]", "config.json of policy.model decides it"),
        ("layernorm_zero_centered_gamma=true", "config.json of policy.model decides it"),
        ("softmax_type=learnable", "config.json of policy.model decides it"),
        ("moe_aux_loss_coeff=0.01", "times the number of tokens"),
        ("bf16=true", "use policy.dtype"),
        ("loss_scale=128", "there is no loss scale"),
        ("lr=1e-3", "use optim.lr"),
        ("num_microbatches_with_partial_activation_checkpoints=1", "use recompute_granularity"),
        (
            "hetereogenous_dist_checkpoint=true",
            "layers that are alike are in one tensor",
        ),  # Megatron's spelling
        ("delay_wgrad_compute=true", "complete when the backward pass is"),
    ],
)
def test_a_field_that_makes_wrong_numbers_is_refused_by_training_and_by_the_plan(
    option: str, said: str
) -> None:
    config = config_of(f"policy.megatron.{option}")
    message = f"policy.megatron.{option.split('=')[0]} cannot be set: .*{re.escape(said)}"
    with pytest.raises(ConfigError, match=message):
        model.transformer_config(read_shape(config.policy.model), config)
    with pytest.raises(ConfigError, match=message):
        make_plan(config, "h100", 1, has_te=False)


def test_a_field_that_leaves_the_numbers_alone_reaches_megatron() -> None:
    options = [
        "recompute_granularity=selective",
        "bucket_size=1000",
        "adam_eps=1e-6",
        "overlap_grad_reduce=true",
    ]
    config = config_of(*(f"policy.megatron.{option}" for option in options))
    built = model.transformer_config(read_shape(config.policy.model), config)
    _, optimizer, ddp = model.split_passthrough(config.policy.megatron)
    assert built.recompute_granularity == "selective"
    assert (optimizer, ddp) == ({"adam_eps": 1e-6}, {"bucket_size": 1000, "overlap_grad_reduce": True})


def test_the_fields_that_are_read_are_megatrons_and_have_its_defaults() -> None:
    defaults: dict[str, Any] = {}
    for owner in (model.OptimizerConfig, model.TransformerConfig):
        defaults |= {field.name: field.default for field in dataclasses.fields(owner)}
    ours = vars(Passthrough.of({}))
    assert set(ours) - {"verbatim"} == READ
    # Megatron's own default is allgather; the policy sets alltoall
    assert {name: ours[name] for name in READ} == {name: defaults[name] for name in READ} | {
        "moe_token_dispatcher_type": "alltoall"
    }


def test_every_field_is_kept_as_it_was_given() -> None:
    given = {"recompute_num_layers": 2, "fp8": "hybrid", "recompute_modules": None}
    parsed = Passthrough.of(given)
    assert parsed.verbatim == given
    assert (parsed.recompute_num_layers, parsed.recompute_modules) == (2, None)
    assert parsed.optimizer_offload_fraction == 0.0 and not parsed.is_allgather
    assert Passthrough.of({"moe_token_dispatcher_type": "allgather"}).is_allgather


@pytest.mark.parametrize(
    ("given", "recomputed"),
    [
        ({}, []),
        ({"recompute_modules": ["mlp"]}, []),  # without a granularity Megatron recomputes nothing
        ({"recompute_granularity": "full"}, ["full"]),
        ({"recompute_granularity": "selective"}, ["core_attn"]),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]}, ["mlp", "moe"]),
    ],
    ids=str,
)
def test_what_is_recomputed_follows_granularity_and_modules(
    given: dict[str, Any], recomputed: list[str]
) -> None:
    parsed = Passthrough.of(given)
    assert [what for what in ("full", "core_attn", "mlp", "moe") if parsed.recomputes(what)] == recomputed


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "recompute_num_layers=two",
            "policy.megatron.recompute_num_layers='two': input should be a valid integer",
        ),
        ("recompute_modules=mlp", "policy.megatron.recompute_modules='mlp': input should be a valid list"),
        (
            "optimizer_cpu_offload=maybe",
            "policy.megatron.optimizer_cpu_offload='maybe': input should be a valid bool",
        ),
    ],
)
def test_a_field_of_a_wrong_type_is_refused_by_name(option: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_plan(config_of(f"policy.megatron.{option}"), "h100", 1)


@pytest.mark.parametrize(
    "option", ["overlap_grad_reduce=no", "overlap_grad_reduce=1", "bucket_size=true", "adam_eps=yes"]
)
def test_megatron_gets_no_text_for_true_and_no_truth_for_a_number(option: str) -> None:
    given = config_of(f"policy.megatron.{option}").policy.megatron
    with pytest.raises(ConfigError, match=f"policy.megatron.{option.partition('=')[0]}=.*: input should be"):
        model.split_passthrough(given)


def test_null_and_whole_numbers_are_megatrons() -> None:
    given = {"overlap_grad_reduce": True, "bucket_size": None, "adam_eps": 1, "recompute_modules": ["mlp"]}
    assert model.split_passthrough(given)[1] == {"adam_eps": 1}
