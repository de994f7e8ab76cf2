"""Compares Policy with a plain Hugging Face model trained by the same equations, all cases in one launch.

torchrun --nproc-per-node WORLD -m tests.distributed.parity OUT.json [PATTERN] runs every case of that world
size, or those with the pattern in their name; the main rank writes what it measured.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from dapo_kernels import Head
from safetensors.torch import load_file

from dapo import config as configs
from dapo.engine.embedded import as_stored, learnt_and_kept
from dapo.learn.advantages import set_advantages
from dapo.learn.objective import token_weights
from dapo.mesh import Mesh
from dapo.policy import metrics, schedule
from dapo.policy.megatron import PlacedBatch, Policy, PolicyError
from dapo.policy.schedule import get_forward_backward_func
from dapo.types import Group, Prompt, Sample
from tests.batches import batch_of_rank
from tests.distributed.cases import CASES, FAULTS, OBJECTIVES, Case
from tests.distributed.ranks import prepare_rank

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


def make_hf(model: str, is_tied: bool, directory: Path, layers: int = 4) -> None:
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
    experts = dict(head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48)
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
        "deepseek_v3-no-rank": (
            transformers.DeepseekV3Config,
            transformers.DeepseekV3ForCausalLM,
            latent | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0},
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
        vocab_size=VOCAB,
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

    def logprobs(self, group: Group, sample: Sample) -> torch.Tensor:
        tokens = torch.from_numpy(np.concatenate([group.prompt.tokens, sample.tokens])).long()
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


def run(case: Case, directory: Path) -> dict[str, Any]:
    parallel = configs.Parallel(
        tensor=case.tensor,
        pipeline=case.pipeline,
        virtual_pipeline=case.virtual,
        context=case.context,
        expert=case.expert,
    )
    config = configs.Config(
        run=configs.Run(dir=directory / "run"),
        data=configs.Data(train=directory / "none"),
        rollout=configs.Rollout(
            prompts_per_step=NUM_UPDATES * GROUPS_PER_UPDATE,
            group_size=GROUP_SIZE,
            temperature=0.9,
            dump_share=1.0,
        ),
        objective=configs.Objective(
            normaliser=case.normaliser,
            overlong_filtering=case.filtering,
            **OBJECTIVES.get(case.objective, {}),
        ),
        optim=configs.Optim(lr=LR, warmup_steps=0, prompts_per_minibatch=GROUPS_PER_UPDATE, clip_grad=0.5),
        parallel=parallel,
        policy=configs.Policy(
            model=directory / "hf",
            dtype=case.dtype,
            tokens_per_microbatch=case.budget,
            megatron={"adam_eps": EPS} | case.megatron,
        ),
    )
    mesh = Mesh(parallel)
    if mesh.is_main:
        make_hf(case.model, case.is_tied, directory / "hf", case.layers)
    mesh.barrier()
    policy, hf = Policy(config, mesh), HFTrainer(directory / "hf", config)
    inject(case.fault, policy)
    groups = make_groups(np.random.default_rng(3), case.stale, config.objective.advantage)
    planned = batch_of_rank(mesh, groups, config, mesh.data, metrics={}, version=VERSION)
    batch = policy.place(planned)
    result: dict[str, Any] = {"case": asdict(case), "microbatches": len(batch.minibatches[0])}

    policy.save_hf(directory / "exported")
    before, after = (
        load_file(directory / "hf" / "model.safetensors"),
        load_file(directory / "exported" / "model.safetensors"),
    )
    result["round_trip"] = set(before) == set(after) and all(
        torch.equal(before[k].to(after[k].dtype), after[k]) for k in before
    )

    with torch.no_grad():
        old = {(g.id, s.index): hf.logprobs(g, s).detach() for g in groups for s in g.samples}
    weights = [m.token_weights.clone() for minibatch in batch.minibatches for m in minibatch]
    result["mismatch"] = policy.score(batch)
    scored = [m for minibatch in batch.minibatches for m in minibatch]
    result["weights kept"] = all(
        torch.equal(m.token_weights, w) for m, w in zip(scored, weights, strict=True)
    )
    result["expected_mismatch"] = expected_mismatch(groups, old, config.objective)
    result["logprobs"] = mesh.max(_logprob_error(policy, batch, groups, old))

    ratio_gaps: list[float] = []
    _watch_ratios(ratio_gaps)
    finalize = policy.transformer.finalize_model_grads_func
    policy.transformer.finalize_model_grads_func = lambda *a, **k: finalize(
        *a, **k | {"force_all_reduce": True}
    )  # whole gradients on every rank
    policy.backward(batch.minibatches[0])
    policy.transformer.finalize_model_grads_func = finalize
    result["ratio"] = mesh.max(max(ratio_gaps, default=0.0))
    Head.loss = _plain_loss  # type: ignore[method-assign]
    hf.backward(groups[:GROUPS_PER_UPDATE], old)
    params = dict(as_stored(learnt_and_kept(hf.model)))
    grads = dict(as_stored((n, p.grad) for n, p in hf.model.named_parameters()))
    result |= gradient_gaps(policy, grads)
    result["toy"] = toy_metric(policy, batch)

    start = {name: param.detach().clone() for name, param in params.items()}
    our_start = {name: weight.clone().float() for name, weight in policy.weights()}
    result["grad_norms"] = []
    for i, minibatch in enumerate(batch.minibatches):
        norm = policy.update(minibatch)["grad_norm"]
        hf.backward(groups[i * GROUPS_PER_UPDATE : (i + 1) * GROUPS_PER_UPDATE], old)
        result["grad_norms"].append([norm, hf.step()])
    our_end = {name: weight.clone().float() for name, weight in policy.weights()}
    result["params"], result["worst"] = max(
        (float((w - params[n].detach()).abs().max()), n) for n, w in our_end.items()
    )
    result["moved"] = max(float((params[n].detach() - start[n]).abs().max()) for n in params)
    ours = torch.cat([(our_end[n] - our_start[n]).flatten() for n in params])
    theirs = torch.cat([(params[n].detach() - start[n]).flatten() for n in params])
    result["direction"] = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))

    with torch.no_grad():
        next(policy.chunks[0].parameters()).fill_(torch.nan)
    result["refused"] = [
        _refusal(policy.update, batch.minibatches[0]),
        _refusal(policy.score, batch),
    ]
    return result


def gradient_gaps(policy: Policy, grads: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Compare all gradients together, by norm; and each by its largest value."""
    exported = policy._weights.export(lambda p: getattr(p, "main_grad", p.data))
    ours = {name: grad.clone() for name, grad in exported if name in grads}
    gaps, norms = zip(*((float((g - grads[n]).norm()), float(grads[n].norm())) for n, g in ours.items()), strict=True)
    largest = {n: float(grads[n].abs().max()) for n in ours}
    each = {n: float((g - grads[n]).abs().max()) / largest[n] for n, g in ours.items() if largest[n] > 0}
    worst = max(each, key=each.__getitem__)
    assert len(ours) == len(grads)
    return {
        "gradients": float(np.linalg.norm(gaps) / np.linalg.norm(norms)),
        "worst gradient": [each[worst], worst],
    }


