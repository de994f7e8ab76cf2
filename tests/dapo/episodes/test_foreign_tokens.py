"""Tokens that the policy did not write: no gradient, no weight and no metric is theirs.

The loss of two-turn samples is written by hand on the policy's tokens alone, in float64.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dapo_kernels import Head, Sequences, reference
from torch import Tensor

from dapo import config as configs
from dapo import mesh as meshes
from dapo.learn.batch import Microbatch, shares
from dapo.learn.objective import importance
from dapo.policy.megatron import Policy
from dapo.policy.schedule import on_device
from dapo.policy.support import mass_above, mass_beyond
from dapo.report import samples
from dapo.types import Group, Prompt, Sample
from tests import batches
from tests.conftest import make_config
from tests.dapo.policy.test_megatron import one_rank, params

ROOT = Path(__file__).parents[3]
VOCAB, HIDDEN, VERSION = 20, 6, 1
OBJECTIVES = [
    {"importance": kind, "importance_of": of}
    for kind in ("none", "tis", "band", "sequence_mask")
    for of in ("stale", "all")
    if (kind, of) != ("none", "all")  # which is refused
]


def make_groups(foreign: float = float("nan"), seed: int = 1, tool_seed: int = 1) -> list[Group]:
    """Two groups of three samples: turn, tool's answer, turn, …. Older weights wrote the first turns.

    `foreign`: behavior log-prob of the tools' tokens, which `tool_seed` chooses.
    """
    rng, tool = np.random.default_rng(seed), np.random.default_rng(tool_seed)
    groups = []
    for id in range(2):
        group = Group(id, Prompt(id, rng.integers(0, VOCAB, 3).astype(np.int32), "1"))
        for index in range(3):
            lengths = rng.integers(2, 7, 3 + 2 * (index == 2)).tolist()
            mask = np.concatenate([np.full(n, i % 2 == 0) for i, n in enumerate(lengths)])
            tokens = rng.integers(0, VOCAB, len(mask))
            tokens[~mask] = tool.integers(0, VOCAB, int((~mask).sum()))
            logprobs = np.where(mask, -3 + rng.normal(0, 0.4, len(mask)), foreign).astype(np.float32)
            ends = np.cumsum([0, *lengths]).tolist()
            versions = tuple(
                (VERSION - (i == 0), start, end)
                for i, (start, end) in enumerate(itertools.pairwise(ends))
                if i % 2 == 0
            )
            sample = Sample(id, index, tokens.astype(np.int32), logprobs, mask, versions, "stop")
            sample.advantage = float(np.float32(rng.normal()))
            group.samples.append(sample)
        groups.append(group)
    return groups


# --- the loss by hand ---


class Model(torch.nn.Module):
    """Logits from the mean of the embeddings so far; without context from the place alone."""

    def __init__(self, has_context: bool, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.has_context = has_context
        rows = VOCAB if has_context else 100
        self.embedding = torch.nn.Parameter(torch.randn(rows, HIDDEN, dtype=torch.float64))
        self.inner = torch.nn.Parameter(torch.randn(HIDDEN, HIDDEN, dtype=torch.float64))
        self.head = torch.nn.Parameter(torch.randn(VOCAB, HIDDEN, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [n] of one sequence → logits [n, V]."""
        places = torch.arange(len(tokens))
        hidden = self.embedding[tokens if self.has_context else places]
        if self.has_context:
            hidden = hidden.cumsum(0) / (places[:, None] + 1)
        return (hidden @ self.inner).tanh() @ self.head.t()

    def nudged(self) -> Model:
        """Another one nearby: the policy before the updates."""
        other = Model(self.has_context)
        with torch.no_grad():
            for own, param in zip(other.parameters(), self.parameters(), strict=True):
                own.copy_(param + 0.1 * torch.randn_like(param))
        return other


