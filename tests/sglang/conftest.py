"""One real SGLang server for all tests of a session: a random Qwen2 of two layers in fp32. It takes a minute
or two to start.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dapo.config import Config
from dapo.engine.arguments import known_arguments
from dapo.engine.control import KEY_VARIABLE, Server
from dapo.engine.fleet import Fleet, make_servers
from tests.sglang.environment.build import build

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "fake"
HIDDEN = Path(__file__).parent / "environment/hidden"
BASE = ROOT / "examples/arithmetic/base"
VOCAB = 64  # the tokenizer knows 25 of them
# config.json of a model that is only read, never built
QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class RunningServer:
    """`server` makes control calls, with the key. Its weights are those in `model`: a test that loads others
    loads these again.
    """

    url: str
    model: Path
    server: Server
    config: Config


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """The Python that has SGLang, made where it is missing."""
    if sys.platform != "linux":
        pytest.skip("SGLang runs on Linux")
    return build()


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture(scope="session")
def sglang_server(
    sglang_python: Path, random_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    config = server_config(tmp_path_factory.mktemp("sglang"), random_model, python=str(sglang_python))
    servers = make_servers(config, say=lambda text: print(text, file=sys.stderr))
    try:
        servers.wait()
        [server] = servers.workers
        yield RunningServer(server.url, random_model, server, config)
    finally:
        servers.close()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for a run, whose servers are the stand-in's; it serves as their model, too."""
    # a Transformer Engine without its compiled part ends real servers, and they are refused
    path = [str(FAKE), str(HIDDEN), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    known_arguments.cache_clear()
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    return tmp_path


@pytest.fixture
def start(fake: Path) -> Iterator[Callable[..., Fleet]]:
    """Servers by options of the section engine, stopped in the end."""
    started = []

    def start(said: list[str] | None = None, **engine: Any) -> Fleet:
        started.append(
            make_servers(server_config(fake, fake, **engine), say=(said if said is not None else []).append)
        )
        return started[-1]

    yield start
    for each in started:
        each.close()


def make_model(folder: Path, num_experts: int = 0) -> Path:
    """In a Hugging Face directory, with the arithmetic example's tokenizer: biases and norms matter, and so
    does every weight.

    A Qwen2; with experts a Qwen3-MoE.
    """
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(BASE / name, folder)
    torch.manual_seed(5)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    common: dict[str, Any] = shape | dict(
        vocab_size=VOCAB,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    experts: dict[str, Any] = dict(
        head_dim=16,
        num_experts=num_experts,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    )
    model = (
        transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**common, **experts))
        if num_experts
        else transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common))
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.1 * torch.randn_like(weight))
            else:
                weight.normal_(0, 0.3 if "bias" in name else 0.1)
    model.generation_config = transformers.GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    return folder


def server_config(folder: Path, model: Path, replay: str = "off", **engine: Any) -> Config:
    """A run in `folder` whose engine is SGLang: `server_config(tmp_path, model, servers=2)`."""
    return Config.model_validate(
        {
            "run": {"dir": folder / "run"},
            "data": {"train": folder / "train.jsonl", "max_prompt_length": 256},
            "rollout": {"max_response_length": 256},
            "policy": {"model": model, "dtype": "float32", "routing_replay": replay},
            "engine": {"kind": "sglang", "max_concurrent": 64, **engine},
        }
    )
