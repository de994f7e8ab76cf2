"""What dapo eval refuses of a model: by the table of names, by the engine, by servers of another model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo import assemble
from dapo.assemble import _check_served, _own_fields, _weights, enter, evaluate_models, make_sampler
from dapo.config import Config, ConfigError, Engine
from dapo.engine.embedded import EmbeddedEngine
from dapo.mesh import set_gpu_environment
from dapo.model.tokenizer import load_tokenizer
from tests.conftest import make_config

BASE = Path(__file__).parents[2] / "examples/arithmetic/base"
NORM = "model.norm.weight"


def changed(directory: Path, tensors: dict[str, torch.Tensor | None] | None = None, **fields: object) -> Path:
    """A copy of the base policy with other tensors, None: without, and other fields of config.json."""
    shutil.copytree(BASE, directory)
    weights = load_file(directory / "model.safetensors") | (tensors or {})
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def load(model: Path) -> None:
    """Load a model as dapo eval does."""
    engine = EmbeddedEngine(model, torch.float32, torch.device("cpu"), 8)
    engine.load_weights(_weights(model), version=0)


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lm_head.weight": torch.ones(25, 64)}, "lm_head.weight is not model.em"),
        ({"odd.weight": torch.ones(2)}, "odd.weight"),
        ({NORM: None}, f"1 tensors are missing, first {NORM}"),
        ({NORM: torch.ones(65)}, f"{NORM} has shape (65,)"),
    ],
)
def test_weights_that_do_not_fit_are_not_evaluated(
    tmp_path: Path, tensors: dict[str, torch.Tensor | None], said: str, is_known: bool
) -> None:
    """Of a model that cannot be trained here no table has the names: the engine refuses what has no place."""
    fields = {} if is_known else {"logit_softcapping": 30.0}
    with pytest.raises(ConfigError) as error:
        load(changed(tmp_path / "model", tensors, **fields))
    assert said in str(error.value) and str(tmp_path / "model") in str(error.value)


@pytest.mark.parametrize("fields", [{}, {"logit_softcapping": 30.0}])
def test_weights_that_fit_are_evaluated_whether_the_model_can_be_trained_or_not(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    load(changed(tmp_path / "model", **fields))


def test_a_model_that_the_engine_cannot_build_is_refused_in_one_line(tmp_path: Path) -> None:
    model = changed(tmp_path / "model", model_type="mystery")
    with pytest.raises(ConfigError, match=r"engine.kind=embedded cannot build it: .*mystery") as error:
        load(model)
    assert "\n" not in str(error.value)


def test_servers_of_another_model_are_not_sent_weights_that_mean_something_else(tmp_path: Path) -> None:
    _check_served(BASE, changed(tmp_path / "same", dtype="bfloat16", use_cache=False))
    larger = changed(tmp_path / "larger", vocab_size=40, rms_norm_eps=1e-5)
    with pytest.raises(ConfigError, match=r"larger differs from .* in rms_norm_eps, vocab_size:"):
        _check_served(BASE, larger)
    other_end = changed(tmp_path / "other_end", eos_token_id=7)
    with pytest.raises(ConfigError, match="in stop tokens: evaluate it on servers of its own"):
        _check_served(BASE, other_end)


MAIN: Any = SimpleNamespace(
    is_main=True,
    check_same=lambda values, remedy: None,
    on_main=lambda function, *args: function(*args),
    on_main_only=lambda make: make(),
    device=torch.device("cpu"),
)


def train(config: Config) -> None:
    """Do what `dapo train` does on the main rank before the policy is built."""
    with ExitStack() as opened:
        enter(config, MAIN, opened)
        make_sampler(config, MAIN)


def test_servers_on_the_trainers_gpus_cannot_generate_while_it_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    engine = SimpleNamespace(is_colocated=True, close=lambda: closed.append(True))
    monkeypatch.setattr(assemble, "make_engine", lambda *arguments: engine)
    mesh = SimpleNamespace(**vars(MAIN), data=1)
    data = BASE.parent / "data/train.jsonl"
    options = f"policy.model={BASE}", f"data.train={data}", "reward.workers=0", "data.max_prompt_length=16"
    for staleness in (0, 2):
        config = make_config(tmp_path, *options, f"rollout.max_staleness={staleness}")
        if not staleness:
            make_sampler(config, mesh)  # type: ignore[arg-type]
            continue
        with pytest.raises(
            ConfigError, match=r"^rollout.max_staleness=2: the servers share the trainer's GPUs"
        ):
            make_sampler(config, mesh)  # type: ignore[arg-type]
    assert closed == [True]


def evaluate(config: Config) -> None:
    evaluate_models(config, MAIN, [config.policy.model])


@pytest.mark.parametrize("command", [train, evaluate])
@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"max_position_embeddings": 47}, "=32 are 48 positions, and policy.model="),
        ({"vocab_size": 20}, "config.json a vocab_size of 20: use the model's own tokenizer"),
    ],
)
def test_a_model_too_short_or_of_fewer_tokens_is_refused(
    command: Callable[[Config], None], field: dict[str, int], said: str, tmp_path: Path
) -> None:
    weights = {"model.embed_tokens.weight": torch.ones(20, 64)} if "vocab_size" in field else None
    model = changed(tmp_path / "other", weights, **field)
    data = BASE.parent / "data/heldout.jsonl"
    config = make_config(tmp_path, f"policy.model={model}", f"eval.data={data}", f"data.train={data}")
    with pytest.raises(ConfigError) as error:
        command(config)
    assert said in str(error.value)


def test_a_metric_that_evaluation_will_not_have_is_refused_at_start(tmp_path: Path) -> None:
    data = BASE.parent / "data/heldout.jsonl"
    files = [f"policy.model={BASE}", f"eval.data={data}", f"data.train={data}"]
    config = make_config(tmp_path, *files, "run.keep_best=eval/aime/mean", "reward.workers=0")
    said = "run.keep_best=eval/aime/mean: expected one of eval/accuracy, eval/heldout/mean, eval/heldout/maj"
    with pytest.raises(ConfigError, match=said):
        train(config)
    assert not (tmp_path / "run").exists()


def test_what_is_the_models_own_is_known_of_it() -> None:
    fields = _own_fields(BASE, load_tokenizer(BASE))
    assert fields["vocab_size"] == 25 and fields["stop_ids"]


def test_the_vocabulary_of_a_model_with_a_vision_tower_is_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 1, "text_config": {"vocab_size": 25}}')
    assert _own_fields(tmp_path, load_tokenizer(BASE))["vocab_size"] == 25


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (None, None),
        (Engine(kind="sglang", weight_sync="broadcast"), "0"),
        (Engine(kind="sglang", weight_sync="tensor"), None),
        (Engine(kind="embedded", weight_sync="broadcast"), None),
    ],
)
def test_only_a_run_that_broadcasts_to_servers_changes_how_nccl_allocates(
    engine: Engine | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Any = engine and SimpleNamespace(engine=engine, run=SimpleNamespace(deterministic=False))
    monkeypatch.setattr(os, "environ", {})
    set_gpu_environment(config)
    assert os.environ.get("NCCL_CUMEM_ENABLE") == expected
    os.environ["NCCL_CUMEM_ENABLE"] = "1"
    set_gpu_environment(config)
    assert os.environ["NCCL_CUMEM_ENABLE"] == "1", "what is there already stays"
