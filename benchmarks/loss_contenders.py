"""The losses that policy_loss.py compares. Each turns hidden states and the LM head into the loss of Eq. 8,
log-probs and, where it can, entropy; peers are taken from their packages if those are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from dapo_kernels import linear_policy_loss, reference
from torch import Tensor

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


@dataclass
class Problem:
    """One minibatch: [T, H] hidden states, [V, H] head, and the loss's arguments per token."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    weights: Tensor

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of our losses, but for the logits."""
        tokens = {"targets": self.targets, "old_logprobs": self.old, "advantages": self.advantages}
        return tokens | {"mask": self.mask, "weights": self.weights} | CLIP


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem."""

    T: int
    H: int
    V: int
    masked: float = 0.0  # fraction of prompt tokens

    @property
    def name(self) -> str:
        return f"T {self.T}, H {self.H}, V {self.V}, {self.masked:.0%} masked"

    @property
    def floor_flops(self) -> float:
        """Operations of three matrix products over the tokens inside the mask."""
        return 3 * 2 * self.T * (1 - self.masked) * self.H * self.V


def make(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Problem:
    """Make inputs with logits of σ = 3, targets drawn from the softmax, and old log-probs so noisy that some
    tokens are clipped.
    """
    generator = torch.Generator(device).manual_seed(seed)
    randn = lambda *size: torch.randn(*size, generator=generator, device=device)  # noqa: E731
    hidden = randn(shape.T, shape.H).to(dtype)
    weight = (randn(shape.V, shape.H) * 3 / shape.H**0.5).to(dtype)
    targets = torch.empty(shape.T, dtype=torch.int64, device=device)
    logprobs = torch.empty(shape.T, device=device)
    for rows in torch.arange(shape.T, device=device).split(2048):
        scores = (hidden[rows] @ weight.t()).float().log_softmax(-1)
        targets[rows] = torch.multinomial(scores.exp(), 1, generator=generator)[:, 0]
        logprobs[rows] = scores.gather(-1, targets[rows, None])[:, 0]
    mask = torch.rand(shape.T, generator=generator, device=device) >= shape.masked
    weights = torch.full((shape.T,), 1 / max(int(mask.sum()), 1), device=device)
    old, advantages = logprobs + 0.3 * randn(shape.T), randn(shape.T)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    return Problem(*leaves, targets, old, advantages, mask, weights)


Result = tuple[Tensor, Tensor, Tensor | None]  # loss, log-probs [T], entropy [T]
Contender = Callable[[Problem], Result]


def loss_of(problem: Problem, logprobs: Tensor) -> Tensor:
    """Compute Eq. 8 from log-probs, for peers that stop there."""
    ratio = (logprobs - problem.old).exp()
    clipped = ratio.clamp(1 - CLIP["clip_low"], 1 + CLIP["clip_high"])
    losses = torch.maximum(-ratio * problem.advantages, -clipped * problem.advantages)
    return (losses * problem.weights * problem.mask).sum()


def ours(problem: Problem, **options: Any) -> Result:
    out = linear_policy_loss(problem.hidden, problem.weight, **problem.arguments, **options)
    return out.loss, out.logprobs, out.entropy


def plain(problem: Problem) -> Result:
    out = reference.policy_loss(problem.hidden @ problem.weight.t(), **problem.arguments)
    return out.loss, out.logprobs, out.entropy


def make_compiled() -> Contender:
    def step(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        scores = (hidden @ weight.t()).float().log_softmax(-1)
        with torch.no_grad():
            entropy = -(scores.exp() * scores).sum(-1)
        return scores.gather(-1, targets[:, None])[:, 0], entropy

    compiled = torch.compile(step, dynamic=True)

    def contender(problem: Problem) -> Result:
        logprobs, entropy = compiled(problem.hidden, problem.weight, problem.targets)
        return loss_of(problem, logprobs), logprobs, entropy

    return contender


def make_liger_scaled_ce() -> Contender:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction as Function,
    )

    def contender(problem: Problem) -> Result:
        targets = problem.targets.masked_fill(~problem.mask, -100)  # it skips ignored rows
        nll, entropy = Function.apply(problem.hidden, problem.weight, targets, 1.0, -100, 1, True)
        return loss_of(problem, -nll), -nll, entropy

    return contender


def make_liger_grpo() -> Contender:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28, loss_type="dapo", chunk_size=1
    )

    def contender(problem: Problem) -> Result:
        rows = 8  # it takes a padded batch [B, L]
        batch = lambda x: x.view(rows, -1, *x.shape[1:])  # noqa: E731
        loss, *_ = module(
            batch(problem.hidden),
            problem.weight,
            batch(problem.targets),
            batch(problem.mask).float(),
            problem.advantages[:rows],
            old_per_token_logps=batch(problem.old),
        )
        # one advantage a row, and no log-probs: timed, not compared
        return loss, torch.full_like(problem.old, torch.nan), None

    return contender


def make_verl() -> Contender:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def contender(problem: Problem) -> Result:
        logprobs, entropy = linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, 1.0, "none", None
        )
        return loss_of(problem, logprobs), logprobs, entropy

    return contender


def make_cce(filter_eps: str | None) -> Contender:
    from cut_cross_entropy import linear_cross_entropy

    def contender(problem: Problem) -> Result:
        nll = linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, reduction="none", filter_eps=filter_eps
        )
        return loss_of(problem, -nll), -nll, None

    return contender


def make_quack() -> Contender:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def contender(problem: Problem) -> Result:
        loss = chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="sum")
        # cross entropy and no more: what three products cost at best
        return loss, torch.full_like(problem.old, torch.nan), None

    return contender


def make_trl() -> Contender:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def contender(problem: Problem) -> Result:
        logits = problem.hidden @ problem.weight.t()
        logprobs = selective_log_softmax(logits, problem.targets)
        with torch.no_grad():
            entropy = entropy_from_logits(logits)
        return loss_of(problem, logprobs.float()), logprobs, entropy

    return contender


def contenders(
    on_gpu: bool, names: Collection[str] | None = None
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Return the losses that can run here, of these names if there are any, and why the others cannot."""
    makers: dict[str, Callable[[], Contender]] = {
        "dapo": lambda: ours,
        "dapo, fp32 logits": lambda: partial(ours, fp32_logits=True),
        "plain torch": lambda: plain,
        "torch.compile": make_compiled,
        "TRL": make_trl,
        "Liger GRPO (chunked)": make_liger_grpo,
    }
    if on_gpu:
        makers |= {
            "Liger scaled CE": make_liger_scaled_ce,
            "verl linear_cross_entropy": make_verl,
            "CCE": lambda: make_cce("high"),
            "quack (cross entropy only)": make_quack,
            "CCE, exact": lambda: make_cce(None),
        }
    ready, absent = {}, {}
    for name, maker in makers.items():
        if names is not None and name not in names:
            continue
        try:
            ready[name] = maker()
        except (ImportError, RuntimeError) as error:
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return ready, absent
