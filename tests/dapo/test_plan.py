"""What `dapo plan` counts, against what is known of real models; what it refuses, and what it advises. Activations: tests/distributed."""

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
from dapo.memory import BATCH_BYTES, CHUNK_BYTES, Rank, num_parameters, stage_parameters
from dapo.plan import GIB, HARDWARE, Plan, describe, make_plan, remedies
from dapo.shape import ModelShape, padded_vocab, read_shape

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples/qwen2.5_32b_paper/config.yaml"


def sizes(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return dict(zip(names, (hidden, ffn, layers, heads, kv, vocab), strict=True)) | {"tie_word_embeddings": False} | more


MODELS = {  # config.json as published, and the parameters that its weights hold
    "Qwen2.5-0.5B": (sizes(896, 4864, 24, 14, 2, 151936, model_type="qwen2", tie_word_embeddings=True), 494_032_768),
    "Qwen2.5-7B": (sizes(3584, 18944, 28, 28, 4, 152064, model_type="qwen2", use_mrope=False, sliding_window=131072), 7_615_616_512),
    "Qwen2.5-32B": (sizes(5120, 27648, 64, 40, 8, 152064, model_type="qwen2", max_window_layers=64), 32_763_876_352),
    "Qwen3-8B": (sizes(4096, 12288, 36, 32, 8, 151936, model_type="qwen3", head_dim=128, attention_bias=False), 8_190_735_360),
    "Llama-3-8B": (sizes(4096, 14336, 32, 32, 8, 128256, model_type="llama", rope_theta=500000.0, rope_scaling=None), 8_030_261_248),
    "Mistral-Nemo": (sizes(5120, 14336, 40, 32, 8, 131072, model_type="mistral", head_dim=128, sliding_window=None), 12_247_782_400),
}
LAYERS = ["full_attention", "sliding_attention"]


def write_model(directory: Path, name: str, **changed: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODELS[name][0] | changed))
    return directory


def plan_of(folder: Path, model: str, *overrides: str, gpu: str = "h100", world: int | None = None, te: bool = False) -> Plan:
    path = folder / "run.yaml"
    path.write_text(
        f"run: {{dir: r}}\ndata: {{train: t}}\npolicy: {{model: {write_model(folder / model, model)}}}\nengine: {{kind: sglang}}\n"
    )
    return make_plan(config.load(path, list(overrides)), gpu, world, has_te=te)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_real_models(name: str, tmp_path: Path) -> None:
    assert num_parameters(read_shape(write_model(tmp_path, name))) == MODELS[name][1]


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen3-8B", "Llama-3-8B"])
def test_all_ranks_together_hold_the_whole_model_once(name: str, layout: tuple[int, int], tmp_path: Path) -> None:
    """But for what is meant to be there more often: padding, a tied head of its own on the last stage."""
    tensor, pipeline = layout
    shape = read_shape(write_model(tmp_path, name))
    stages = [stage_parameters(shape, tensor, pipeline, stage) for stage in range(pipeline)]
    held = sum(tensor * split + whole for split, whole in stages)
    padding = (padded_vocab(shape, tensor) - shape.vocab_size) * shape.hidden_size
    copies = padded_vocab(shape, tensor) * shape.hidden_size if shape.is_tied and pipeline > 1 else 0
    assert held - copies - padding * (1 if shape.is_tied else 2) == num_parameters(shape)


