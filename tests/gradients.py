"""Ask the loss what it does to a policy: to tokens by their ratios, and to a minibatch's samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from dapo_kernels.reference import logprobs, policy_loss
from torch import Tensor

from dapo.config import Objective
from dapo.learn.advantages import set_advantages
from dapo.learn.objective import token_weights
from dapo.reward.overlong import soft_overlong_penalty
from dapo.rollout.buffer import Buffer
from dapo.types import Group
from tests.conftest import make_group

LOW, HIGH = 0.2, 0.28  # the paper's clip
LONGEST = 256  # rollout.max_response_length
BUDGET, CACHE = 96, 48  # of the soft overlong punishment, tokens
VOCAB = 5


def at_ratios(ratios: Sequence[float], advantage: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Make one token for each ratio: logits, targets, old log-probs, advantages, mask."""
    count = len(ratios)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(count, VOCAB, generator=g, dtype=torch.float64)
    targets, mask = torch.randint(VOCAB, (count,), generator=g), torch.ones(count, dtype=torch.bool)
    old = logprobs(logits, targets, mask) - torch.tensor(ratios, dtype=torch.float64).log()
    return logits, targets, old, torch.full((count,), advantage, dtype=torch.float64), mask


def gradient_at(
    ratios: Sequence[float], advantage: float, clip_high: float = HIGH, dual_clip: float | None = None
) -> Tensor:
    """Return the gradient of the logits of `at_ratios`, [len(ratios), VOCAB]."""
    logits, *rest = at_ratios(ratios, advantage)
    logits.requires_grad_()
    policy_loss(logits, *rest, clip_low=LOW, clip_high=clip_high, dual_clip=dual_clip).loss.backward()
    assert logits.grad is not None
    return logits.grad


def ascend(p: float, clip_high: float, step: float = 1e-3, most: float = 0.99) -> float:
    """Follow the gradient of one token of probability p with advantage 1 until it is zero, or p is `most`.

    `step`: of the logit that moves farthest. The result is at most e^(2 · step) times too high.
    """
    logits = torch.log(torch.tensor([[p] + [(1 - p) / 7] * 7], dtype=torch.float64))
    one, old = torch.ones(1, dtype=torch.float64), logits[0, :1].clone()
    target, mask = torch.tensor([0]), torch.tensor([True])
    while (now := logits.softmax(-1)[0, 0].item()) < most:
        leaf = logits.requires_grad_()
        loss = policy_loss(leaf, target, old, one, mask, clip_low=LOW, clip_high=clip_high).loss
        (gradient,) = torch.autograd.grad(loss, leaf)
        if not gradient.any():
            break
        logits = logits.detach() - step * gradient / gradient.abs().max()
    return now


def steps_to(end: float, p: float, clip_high: float, step: float = 1e-3) -> int:
    """Count the ascents of a token from p until its probability is `end`, each from where the last ended."""
    taken = 0
    while p < end:
        p, taken = ascend(p, clip_high, step), taken + 1
    return taken


def pushes(
    groups: Sequence[Group], normaliser: str = "token_mean", filtering: bool = False
) -> list[list[float]]:
    """Return Σ w · A over each sample's tokens, [group][sample], read off the gradient of the loss.

    The policy is uniform and has not moved: the gradient by a token's own logit is −w · A · (1 − 1/V).
    Advantages must be set.
    """
    objective = Objective.model_construct(normaliser=normaliser, overlong_filtering=filtering)
    weights = token_weights(groups, objective, LONGEST)
    return [
        [_push(sample.length, w, sample.advantage) for sample, w in zip(group.samples, ws, strict=True)]
        for group, ws in zip(groups, weights, strict=True)
    ]


def _push(length: int, weight: float, advantage: float) -> float:
    logits = torch.zeros(length, VOCAB, dtype=torch.float64, requires_grad=True)
    old = torch.full((length,), -math.log(VOCAB), dtype=torch.float64)
    targets, mask = torch.arange(length) % VOCAB, torch.ones(length, dtype=torch.bool)
    advantages, weights = (torch.full((length,), x, dtype=torch.float64) for x in (advantage, weight))
    clip = {"clip_low": LOW, "clip_high": HIGH}
    policy_loss(logits, targets, old, advantages, mask, weights=weights, **clip).loss.backward()
    assert logits.grad is not None
    if weight * advantage == 0:
        assert not logits.grad.any(), "no other logit has a gradient either"
    return -float(logits.grad[mask, targets].sum()) / (1 - 1 / VOCAB)


def weights_of(groups: Sequence[Group], normaliser: str) -> list[list[float]]:
    """Return every sample's weight: what its tokens are pushed with where all advantages are 1."""
    for group in groups:
        for sample in group.samples:
            sample.advantage = 1.0
    return pushes(groups, normaliser)


def kept_of(groups: Sequence[Group], is_dynamic: bool) -> list[Group]:
    """Return the groups that the buffer keeps, with advantages."""
    buffer = Buffer(len(groups), is_dynamic)
    buffer.fill(groups)
    set_advantages(buffer.kept)
    return buffer.kept


def punish(group: Group) -> Group:
    """Add the penalty of Eq. 13 to the group's rewards."""
    for sample in group.samples:
        sample.reward += soft_overlong_penalty(sample.length, BUDGET, CACHE)
    return group


def advantages_of(
    correct: Sequence[int], lengths: Sequence[int], estimator: str = "group_std"
) -> list[float]:
    """Return the advantages of a group by the reward of Eq. 7 and 13."""
    group = punish(make_group(correct, lengths))
    set_advantages([group], estimator)
    return [sample.advantage for sample in group.samples]
