import json
import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from dapo import clock
from dapo.config import ConfigError
from dapo.learn.advantages import ADVANTAGES, group_advantages
from dapo.learn.objective import NORMALISERS
from dapo.reward.pool import Decoder, Reward
from dapo.rollout import dump
from dapo.rollout.buffer import Buffer
from dapo.rollout.prompts import PromptStream
from dapo.rollout.rollouts import RolloutError, Rollouts
from dapo.types import Interrupted, Request, Sample, StorageError
from tests.batches import next_batches
from tests.conftest import make_config, make_group, make_prompt

NUM_PROMPTS = 40
VOCABULARY = 5000  # beyond make_prompt's


class ScriptedEngine:
    """Answers prompt i's samples as `script(i)` says: "10" is one right, one wrong answer. With `order`, in a
    random order.
    """

    def __init__(
        self,
        script: Callable[[int], str],
        order: int | None = None,
        length: Callable[[Request], int] = lambda request: 4,
    ):
        self.script, self.length = script, length
        self.random = random.Random(order) if order is not None else None
        self.version = 0
        self.submitted: list[list[Request]] = []  # by call
        self.aborted: set[str] = set()
        self.outstanding: list[Request] = []

    def stream(self):
        return self

    def submit(self, requests: Iterable[Request]) -> None:
        if requests := list(requests):
            self.submitted.append(requests)
            self.outstanding += requests

    def completed(self):
        while self.outstanding:
            yield self.answer(
                self.outstanding.pop(self.random.randrange(len(self.outstanding)) if self.random else 0)
            )

    def answer(self, request: Request) -> Sample:
        length = self.length(request)
        return Sample(
            group=request.group,
            index=request.index,
            tokens=np.full(length, int(self.script(prompt_of(request))[request.index]), np.int32),
            behavior_logprobs=-np.random.default_rng(request.seed).random(length, np.float32),
            loss_mask=np.ones(length, bool),
            versions=((self.version, 0, length),),
            finish_reason="length" if length == request.sampling.max_tokens else "stop",
        )

    def abort(self, ids=None):
        gone = {request.id for request in self.outstanding} if ids is None else set(ids)
        self.aborted |= gone
        self.outstanding = [request for request in self.outstanding if request.id not in gone]

    def load_weights(self, weights, version):
        self.version = version

    def waiting(self):
        return f"{len(self.outstanding)} outstanding"

    def prepare_weights(self, version): ...

    def take_idle(self):
        return [0.0]

    def release_memory(self): ...

    def close(self): ...

    def asked(self) -> list[int]:
        """Prompts in asking order, over all rounds."""
        return [
            prompt_of(request) for requests in self.submitted for request in requests if request.index == 0
        ]


def prompt_of(request: Request) -> int:
    return request.prompt.index  # see make_prompt


def make_rollouts(tmp_path, engine, *overrides, num_data_ranks=1, **callbacks) -> Rollouts:
    """prompts_per_step 4, group_size 2, prompts_per_round 4, max_rounds 3, unless overridden. A token 1 at
    the end is a right answer.
    """
    config = make_config(tmp_path, *overrides)
    prompts = PromptStream([make_prompt(i) for i in range(NUM_PROMPTS)], seed=5)
    decoder = Decoder(lambda tokens: f"Answer: {tokens[-1]}")
    reward = Reward(config.reward, config.rollout.max_response_length, decoder=decoder)
    return Rollouts(
        config,
        num_data_ranks,
        engine,
        prompts,
        reward,
        stop_ids=(7,),
        vocab_size=VOCABULARY,
        **callbacks,
    )


def asking_order(count):
    return [
        prompt.index
        for prompt in PromptStream([make_prompt(i) for i in range(NUM_PROMPTS)], seed=5).take(count)
    ]


def by_place(*scripts: str) -> Callable[[int], str]:
    """A script by place in the first epoch's asking order; "10" beyond the ones given."""
    order = asking_order(len(scripts))
    return lambda prompt: scripts[order.index(prompt)] if prompt in order else "10"