def hf_shape(directory: Path) -> ModelShape:
    """As Hugging Face reads the same file."""
    hf = transformers.AutoConfig.from_pretrained(directory)
    return ModelShape(
        hf.model_type, hf.vocab_size, hf.hidden_size, hf.intermediate_size, hf.num_hidden_layers, hf.num_attention_heads,
        hf.num_key_value_heads, getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads, hf.rms_norm_eps,
        hf.rope_parameters["rope_theta"], hf.tie_word_embeddings,
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
            {"model_type": "qwen3_moe", "num_experts": 128},
            "model_type 'qwen3_moe' is not supported; supported: qwen2, qwen3, llama, mistral",
        ),
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
        ({"layer_types": LAYERS * 14}, "layer_types ['full_attention', 'sliding_attention'] are not supported"),
        ({"use_mrope": True}, "use_mrope=True is not supported"),
        ({"model_type": "mistral"}, "sliding_window=131072 is not supported; supported: null"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type yarn wants the field 'original_max_position_embeddings'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type yarn wants the field 'factor'"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_shape(write_model(tmp_path, "Qwen2.5-7B", **changed))


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["parallel.tensor=3"], None, "parallel.tensor=3 does not divide the model's num_attention_heads=28; parallel.tensor=3 does not "
                                      "divide the model's num_key_value_heads=4; parallel.tensor=3 does not divide the model's "
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

    from dapo.batch import build

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
    assert abs(split.activations / whole.activations - 1 / 4) < 0.02  # sequence parallelism: all but cos and sin
    assert worst("parallel.tensor=1", world=4).optimizer == whole.optimizer // 4
    assert worst("parallel.tensor=1", world=4).grads == whole.grads
    staged = plan_of(tmp_path, "Qwen2.5-7B", "parallel.tensor=1", "parallel.pipeline=4")
    assert [rank.in_flight for rank in staged.stages] == [4, 3, 2, 1]
    assert sum(rank.parameters for rank in staged.stages) == whole.parameters
    shared = worst("parallel.tensor=4", "parallel.context=2")
    assert shared.optimizer == split.optimizer // 2 and shared.grads == split.grads
    assert shared.tokens == split.tokens // 2 and shared.kept < 0.55 * split.kept, "half, and the other half's keys and values"
    turns = plan_of(tmp_path, "Qwen2.5-7B", "parallel.tensor=1", "parallel.pipeline=4", "parallel.virtual_pipeline=7")
    assert [rank.in_flight for rank in turns.stages] == [31, 29, 27, 25], "of a seventh of the stage's layers each"
    assert [rank.parameters for rank in turns.stages] == [rank.parameters for rank in staged.stages]
    assert turns.microbatches % 4 == 0 and turns.stages[0].microbatches % 4 == 0
    assert turns.update_seconds < staged.update_seconds, "less waiting"
    assert 1.9 < worst("parallel.tensor=4", "policy.tokens_per_microbatch=65536").kept / split.kept < 2.1
    offload = ("optimizer_cpu_offload=true", "optimizer_offload_fraction=1.0", "use_precision_aware_optimizer=true")
    assert worst("parallel.tensor=4", *(f"policy.megatron.{field}" for field in offload)).optimizer == 0 < split.optimizer


def test_an_out_of_memory_case_names_what_makes_it_fit_and_it_does(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "Qwen2.5-32B", "parallel.pipeline=2", gpu="h800", world=128)
    assert not plan.fits
    lines = describe(plan)
    assert any(re.match(r"out of memory during a layer's backward pass on stage 0: \d+\.\d GiB too much", line) for line in lines)
    first = next(line for line in lines if line.startswith("fits with "))
    overrides = first.removeprefix("fits with ").partition(":")[0].split()
    assert overrides == ["policy.megatron.recompute_granularity=selective", "policy.megatron.recompute_modules=[mlp]"]
    changed = plan_of(tmp_path, "Qwen2.5-32B", "parallel.pipeline=2", *overrides, gpu="h800", world=128)
    assert changed.fits
    assert changed.worst.peak / GIB < plan.room < plan.worst.peak / GIB


def test_where_no_single_change_is_enough_several_are_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "Qwen2.5-32B", "parallel.tensor=2", gpu="h100", world=8)
    found = remedies(plan)
    assert found
    for text, changed in found:
        overrides = [word for word in text.split() if "=" in word]
        again = plan_of(tmp_path, "Qwen2.5-32B", "parallel.tensor=2", *overrides, gpu="h100", world=changed.world)
        assert again.fits
        assert again.worst.peak == changed.worst.peak
    assert all(
        len([word for word in text.split() if "recompute_method" not in word and "num_layers" not in word]) >= 2 for text, _ in found
    )


