"""What `dapo plan` counts, against what is known of real models; what it refuses, and what it advises.
Activations: tests/distributed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dapo import config
from dapo.learn.batch import BYTES_PER_TOKEN
from dapo.model.families import read_shape
from dapo.model.parameters import active_parameters, expert_parameters, stage_parameters
from dapo.model.shape import LayerKind
from dapo.plan.activations import DELTA_CHUNK
from dapo.plan.advice import Plan, remedies
from dapo.plan.memory import BATCH_BYTES, CHUNK_BYTES, GIB, Rank
from dapo.plan.plan import describe, make_plan
from dapo.plan.time import HARDWARE, forward_flops, mixing
from dapo.policy.delta_rule import CHUNK, chunk_gated_delta_rule
from tests.dapo.model.models import plan_of, write_model

ROOT = Path(__file__).parents[3]
PAPER = ROOT / "examples/qwen2.5_32b_paper/config.yaml"
EXPERTS = ROOT / "examples/qwen3_30b_a3b/config.yaml"


def test_the_constants_are_those_of_the_kernels_and_of_the_batch() -> None:
    from dapo_kernels import linear_policy_loss  # noqa: F401  # the module hides behind the function of its name

    kernels = sys.modules["dapo_kernels.linear_policy_loss"]
    assert CHUNK_BYTES["cpu"] == kernels.CPU_CHUNK_BYTES
    assert CHUNK_BYTES["cuda"] == CHUNK_BYTES["transformer_engine"] == kernels.GPU_CHUNK_BYTES
    assert BATCH_BYTES == BYTES_PER_TOKEN


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
    assert turns.time.microbatches % 4 == 0 and turns.stages[0].microbatches % 4 == 0
    assert turns.time.update < staged.time.update, "less waiting"
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
    assert one.expert_copies == 16 and eight.expert_copies == 2, (
        "tensor ranks have whole experts, so they split their optimizer's state"
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
    least = 6 * (active - 151936 * 2048) * plan.time.tokens / (16 * 312e12 * HARDWARE["a100"].mfu)
    assert 1.6 * least < plan.time.update < 1.8 * least, (
        "attention over 11,264 tokens costs 0.7 of the matrices"
    )


def test_memory_follows_the_layers_of_each_stage(tmp_path: Path) -> None:
    """Qwen3-Next has attention in every fourth layer: of sixteen stages of three, in none of every fourth."""

    def plan(*overrides: str) -> Plan:
        options = "parallel.tensor=2", "parallel.expert=2", *overrides
        return plan_of(tmp_path, "Qwen3-Next-80B-A3B", *options, world=256, te=True)

    whole, staged = plan().worst, plan("parallel.pipeline=16")
    assert sum(rank.parameters for rank in staged.stages) == whole.parameters
    first, second, third = staged.stages[:3]
    assert first.shape.kinds(first.chunks[0])[LayerKind(is_delta=True, has_experts=True)] == 3
    assert first.kept > second.kept == third.kept, "a DeltaNet keeps more than attention"
    assert sum(rank.kept for rank in staged.stages) == pytest.approx(whole.kept, rel=0.02)
    assert "3 of 48 layers (3 with a DeltaNet, 0 with attention on stage 0)" in describe(staged)[2]
    full = [f"policy.megatron.recompute_{x}" for x in ("granularity=full", "method=uniform", "num_layers=3")]
    recomputed = plan("parallel.pipeline=16", *full).stages
    assert recomputed[0].kept == recomputed[1].kept < first.kept / 10
    assert recomputed[0].working - first.working == pytest.approx(3 * layer_bytes(first), rel=1e-6)
    attention = "policy.megatron.recompute_granularity=selective"
    fewer = plan("parallel.pipeline=16", attention).stages
    assert fewer[0].kept == first.kept and fewer[1].kept < second.kept, "a DeltaNet is not recomputed"


def layer_bytes(rank: Rank) -> float:
    [layer] = rank.layers.values()
    return layer.everything * rank.tokens


def test_where_some_layers_have_experts_both_modules_are_recomputed(tmp_path: Path) -> None:
    def plan(*overrides: str) -> Plan:
        options = "parallel.tensor=8", "parallel.expert=64", "policy.tokens_per_microbatch=22528", *overrides
        return plan_of(tmp_path, "DeepSeek-V3", *options, gpu="b200", world=256, te=True)

    def kept(modules: str) -> int:
        selective = "recompute_granularity=selective", f"recompute_modules=[{modules}]"
        return plan(*(f"policy.megatron.{field}" for field in selective)).worst.kept

    everything = plan()
    assert "61 of 61 layers (3 with an MLP, 58 with experts)" in describe(everything)[2]
    dense, sparse = everything.worst.kept - kept("mlp"), everything.worst.kept - kept("moe")
    assert 0 < dense < sparse / 10 and everything.worst.kept - kept("moe,mlp") == dense + sparse
    found = [text for text, _ in remedies(everything)]
    assert any("recompute_modules=[moe,mlp]" in text for text in found), found


def test_only_layers_with_attention_cost_more_in_longer_sequences(tmp_path: Path) -> None:
    shape = read_shape(write_model(tmp_path, "Qwen3-Next-80B-A3B"))
    more = forward_flops(shape, 2000) - forward_flops(shape, 1000)
    assert more == 2 * 12 * 1000 * 16 * 256
    latent = read_shape(write_model(tmp_path, "DeepSeek-V3"))
    more = forward_flops(latent, 2000) - forward_flops(latent, 1000)
    assert more == 2 * 61 * 500 * 128 * (192 + 128), "a query with keys, a score with values"


def test_a_deltanet_s_flops_are_those_of_its_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of the plain rule are counted as it runs; torch does not count those of `solve`."""
    shape = read_shape(write_model(tmp_path, "Qwen3-Next-80B-A3B"))
    delta = shape.delta
    assert delta
    heads, k, v, length, chunk = delta.num_value_heads, delta.key_dim, delta.value_dim, 64, CHUNK
    assert DELTA_CHUNK["cpu"] == chunk
    q, key, value = (torch.randn(1, length, heads, d) for d in (k, k, v))
    with FlopCounterMode(display=False) as counter:
        decay, beta = -torch.rand(1, length, heads), torch.rand(1, length, heads)
        chunk_gated_delta_rule(q, key / 100, value, decay, beta)
    monkeypatch.setitem(DELTA_CHUNK, "transformer_engine", chunk)
    uncounted = heads * chunk * (k + v) / 2 + delta.conv_width * (2 * delta.keys + delta.values)
    per_token = 2 * (mixing(shape, LayerKind(is_delta=True, has_experts=True), length) - uncounted)
    assert counter.get_total_flops() == length * per_token


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