# Eq. 9


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1, -1], [2**-0.5, -(2**-0.5)]),  # std of ±1 with ddof = 1 is √2
        ([1, 1, 1, -1], [0.5, 0.5, 0.5, -1.5]),  # mean ½, std 1
        ([0, 1, 2], [-1, 0, 1]),
        ([1, 0.5, -1, -2], [0.9986, 0.6355, -0.4539, -1.1802]),  # shaped: mean −0.375, std √(5.6875 / 3)
        ([1, 1, 1], [0, 0, 0]),
        ([-1.7] * 16, [0] * 16),
        ([0.1] * 3, [0] * 3),
        ([0.1 + 0.2, 0.3], [0, 0]),  # equal up to rounding: the 1e-6 below holds it down
    ],
)
def test_group_advantages_by_hand(rewards, expected):
    advantages = group_advantages(rewards)
    assert advantages.dtype == np.float32
    assert advantages == pytest.approx(expected, abs=2e-4)


def test_equal_rewards_give_advantages_of_exactly_zero():
    """Their mean is rounded: 0.1 three times has another. Adam would make whole steps of such a gradient."""
    for rewards in ([0.1] * 3, [-1.7] * 16, [0.7] * 6):
        assert not group_advantages(rewards).any()


def test_group_advantages_have_mean_zero_and_sample_std_one():
    advantages = group_advantages(np.random.default_rng(0).normal(size=16) * 3 + 5).astype(np.float64)
    assert advantages.mean() == pytest.approx(0, abs=1e-6)
    assert advantages.std(ddof=1) == pytest.approx(1, abs=1e-5)


def test_tiny_differences_are_damped_by_the_1e6_in_the_denominator():
    assert group_advantages([1e-6, -1e-6]) == pytest.approx([1 / (1 + 2**0.5), -1 / (1 + 2**0.5)], rel=1e-5)


# Eq. 11


@pytest.mark.parametrize(
    ("correct", "expected"),
    [([1, 1, 1], False), ([0, 0, 0], False), ([1, 0, 0], True), ([1, 1, 0], True), ([], False)],
)
def test_only_a_group_with_right_and_wrong_samples_is_mixed(correct, expected):
    assert make_group(correct).is_mixed is expected


@pytest.mark.parametrize(
    ("correct", "kind"), [([1, 1], "all_correct"), ([0, 0], "all_wrong"), ([1, 0], "kept")]
)
def test_groups_are_kept_by_correctness_never_by_shaped_reward(correct, kind):
    group = make_group(correct)
    for sample, reward in zip(group.samples, [0.3, -0.6] if kind != "kept" else [0.5, 0.5], strict=True):
        sample.reward = reward
    buffer = Buffer(1, is_dynamic=True)
    buffer.offer(group)
    assert getattr(buffer, kind) == [group]
    assert buffer.is_full is (kind == "kept")


def test_an_all_correct_group_with_different_length_penalties_is_turned_away(tmp_path):
    rollouts = make_rollouts(
        tmp_path, ScriptedEngine(by_place("11"), length=lambda request: 24 + 4 * request.index)
    )
    buffer = rollouts.collect(0)
    [group] = buffer.all_correct
    assert [sample.reward for sample in group.samples] == [1.0, 0.5]
    assert len(buffer.kept) == 4


def test_advantages_come_from_the_shaped_reward(tmp_path):
    rollouts = make_rollouts(
        tmp_path,
        ScriptedEngine(lambda prompt: "1100", length=lambda request: 24 + 2 * request.index),
        "rollout.group_size=4",
    )
    [batch] = next_batches(rollouts, 0)
    advantages = {
        round(float(a), 4)
        for microbatches in batch.minibatches
        for m in microbatches
        for a in m.advantages[m.loss_mask]
    }
    assert advantages == {round(float(a), 4) for a in group_advantages([1, 1 - 0.25, -1 - 0.5, -1 - 0.75])}


# Algorithm 1, lines 4–9


def test_samples_that_finish_in_any_order_give_the_same_batch(tmp_path):
    def sample(order):
        engine = ScriptedEngine(
            by_place("11", "10", "00", "01"), order, length=lambda request: 1 + request.seed % 24
        )
        rollouts = make_rollouts(tmp_path, engine, "rollout.prompts_per_round=7", num_data_ranks=2)
        buffer = rollouts.collect(0)
        assert [group.prompt.index for group in buffer.kept] == [
            i for i in asking_order(7) if engine.script(i) in ("10", "01")
        ][:4]
        assert all([sample.index for sample in group.samples] == [0, 1] for group in buffer.asked)
        rollouts = make_rollouts(tmp_path, engine, "rollout.prompts_per_round=7", num_data_ranks=2)
        return next_batches(rollouts, 0)

    in_order = sample(None)
    for order in range(5):
        for batch, expected in zip(sample(order), in_order, strict=True):
            assert batch.metrics == expected.metrics
            for microbatches, expected_microbatches in zip(
                batch.minibatches, expected.minibatches, strict=True
            ):
                for m, e in zip(microbatches, expected_microbatches, strict=True):
                    assert all(np.array_equal(getattr(m, name), getattr(e, name)) for name in vars(m))


