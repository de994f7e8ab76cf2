"""Compares Policy with a plain Hugging Face model trained by the same equations, all cases in one launch.

torchrun --nproc-per-node WORLD -m tests.distributed.parity OUT.json [PATTERN] runs every case of that world
size, or those with the pattern in their name; the main rank writes what it measured.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from dapo_kernels import Head
from safetensors.torch import load_file

from dapo import config as configs
from dapo.learn.batch import shares
from dapo.mesh import Mesh
from dapo.model.families import read_shape
from dapo.model.routing import Routing
from dapo.policy import latent, metrics, schedule
from dapo.policy.latent import gather_from_sequence_parallel_region
from dapo.policy.megatron import PlacedBatch, Policy, PolicyError
from dapo.policy.schedule import get_forward_backward_func
from dapo.types import Group
from tests.distributed.cases import (
    ALL_LAYOUTS,
    CASES,
    FAULTS,
    LAYER_FAULTS,
    MORE,
    OBJECTIVES,
    ROUTE_FAULTS,
    Case,
)
from tests.distributed.ranks import prepare_rank
from tests.distributed.reference import (
    EPS,
    GROUP_SIZE,
    GROUPS_PER_UPDATE,
    LR,
    NUM_UPDATES,
    VERSION,
    folder,
    importance_of,
    make_groups,
    make_hf,
    reference,
    tell_routes,
)


def run(case: Case, directory: Path) -> dict[str, Any]:
    model = folder(case, directory.parent) / "hf"
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
            model=model,
            dtype=case.dtype,
            tokens_per_microbatch=case.budget,
            megatron={"adam_eps": EPS} | case.megatron,
            routing_replay=case.replay or "off",
        ),
    )
    mesh = Mesh(parallel)
    if mesh.is_main and not model.exists():
        make_hf(case.model, case.is_tied, model, case.layers)
    mesh.barrier()
    groups = make_groups(np.random.default_rng(3), case.stale, config.objective.advantage)
    routing = Routing(read_shape(model)) if case.replay == "rollout" else None
    if routing:
        tell_routes(groups, routing)
    expected = reference(case, config, directory.parent, groups, mesh)
    old = expected.old
    policy = Policy(config, mesh)
    inject(case.fault, policy)
    if case.fault == "wrong expert":  # one, of one token in one layer
        told = groups[0].samples[0].routes
        told[1, 0] = (set(range(8)) - set(told[1, : routing.per_token].tolist())).pop()
    asked: Any = groups, config, mesh.data, {}
    share = mesh.scatter(
        lambda: shares(*asked, version=VERSION, routing=routing), by_stage=routing is not None
    )
    planned = share.batch(parallel, mesh.context_rank)
    if case.fault == "another microbatch":
        first, second = planned.minibatches[0][:2]
        first.routes, second.routes = (
            np.resize(other.routes, own.routes.shape) for own, other in ((first, second), (second, first))
        )
    batch = policy.place(planned)
    result: dict[str, Any] = {"case": asdict(case), "microbatches": len(batch.minibatches[0])}

    policy.save_hf(directory / "exported")
    before, after = (
        load_file(model / "model.safetensors"),
        load_file(directory / "exported" / "model.safetensors"),
    )
    result["round_trip"] = set(before) == set(after) and all(
        torch.equal(before[k].to(after[k].dtype), after[k]) for k in before
    )

    weights = [m.token_weights.clone() for minibatch in batch.minibatches for m in minibatch]
    result["mismatch"] = policy.score(batch)
    scored = [m for minibatch in batch.minibatches for m in minibatch]
    result["weights kept"] = all(
        torch.equal(m.token_weights, w) for m, w in zip(scored, weights, strict=True)
    )
    result["expected_mismatch"] = expected_mismatch(groups, old, config.objective)
    if routing:
        by_layer = zip(routing.layers, expected.others, strict=True)
        result["expected_mismatch"] |= {f"policy/layer_{n}/routes_differ": x for n, x in by_layer}
        result["expected_mismatch"]["policy/routes_differ"] = float(np.mean(expected.others))
        result["own routes"] = result["mismatch"].pop("policy/mismatch_own_routes")
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
    result |= gradient_gaps(policy, expected.grads)
    if case.fault == "left at forward":
        policy.routes.is_recomputed = True
        result["noticed"] = _refusal(policy.backward, batch.minibatches[0])
        return result
    result["toy"] = toy_metric(policy, batch)

    our_start = {name: weight.clone().float() for name, weight in policy.weights()}
    norms = [policy.update(minibatch)["grad_norm"] for minibatch in batch.minibatches]
    result["grad_norms"] = list(zip(norms, expected.norms, strict=True))
    our_end = {name: weight.clone().float() for name, weight in policy.weights()}
    start, end = expected.start, expected.end
    result["params"], result["worst"] = max((float((w - end[n]).abs().max()), n) for n, w in our_end.items())
    result["moved"] = max(float((end[n] - start[n]).abs().max()) for n in end)
    ours = torch.cat([(our_end[n] - our_start[n]).flatten() for n in end])
    theirs = torch.cat([(end[n] - start[n]).flatten() for n in end])
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
    gaps, norms = zip(
        *((float((g - grads[n]).norm()), float(grads[n].norm())) for n, g in ours.items()), strict=True
    )
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
    latent.gather_from_sequence_parallel_region = gather_from_sequence_parallel_region
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
    elif fault == "swapped gate":  # queries where gates should be
        for layer in policy.chunks[0].decoder.layers:
            if hasattr(layer.self_attention, "linear_qkv"):
                weight, groups = layer.self_attention.linear_qkv.weight, policy.shape.num_kv_heads
                rows = policy.shape.num_heads // groups * policy.shape.head_dim
                query, gate, rest = weight.data.unflatten(0, (groups, -1)).tensor_split([rows, 2 * rows], 1)
                weight.data.copy_(torch.cat([gate, query, rest], 1).flatten(0, 1))
    elif fault == "heads not summed":  # as Megatron's own layers, where ranks have parts of down projections
        gather = latent.gather_from_sequence_parallel_region
        latent.gather_from_sequence_parallel_region = partial(gather, tensor_parallel_output_grad=False)
    elif fault == "norm not summed":  # each rank has other heads' part of the gradient
        for name, param in policy.chunks[0].named_parameters():
            if name.endswith("out_norm.weight"):
                param.sequence_parallel = False
    elif fault == "left at forward":  # what is computed again is told the last microbatch's routes
        policy.routes.is_recomputed = False
        forward = policy.routes.forward

        @contextmanager
        def left(chunk: int, microbatch: Any) -> Any:
            with forward(chunk, microbatch):
                yield
            for replay in policy.routes.chunks[chunk]:
                replay.is_forward = True

        policy.routes.forward = left
    else:
        assert fault in ("", "wrong expert", "another microbatch")


def toy_metric(policy: Policy, batch: PlacedBatch) -> float:
    """Add a metric where the guide says: a sum and a value. Returns it, of all ranks' response tokens."""
    sums, values = metrics.update_sums, metrics.update_metrics
    metrics.update_sums = lambda *x, **y: sums(*x, **y) | {"toy": 2 * sums(*x)["tokens"]}
    metrics.update_metrics = lambda x: values(x) | {"policy/toy": x["toy"] / x["tokens"]}
    found = metrics.update_metrics(policy.backward(batch.minibatches[0]))["policy/toy"]
    metrics.update_sums, metrics.update_metrics = sums, values
    return found