def test_a_mixture_of_experts_that_does_not_fit_is_advised_to_spread_them(tmp_path: Path) -> None:
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
        ).time.update

    assert seconds() > seconds(world=16) > seconds(world=16, gpu="b200")
    full = ("granularity=full", "method=uniform", "num_layers=1")
    assert 1.25 < seconds(*(f"policy.megatron.recompute_{field}" for field in full)) / seconds() < 1.34
    # 6 flops a parameter and token are the larger part
    plan = plan_of(tmp_path, "Qwen2.5-7B", "parallel.tensor=4", gpu="a100", world=8)
    least = 6 * 7.07e9 * plan.time.tokens / (8 * 312e12 * HARDWARE["a100"].mfu)
    assert least < plan.time.update < 1.4 * least


def test_what_is_not_counted_is_said(tmp_path: Path) -> None:
    overrides = [
        "parallel.tensor=4",
        "policy.megatron.activation_func_fp8_input_store=true",
        "policy.megatron.adam_eps=1e-6",
        "policy.dtype=float32",
    ]
    plan = plan_of(tmp_path, "Qwen2.5-7B", *overrides, world=4096)
    first, second, third = (line for line in describe(plan) if line.startswith("note"))
    assert "policy.megatron.activation_func_fp8_input_store is not counted" in first
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
        sum(stage_parameters(shape, 4, pipeline, pipeline - 1))
        + expert_parameters(shape, pipeline, 8, pipeline - 1)
        for pipeline in (1, 2)
    ]
    first = sum(stage_parameters(shape, 4, 2, 0)) + expert_parameters(shape, 2, 8, 0)
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


def test_routes_are_counted_on_every_stage_and_on_the_main_rank(tmp_path: Path) -> None:
    """A byte for each of a token's 8 experts in each of 48 layers; 20,480 + 2,048 tokens of 8,192 samples."""
    layout = ["parallel.pipeline=2", "parallel.tensor=4"]

    def stage(replay: str, *more: str) -> Rank:
        options = [f"policy.routing_replay={replay}", *layout, *more]
        return plan_of(tmp_path, "Qwen3-30B-A3B", *options, world=16).stages[1]

    tokens = 8192 // 2 * (20_480 + 2_048)
    for replay in ("old", "rollout"):
        assert stage(replay).batch - stage("off").batch == 24 * 8 * tokens // 4
    shared = stage("rollout", "parallel.context=2").batch - stage("off", "parallel.context=2").batch
    assert shared == 24 * 8 * tokens // 4, "half of the tokens, of twice as many samples"
    assert stage("rollout").sampled_routes == 48 * 8 * 2 * tokens and stage("old").sampled_routes == 0
    lines = describe(plan_of(tmp_path, "Qwen3-30B-A3B", "policy.routing_replay=rollout", *layout, world=16))
    assert any("66.0 GiB of the main rank's main memory, 8.2 MiB each" in line for line in lines)


def test_the_command_ends_with_1_where_memory_runs_out_and_with_2_where_the_layout_is_wrong(
    tmp_path: Path,
) -> None:
    model = write_model(tmp_path, "Qwen2.5-32B")
    for override, status, expected in (
        ("parallel.tensor=1", 1, "out of memory"),
        ("parallel.tensor=16", 2, "error: parallel.tensor=16 does not divide"),
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
        assert done.returncode == status
        assert expected in done.stdout + done.stderr