def test_surplus_prompts_come_first_at_the_next_step(tmp_path):
    engine = ScriptedEngine(by_place("10", "00", "10", "11", "10", "10"))
    rollouts = make_rollouts(tmp_path, engine, "rollout.prompts_per_round=9")
    buffer = rollouts.collect(0)
    assert [group.prompt.index for group in buffer.kept] == [asking_order(9)[i] for i in (0, 2, 4, 5)]
    assert [group.prompt.index for group in buffer.surplus] == asking_order(9)[6:]
    rollouts.collect(1)
    assert engine.asked() == asking_order(9) + asking_order(15)[6:]


def test_rounds_are_asked_for_until_enough_groups_are_mixed_the_last_of_what_probably_lacks(tmp_path):
    engine = ScriptedEngine(by_place("10", "00", "00", "00", "10", "00", "10", "11", "10", "10"))
    buffer = make_rollouts(tmp_path, engine).collect(3)
    assert [len(requests) for requests in engine.submitted] == [4 * 2, 4 * 2, 2 * 2]
    assert engine.asked() == asking_order(10)
    assert [
        len(groups) for groups in (buffer.kept, buffer.all_correct, buffer.all_wrong, buffer.surplus)
    ] == [4, 1, 4, 1]


def test_sampling_ends_with_the_round_that_fills_the_buffer(tmp_path):
    engine = ScriptedEngine(lambda prompt: "10")
    make_rollouts(tmp_path, engine).collect(0)
    assert len(engine.submitted) == 1


def test_sampling_ends_after_max_rounds(tmp_path):
    engine = ScriptedEngine(lambda prompt: "00")
    buffer = make_rollouts(tmp_path, engine, "rollout.max_rounds=5", "rollout.prompts_per_round=3").collect(0)
    assert [len(requests) for requests in engine.submitted] == [6] * 5
    assert len(buffer.all_wrong) == 15 and not buffer.kept


def test_the_engine_is_asked_with_our_sampling_settings_and_the_prompts_tokens(tmp_path):
    engine = ScriptedEngine(lambda prompt: "10")
    make_rollouts(tmp_path, engine, "rollout.temperature=0.9").collect(0)
    for request in engine.submitted[0]:
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop_ids) == (
            0.9,
            1.0,
            32,
            (7,),
        )
        assert np.array_equal(request.prompt.tokens, make_prompt(prompt_of(request)).tokens)


TWO_OF_TWELVE = ("10", "00", "00", "11", "01", *["00"] * 5, "11", "11")


def test_at_the_cap_a_step_trains_on_fewer_groups(tmp_path):
    engine = ScriptedEngine(by_place(*TWO_OF_TWELVE))
    [batch] = next_batches(make_rollouts(tmp_path, engine, "rollout.at_cap=train"), 0)
    assert (batch.metrics["groups/kept"], len(batch.minibatches)) == (2, 1)
    assert sum(len(m.cu_seqlens) - 1 for m in batch.minibatches[0]) == 4


def test_at_the_cap_a_run_stops_with_the_shares_if_asked_to(tmp_path):
    rollouts = make_rollouts(tmp_path, ScriptedEngine(by_place(*TWO_OF_TWELVE)), "rollout.at_cap=stop")
    counts = "2 of 4 mixed groups among 12 sampled.*25% all correct.*58% all wrong"
    with pytest.raises(
        RolloutError, match=f"max_rounds=3 .*{counts}.*reward.function=dapo.reward:is_correct"
    ):
        next_batches(rollouts, 0)


def test_a_full_step_does_not_stop_a_run_that_stops_at_the_cap(tmp_path):
    make_rollouts(tmp_path, ScriptedEngine(lambda prompt: "10"), "rollout.at_cap=stop").next_batch(0)