def expected_mismatch(
    groups: list[Group], old: dict[tuple[int, int], torch.Tensor], objective: configs.Objective
) -> dict[str, float]:
    """Compute what Policy.score reports, token by token."""
    gaps, corrected, everything = [], [], []
    buckets: dict[str, list[float]] = defaultdict(list)
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
                        if version == VERSION:
                            gaps.append(abs(off[t]))
                            for bucket in buckets_of(t, float(sample.behavior_logprobs[t])):
                                buckets[bucket].append(abs(off[t]))
                        corrected += [importance[t]] if is_all or version < VERSION else []
                        everything.append(importance[t])
    expected = {"policy/mismatch": float(np.mean(gaps)), "policy/mismatch_max": max(gaps)}
    expected["policy/mismatch_p99"] = float(np.quantile(gaps, 0.99, method="inverted_cdf"))
    for bucket, found in buckets.items():
        expected[f"policy/mismatch_{bucket}"] = float(np.mean(found))
        expected[f"policy/mismatch_p99_{bucket}"] = float(np.quantile(found, 0.99, method="inverted_cdf"))
    if corrected:
        cut = objective.importance_cap if measured.importance == "tis" else 0.0
        expected["policy/importance"] = float(np.mean(corrected))
        expected["policy/importance_cut"] = float(np.mean([x == cut for x in corrected]))
        weights = np.array(everything)
        expected["policy/ess"] = float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
    return expected


def buckets_of(position: int, logprob: float) -> list[str]:
    """Responses are shorter than 64 tokens, log-probs of random behavior are anywhere."""
    bounds = [-6, -3, -1, -0.1, -0.01, 0]
    highest = next(bound for bound in bounds if logprob <= bound) if logprob <= 0 else 0
    return [f"at_{0 if position < 16 else 16}", f"logprob_{highest}"]


def _refusal(function: Any, argument: Any) -> str:
    try:
        function(argument)
    except (PolicyError, AssertionError) as error:
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
    known = [*CASES, *FAULTS, *LAYER_FAULTS, *ROUTE_FAULTS]
    if only:
        known += [case for case in [*ALL_LAYOUTS, *MORE] if case not in known]
    for case in known:
        if case.world != int(os.environ["WORLD_SIZE"]) or not re.search(only, case.name):
            continue
        directory = Path(out).parent / case.name
        results.append({"name": case.name, **run(case, directory)})
        parallel_state.destroy_model_parallel()
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
