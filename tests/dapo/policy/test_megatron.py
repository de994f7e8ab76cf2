"""The policy of one rank: what it refuses, what an update leaves alone, and the metrics of a step."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dapo import config as configs
from dapo import mesh as meshes
from dapo.learn.advantages import set_advantages
from dapo.learn.batch import shares
from dapo.policy.megatron import PlacedBatch, Policy, PolicyError
from dapo.policy.metrics import step_metrics
from dapo.types import Group, Prompt, Sample
from tests import batches

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def config() -> configs.Config:
    overrides = ["rollout.prompts_per_step=4", "optim.prompts_per_minibatch=2", "optim.weight_decay=0.1"]
    return configs.load(ROOT / "examples/arithmetic/config.yaml", overrides)


@pytest.fixture(scope="module")
def shared(config: configs.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    with one_rank():
        yield Policy(config, meshes.Mesh(config.parallel))


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """In the root, as the only rank of a run, which is over in the end."""
    from megatron.core import parallel_state  # after dapo.policy, which adapts it

    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
    with pytest.MonkeyPatch.context() as environment:
        environment.chdir(ROOT)
        for name, value in (alone | {"MASTER_ADDR": "127.0.0.1"}).items():
            environment.setenv(name, value)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
            atexit.unregister(dist.destroy_process_group)
            meshes._connect.cache_clear()


@pytest.fixture
def policy(shared: Policy) -> Iterator[Policy]:
    """The policy; its parameters and moments are put back after each test."""
    before = {name: param.detach().clone() for name, param in params(shared).items()}
    yield shared
    for name, param in params(shared).items():
        param.data.copy_(before[name])
    for state in shared.optimizer.chained_optimizers[0].optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
    shared.optimizer.reload_model_params()


def params(policy: Policy) -> dict[str, torch.Tensor]:
    return dict(policy.chunks[0].named_parameters())


def state_of(policy: Policy) -> list[torch.Tensor]:
    """Return copies of all that an update changes: parameters and moments."""
    states = policy.optimizer.chained_optimizers[0].optimizer.state.values()
    moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().clone() for tensor in [*params(policy).values(), *moments]]


def make_groups(rewards: list[list[float]], seed: int = 0) -> list[Group]:
    """Groups of random responses with these rewards."""
    rng = np.random.default_rng(seed)
    groups = []
    for id, group_rewards in enumerate(rewards):
        group = Group(id, Prompt(id, rng.integers(0, 20, 5).astype(np.int32), "1"))
        for index, reward in enumerate(group_rewards):
            n = int(rng.integers(3, 9))
            group.samples.append(
                Sample(
                    id, index, rng.integers(0, 20, n).astype(np.int32), -rng.random(n, dtype=np.float32),
                    np.ones(n, bool), ((0, 0, n),), "stop", reward=reward,
                )
            )  # fmt: skip
        groups.append(group)
    set_advantages(groups)
    return groups


def placed(policy: Policy, groups: list[Group]) -> PlacedBatch:
    return policy.place(batches.plan(groups, policy.config, 1, {})[0])


MIXED = [[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_have_the_type_that_was_asked_for(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    chosen = policy.config.policy.model_copy(update={"logits_dtype": dtype})
    monkeypatch.setattr(policy, "config", policy.config.model_copy(update={"policy": chosen}))
    head = policy.head
    assert head.fp32_logits is (dtype == "float32")
    narrow = replace(head, weight=torch.nn.Parameter(head.weight.bfloat16()))
    assert narrow.logits_dtype == getattr(torch, dtype)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_parameter_that_is_not_finite_is_named_before_a_save(policy: Policy, value: float) -> None:
    policy.check_finite()
    params(policy)["decoder.layers.1.mlp.linear_fc2.weight"].data[3, 5] = value
    with pytest.raises(PolicyError, match=r"^1 parameters .* first model.layers.1.mlp.down_proj.weight: "):
        policy.check_finite()


def test_a_gradient_that_is_not_finite_leaves_the_policy_as_it_was(policy: Policy) -> None:
    batch = placed(policy, make_groups(MIXED))
    policy.score(batch)
    before, finalize = state_of(policy), policy.transformer.finalize_model_grads_func

    def with_nan(*arguments: object, **options: object) -> None:
        finalize(*arguments, **options)
        params(policy)["embedding.word_embeddings.weight"].main_grad[2, 3] = torch.nan

    policy.transformer.finalize_model_grads_func = with_nan
    with pytest.raises(PolicyError, match="gradient's norm is nan: this update was not taken"):
        policy.update(batch.minibatches[0])
    policy.transformer.finalize_model_grads_func = finalize
    assert all(map(torch.equal, before, state_of(policy)))
    policy.update(batch.minibatches[0])
    assert not all(map(torch.equal, before, state_of(policy))), "an update moves what is compared"


def test_a_probe_is_scored_and_not_learnt_from(policy: Policy) -> None:
    """Of a few responses of the current weights, where those that are learnt from are of older ones."""
    groups, probe = make_groups(MIXED), make_groups([[0.0], [0.0]], seed=1)
    for group in groups:
        for sample in group.samples:
            sample.versions = ((0, 0, sample.length),)
    for group in probe:
        group.samples[0].versions = ((1, 0, group.samples[0].length),)
    [with_probe] = batches.batches_of(shares(groups, policy.config, 1, {}, 1, probe), policy.config)
    [plain] = batches.batches_of(shares(groups, policy.config, 1, {}, 1), policy.config)
    both, alone = policy.place(with_probe), policy.place(plain)
    found, expected = policy.score(both), policy.score(alone)
    assert "policy/mismatch" not in found and "policy/importance" in found
    [microbatch] = both.probe
    assert microbatch.scores
    gap = (microbatch.scores.old_logprobs - microbatch.behavior_logprobs)[microbatch.loss_mask].abs()
    assert len(gap) == sum(group.samples[0].length for group in probe)
    assert found.pop("policy/mismatch_probe") == pytest.approx(float(gap.mean())) and found == expected
    assert [len(minibatch) for minibatch in both.minibatches] == [len(m) for m in alone.minibatches]


def test_log_probs_that_are_not_finite_are_told_with_the_parameter_that_is_not(policy: Policy) -> None:
    params(policy)["decoder.layers.0.mlp.linear_fc2.weight"].data[3, 5] = torch.nan
    with pytest.raises(PolicyError, match=r"log-probs .* first model.layers.0.mlp.down_proj.weight"):
        policy.score(placed(policy, make_groups(MIXED)))


@pytest.mark.parametrize("how", ["equal rewards", "filtered"])
def test_an_update_from_which_nothing_can_be_learnt_moves_nothing(policy: Policy, how: str) -> None:
    """Adam's momentum and the decay would repeat the update before it."""
    batch = placed(
        policy, make_groups([*MIXED, *([[1.0, 1.0, 1.0]] * 2 if how == "equal rewards" else MIXED)])
    )
    if how == "filtered":
        for microbatch in batch.minibatches[1]:
            microbatch.token_weights.zero_()
    policy.score(batch)
    first = policy.update(batch.minibatches[0])
    before, ticks = state_of(policy), policy.scheduler.num_steps
    assert any(float(tensor.abs().max()) > 0 for tensor in before[len(params(policy)) :]), "there is momentum"
    second = policy.update(batch.minibatches[1])
    assert all(map(torch.equal, before, state_of(policy))) and policy.scheduler.num_steps == ticks
    assert (first["taken"], second["taken"]) == (1.0, 0.0)
    values = step_metrics([first, second])
    assert (values["policy/updates_skipped"], values["policy/grad_norm"]) == (1, first["grad_norm"])


def test_one_token_that_weighs_something_makes_an_update(policy: Policy) -> None:
    batch = placed(policy, make_groups(MIXED + MIXED))
    for microbatch in batch.minibatches[1]:
        keep = microbatch.loss_mask.nonzero()[-1]
        kept = microbatch.token_weights[keep].clone()
        microbatch.token_weights.zero_()[keep] = kept
    policy.score(batch)
    before = state_of(policy)
    assert policy.update(batch.minibatches[1])["taken"] == 1.0
    assert not all(map(torch.equal, before, state_of(policy)))


def test_a_checkpoint_goes_on_with_another_learning_rate(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron finds the optimizer's groups by it."""
    saving = policy.save(tmp_path)
    saving.start(in_background=False)
    saving.finish()
    for group in policy.optimizer.param_groups:
        monkeypatch.setitem(group, "max_lr", 7e-5)
    policy.load(tmp_path)
    assert [group["max_lr"] for group in policy.optimizer.param_groups] == [7e-5, 7e-5]