def test_empty_steps_train_nothing_and_stop_the_run_after_max_empty_steps(tmp_path):
    rollouts = make_rollouts(
        tmp_path, ScriptedEngine(lambda prompt: "11"), "rollout.max_empty_steps=3", num_data_ranks=2
    )
    for step in range(2):
        assert [batch.minibatches for batch in next_batches(rollouts, step)] == [[], []]
    with pytest.raises(
        RolloutError, match=r"max_empty_steps=3 .*0 of 4 mixed .*100% all correct.* 0% all wrong"
    ):
        next_batches(rollouts, 2)


def test_only_empty_steps_in_a_row_count_and_resuming_remembers_them(tmp_path):
    kinds = iter(["00", "00", "10", "00", "00", "00"])
    engine = ScriptedEngine(lambda prompt: kind)
    rollouts = make_rollouts(tmp_path, engine)
    for step in range(5):
        kind = next(kinds)
        next_batches(rollouts, step)
    resumed = make_rollouts(tmp_path, engine)
    resumed.load_state_dict(rollouts.state_dict())
    with pytest.raises(RolloutError):
        next_batches(resumed, 5)


def test_without_dynamic_sampling_one_round_of_n_groups_is_kept_whole(tmp_path):
    engine = ScriptedEngine(by_place("00", "11", "10", "00"))
    buffer = make_rollouts(
        tmp_path, engine, "rollout.dynamic_sampling=false", "rollout.prompts_per_round=40"
    ).collect(0)
    assert [group.prompt.index for group in buffer.kept] == engine.asked() == asking_order(4)
    assert not buffer.surplus


def test_without_dynamic_sampling_a_group_of_equal_rewards_has_no_gradient(tmp_path):
    engine = ScriptedEngine(by_place("00", "11", "10", "00"))
    options = "rollout.dynamic_sampling=false", "rollout.at_cap=stop"
    [batch] = next_batches(make_rollouts(tmp_path, engine, *options), 0)
    counts = {name: batch.metrics[f"groups/{name}"] for name in ("asked", "kept", "all_correct", "all_wrong")}
    assert counts == {"asked": 4, "kept": 4, "all_correct": 1, "all_wrong": 2}
    assert batch.metrics["rollout/no_gradient"] == 3 / 4
    advantages = np.concatenate([m.advantages[m.loss_mask] for part in batch.minibatches for m in part])
    assert (advantages == 0).mean() == 3 / 4


def test_without_dynamic_sampling_steps_without_a_gradient_stop_the_run_too(tmp_path):
    rollouts = make_rollouts(tmp_path, ScriptedEngine(lambda prompt: "00"), "rollout.dynamic_sampling=false")
    for step in range(2):
        assert len(next_batches(rollouts, step)[0].minibatches) == 2
    with pytest.raises(RolloutError, match=r"max_empty_steps=3 .*0 of 4 mixed .* 100% all wrong"):
        next_batches(rollouts, 2)


def test_lengths_that_are_punished_are_a_gradient_of_groups_all_correct(tmp_path):
    engine = ScriptedEngine(lambda prompt: "11", length=lambda request: 24 + 4 * request.index)
    rollouts = make_rollouts(tmp_path, engine, "rollout.dynamic_sampling=false")
    [batch] = next_batches(rollouts, 0)
    assert batch.metrics["rollout/no_gradient"] == 0 and batch.metrics["groups/all_correct"] == 4
    assert rollouts.num_empty_steps == 0


@pytest.mark.parametrize(
    ("kind", "undecided", "stops"), [("00", 1.0, True), ("00", 0.9, False), ("10", 1.0, False)]
)
def test_a_reward_that_decides_nothing_is_named_at_once(tmp_path, monkeypatch, kind, undecided, stops):
    rollouts = make_rollouts(tmp_path, ScriptedEngine(lambda prompt: kind), "reward.time_limit=3")
    counts = {"reward/timeouts": 20, "reward/crashes": 4, "reward/undecided": undecided}
    monkeypatch.setattr(rollouts.reward, "take_metrics", lambda: counts)
    if not stops:
        assert next_batches(rollouts, 0)[0].metrics["reward/undecided"] == undecided
        return
    with pytest.raises(RolloutError) as error:
        next_batches(rollouts, 0)
    assert str(error.value).startswith("reward.function=dapo.reward:is_correct decided about none")
    assert "20 calls ran past reward.time_limit=3.0, 4 ended their process" in str(error.value)


