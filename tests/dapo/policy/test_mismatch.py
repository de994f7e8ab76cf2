"""Mismatch by position and log-prob: as counted token by token, and the same however a batch is split."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from dapo.policy import mismatch
from dapo.policy.schedule import on_device
from dapo.types import Group
from tests.batches import plan
from tests.conftest import make_config, make_group

CPU = torch.device("cpu")


def random_tokens(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gap, behavior log-prob and position of tokens in every bucket, and on every bucket's edge."""
    rng = np.random.default_rng(seed)
    gap = 10.0 ** rng.uniform(-9, 2, count)
    behavior = np.concatenate([mismatch.LOGPROBS, -(10.0 ** rng.uniform(-3, 1.5, count))])[:count]
    positions = np.concatenate([mismatch.POSITIONS, (10.0 ** rng.uniform(0, 5, count)).astype(int)])[:count]
    return torch.tensor(gap).float(), torch.tensor(behavior).float(), torch.tensor(positions).long()


def by_bucket(gap: np.ndarray, behavior: np.ndarray, positions: np.ndarray) -> dict[str, list[float]]:
    """The gaps of each bucket, token by token."""
    found = defaultdict(list)
    for distance, logprob, position in zip(gap.tolist(), behavior.tolist(), positions.tolist(), strict=True):
        first = max(edge for edge in mismatch.POSITIONS if edge <= position)
        bound = min(edge for edge in mismatch.LOGPROBS if np.float32(edge) >= np.float32(logprob))
        found[f"at_{first}"].append(distance)
        found[f"logprob_{bound:g}"].append(distance)
        found[""].append(distance)
    return found


def expected_metrics(found: dict[str, list[float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Means, and exact tails."""
    means = {f"policy/mismatch_{name}": float(np.mean(gaps)) for name, gaps in found.items() if name}
    tails = {
        f"policy/mismatch_p99{name and '_' + name}": sorted(gaps)[int(np.ceil(0.99 * len(gaps))) - 1]
        for name, gaps in found.items()
    }
    return means, tails


def test_means_and_tails_are_those_of_each_buckets_tokens() -> None:
    gap, behavior, positions = random_tokens(20_000)
    found = by_bucket(gap.numpy(), behavior.numpy(), positions.numpy())
    assert len(found) == 1 + mismatch.ROWS, "every bucket has tokens"
    means, tails = expected_metrics(found)
    metrics = mismatch.metrics(mismatch.table(gap, behavior, positions).numpy())
    assert {name: metrics.pop(name) for name in means} == pytest.approx(means)
    assert metrics == pytest.approx({name: min(gap, 32.0) for name, gap in tails.items()}, rel=0.1)


def test_tables_add_up() -> None:
    tokens = random_tokens(500)
    parts = [mismatch.table(*(values[part] for values in tokens)) for part in (slice(200), slice(200, None))]
    torch.testing.assert_close(mismatch.blank(CPU) + sum(parts), mismatch.table(*tokens))


def test_without_tokens_there_is_no_metric() -> None:
    assert torch.equal(mismatch.table(*(values[:0] for values in random_tokens(1))), mismatch.blank(CPU))
    assert mismatch.metrics(mismatch.blank(CPU).numpy()) == {}
    one = mismatch.metrics(mismatch.table(*(values[:1] for values in random_tokens(1))).numpy())
    assert set(one) == {
        f"policy/mismatch{name}"
        for name in ("_p99", "_at_0", "_p99_at_0", "_logprob_0", "_p99_logprob_0")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([0.0] * 3, 0.0),
        ([1e-9] * 3, 0.0),
        ([0.01] * 98 + [1.0] * 2, 1.0),
        ([0.01] * 99 + [1.0], 0.01),
        ([100.0], 32.0),
        ([float("inf")], 32.0),
    ],
)
def test_a_tail_is_what_one_token_of_a_hundred_exceeds(gaps: list[float], expected: float) -> None:
    gap = torch.tensor(gaps)
    found = mismatch.metrics(mismatch.table(gap, -torch.ones(len(gap)), torch.zeros(len(gap)).long()).numpy())
    assert found["policy/mismatch_p99"] == pytest.approx(expected, rel=0.1)
    assert (
        found["policy/mismatch_p99_logprob_-1"]
        == found["policy/mismatch_p99_at_0"]
        == (found["policy/mismatch_p99"])
    )


@pytest.mark.parametrize("context", [1, 2, 4])
def test_context_ranks_find_the_same_as_one_rank(tmp_path: Path, context: int) -> None:
    """Of every token, at its own place; prompts, padding, foreign and stale tokens are left out."""
    groups = make_groups()
    samples = [sample for group in groups for sample in group.samples]
    fresh = [sample.loss_mask & (np.arange(sample.length) >= sample.versions[-1][1]) for sample in samples]
    everything = [
        [toy_gap(sample.tokens)[is_fresh], sample.behavior_logprobs[is_fresh], np.flatnonzero(is_fresh)]
        for sample, is_fresh in zip(samples, fresh, strict=True)
    ]
    found = by_bucket(*map(np.concatenate, zip(*everything, strict=True)))
    assert {"at_0", "at_16", "at_64", "at_256"} < set(found)
    means, tails = expected_metrics(found)

    total = mismatch.blank(CPU)
    options = f"parallel.context={context}", "policy.tokens_per_microbatch=1000"
    for batch in plan(groups, make_config(tmp_path, *options), 1, {}, version=1):
        for shard in (m for minibatch in batch.minibatches for m in minibatch):
            m = on_device(shard, CPU)
            counts = m.loss_mask & ~m.is_stale
            positions = mismatch.response_positions(m, context)[counts]
            gap = torch.from_numpy(toy_gap(shard.targets))[counts]
            total += mismatch.table(gap, m.behavior_logprobs[counts], positions)
    metrics = mismatch.metrics(total.numpy())
    assert {name: metrics.pop(name) for name in means} == pytest.approx(means)
    assert metrics == pytest.approx(tails, rel=0.1)


def make_groups() -> list[Group]:
    groups = [
        make_group([1, 0], lengths, id=i, prompt_length=prompt)
        for i, (lengths, prompt) in enumerate([([300, 17], 5), ([64, 3], 90), ([1, 129], 1), ([40, 65], 33)])
    ]
    groups[0].samples[0].loss_mask[3:30] = False  # a tool's
    groups[1].samples[0].versions = ((0, 0, 20), (1, 20, 64))
    for group in groups:
        for sample in group.samples:
            if len(sample.versions) == 1:
                sample.versions = ((1, 0, sample.length),)
    return groups


def toy_gap(targets: np.ndarray) -> np.ndarray:
    """A distance that the token alone decides."""
    return (targets % 1000 / 1000).astype(np.float32)
