"""A plain Hugging Face model trained by the same equations, with which parity.py compares.

Its results depend on the model and the objective, and on no layout: the main rank computes them once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from dapo import config as configs
from dapo.engine.embedded import as_stored, learnt_and_kept
from dapo.learn.advantages import set_advantages
from dapo.learn.batch import stale_tokens
from dapo.learn.objective import token_weights
from dapo.mesh import Mesh
from dapo.model.families import read_shape
from dapo.model.routing import Routing
from dapo.types import Group, Prompt, Sample
from tests.distributed.cases import Case

# Adam divides by |g| + eps: at 1e-8 it would turn the rounding of all but vanishing gradients into steps
EPS = 1e-6
# 250 is padded at every tensor size
LR, NUM_UPDATES, GROUPS_PER_UPDATE, GROUP_SIZE, VOCAB = 1e-3, 3, 2, 4, 250
VERSION = 2  # of the weights
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
}


def make_hf(model: str, is_tied: bool, directory: Path, layers: int = 4, vocab: int = VOCAB) -> None:
    """Save a random model in which biases and norms matter."""
    kinds = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
        # ≠ hidden / heads
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"rms_norm_eps": 1e-5}),
        "mistral": (
            transformers.MistralConfig,
            transformers.MistralForCausalLM,
            {"head_dim": 16, "sliding_window": None},
        ),
    }
    kinds |= {  # the rotary embedding stretched: sequences are up to 31 tokens long
        "qwen3-yarn": (*kinds["qwen3"][:2], {"head_dim": 16, "rope_parameters": YARN}),
        "llama3": (*kinds["llama"][:2], {"rope_parameters": LLAMA3}),
    }
    # four: of two the order in which they are added makes no difference
    experts = dict(head_dim=16, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=48)
    kinds |= {
        "qwen3_moe": (
            transformers.Qwen3MoeConfig,
            transformers.Qwen3MoeForCausalLM,
            experts | {"norm_topk_prob": True},
        ),
        "qwen3_moe-unnormalised": (
            transformers.Qwen3MoeConfig,
            transformers.Qwen3MoeForCausalLM,
            experts | {"norm_topk_prob": False},
        ),
    }
    latent = dict(
        num_key_value_heads=8, moe_intermediate_size=48, n_routed_experts=8, num_experts_per_tok=4,
        n_shared_experts=2, kv_lora_rank=24, q_lora_rank=40, qk_rope_head_dim=8, qk_nope_head_dim=12,
        v_head_dim=16, routed_scaling_factor=1.5,
    )  # fmt: skip
    delta = dict(
        head_dim=16, linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=8,
        linear_value_head_dim=12, full_attention_interval=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.25},
    )  # fmt: skip
    shared = experts | delta | {"shared_expert_intermediate_size": 40}
    kinds |= {
        "deepseek_v3": (
            transformers.DeepseekV3Config,
            transformers.DeepseekV3ForCausalLM,
            latent
            | {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
            | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
        ),
        "deepseek_v3-alike": (
            transformers.DeepseekV3Config,
            transformers.DeepseekV3ForCausalLM,
            latent | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
        ),
        "glm4_moe_lite": (
            transformers.Glm4MoeLiteConfig,
            transformers.Glm4MoeLiteForCausalLM,
            latent | {"rms_norm_eps": 1e-6},
        ),
        "qwen3_5_text": (transformers.Qwen3_5TextConfig, transformers.Qwen3_5ForCausalLM, delta),
        "qwen3_5_moe_text": (
            transformers.Qwen3_5MoeTextConfig,
            transformers.Qwen3_5MoeForCausalLM,
            shared,
        ),
        "qwen3_next": (transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM, shared),
    }
    config, cls, extra = kinds[model]
    shape = dict(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(5)
    hf = cls(config(**shape | {"tie_word_embeddings": is_tied} | extra))
    with torch.no_grad():
        for name, param in hf.named_parameters():
            if "norm" in name:
                param.add_(0.1 * torch.randn_like(param))
            elif "A_log" in name:
                param.uniform_(-1, 1)
            else:
                param.normal_(0, 0.3 if "bias" in name else 0.08)
        for name, buffer in hf.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(0, 0.3)
    hf.save_pretrained(directory)


def make_groups(rng: np.random.Generator, is_stale: bool, advantage: str = "group_std") -> list[Group]:
    """Make random groups. Stale: older weights (version 1 of 2) wrote half of every other sample."""
    groups = []
    for g in range(NUM_UPDATES * GROUPS_PER_UPDATE):
        group = Group(g, Prompt(g, rng.integers(0, VOCAB, rng.integers(1, 9)).astype(np.int32), "0"))
        for i in range(GROUP_SIZE):
            n = int(rng.integers(1, 24))
            sample = Sample(
                g,
                i,
                tokens=rng.integers(0, VOCAB, n).astype(np.int32),
                behavior_logprobs=rng.normal(-5, 1, n).astype(np.float32),
                loss_mask=rng.random(n) < 0.9,
                versions=((VERSION, 0, n),),
                finish_reason="length" if rng.random() < 0.3 else "stop",
                reward=float(rng.normal()),
            )
            sample.loss_mask[0] = True
            if is_stale:
                half = (i % 2) * ((n + 1) // 2)
                sample.versions = ((1, 0, half), (VERSION, half, n))
            group.samples.append(sample)
        groups.append(group)
    set_advantages(groups, advantage)
    return groups


def tell_routes(groups: list[Group], routing: Routing) -> None:
    """Give each sample random routes, which no router would choose."""
    rng = np.random.default_rng(4)
    for group in groups:
        for sample in group.samples:
            fed = len(group.prompt.tokens) + sample.length - 1
            order = rng.random((fed, len(routing.layers), routing.shape.num_experts)).argsort(-1)
            sample.routes = order[..., : routing.per_token].reshape(fed, -1).astype(routing.dtype)


class HFTrainer:
    """The same equations in the plainest torch: one unpacked sample at a time, torch's AdamW and gradient
    clipping.
    """

    def __init__(self, directory: Path, config: configs.Config):
        plain = dict(attn_implementation="eager", experts_implementation="eager")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, **plain
        )
        self.config = config
        matrices, vectors = (
            [p for p in self.model.parameters() if (p.dim() > 1) == is_matrix] for is_matrix in (True, False)
        )
        groups = [
            {"params": matrices, "weight_decay": config.optim.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=config.optim.betas, eps=EPS)
        # of each sample, [tokens, layers, k]: told to the routers; without them they choose, and it is kept
        self.routes: dict[tuple[int, int], torch.Tensor] = {}
        self.chosen: list[torch.Tensor] = []  # in the pass that is underway, by layer
        self.told: list[torch.Tensor] = []
        self.others: list[torch.Tensor] = []  # by layer, [tokens]
        for module in self.model.modules():
            if module.__class__.__name__.endswith(("TopKRouter", "TopkRouter")):
                module.register_forward_hook(self._route)

    def _route(self, router: torch.nn.Module, _: object, out: tuple[torch.Tensor, ...]) -> object:
        logits, weights, chosen = out
        if self.told:
            told = self.told.pop(0)
            self.others.append((told.sort(-1).values != chosen.sort(-1).values).any(-1))
            chosen = told
            is_sigmoid = hasattr(router, "e_score_correction_bias")
            weights = (logits.sigmoid() if is_sigmoid else logits.softmax(-1)).gather(1, chosen)
            if getattr(router, "norm_topk_prob", True):
                weights = weights / weights.sum(-1, keepdim=True)
            weights = weights * getattr(router, "routed_scaling_factor", 1.0)
        self.chosen.append(chosen)
        return logits, weights, chosen

    def logprobs(self, group: Group, sample: Sample) -> torch.Tensor:
        tokens = torch.from_numpy(np.concatenate([group.prompt.tokens, sample.tokens])).long()
        key = group.id, sample.index
        self.chosen, self.others = [], []
        self.told = [*self.routes[key].unbind(1)] if key in self.routes else []
        logits = (
            self.model(tokens[None, :-1]).logits[0, len(group.prompt.tokens) - 1 :]
            / self.config.rollout.temperature
        )
        return logits.log_softmax(-1).gather(-1, torch.from_numpy(sample.tokens).long()[:, None])[:, 0]

    def backward(self, groups: list[Group], old: dict[tuple[int, int], torch.Tensor]) -> None:
        objective = self.config.objective
        self.optimizer.zero_grad()
        longest = self.config.rollout.max_response_length
        for group, weights in zip(groups, token_weights(groups, objective, longest), strict=True):
            for sample, weight in zip(group.samples, weights, strict=True):
                log_old, mask = old[group.id, sample.index], torch.from_numpy(sample.loss_mask)
                logp = self.logprobs(group, sample)
                ratio = (logp - log_old).exp()
                if objective.kind == "gspo":
                    ratio = (logp - log_old)[mask].mean().exp() * torch.ones_like(logp)
                clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
                loss = -torch.min(ratio * sample.advantage, clipped * sample.advantage)
                if objective.kind == "cispo":
                    loss = -clipped.detach() * sample.advantage * logp
                importance = torch.tensor(importance_of(sample, log_old, objective))
                (weight * (importance * loss)[mask]).sum().backward()

    def step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        return float(norm)


def importance_of(sample: Sample, log_old: torch.Tensor, objective: configs.Objective) -> list[float]:
    """Compute the importance of each token of a sample, one by one."""
    gaps = (log_old - torch.from_numpy(sample.behavior_logprobs)).tolist()
    writers = [version for version, start, end in sample.versions for _ in range(start, end)]
    is_all = objective.importance_of == "all"
    corrected = [m and (is_all or v < VERSION) for m, v in zip(sample.loss_mask, writers, strict=True)]
    low, high = objective.importance_band
    if objective.importance == "sequence_mask":
        chosen = [gap for gap, c in zip(gaps, corrected, strict=True) if c]
        is_kept = not chosen or low <= math.exp(sum(chosen) / len(chosen)) <= high
        return [float(is_kept)] * len(gaps)
    found = []
    for gap, c in zip(gaps, corrected, strict=True):
        ratio = math.exp(gap)
        if objective.importance == "band":
            ratio = ratio if low <= ratio <= high else 0.0
        elif objective.importance == "tis":
            ratio = min(ratio, objective.importance_cap)
        else:
            c = False
        found.append(ratio if c else 1.0)
    return found


@dataclass(frozen=True)
class Reference:
    """Tensors have the names of Hugging Face's files."""

    old: dict[tuple[int, int], torch.Tensor]  # log-probs before the updates, by group and index
    grads: dict[str, torch.Tensor]  # of the first minibatch, before clipping
    start: dict[str, torch.Tensor]  # before the updates
    end: dict[str, torch.Tensor]  # after them
    norms: list[float]  # of each update's gradient
    others: list[float]  # of each layer with experts: tokens whose own experts are others than they were told