def seeds_by_id(engine):
    return {request.id: request.seed for requests in engine.submitted for request in requests}


def test_every_sample_of_a_run_has_its_own_seed_and_group_id(tmp_path):
    engine = ScriptedEngine(lambda prompt: "00")
    rollouts = make_rollouts(tmp_path, engine)
    for step in range(3):
        rollouts.collect(step)
    assert len(seeds_by_id(engine)) == len(set(seeds_by_id(engine).values())) == 3 * 12 * 2
    assert all(0 <= seed < 2**63 for seed in seeds_by_id(engine).values())


def test_seeds_depend_on_the_runs_seed_and_the_samples_names_alone(tmp_path):
    def seeds(*overrides, script="00", order=None):
        engine = ScriptedEngine(lambda prompt: script, order)
        make_rollouts(tmp_path, engine, *overrides).collect(1)
        return seeds_by_id(engine)

    in_rounds_of_four = seeds()
    assert seeds("rollout.prompts_per_round=6", "rollout.max_rounds=2", order=1) == in_rounds_of_four
    assert seeds(script="10").items() <= in_rounds_of_four.items()
    assert not set(seeds("run.seed=1").values()) & set(in_rounds_of_four.values())


@pytest.mark.parametrize("after", [1, 8, 9, 20, 24])  # samples; a round is 8, the last round ends with 24
def test_interrupted_every_prompt_goes_back_and_the_step_can_be_made_anew(tmp_path, after):
    engine = ScriptedEngine(lambda prompt: "00", order=2)
    seen = iter(range(1, 1000))
    rollouts = make_rollouts(tmp_path, engine, is_interrupted=lambda: next(seen) >= after)
    with pytest.raises(Interrupted):
        next_batches(rollouts, 0)
    assert not engine.outstanding and engine.aborted <= {request.id for request in engine.submitted[-1]}

    again, untouched = ScriptedEngine(engine.script), ScriptedEngine(engine.script)
    resumed = make_rollouts(tmp_path, again)
    resumed.load_state_dict(rollouts.state_dict())
    assert resumed.num_empty_steps == 0
    resumed.collect(0)
    make_rollouts(tmp_path, untouched).collect(0)
    assert again.asked() == untouched.asked() == asking_order(12)
    assert seeds_by_id(again) == seeds_by_id(untouched)


def test_a_resumed_run_asks_for_what_an_unbroken_one_would(tmp_path):
    script = by_place("10", "00", "10", "11", "10", "10")
    unbroken = ScriptedEngine(script)
    rollouts = make_rollouts(tmp_path, unbroken, "rollout.prompts_per_round=9")
    next_batches(rollouts, 0)
    state = rollouts.state_dict()
    next_batches(rollouts, 1)
    resumed = ScriptedEngine(script)
    rollouts = make_rollouts(tmp_path, resumed, "rollout.prompts_per_round=9")
    rollouts.load_state_dict(state)
    next_batches(rollouts, 1)
    assert resumed.asked() == unbroken.asked()[9:]
    assert seeds_by_id(resumed).items() <= seeds_by_id(unbroken).items()


# the ledger


def test_the_ledger_accounts_for_every_group_and_token():
    buffer = Buffer(2, is_dynamic=True)
    kept = [make_group([1, 0], [3, 4]), make_group([0, 1], [6, 7])]
    all_correct = [make_group([1, 1], [1, 2]), make_group([1, 1], [9, 9])]
    all_wrong = [make_group([0, 0], [5, 32], truncated=[1])]
    surplus = [make_group([1, 1], [8, 14])]
    for group in [all_correct[0], kept[0], *all_wrong, all_correct[1], kept[1], *surplus]:
        buffer.offer(group)
    assert (buffer.kept, buffer.all_correct, buffer.all_wrong, buffer.surplus) == (
        kept,
        all_correct,
        all_wrong,
        surplus,
    )
    assert buffer.ledger() == {
        "groups/asked": 6,
        "groups/kept": 2,
        "groups/all_correct": 2,
        "groups/all_wrong": 1,
        "groups/surplus": 1,
        "rollout/no_gradient": pytest.approx(3 / 5),
        "rollout/accuracy": 6 / 10,
        "rollout/reward": 2 / 10,
        "rollout/truncated": 1 / 10,
        "rollout/length": 78 / 10,
        "rollout/length_max": 32,
        "rollout/length_kept": (3 + 4 + 6 + 7) / 4,
        "rollout/length_turned_away": (1 + 2 + 9 + 9 + 5 + 32) / 6,
        "rollout/tokens": 100,
        "rollout/tokens_learnt": 5 + 6 + 8 + 9,
        "rollout/attended": (5**2 + 6**2 + 8**2 + 9**2) / 2 / 28,
        "perf/groups_aborted": 0,
    }


