"""A trainer on several ranks sends its weights to a running server by each transport, and checks what the
server generates with them.

torchrun --nproc-per-node 2 -m tests.sglang.sync URL MODEL OUT.json: the main rank writes what it measured.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

from dapo import config as configs
from dapo.engine.control import Server
from dapo.engine.weight_sync import WeightSync, make_sync
from dapo.mesh import Mesh
from dapo.policy.megatron import Policy
from dapo.policy.weight_files import open_weights
from dapo.sampler import Sampler

NUM_REQUESTS = 64  # at once
BUCKET = 40_000  # bytes: many of them


class OnlyWeights:
    """As much of Rollouts as a sync needs."""

    def __init__(self, weights: WeightSync):
        self.prepare_weights, self.load_weights = weights.prepare, weights.load
        self.engine = SimpleNamespace(is_colocated=True)


def generate(server: Server, prompt: list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": max_tokens, "temperature": 1.0, "ignore_eos": True}
    return server.post(
        "/generate",
        {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True} | more,
        timeout=120,
    )


def make_variant(model: Path, directory: Path, seed: int) -> Path:
    """The same architecture with other weights."""
    torch.manual_seed(seed)
    hf = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for weight in hf.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    hf.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((model / name).read_bytes())
    return directory


@torch.no_grad()
def logprobs(hf: Any, prompt: list[int], response: list[int]) -> np.ndarray:
    """float64 [n] of the response's tokens."""
    logits = hf(torch.tensor([prompt + response[:-1]])).logits[0, len(prompt) - 1 :]
    return logits.double().log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0].numpy()


def gap(hf: Any, prompt: list[int], answer: dict[str, Any]) -> float:
    """Largest difference between a response's log-probs as the server reports them and the model's."""
    reported = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    return float(np.abs(np.array(reported) - logprobs(hf, prompt, answer["output_ids"])).max())


def load(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def measure(server: Server, directory: Path, vocab: int) -> dict[str, Any]:
    hf, rng = load(directory), np.random.default_rng(1)
    prompts = [rng.integers(2, vocab, rng.integers(2, 20)).tolist() for _ in range(NUM_REQUESTS)]
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        answers = list(pool.map(lambda prompt: generate(server, prompt, 24), prompts))
    versions = {tuple(v.items()) for answer in answers for v in answer["meta_info"]["weight_versions"]}
    return {
        "gap": max(gap(hf, p, a) for p, a in zip(prompts, answers, strict=True)),
        "versions": [dict(v) for v in versions],
    }


def main(url: str, model: str, out: str) -> None:
    torch.set_num_threads(1)
    folder = Path(out).parent
    has_experts = "num_experts_per_tok" in json.loads((Path(model) / "config.json").read_text())
    parallel = configs.Parallel(tensor=2, expert=2 if has_experts else 1)
    mesh = Mesh(parallel)
    variants = [folder / f"variant-{i}" for i in range(4)]
    mesh.on_main(
        lambda: [make_variant(Path(model), variant, seed) for seed, variant in enumerate(variants)] and None
    )
    config = configs.Config(
        run=configs.Run(dir=folder / "run"),
        data=configs.Data(train=folder / "none"),
        parallel=parallel,
        policy=configs.Policy(model=variants[0], dtype="float32"),
    )
    policy, server = Policy(config, mesh), Server(url)
    vocab = policy.shape.vocab_size
    results = []
    for i, kind in enumerate(["disk", "tensor", "broadcast", "broadcast"]):
        policy._weights.load(open_weights(variants[i], policy.shape))
        weights = make_sync(
            kind,  # type: ignore[arg-type]
            lambda: [server],
            bucket_bytes=BUCKET,
            device=mesh.device,
            directory=folder / "weights",
            model=variants[0],
            verify=True,
            timeout=60,
        )
        before = mesh.on_main(measure, server, variants[i], vocab)
        rollouts: Any = OnlyWeights(weights) if mesh.is_main else None
        Sampler(config, mesh, rollouts, {}).load_weights(policy, version=100 + i)
        after = mesh.on_main(measure, server, variants[i], vocab)
        results.append(
            {"name": f"{kind}-{i}", "kind": kind, "version": 100 + i, "before": before, "after": after}
        )
        mesh.on_main(weights.close)
    if mesh.is_main:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