def inject(fault: str, policy: Policy) -> None:
    """Make the gradient scale wrong, as a mistake in Megatron's settings would; nothing else changes."""
    schedule.get_forward_backward_func = get_forward_backward_func
    # Megatron multiplies a loss that comes without a number of tokens so, and averages it
    if fault == "context factor":
        finalize = policy.transformer.finalize_model_grads_func

        def twice(model: list[Any], *arguments: Any, **options: Any) -> None:
            finalize(model, *arguments, **options)
            for chunk in model:
                chunk.scale_gradients(policy.config.parallel.context)

        policy.transformer.finalize_model_grads_func = twice
    elif fault == "token mean":  # Megatron divides by the number of tokens, where it knows one

        def counted(forward_step_func: Any, **arguments: Any) -> Any:
            def step(data: Any, model: Any) -> Any:
                hidden, loss = forward_step_func(data, model)

                def with_tokens(hidden: torch.Tensor) -> Any:
                    total, _, sums = loss(hidden)
                    count = sums["tokens"] if isinstance(sums, dict) else 0
                    return total, torch.tensor(count, dtype=torch.int), sums

                return hidden, with_tokens

            return get_forward_backward_func()(forward_step_func=step, **arguments)

        schedule.get_forward_backward_func = lambda: counted
    # summed over the data-parallel ranks and left so, where other ranks have the experts too
    elif fault == "expert factor":
        finalize_all = policy.transformer.finalize_model_grads_func

        def halved(model: list[Any], *arguments: Any, **options: Any) -> None:
            finalize_all(model, *arguments, **options)
            for chunk in model:
                for name, param in chunk.named_parameters():
                    if ".experts." in name:
                        param.main_grad.mul_(1 / policy.config.parallel.tensor)

        policy.transformer.finalize_model_grads_func = halved
    else:
        assert not fault