def test_the_ledger_of_nothing_is_zeros():
    assert set(Buffer(2, is_dynamic=True).ledger().values()) == {0}


@pytest.mark.parametrize("seed", range(5))
def test_asked_is_kept_plus_all_correct_plus_all_wrong_plus_surplus(tmp_path, seed):
    rng = random.Random(seed)
    outcomes = [rng.choice(["00", "10", "01", "11"]) for _ in range(NUM_PROMPTS)]
    engine = ScriptedEngine(outcomes.__getitem__, order=seed)
    [batch] = next_batches(make_rollouts(tmp_path, engine, "rollout.prompts_per_round=5"), 0)
    groups = {
        name.removeprefix("groups/"): count
        for name, count in batch.metrics.items()
        if name.startswith("groups/")
    }
    assert groups.pop("asked") == sum(groups.values()) == len(engine.asked())
    assert batch.metrics["rollout/tokens"] == 4 * 2 * len(engine.asked())


# docs/add_an_advantage.md


def leave_one_out(rewards):
    groups = [np.asarray(r, dtype=np.float64) for r in rewards]
    return [((r - r.mean()) * len(r) / (len(r) - 1)).astype(np.float32) for r in groups]


def square_mean(tokens, longest):
    num_samples = sum(np.count_nonzero(t) for t in tokens)
    return [num_samples * t**2 for t in tokens]


def test_a_new_advantage_and_a_new_normaliser_are_an_entry_each(tmp_path, monkeypatch):
    monkeypatch.setitem(ADVANTAGES, "leave_one_out", leave_one_out)
    monkeypatch.setitem(NORMALISERS, "square_mean", square_mean)
    rollouts = make_rollouts(tmp_path, ScriptedEngine(lambda prompt: "1000"), "rollout.group_size=4")
    chosen = {"advantage": "leave_one_out", "normaliser": "square_mean"}
    objective = rollouts.config.objective.model_copy(update=chosen)
    rollouts.config = rollouts.config.model_copy(update={"objective": objective})
    [batch] = next_batches(rollouts, 0)
    packed = [microbatch for microbatches in batch.minibatches for microbatch in microbatches]
    advantages = {round(float(a), 4) for m in packed for a in m.advantages[m.loss_mask]}
    assert advantages == {2.0, round(-2 / 3, 4)}  # ±1 minus the mean of the other three
    assert {round(float(1 / w)) for m in packed for w in m.token_weights[m.loss_mask]} == {2 * 4 * 4**2}


def a_file_in_its_place(directory):
    directory.parent.mkdir()
    directory.write_text("")


def no_room(directory):
    """Let the place of the file that is being written be a full disk."""
    directory.mkdir(parents=True)
    (directory / "step-000000.partial").symlink_to("/dev/full")


