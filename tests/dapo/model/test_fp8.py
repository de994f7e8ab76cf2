"""FP8: which settings are refused, what a plan counts of it, and that packs are padded for it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest

from dapo.config import ConfigError
from dapo.learn.batch import Batch
from dapo.model.families import read_shape
from dapo.plan.plan import Plan
from dapo.policy import model
from tests.batches import plan as plan_batch
from tests.conftest import make_config
from tests.dapo.learn.test_batch import random_groups
from tests.dapo.model.models import plan_of, write_model

HYBRID, RECIPE = "policy.megatron.fp8=hybrid", "policy.megatron.fp8_recipe"
FP8 = [HYBRID, f"{RECIPE}=tensorwise"]


def of_7b(folder: Path, *overrides: str, gpu: str = "h100", te: bool = True) -> Plan:
    return plan_of(folder, "Qwen2.5-7B", "parallel.tensor=4", *overrides, gpu=gpu, world=8, te=te)


@pytest.mark.parametrize(
    ("overrides", "gpu", "te", "says"),
    [
        ([HYBRID], "h100", True, f"{RECIPE}=delayed: use one of tensorwise, blockwise, mxfp8, whose scales"),
        ([HYBRID, f"{RECIPE}=custom"], "h100", True, f"{RECIPE}=custom: use one of"),
        ([*FP8, "policy.megatron.fp8=e5m2"], "h100", True, "policy.megatron.fp8=e5m2: use e4m3 or hybrid"),
        ([*FP8, "policy.megatron.fp8=true"], "h100", True, "fp8=True: input should be a valid string"),
        ([*FP8, "policy.dtype=float32"], "h100", True, "policy.megatron.fp8 wants policy.dtype=bfloat16"),
        (FP8, "a100", True, f"{RECIPE}=tensorwise: A100 80GB has no FP8"),
        ([HYBRID, f"{RECIPE}=mxfp8"], "h100", True, f"{RECIPE}=mxfp8: H100 80GB has tensorwise, blockwise"),
        (FP8, "h100", False, "wants Transformer Engine's layers: plan with --transformer-engine"),
        ([*FP8, "policy.megatron.fp8_param=true"], "h100", True, "fp8_param cannot be set: the parameters"),
        ([*FP8, "policy.megatron.fp8_margin=1"], "h100", True, "fp8_margin cannot be set: it belongs to"),
        (["policy.megatron.fp4=e2m1"], "b200", True, "fp4 cannot be set: gradients would be rounded"),
    ],
)
def test_fp8_that_cannot_be_is_refused_in_one_line(
    overrides: list[str], gpu: str, te: bool, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as refused:
        of_7b(tmp_path, *overrides, gpu=gpu, te=te)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("recipe", "is_refused"), [("tensorwise", False), ("blockwise", True)])
def test_a_matrix_that_a_recipe_cannot_cut_into_blocks_is_refused(
    recipe: str, is_refused: bool, tmp_path: Path
) -> None:
    said = "fp8_recipe=blockwise: columns of heads on a rank, 448, are no multiple of 128"
    with pytest.raises(ConfigError, match=said) if is_refused else contextlib.nullcontext():
        plan_of(tmp_path, "Qwen2.5-0.5B", "parallel.tensor=2", HYBRID, f"{RECIPE}={recipe}", te=True)


def test_training_without_transformer_engine_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m", "Qwen2.5-7B")
    config = make_config(tmp_path, f"policy.model={tmp_path / 'm'}", "policy.dtype=bfloat16", *FP8)
    said = "fp8=hybrid with fp8_recipe=tensorwise wants a GPU and Transformer Engine's layers: install it"
    with pytest.raises(ConfigError, match=said):
        model.transformer_config(read_shape(tmp_path / "m"), config)


def test_fp8_takes_less_for_activations_more_for_weights_and_half_the_matrices_time(tmp_path: Path) -> None:
    plain, fp8 = of_7b(tmp_path), of_7b(tmp_path, *FP8)
    one, other = plain.worst, fp8.worst
    tables = 2 * 152064 // 4 * 3584
    assert other.params == one.params + 2 * (one.parameters - tables)
    # a byte less for each value of two norms' outputs and of the MLP's product
    saved = 28 * other.tokens * (2 * 3584 + 18944) // 4
    assert one.kept - other.kept == pytest.approx(saved, rel=1e-6)
    assert plain.time.update / 2 < fp8.time.update < 0.75 * plain.time.update
    assert plain.time.scores / 2 < fp8.time.scores < 0.75 * plain.time.scores


def test_experts_in_fp8_are_counted(tmp_path: Path) -> None:
    layout = ["parallel.tensor=4", "parallel.expert=8"]
    one, other = (
        plan_of(tmp_path, "Qwen3-30B-A3B", *layout, *fields, world=16, te=True).worst for fields in ([], FP8)
    )
    assert other.kept < one.kept and other.params > one.params + 2 * one.expert_parameters


@pytest.mark.parametrize(("recipe", "multiple"), [("tensorwise", 16), ("mxfp8", 32), ("blockwise", 128)])
@pytest.mark.parametrize("layout", [["parallel.tensor=2"], ["parallel.context=2"]])
def test_packs_are_padded_to_what_a_matrix_product_in_fp8_takes(
    recipe: str, multiple: int, layout: list[str], tmp_path: Path
) -> None:
    options = [*layout, "rollout.prompts_per_step=6", "rollout.prompts_per_round=6"]
    options += ["optim.prompts_per_minibatch=6", "policy.tokens_per_microbatch=200"]
    config, groups = make_config(tmp_path, *options, HYBRID, f"{RECIPE}={recipe}"), random_groups(6)
    multiple *= config.parallel.tensor
    assert all(n % multiple == 0 for n in lengths(plan_batch(groups, config, 2, {})))
    assert any(n % multiple for n in lengths(plan_batch(groups, make_config(tmp_path, *options), 2, {})))


def lengths(shards: list[Batch[np.ndarray]]) -> list[int]:
    """Return the number of tokens of every rank's every microbatch."""
    return [len(m.tokens) for shard in shards for minibatch in shard.minibatches for m in minibatch]
