"""Sums of microbatches, and the metrics made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dapo_kernels import PolicyLoss, Tokens, policy_loss

from dapo.policy import metrics


def make_loss(num_tokens: int, seed: int = 0) -> tuple[PolicyLoss, Tokens]:
    """Return a loss of so many tokens and its arguments; outside the mask are zeros, as the kernel leaves
    them.
    """
    torch.manual_seed(seed)
    mask = torch.rand(num_tokens) < 0.7
    logprobs, entropy = -torch.rand(num_tokens) * mask, torch.rand(num_tokens) * mask
    low, high = ((torch.rand(num_tokens) < 0.3) & mask for _ in range(2))
    weights = torch.rand(num_tokens) * (torch.rand(num_tokens) < 0.8)
    tokens = Tokens(mask.long(), mask, -torch.rand(num_tokens), torch.randn(num_tokens), weights)
    return PolicyLoss(torch.randn(()), logprobs, entropy, low, high), tokens


def joined(losses: list[tuple[PolicyLoss, Tokens]]) -> tuple[PolicyLoss, Tokens]:
    def together(parts: list[Any], *names: str) -> list[torch.Tensor]:
        return [torch.cat([getattr(part, name) for part in parts]) for name in names]

    outs, tokens = map(list, zip(*losses, strict=True))
    fields = together(outs, "logprobs", "entropy", "clipped_low", "clipped_high")
    arguments = together(tokens, "targets", "mask", "old_logprobs", "advantages", "weights")
    return PolicyLoss(sum(out.loss for out in outs), *fields), Tokens(*arguments)


def taken(sums: metrics.Sums, grad_norm: float = 2.0) -> metrics.Sums:
    return sums | {"taken": 1.0, "grad_norm": grad_norm, "lr": 0.5}


def test_a_rank_that_reports_nothing_contributes_zeros_under_the_same_names() -> None:
    assert metrics.update_sums() == dict.fromkeys(metrics.update_sums(*make_loss(9)), 0.0)
    bounded = metrics.update_sums(*make_loss(9), dual_clip=3.0)
    assert metrics.update_sums(dual_clip=3.0) == dict.fromkeys(bounded, 0.0)
    scored = metrics.score_sums(torch.zeros(4), torch.ones(3), torch.ones(1))
    assert metrics.score_sums() == dict.fromkeys(scored, 0.0)


def test_the_sums_of_microbatches_are_those_of_the_whole() -> None:
    losses = [make_loss(9, seed=1), make_loss(30, seed=2)]
    out, tokens = joined(losses)
    total = metrics.total([metrics.update_sums(), *(metrics.update_sums(*loss) for loss in losses)])
    assert total == pytest.approx(metrics.update_sums(out, tokens))
    values, weighed = metrics.update_metrics(total), tokens.mask & (tokens.weights > 0)
    assert 0 < weighed.sum() < tokens.mask.sum()
    assert values["policy/entropy"] == pytest.approx(float(out.entropy[tokens.mask].mean()))
    assert values["policy/probability"] == pytest.approx(float(out.logprobs[tokens.mask].exp().mean()))
    for name in ("clip_low", "clip_high"):
        clipped = getattr(out, name.replace("clip", "clipped"))[weighed]
        assert values[f"policy/{name}"] == pytest.approx(float(clipped.float().mean()))


def test_tokens_of_all_updates_of_a_step_count_alike() -> None:
    losses = [make_loss(9, seed=1), make_loss(90, seed=2)]
    first, second = (metrics.update_sums(*loss) for loss in losses)
    values = metrics.step_metrics([taken(first), taken(second, grad_norm=5.0)])
    of_the_whole = metrics.update_metrics(metrics.update_sums(*joined(losses)))
    assert {name: values[name] for name in of_the_whole} == pytest.approx(of_the_whole)
    assert values["policy/loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
    assert (values["policy/grad_norm"], values["policy/lr"], values["policy/updates_skipped"]) == (
        3.5,
        0.5,
        0,
    )


def test_the_probability_of_clipped_tokens_is_theirs_alone() -> None:
    """An update that clips nothing, as the first one does, changes nothing of it."""
    mask, zeros, no = torch.ones(4, dtype=torch.bool), torch.zeros(4), torch.zeros(4, dtype=torch.bool)
    tokens = Tokens(mask.long(), mask, zeros, zeros + 1, weights=zeros + 1)
    logprobs = torch.tensor([0.25, 0.75, 0.5, 0.5]).log()
    high = torch.tensor([True, True, False, False])
    first = metrics.update_sums(PolicyLoss(torch.zeros(()), logprobs, zeros, no, no), tokens)
    second = metrics.update_sums(PolicyLoss(torch.zeros(()), logprobs, zeros, no, high), tokens)
    values = metrics.step_metrics([taken(first), taken(second)])
    assert values["policy/clip_high_probability"] == pytest.approx(0.5)
    assert (values["policy/clip_high"], values["policy/clip_low"]) == (0.25, 0.0)
    assert "policy/clip_high_probability" not in metrics.step_metrics([taken(first)])


def test_tokens_without_weight_are_not_counted_as_clipped() -> None:
    mask, zeros = torch.ones(4, dtype=torch.bool), torch.zeros(4)
    tokens = Tokens(mask.long(), mask, zeros, zeros - 1, weights=torch.tensor([0.0, 0.5, 0.0, 0.5]))
    clipped = torch.tensor([True, True, False, False])
    sums = metrics.update_sums(PolicyLoss(torch.zeros(()), zeros, zeros, clipped, clipped), tokens)
    assert (sums["clipped_low"], sums["clipped_high"], sums["clipped_high_probability"]) == (1, 1, 1)
    assert metrics.update_metrics(sums)["policy/clip_low"] == 0.5


def test_learnt_tokens_have_a_weight_and_an_advantage_of_either_sign() -> None:
    mask, zeros, no = torch.ones(6, dtype=torch.bool), torch.zeros(6), torch.zeros(6, dtype=torch.bool)
    advantages = torch.tensor([-1.0, 0.0, 0.0, 0.0, 1.0, -1.0])
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    tokens = Tokens(mask.long(), mask, zeros, advantages, weights)
    assert metrics.update_sums(PolicyLoss(torch.zeros(()), zeros, zeros, no, no), tokens)["learnt"] == 2


def test_tokens_at_the_dual_clip_are_counted() -> None:
    """Those with A < 0 and a ratio above it: the loss no longer grows, so they have no gradient."""
    mask = torch.tensor([True, True, True, True, False])
    logprobs = torch.tensor([3.1, 2.9, 3.1, 3.1, 3.1]).log()
    advantages = torch.tensor([-1.0, -1.0, 1.0, -1.0, -1.0])
    weights, no = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]), torch.zeros(5, dtype=torch.bool)
    out = PolicyLoss(torch.zeros(()), logprobs, torch.zeros(5), no, no)
    tokens = Tokens(mask.long(), mask, torch.zeros(5), advantages, weights)
    sums = metrics.update_sums(out, tokens, dual_clip=3.0)
    assert metrics.update_metrics(sums)["policy/dual_clip"] == pytest.approx(1 / 3)
    assert "policy/dual_clip" not in metrics.update_metrics(metrics.update_sums(out, tokens))


def test_the_tokens_at_the_dual_clip_are_those_whose_gradient_it_removes() -> None:
    torch.manual_seed(0)
    logits = torch.randn(60, 4, dtype=torch.float64, requires_grad=True)
    targets, mask = torch.randint(0, 4, (60,)), torch.rand(60) < 0.8
    old, advantages = -3 * torch.rand(60, dtype=torch.float64) - 1, torch.randn(60, dtype=torch.float64)
    weights = torch.rand(60, dtype=torch.float64)
    bounds = dict(clip_low=0.2, clip_high=0.28)

    def zero_gradients(**options: float) -> int:
        out = policy_loss(logits, targets, old, advantages, mask, weights=weights, **bounds, **options)
        (gradient,) = torch.autograd.grad(out.loss, logits)
        return int((gradient[mask].abs().sum(1) == 0).sum())

    out = policy_loss(logits, targets, old, advantages, mask, weights=weights, **bounds, dual_clip=2.0)
    sums = metrics.update_sums(out, Tokens(targets, mask, old, advantages, weights), dual_clip=2.0)
    assert 0 < sums["dual_clipped"] == zero_gradients(dual_clip=2.0) - zero_gradients()


def test_an_update_without_tokens_or_none_at_all_has_no_means() -> None:
    assert metrics.update_metrics(metrics.update_sums()) == {}
    assert metrics.step_metrics([]) == {}
    skipped = metrics.update_sums() | {"taken": 0.0, "grad_norm": 0.0, "lr": 0.0}
    assert metrics.step_metrics([skipped, skipped]) == {"policy/updates_skipped": 2}


def test_an_update_that_was_skipped_has_no_part_in_loss_norm_and_learning_rate() -> None:
    sums = metrics.update_sums(*make_loss(9))
    skipped = sums | {"learnt": 0.0, "loss": 0.0, "taken": 0.0, "grad_norm": 0.0, "lr": 0.0}
    values = metrics.step_metrics([taken(sums), skipped])
    assert values["policy/updates_skipped"] == 1
    assert values["policy/loss"] == sums["loss"]
    assert (values["policy/grad_norm"], values["policy/lr"]) == (2.0, 0.5)


def test_scores_are_summed_over_current_and_corrected_tokens_apart() -> None:
    old = torch.tensor([-1.0, float("nan"), -2.0])
    weights, cut = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([True, False])
    sums = metrics.score_sums(old, torch.tensor([0.5]), weights, weights[1:], cut)
    assert sums == {
        "broken": 1, "current": 1, "gap": 0.5, "tokens": 3, "importance": 3.5, "importance_squared": 5.25,
        "corrected": 2, "corrected_importance": 2.5, "importance_cut": 1, "probe_tokens": 0, "probe_gap": 0,
    }  # fmt: skip
    probe = metrics.score_sums(old[:1], probe=torch.tensor([0.5, 0.25]))
    assert probe == dict.fromkeys(sums, 0.0) | {"probe_tokens": 2, "probe_gap": 0.75}


@pytest.mark.parametrize(
    ("gap", "importance", "expected"),
    [
        ([0.5, 1.5], [], {"policy/mismatch": 1.0, "policy/mismatch_max": 1.5}),
        (
            [],
            [0.5, 2.0],
            {"policy/importance": 1.25, "policy/importance_cut": 0.5, "policy/ess": 2.5**2 / (2 * 4.25)},
        ),
        (
            [1.0, 1.0],
            [0.5, 0.5],
            {
                "policy/mismatch": 1.0, "policy/mismatch_max": 1.0, "policy/importance": 0.5,
                "policy/importance_cut": 0.0, "policy/ess": 9 / (4 * 2.5),
            },
        ),
        ([], [0.0], {"policy/importance": 0.0, "policy/importance_cut": 0.0, "policy/ess": 0.0}),
        ([], [], {}),
    ],
)  # fmt: skip
def test_metrics_of_scores_are_those_of_the_tokens_there_are(gap, importance, expected) -> None:
    corrected = torch.tensor(importance)
    weights = torch.cat([corrected, torch.ones(len(gap))])
    sums = metrics.score_sums(torch.zeros(2), torch.tensor(gap), weights, corrected, corrected >= 2.0)
    assert metrics.score_metrics(sums, max(gap, default=0.0)) == expected


def test_a_metric_is_a_sum_and_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, values = metrics.update_sums, metrics.update_metrics
    monkeypatch.setattr(
        metrics, "update_sums", lambda *x, **y: sums(*x, **y) | {"toy": 2 * sums(*x)["tokens"]}
    )
    monkeypatch.setattr(
        metrics, "update_metrics", lambda x: values(x) | {"policy/toy": x["toy"] / x["tokens"]}
    )
    rows = [metrics.update_sums(), metrics.update_sums(*make_loss(9)), metrics.update_sums(*make_loss(5))]
    assert metrics.update_metrics(metrics.total(rows))["policy/toy"] == 2.0
