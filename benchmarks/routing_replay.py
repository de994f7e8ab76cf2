"""What does routing replay mend, and what does it cost?

python benchmarks/routing_replay.py [noise|bytes, default both]

noise: a small mixture of experts whose engine draws noise onto its routers' logits. Steps without and with
replay by turns: the mismatch as a KL divergence, and CPU seconds, sampling included. bytes: a response of the
paper's length of Qwen3-30B-A3B: on the wire, in the intake process, in the main process, on its way to the
ranks, and on a rank.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from record import ROOT, heading, save, table

from dapo import config as configs
from dapo.engine import generate
from dapo.engine.embedded import EmbeddedEngine
from dapo.learn.advantages import set_advantages
from dapo.learn.batch import shares
from dapo.mesh import Mesh
from dapo.model.routing import Routing
from dapo.model.shape import ModelShape
from dapo.policy.megatron import Policy
from dapo.types import Group, Prompt, Request, Sampling

NOISE = 0.1  # σ on the logits of the engine's routers
PAIRS = 15
PROMPTS, SIZE, LENGTH = 16, 8, 96
PAPER = 512, 20_480  # tokens of prompt and response
QWEN3_30B = ModelShape(
    "qwen3_moe", 151_936, 2048, 6144, 48, 32, 4, 128, 1e-6, 1e6, False,
    num_experts=128, experts_per_token=8, expert_ffn_size=768,
)  # fmt: skip


def make_model(folder: Path) -> Path:
    """Make a Qwen3-MoE of random weights."""
    import transformers

    torch.manual_seed(3)
    sizes: dict[str, Any] = dict(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128,
        norm_topk_prob=True, tie_word_embeddings=False, eos_token_id=1, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0, 0.06)
    model.save_pretrained(folder)
    return folder


def add_noise(engine: EmbeddedEngine) -> None:
    noise = torch.Generator().manual_seed(0)

    def noisy(_: Any, inputs: Any, out: Any) -> Any:
        logits, weights, _ = out
        chosen = (logits + NOISE * torch.randn(logits.shape, generator=noise)).topk(weights.shape[-1]).indices
        weights = logits.softmax(-1).gather(1, chosen)
        return logits, weights / weights.sum(-1, keepdim=True), chosen

    for module in engine.model.modules():
        if type(module).__name__ == "Qwen3MoeTopKRouter":
            module.register_forward_hook(noisy)


def make_policy(folder: Path, model: Path) -> Policy:
    options = configs.Config(
        run=configs.Run(dir=folder),
        data=configs.Data(train=folder / "none", max_prompt_length=16),
        rollout=configs.Rollout(
            prompts_per_step=PROMPTS, group_size=SIZE, prompts_per_round=PROMPTS, max_response_length=LENGTH
        ),
        reward=configs.Reward(soft_overlong_punishment=False),
        optim=configs.Optim(lr=0.0, prompts_per_minibatch=PROMPTS // 4),
        parallel=configs.Parallel(tensor=1),
        policy=configs.Policy(
            model=model, dtype="float32", tokens_per_microbatch=1024, routing_replay="rollout"
        ),
    )
    return Policy(options, Mesh(options.parallel))


@contextmanager
def replaying(policy: Policy, replay: str) -> Iterator[None]:
    """Let the policy be as it is built with this policy.routing_replay."""
    config, routes = policy.config, policy.routes
    assert routes
    routers = [layer.mlp.router for layer in policy.chunks[0].decoder.layers]
    replays = [router.router_replay for router in routers]
    if replay == "off":
        policy.config, policy.routes = config.changed(["policy.routing_replay=off"]), None
        for router in routers:
            router.router_replay = None
    yield
    policy.config, policy.routes = config, routes
    for router, own in zip(routers, replays, strict=True):
        router.router_replay = own


def requests(returns_routes: bool, seed: int) -> list[Request]:
    rng = np.random.default_rng(0)
    sampling = Sampling(1.0, LENGTH, (1,), returns_routes=returns_routes)
    prompts = [Prompt(g, rng.integers(2, 512, 16).astype(np.int32), "") for g in range(PROMPTS)]
    return [
        Request(g, i, prompts[g], 1000 * seed + SIZE * g + i, sampling)
        for g in range(PROMPTS)
        for i in range(SIZE)
    ]


def step(policy: Policy, engine: EmbeddedEngine, seed: int) -> dict[str, float]:
    """Take a step; return its mismatch, and CPU seconds of its parts."""
    replayed = policy.config.policy.routing_replay == "rollout"
    start = time.process_time()
    stream = engine.stream()
    asked = requests(replayed, seed)
    stream.submit(asked)
    samples = sorted(stream.completed(), key=lambda s: (s.group, s.index))
    sampled = time.process_time()
    prompts = {request.group: request.prompt for request in asked}
    groups = [Group(g, prompts[g], [s for s in samples if s.group == g]) for g in range(PROMPTS)]
    for group in groups:
        for i, sample in enumerate(group.samples):
            sample.reward = float(i % 2)
    set_advantages(groups, "group_std")
    routing = Routing(policy.shape) if replayed else None
    [share] = shares(groups, policy.config, 1, {}, routing=routing)
    batch = policy.place(share.batch(policy.config.parallel, 0))
    metrics = policy.score(batch)
    scored = time.process_time()
    for minibatch in batch.minibatches:
        policy.update(minibatch)
    end = time.process_time()
    gaps = [
        (m.scores.old_logprobs - m.behavior_logprobs)[m.loss_mask].double()  # type: ignore[union-attr]
        for minibatch in batch.minibatches
        for m in minibatch
    ]
    gap = torch.cat(gaps)
    return {
        "kl": float((gap.exp() - 1 - gap).mean()),  # of behavior to old, from its own samples
        "mean": metrics["policy/mismatch"],
        "own": metrics.get("policy/mismatch_own_routes", 0.0),
        "differ": metrics.get("policy/routes_differ", 0.0),
        "sampling": sampled - start,
        "scoring": scored - sampled,
        "updates": end - scored,
        "step": end - start,
    }


def noise() -> list[str]:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {"off": [], "rollout": []}
    with tempfile.TemporaryDirectory() as temporary:
        model = make_model(Path(temporary) / "model")
        policy = make_policy(Path(temporary), model)
        routing = Routing(policy.shape)
        engine = EmbeddedEngine(model, torch.float32, torch.device("cpu"), PROMPTS * SIZE, routing)
        add_noise(engine)
        engine.load_weights(policy.weights(), 0)
        for pair in range(PAIRS + 1):
            for replay in sorted(found, reverse=pair % 2 == 1):
                with replaying(policy, replay):
                    row = step(policy, engine, pair)
                if pair:  # the first warms up
                    found[replay].append(row)
                print(pair, replay, json.dumps({k: round(v, 6) for k, v in row.items()}), flush=True)
    rows = []
    for name, shown in (
        ("kl", "KL of engine to policy"), ("mean", "mean distance of log-probs"),
        ("sampling", "CPU s, sampling"), ("scoring", "CPU s, old log-probs"), ("updates", "CPU s, updates"),
        ("step", "CPU s, the step"),
    ):  # fmt: skip
        off, on = ([row[name] for row in found[replay]] for replay in ("off", "rollout"))
        ratios = sorted(y / x for x, y in zip(off, on, strict=True))
        middle = statistics.median(ratios)
        rows.append([shown, f"{statistics.median(off):.3g}", f"{statistics.median(on):.3g}",
                     f"{middle:.3g} ({ratios[0]:.3g} to {ratios[-1]:.3g})"])  # fmt: skip
    last = found["rollout"][-1]
    text = [
        f"## Noise of σ = {NOISE} on the logits of the engine's routers\n",
        f"A Qwen3-MoE of 4 layers with 4 of 16 experts for a token, float32, {PROMPTS * SIZE} responses of "
        f"at most {LENGTH} tokens, 4 updates, one rank. {PAIRS} pairs of steps by turns; the ratio is with "
        "to without, the median and its range.\n",
        table(["", "without", "with replay", "ratio"], rows),
        f"\nWith replay {last['differ']:.1%} of the tokens' own routes, a mean over layers, are others than "
        f"the engine's; one microbatch scored without has a mean of {last['own']:.3g}.",
    ]
    return text


def wire() -> list[str]:
    routing = Routing(QWEN3_30B)
    p, n = PAPER
    rows = p + n - 1
    rng = np.random.default_rng(0)
    routes = rng.permuted(np.tile(np.arange(128, dtype=np.int32), (rows * 48 // 16, 1)), axis=1)
    routes = np.resize(routes[:, :8], (rows, 48, 8))
    tokens = rng.integers(0, 151_936, n).tolist()
    meta = {
        "id": "r", "prompt_tokens": p, "finish_reason": {"type": "length"}, "weight_version": "1",
        "output_token_logprobs": [[-0.5, token, None] for token in tokens],
    }  # fmt: skip
    plain = orjson.dumps({"text": "", "output_ids": tokens, "meta_info": meta})
    encoded = base64.b64encode(routes.tobytes()).decode()
    whole = orjson.dumps({"text": "", "output_ids": tokens, "meta_info": meta | {"routed_experts": encoded}})
    prompt = Prompt(0, rng.integers(0, 151_936, p).astype(np.int32), "")
    request = Request(0, 0, prompt, 0, Sampling(1.0, n, (), returns_routes=True))
    asked = generate.asked(request, "r")
    without, with_routes = [], []
    for _ in range(PAIRS):
        for answer, times, wanted in ((plain, without, None), (whole, with_routes, routing)):
            start = time.perf_counter()
            sample = generate.read(answer, asked, 151_936, wanted)
            times.append(time.perf_counter() - start)
    assert len(whole) < asked.max_bytes(routing) and sample.routes is not None
    frame = len(pickle.dumps(sample, protocol=5))
    group = Group(0, prompt, [sample])
    options = configs.load(
        ROOT / "examples/qwen3_30b_a3b/config.yaml",
        ["parallel.pipeline=2", "parallel.tensor=4", "policy.routing_replay=rollout"],
    )
    made = list(shares([group], options, 1, {}, routing=routing))
    stage = made[0].routes
    assert stage is not None
    mib = 2**20
    body = [
        ["int32, as SGLang has them", f"{routes.nbytes / mib:.1f} MiB"],
        ["the answer (base64 in JSON)", f"{len(whole) / mib:.1f} MiB, {len(plain) / mib:.2f} without"],
        ["parsed, decoded and checked, in the intake process",
         f"{statistics.median(with_routes) * 1e3:.0f} ms ({min(with_routes) * 1e3:.0f} to "
         f"{max(with_routes) * 1e3:.0f}), {statistics.median(without) * 1e3:.0f} without"],
        ["a sample, from there to the main process", f"{frame / mib:.2f} MiB"],
        ["its routes there", f"{sample.routes.nbytes / mib:.2f} MiB"],
        ["to each stage of 2", f"{stage.nbytes / mib:.2f} MiB"],
        ["kept by each tensor rank of 4", f"{stage.nbytes / 4 / mib:.2f} MiB"],
        ["a step of 8,192 such responses, main memory of the main rank",
         f"{8192 * sample.routes.nbytes / 2**30:.1f} GiB"],
    ]  # fmt: skip
    return [
        f"## A response of {n:,} tokens after a prompt of {p}, Qwen3-30B-A3B\n",
        f"48 layers, 8 of 128 experts. Seconds: median and range of {PAIRS}.\n",
        table(["", "size or time"], body),
    ]


def main() -> None:
    wanted = sys.argv[1:] or ["noise", "bytes"]
    parts = {"noise": noise, "bytes": wire}
    text = heading("Routing replay")
    for name in wanted:
        text += "\n" + "\n".join(parts[name]()) + "\n"
    save("routing_replay.md", text)


if __name__ == "__main__":
    main()
