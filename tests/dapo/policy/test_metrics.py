"""Sums of microbatches, and the metrics made of them."""

from __future__ import annotations

import pytest
import torch
from dapo_kernels import PolicyLoss

from dapo.policy import metrics


def make_loss(num_tokens: int, seed: int = 0) -> tuple[PolicyLoss, torch.Tensor]:
    """Return a loss of so many tokens and its mask; outside the mask are zeros, as the kernel leaves them."""
    torch.manual_seed(seed)
    mask = torch.rand(num_tokens) < 0.7
    logprobs, entropy = -torch.rand(num_tokens) * mask, torch.rand(num_tokens) * mask
    low, high = ((torch.rand(num_tokens) < 0.3) & mask for _ in range(2))
    return PolicyLoss(torch.randn(()), logprobs, entropy, low, high), mask


def test_a_rank_that_reports_nothing_contributes_zeros_under_the_same_names() -> None:
    assert metrics.update_sums() == dict.fromkeys(metrics.update_sums(*make_loss(9)), 0.0)
    scored = metrics.score_sums(torch.zeros(4), torch.ones(3), torch.ones(1), cap=2.0)
    assert metrics.score_sums() == dict.fromkeys(scored, 0.0)


def test_the_sums_of_microbatches_are_those_of_the_whole() -> None:
    losses = [make_loss(9, seed=1), make_loss(30, seed=2)]
    whole = PolicyLoss(
        sum(out.loss for out, _ in losses),
        *(
            torch.cat([getattr(out, name) for out, _ in losses])
            for name in ("logprobs", "entropy", "clipped_low", "clipped_high")
        ),
    )
    mask = torch.cat([mask for _, mask in losses])
    total = metrics.total([metrics.update_sums(), *(metrics.update_sums(*loss) for loss in losses)])
    assert total == pytest.approx(metrics.update_sums(whole, mask))
    values = metrics.update_metrics(total)
    assert values["policy/entropy"] == pytest.approx(float(whole.entropy[mask].mean()))
    assert values["policy/clip_high"] == pytest.approx(float(whole.clipped_high[mask].float().mean()))


def test_a_minibatch_without_response_tokens_has_metrics_of_zero() -> None:
    assert set(metrics.update_metrics(metrics.update_sums()).values()) == {0.0}


def test_scores_are_summed_over_current_and_stale_tokens_apart() -> None:
    old = torch.tensor([-1.0, float("nan"), -2.0])
    sums = metrics.score_sums(old, gap=torch.tensor([0.5]), importance=torch.tensor([2.0, 0.5]), cap=2.0)
    assert sums == {
        "broken": 1, "current": 1, "gap": 0.5, "stale": 2, "importance": 2.5, "importance_cut": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("gap", "importance", "expected"),
    [
        ([0.5, 1.5], [], {"policy/mismatch": 1.0, "policy/mismatch_max": 1.5}),
        ([], [0.5, 2.0], {"policy/importance": 1.25, "policy/importance_cut": 0.5}),
        ([], [], {}),
    ],
)
def test_metrics_of_scores_are_those_of_the_tokens_there_are(gap, importance, expected) -> None:
    sums = metrics.score_sums(torch.zeros(2), torch.tensor(gap), torch.tensor(importance), cap=2.0)
    assert metrics.score_metrics(sums, max(gap, default=0.0)) == expected


def test_a_metric_is_a_sum_and_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, values = metrics.update_sums, metrics.update_metrics
    monkeypatch.setattr(metrics, "update_sums", lambda *x: sums(*x) | {"toy": 2 * sums(*x)["tokens"]})
    monkeypatch.setattr(
        metrics, "update_metrics", lambda x: values(x) | {"policy/toy": x["toy"] / x["tokens"]}
    )
    rows = [metrics.update_sums(), metrics.update_sums(*make_loss(9)), metrics.update_sums(*make_loss(5))]
    assert metrics.update_metrics(metrics.total(rows))["policy/toy"] == 2.0