@pytest.mark.parametrize(
    ("break_disk", "only"), [(a_file_in_its_place, False), (a_file_in_its_place, True), (no_room, True)]
)
def test_a_step_whose_dump_cannot_be_written_is_given_back(tmp_path, break_disk, only):
    script = ["10", "11", "01", "00"]
    engine = ScriptedEngine(lambda prompt: script[prompt // 6 % 4])
    rollouts = make_rollouts(tmp_path, engine, "rollout.dump_share=1.0", f"rollout.only={only}")
    directory = tmp_path / "run/rollouts"
    break_disk(directory)
    with pytest.raises(StorageError, match=r"step-000000.parquet cannot be written, .* GiB free there: \w+"):
        next_batches(rollouts, 0)
    assert not list(directory.glob("*.partial")), "nothing half-written is left"
    assert len(engine.asked()) > 4, "groups of all kinds"
    again = [prompt.index for prompt in rollouts.prompts.take(len(engine.asked()))]
    assert sorted(again) == sorted(engine.asked())


def test_a_dump_that_failed_beside_a_step_stops_the_run_before_the_next_one_and_costs_no_checkpoint(tmp_path):
    engine = ScriptedEngine(lambda _: "10")
    rollouts = make_rollouts(tmp_path, engine, "rollout.dump_share=1.0")
    no_room(tmp_path / "run/rollouts")
    next_batches(rollouts, 0)
    rollouts.save(tmp_path)
    num_asked, state = len(engine.asked()), rollouts.state_dict()
    with pytest.raises(StorageError, match=r"step-000000.parquet cannot be written"):
        next_batches(rollouts, 1)
    assert len(engine.asked()) == num_asked and rollouts.state_dict() == state
    assert json.loads((tmp_path / "rollouts.json").read_text()) == state
    next_batches(rollouts, 1)  # it is said once
    rollouts.close()


def test_replayed_groups_do_not_go_into_the_stream(tmp_path):
    first = make_rollouts(
        tmp_path, ScriptedEngine(lambda _: "10"), "rollout.dump_share=1.0", "run.dir=" + str(tmp_path / "a")
    )
    next_batches(first, 0)
    first.dumps.close()
    replay = [f"rollout.replay={tmp_path / 'a/rollouts'}", "rollout.dump_share=1.0"]
    rollouts = make_rollouts(tmp_path, ScriptedEngine(lambda _: "10"), *replay)
    a_file_in_its_place(tmp_path / "run/rollouts")
    before = rollouts.prompts.state_dict()
    with pytest.raises(StorageError):
        next_batches(rollouts, 0)
    assert rollouts.prompts.state_dict() == before


@pytest.mark.parametrize("place", ["prompt", "response"])
@pytest.mark.parametrize("token", [-1, VOCABULARY - 1, VOCABULARY])
def test_a_dump_of_another_vocabulary_is_refused_before_the_policy_sees_it(tmp_path, place, token):
    group = make_group([1, 0])
    for sample in group.samples:
        sample.tokens = np.full(4, 7, np.int32)
    changed = group.prompt.tokens if place == "prompt" else group.samples[1].tokens
    changed[-1] = token
    path = dump.path_of(tmp_path / "other", 0)
    buffer = Buffer(1, is_dynamic=True)
    buffer.offer(group)
    with dump.Writer() as writer:
        writer.write(path, buffer, 1.0)
    rollouts = make_rollouts(tmp_path, ScriptedEngine(lambda _: "10"), f"rollout.replay={path.parent}")
    if 0 <= token < VOCABULARY:
        assert rollouts._replayed(0) is not None
        return
    with pytest.raises(ConfigError, match=rf"^rollout.replay: {path}: token id {token}, where the policy's "):
        next_batches(rollouts, 0)


def test_the_reward_is_closed_although_the_engine_failed_to(tmp_path, monkeypatch):
    rollouts = make_rollouts(tmp_path, ScriptedEngine(lambda _: "10"))
    closed = []
    monkeypatch.setattr(rollouts.reward, "close", lambda: closed.append("reward"))
    monkeypatch.setattr(rollouts.engine, "close", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollouts.close()
    assert closed == ["reward"]


def test_the_engine_is_asked_before_weights_are_sent_and_gets_them_all(tmp_path, monkeypatch):
    rollouts, calls = make_rollouts(tmp_path, ScriptedEngine(lambda _: "10")), []
    engine = rollouts.engine
    monkeypatch.setattr(engine, "prepare_weights", lambda version: calls.append(version))
    monkeypatch.setattr(
        engine, "load_weights", lambda weights, version: calls.append((list(weights), version))
    )
    rollouts.prepare_weights(5)
    before = clock.progress()[0]
    rollouts.load_weights([("a", 1), ("b", 2)], 5)
    assert clock.progress()[0] - before == 4, "a heartbeat for each tensor, and the phase's two"
    assert calls == [5, ([("a", 1), ("b", 2)], 5)]


def test_where_no_group_is_kept_none_is_stale(tmp_path):
    options = "rollout.max_staleness=1", "run.steps=9"
    rollouts = make_rollouts(tmp_path, ScriptedEngine(lambda _: "00"), *options)
    metrics = next_batches(rollouts, 3)[0].metrics
    assert (metrics["rollout/staleness"], metrics["rollout/staleness_max"]) == (0, 0)
    rollouts.close()