def toy_metric(policy: Policy, batch: PlacedBatch) -> float:
    """Add a metric where the guide says: a sum and a value. Returns it, of all ranks' response tokens."""
    sums, values = metrics.update_sums, metrics.update_metrics
    metrics.update_sums = lambda *x, **y: sums(*x, **y) | {"toy": 2 * sums(*x)["tokens"]}
    metrics.update_metrics = lambda x: values(x) | {"policy/toy": x["toy"] / x["tokens"]}
    found = metrics.update_metrics(policy.backward(batch.minibatches[0]))["policy/toy"]
    metrics.update_sums, metrics.update_metrics = sums, values
    return found


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


def expected_mismatch(
    groups: list[Group], old: dict[tuple[int, int], torch.Tensor], objective: configs.Objective
) -> dict[str, float]:
    """Compute what Policy.score reports, token by token."""
    gaps, corrected, everything = [], [], []
    is_all, measured = objective.importance_of == "all", objective
    if objective.importance == "none":
        measured = objective.model_copy(update={"importance": "tis"})
    for group in groups:
        for sample in group.samples:
            log_old = old[group.id, sample.index]
            off = (log_old - torch.from_numpy(sample.behavior_logprobs)).tolist()
            importance = importance_of(sample, log_old, measured)
            for version, start, end in sample.versions:
                for t in range(start, end):
                    if sample.loss_mask[t]:
                        gaps += [abs(off[t])] if version == VERSION else []
                        corrected += [importance[t]] if is_all or version < VERSION else []
                        everything.append(importance[t])
    expected = {"policy/mismatch": float(np.mean(gaps)), "policy/mismatch_max": max(gaps)}
    if corrected:
        cut = objective.importance_cap if measured.importance == "tis" else 0.0
        expected["policy/importance"] = float(np.mean(corrected))
        expected["policy/importance_cut"] = float(np.mean([x == cut for x in corrected]))
        weights = np.array(everything)
        expected["policy/ess"] = float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
    return expected


def _refusal(function: Any, argument: Any) -> str:
    try:
        function(argument)
    except PolicyError as error:
        return str(error)
    return "accepted"


def _logprob_error(
    policy: Policy, batch: PlacedBatch, groups: list[Group], old: dict[tuple[int, int], torch.Tensor]
) -> float:
    """Return the largest difference of this rank's masked log-probs from the Hugging Face model's.

    They are found by the sample's location in the microbatch.
    """
    if not policy.is_last_stage:
        return 0.0
    masks = {(sample.group, sample.index): sample.loss_mask for group in groups for sample in group.samples}
    worst, seen = 0.0, 0
    scored = [microbatch for minibatch in batch.minibatches for microbatch in minibatch]
    for microbatch in scored:
        for location in microbatch.dumped:
            key, tokens = (location.group, location.index), location.tokens
            here = slice(location.start, location.start + tokens.stop - tokens.start)
            mask = torch.from_numpy(masks[key][here])
            gaps = (microbatch.scores.old_logprobs[tokens] - old[key][here])[mask].abs()
            worst, seen = max(worst, float(gaps.max()) if len(gaps) else 0.0), seen + len(gaps)
    assert seen == sum(int(m.loss_mask.sum()) for m in scored)
    return worst


_plain_loss = Head.loss


def _watch_ratios(gaps: list[float]) -> None:
    def watched(head: Head, hidden: Any, tokens: Any, *arguments: Any, **options: Any) -> Any:
        out = _plain_loss(head, hidden, tokens, *arguments, **options)
        gaps.append(float((out.logprobs - tokens.old_logprobs).abs().max()))
        return out

    Head.loss = watched  # type: ignore[method-assign]


def main(out: str, only: str = "") -> None:
    from megatron.core import parallel_state

    prepare_rank()
    results = []
    for case in CASES + FAULTS:
        if case.world != int(os.environ["WORLD_SIZE"]) or not re.search(only, case.name):
            continue
        directory = Path(out).parent / case.name
        results.append({"name": case.name, **run(case, directory)})
        parallel_state.destroy_model_parallel()
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