def test_what_nothing_helps_is_said(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "Qwen2.5-32B", "parallel.tensor=1", gpu="cpu")
    assert not plan.fits
    assert remedies(plan) == []
    assert describe(plan)[-1] == "nothing known makes it fit: another device, or a smaller model"


def test_times_follow_the_hardware_and_the_work(tmp_path: Path) -> None:
    def seconds(*overrides: str, gpu: str = "h100", world: int = 8) -> float:
        return plan_of(tmp_path, "Qwen2.5-7B", "parallel.tensor=4", *overrides, gpu=gpu, world=world).update_seconds

    assert seconds() > seconds(world=16) > seconds(world=16, gpu="b200")
    full = ("granularity=full", "method=uniform", "num_layers=1")
    assert 1.25 < seconds(*(f"policy.megatron.recompute_{field}" for field in full)) / seconds() < 1.34
    # 6 flops a parameter and token are the larger part
    plan = plan_of(tmp_path, "Qwen2.5-7B", "parallel.tensor=4", gpu="a100", world=8)
    least = 6 * 7.07e9 * plan.tokens / (8 * 312e12 * HARDWARE["a100"].mfu)
    assert least < plan.update_seconds < 1.4 * least


def test_what_is_not_counted_is_said(tmp_path: Path) -> None:
    overrides = ["parallel.tensor=4", "policy.megatron.fp8=hybrid", "policy.megatron.adam_eps=1e-6", "policy.dtype=float32"]
    plan = plan_of(tmp_path, "Qwen2.5-7B", *overrides, world=4096)
    first, second, third = (line for line in describe(plan) if line.startswith("note"))
    assert "policy.megatron.fp8 is not counted" in first
    assert "float32 on a GPU" in second
    assert "an update has 512 samples for 1024 data-parallel ranks" in third


def test_the_paper_s_layout_fits_128_gpus_of_80_gb(tmp_path: Path) -> None:
    model = write_model(tmp_path, "Qwen2.5-32B")
    command = [sys.executable, "-X", "importtime", "-m", "dapo", "plan", str(PAPER), f"policy.model={model}"]
    done = subprocess.run([*command, "--gpu", "h800", "--world-size", "128"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-500:]
    assert "32,763,876,352 parameters" in done.stdout
    assert "128 × H800 80GB = tensor 8 × pipeline 2 × data 8" in done.stdout
    assert re.search(r"\nfits: \d+\.\d GiB to spare\n$", done.stdout)
    assert "pydantic" in done.stderr and not re.search(r"\| +(torch|transformers|numpy)\n", done.stderr)


def test_the_paper_s_layout_is_built_on_the_meta_device_as_planned(tmp_path: Path) -> None:
    """All 64 layers: a rank of each stage, as Megatron builds it among 128, has the parameters that the plan counts and the table names."""
    write_model(tmp_path, "Qwen2.5-32B")
    command = [sys.executable, "-m", "tests.dapo.layout_on_meta", str(PAPER), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    shape = read_shape(tmp_path)
    assert json.loads(done.stdout) == [[sum(stage_parameters(shape, 8, 2, stage)) for stage in (0, 1)]] * 2


def test_the_command_ends_with_1_where_memory_runs_out_or_the_layout_is_wrong(tmp_path: Path) -> None:
    model = write_model(tmp_path, "Qwen2.5-32B")
    for override, expected in (("parallel.tensor=1", "out of memory"), ("parallel.tensor=16", "error: parallel.tensor=16 does not divide")):
        command = [sys.executable, "-m", "dapo", "plan", str(PAPER), f"policy.model={model}", override, "--gpu", "h800"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert expected in done.stdout + done.stderr