def by_hand(model: Model, old: Model, groups: list[Group], objective: configs.Objective) -> Tensor:
    """Sum over policy tokens, one by one, of Eq. 8 over their number, with their importance."""
    total = sum(int(sample.loss_mask.sum()) for group in groups for sample in group.samples)
    loss = torch.zeros((), dtype=torch.float64)
    low, high = objective.importance_band
    for group, sample in [(g, sample) for g in groups for sample in g.samples]:
        whole = torch.tensor([*group.prompt.tokens.tolist(), *sample.tokens.tolist()])
        logprobs, before = model(whole[:-1]).log_softmax(-1), old(whole[:-1]).log_softmax(-1).detach()
        first = len(group.prompt.tokens)
        stale = [True] * sample.versions[0][2] + [False] * sample.length  # the first turn
        places = [i for i in range(sample.length) if sample.loss_mask[i]]
        gaps = {
            i: float(before[first + i - 1, whole[first + i]]) - float(sample.behavior_logprobs[i])
            for i in places
            if objective.importance_of == "all" or stale[i]
        }
        mean = np.exp(np.mean(list(gaps.values())))
        for i in places:
            at = first + i - 1, whole[first + i]
            ratio = (logprobs[at] - before[at]).exp()
            clipped = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
            rho, weight = np.exp(gaps.get(i, 0.0)), 1.0
            if objective.importance == "tis" and i in gaps:
                weight = min(rho, objective.importance_cap)
            elif objective.importance == "band" and i in gaps:
                weight = rho if low <= rho <= high else 0.0
            elif objective.importance == "sequence_mask":
                weight = float(low <= mean <= high)
            loss = loss - weight * torch.min(ratio * sample.advantage, clipped * sample.advantage) / total
    return loss


def by_batch(model: Model, old: Model, groups: list[Group], config: configs.Config) -> Tensor:
    """The same through microbatches, importance and the loss that every kernel is tested against."""
    objective = config.objective
    [planned] = batches.plan(groups, config, 1, {}, VERSION)
    [minibatch] = planned.minibatches
    loss = torch.zeros((), dtype=torch.float64)
    for packed in minibatch:
        m: Microbatch[Tensor] = on_device(packed, torch.device("cpu"))
        sizes = m.cu_seqlens.diff().tolist()
        logits, before = (torch.cat([f(part) for part in m.tokens.split(sizes)]) for f in (model, old))
        scored = reference.logprobs(before, m.targets, m.loss_mask)
        corrected = m.loss_mask if objective.importance_of == "all" else m.loss_mask & m.is_stale
        weights = importance(
            scored, m.behavior_logprobs.double(), corrected, objective, Sequences(m.cu_seqlens).means
        )
        weights = weights if objective.importance != "none" else torch.ones_like(weights)
        assert weights.isfinite().all()
        loss = loss + reference.policy_loss(
            logits, m.targets, scored, m.advantages, m.loss_mask,
            weights=(m.token_weights * weights).double(),
            clip_low=objective.clip_low, clip_high=objective.clip_high,
        ).loss  # fmt: skip
    return loss


