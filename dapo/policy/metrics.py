"""Metrics of the tokens that the policy scores and learns from.

One function returns a microbatch's sums by name; they are added up over microbatches, ranks and the step's
updates, and another function makes metrics of them. Without arguments the first returns zeros under the same
names, for ranks that report nothing.

To add a metric of an update: a sum in `update_sums`, a value in `update_metrics`, a row in the glossary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from dapo_kernels import PolicyLoss, Tokens
from torch import Tensor

Sums = dict[str, float]
EMPTY = torch.zeros(0)
NO_TOKENS = torch.zeros(0, dtype=torch.bool)
NOTHING = Tokens(EMPTY.long(), NO_TOKENS, EMPTY, EMPTY, EMPTY)
NO_LOSS = PolicyLoss(
    torch.zeros(()), logprobs=EMPTY, entropy=EMPTY, clipped_low=NO_TOKENS, clipped_high=NO_TOKENS
)


def total(rows: Iterable[Sums]) -> Sums:
    """Add up the sums of several microbatches, of which there is at least one."""
    first, *others = rows
    return {name: sum((row[name] for row in others), start=first[name]) for name in first}


def score_sums(
    old: Tensor = EMPTY,
    gap: Tensor = EMPTY,
    importance: Tensor = EMPTY,
    corrected: Tensor = EMPTY,
    cut: Tensor = NO_TOKENS,
    probe: Tensor = EMPTY,
) -> Sums:
    """Return the sums of a scored microbatch.

    `old`: log π_θold of every token; `gap`: |old − behavior| of the current weights' response tokens;
    `importance`: weights of the response tokens; `corrected`: of those that were corrected; `cut`: which of
    the latter are the cap, or 0; `probe`: as gap, of a probe's tokens.
    """
    sums: dict[str, Any] = {
        "broken": (~old.isfinite()).sum(),
        "current": len(gap),
        "gap": gap.sum(),
        "tokens": len(importance),
        "importance": importance.double().sum(),
        "importance_squared": (importance.double() ** 2).sum(),
        "corrected": len(corrected),
        "corrected_importance": corrected.sum(),
        "importance_cut": cut.sum(),
        "probe_tokens": len(probe),
        "probe_gap": probe.sum(),
    }
    return {name: float(value) for name, value in sums.items()}


def route_sums(layers: Iterable[int], others: Mapping[int, float]) -> Sums:
    """Return, for each layer with experts, how many tokens its router would send to others."""
    return {f"layer_{layer}": others.get(layer, 0.0) for layer in layers}


def own_route_sums(gap: Tensor = EMPTY) -> Sums:
    """Return the sums of tokens that were also scored where the routers chose; `gap`: |old − behavior|."""
    return {"own_tokens": float(len(gap)), "own_gap": float(gap.sum())}


def own_route_metrics(sums: Sums, num_tokens: float) -> dict[str, float]:
    """Return the fraction of tokens whose own route is another, by layer and as a mean; and the mismatch with
    routers that choose. `sums`: of both functions; {}: nothing is replayed. `num_tokens`: of current weights.
    """
    if not sums or not num_tokens:
        return {}
    layers = {name: n / num_tokens for name, n in sums.items() if name.startswith("layer_")}
    found: dict[str, float] = {}
    for layer, fraction in layers.items():
        found[f"policy/{layer}/routes_differ"] = fraction
    found["policy/routes_differ"] = sum(layers.values()) / len(layers)
    if sums["own_tokens"]:
        found["policy/mismatch_own_routes"] = sums["own_gap"] / sums["own_tokens"]
    return found


def score_metrics(sums: Sums, largest_gap: float) -> dict[str, float]:
    """Return the mismatch if the current weights wrote tokens, and the importance if any were corrected.

    The effective sample size is (Σw)² / (n Σw²), with w = 1 for tokens that are not.
    """
    metrics: dict[str, float] = {}
    if sums["probe_tokens"]:
        metrics["policy/mismatch_probe"] = sums["probe_gap"] / sums["probe_tokens"]
    if sums["current"]:
        metrics |= {"policy/mismatch": sums["gap"] / sums["current"], "policy/mismatch_max": largest_gap}
    if sums["corrected"]:
        metrics["policy/importance"] = sums["corrected_importance"] / sums["corrected"]
        metrics["policy/importance_cut"] = sums["importance_cut"] / sums["corrected"]
        squared = sums["tokens"] * sums["importance_squared"]
        metrics["policy/ess"] = sums["importance"] ** 2 / squared if squared else 0.0
    return metrics


def update_sums(out: PolicyLoss = NO_LOSS, tokens: Tokens = NOTHING, dual_clip: float | None = None) -> Sums:
    """Return the sums of a microbatch's loss over its response tokens.

    Clipping is counted over those that weigh something: of a filtered sample no token is learnt from.
    """
    assert tokens.mask is not None and tokens.weights is not None and tokens.advantages is not None
    assert tokens.old_logprobs is not None
    weighed = tokens.mask & (tokens.weights > 0)
    probability = out.logprobs[tokens.mask].exp()
    high = out.clipped_high & weighed
    sums = {
        "tokens": tokens.mask.sum(),
        "weighed": weighed.sum(),
        # a token without an advantage has no gradient
        "learnt": (weighed & (tokens.advantages != 0)).sum(),
        "loss": out.loss.detach(),
        "entropy": out.entropy.sum(),
        "probability": probability.sum(),
        "clipped_low": (out.clipped_low & weighed).sum(),
        "clipped_high": high.sum(),
        "clipped_high_probability": out.logprobs[high].exp().sum(),
    }
    if dual_clip is not None:
        is_beyond = out.logprobs - tokens.old_logprobs > math.log(dual_clip)
        sums["dual_clipped"] = (is_beyond & weighed & (tokens.advantages < 0)).sum()
    return {name: float(value) for name, value in sums.items()}


def update_metrics(sums: Sums) -> dict[str, float]:
    """Return means over the tokens of one update, or of several: a mean over no tokens is left out."""
    metrics: dict[str, float] = {}
    if tokens := sums["tokens"]:
        metrics["policy/entropy"] = sums["entropy"] / tokens
        metrics["policy/probability"] = sums["probability"] / tokens
    if weighed := sums["weighed"]:
        metrics["policy/clip_low"] = sums["clipped_low"] / weighed
        metrics["policy/clip_high"] = sums["clipped_high"] / weighed
        if "dual_clipped" in sums:
            metrics["policy/dual_clip"] = sums["dual_clipped"] / weighed
    if clipped := sums["clipped_high"]:
        metrics["policy/clip_high_probability"] = sums["clipped_high_probability"] / clipped
    return metrics


def step_metrics(updates: Sequence[Sums]) -> dict[str, float]:
    """Return a step's metrics from its updates' sums: tokens count alike, whichever update had them.

    Loss, norm and learning rate are means over the updates that were taken.
    """
    if not updates:
        return {}
    sums = total(updates)
    metrics = {"policy/updates_skipped": len(updates) - sums["taken"]} | update_metrics(sums)
    if taken := sums["taken"]:
        # the token weights hold the normaliser: an update's sum is its loss
        metrics |= {f"policy/{name}": sums[name] / taken for name in ("loss", "grad_norm", "lr")}
    return metrics