def folder(case: Case, root: Path) -> Path:
    """Return the folder of everything that does not depend on the layout."""
    parts = (
        case.model, case.is_tied, case.layers, case.normaliser, case.filtering, case.stale, case.objective,
        case.replay,
    )  # fmt: skip
    return root / "-".join(map(str, ("reference", *parts)))


def reference(case: Case, config: configs.Config, root: Path, groups: list[Group], mesh: Mesh) -> Reference:
    """Return the results of the model in folder(case, root). Collective."""
    path = folder(case, root) / "reference.pt"
    if not mesh.on_main(path.exists):
        mesh.on_main_only(lambda: torch.save(_train(path.with_name("hf"), config, groups), path))
        mesh.barrier()
    return torch.load(path, weights_only=False)  # type: ignore[no-any-return]


def _train(directory: Path, config: configs.Config, groups: list[Group]) -> Reference:
    hf, old, others = HFTrainer(directory, config), {}, []
    with torch.no_grad():
        for g in groups:
            for s in g.samples:
                key = g.id, s.index
                if s.routes is not None:
                    k = read_shape(directory).experts_per_token
                    hf.routes[key] = torch.from_numpy(s.routes).long().unflatten(1, (-1, k))
                old[key] = hf.logprobs(g, s).detach()
                if s.routes is not None:
                    current = s.loss_mask & ~stale_tokens(s, VERSION)
                    mask = torch.from_numpy(np.r_[[False] * (len(g.prompt.tokens) - 1), current])
                    others.append(torch.stack(hf.others, 1)[mask])
                if config.policy.routing_replay == "old":
                    hf.routes[key] = torch.stack(hf.chosen, 1)
    hf.backward(groups[:GROUPS_PER_UPDATE], old)
    params = dict(as_stored(learnt_and_kept(hf.model)))
    grads = dict(as_stored((n, p.grad.clone()) for n, p in hf.model.named_parameters()))
    start = {name: param.detach().clone() for name, param in params.items()}
    norms = []
    for i in range(NUM_UPDATES):
        hf.backward(groups[i * GROUPS_PER_UPDATE : (i + 1) * GROUPS_PER_UPDATE], old)
        norms.append(hf.step())
    end = {name: param.detach().clone() for name, param in params.items()}
    differ = torch.cat(others).float().mean(0).tolist() if others else []
    return Reference(old, grads, start, end, norms, differ)