def gradients(model: Model, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference over the largest value, of all tensors."""
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


def config_of(folder: Path, **objective: Any) -> configs.Config:
    settings = [f"objective.{name}={value}" for name, value in objective.items()]
    return make_config(folder, "optim.prompts_per_minibatch=2", "policy.tokens_per_microbatch=48", *settings)


@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda o: "-".join(o.values()))
def test_gradients_are_those_of_the_policys_tokens_alone(tmp_path: Path, options: dict[str, str]) -> None:
    config, model = config_of(tmp_path, **options), Model(has_context=True)
    old, groups = model.nudged(), make_groups()
    assert sum(len(m) for m in batches.plan(groups, config, 1, {}, VERSION)[0].minibatches) > 1
    hand, batch = by_hand(model, old, groups, config.objective), by_batch(model, old, groups, config)
    assert float(batch) == pytest.approx(float(hand), rel=1e-6) != 0
    expected = gradients(model, hand)
    assert all(g.isfinite().all() for g in expected)
    assert difference(gradients(model, batch), expected) <= 1e-6


def test_a_mask_that_is_wrong_by_a_token_is_seen(tmp_path: Path) -> None:
    config, model = config_of(tmp_path, importance="none"), Model(has_context=True)
    old, groups = model.nudged(), make_groups(foreign=-3.0)
    expected = gradients(model, by_hand(model, old, groups, config.objective))
    mask = groups[0].samples[0].loss_mask
    mask[mask.argmin()] = True  # one of the tool's tokens
    assert difference(gradients(model, by_batch(model, old, groups, config)), expected) > 1e-3


def test_a_tools_tokens_reach_gradients_through_the_context_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path, importance="tis", importance_of="all")
    one, other = make_groups(tool_seed=1), make_groups(tool_seed=2)
    samples = zip(one[0].samples, other[0].samples, strict=True)
    assert all(not np.array_equal(a.tokens, b.tokens) for a, b in samples)
    for has_context in (False, True):
        model = Model(has_context)
        old = model.nudged()
        first, second = (gradients(model, by_batch(model, old, groups, config)) for groups in (one, other))
        if has_context:
            hand = gradients(model, by_hand(model, old, other, config.objective))
            assert difference(first, second) > 1e-3 and difference(second, hand) <= 1e-6
        else:
            assert all(map(torch.equal, first, second))


# --- every reader of the engine's log-probs ---


@pytest.fixture(scope="module")
def policy() -> Iterator[Policy]:
    config = configs.load(ROOT / "examples/arithmetic/config.yaml", ["rollout.dump_share=1.0"])
    with one_rank():
        yield Policy(config, meshes.Mesh(config.parallel))


@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda o: "-".join(o.values()))
def test_log_probs_of_foreign_tokens_are_read_by_nobody(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Neither metrics nor weights, traces and gradients know what stands there; also those of a probe."""
    wide = options | {"importance_band": (1e-9, 1e9)}  # so that nothing is left out
    objective = policy.config.objective.model_copy(update=wide)
    config = policy.config.model_copy(update={"objective": objective})
    monkeypatch.setattr(policy, "config", config)
    found = []
    for foreign in (0.0, float("nan")):
        groups, probe = make_groups(foreign), make_groups(foreign, seed=7)
        [batch] = batches.batches_of(shares(groups, config, 1, {}, VERSION, probe), config)
        placed = policy.place(batch)
        scored = policy.score(placed)
        [minibatch] = placed.minibatches
        weights = [microbatch.scores.importance for microbatch in minibatch if microbatch.scores]
        sums = policy.backward(minibatch)
        grads = [param.main_grad.clone() for param in params(policy).values()]  # type: ignore[attr-defined]
        traces = policy.take_traces()
        assert len(traces) == 6 and sums["learnt"] > 0
        for trace, sample in zip(traces, (s for group in groups for s in group.samples), strict=True):
            assert not trace.old_logprobs[~sample.loss_mask].any() and trace.logprobs.any()
        seen = [
            torch.from_numpy(values) for trace in traces for values in (trace.old_logprobs, trace.logprobs)
        ]
        found.append((scored, sums, [*weights, *grads, *seen]))
    (scored, sums, tensors), (scored_nan, sums_nan, tensors_nan) = found
    assert {"policy/mismatch", "policy/mismatch_probe", "policy/mismatch_p99"} < scored.keys()
    assert scored == scored_nan and sums == sums_nan
    assert all(map(torch.equal, tensors, tensors_nan)) and all(t.isfinite().all() for t in tensors)
    assert any(gradient.any() for gradient in grads)


def test_the_support_of_foreign_tokens_is_not_measured() -> None:
    torch.manual_seed(1)
    head = Head(weight=torch.randn(VOCAB, HIDDEN), temperature=1.0)
    hidden, targets = torch.randn(9, HIDDEN), torch.randint(0, VOCAB, (9,))
    mask = torch.arange(9) % 3 > 0
    broken = torch.where(mask[:, None], hidden, torch.nan)
    for found, plain in (
        (mass_above(head, broken, targets, mask), mass_above(head, hidden, targets, mask)),
        (mass_beyond(head, broken, mask, 0.3), mass_beyond(head, hidden, mask, 0.3)),
    ):
        assert torch.equal(found, plain) and not found[~mask].any() and found[mask].any()


def test_the_report_shows_nothing_of_foreign_log_probs() -> None:
    group = make_groups()[0]
    sample = group.samples[0]
    tokenizer = SimpleNamespace(pieces=lambda tokens: ["x"] * len(tokens))
    row = {
        name: getattr(sample, name)
        for name in ("index", "is_correct", "finish_reason", "reward", "advantage")
    }
    row |= {
        "tokens": sample.tokens,
        "behavior_logprobs": sample.behavior_logprobs,
        "loss_mask": sample.loss_mask,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = samples._describe_sample(row | {"conversation": None, "trace": None}, tokenizer)  # type: ignore[arg-type]
    assert [s == 0 for s in shown["surprise"]] == (~sample.loss_mask).tolist()
    assert 0 < shown["probability"] < 1
