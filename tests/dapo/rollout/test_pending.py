"""Groups asked for ahead of their turn: what is kept depends on neither the order of finishing nor how far
ahead.
"""

import itertools
import json
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dapo.engine.embedded import EmbeddedEngine
from dapo.reward.pool import Decoder, Reward
from dapo.rollout import pending
from dapo.rollout.pending import Chances
from dapo.rollout.prompts import PromptStream
from dapo.rollout.rollouts import Rollouts
from dapo.types import Interrupted, Prompt
from tests.batches import next_batches
from tests.conftest import make_config, make_group, make_prompt
from tests.dapo.rollout import test_rollouts
from tests.dapo.rollout.test_rollouts import NUM_PROMPTS, ScriptedEngine, asking_order

BASE = Path(__file__).parents[3] / "examples/arithmetic/base"
STREAMING = "engine.kind=sglang"
BRIEF = pending.BRIEF
# depend on what finished first
TIMED = {"groups/asked", "groups/surplus", "rollout/tokens", "perf/groups_aborted"}
many_cases = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize(("seconds", "pause"), [(0.04, 0.0), (0.06, 0.06)])
def test_after_a_slow_call_of_the_reward_groups_wait_as_long_to_be_scored_together(
    seconds, pause, monkeypatch
):
    monkeypatch.setattr(pending, "BRIEF", BRIEF)
    times = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(pending.time, "monotonic", lambda: next(times))
    queue = pending.Pending(2)
    queue.complete.append(make_group([1, 0]))
    own = SimpleNamespace(
        pending=queue,
        reward=SimpleNamespace(score=lambda pairs: None),
        first_waves=None,
        lock=threading.RLock(),
    )
    pending.GroupSampler.score(own)
    assert own._score_from == pytest.approx(100.0 + seconds + pause)


def make_rollouts(tmp_path, engine, *overrides, **more):
    return test_rollouts.make_rollouts(tmp_path, engine, "reward.workers=0", *overrides, **more)


def make_engine(seed, order, mixed=0.5):
    """Each prompt's group is mixed with this probability, else all right or all wrong; lengths vary with the
    sample's seed.
    """
    rng = random.Random(seed)
    scripts = [rng.choice(["10", "01"] if rng.random() < mixed else ["11", "00"]) for _ in range(NUM_PROMPTS)]
    return ScriptedEngine(scripts.__getitem__, order, length=lambda request: 1 + request.seed % 24)


def decided(buffer):
    """Prompts whose groups had their turn in this step, in asking order."""
    return [
        group.prompt.index
        for group in sorted(buffer.kept + buffer.all_correct + buffer.all_wrong, key=lambda group: group.id)
    ]


def upcoming(rollouts, count=30):
    """What the sampler would ask for next, left as it is."""
    stream = PromptStream([make_prompt(i) for i in range(NUM_PROMPTS)], seed=5)
    stream.load_state_dict(rollouts.prompts.state_dict())
    return [visit.index for visit in stream.take(count)]


def contents(group):
    """Everything that is known of a group."""
    samples = [
        [value.tolist() if isinstance(value, np.ndarray) else value for value in fields(sample)]
        for sample in group.samples
    ]
    return group.id, group.prompt.index, samples


def fields(sample):
    return [getattr(sample, name) for name in sample.__slots__]


class InterruptAfter:
    """True from the given call on."""

    def __init__(self, after, is_on=True):
        self.after, self.is_on, self.num_calls = after, is_on, 0

    def __call__(self):
        self.num_calls += self.is_on
        return self.is_on and self.num_calls >= self.after


@pytest.fixture(autouse=True)
def no_scoring_call_is_slow(monkeypatch):
    """So that what is scored when does not depend on the machine."""
    monkeypatch.setattr(pending, "BRIEF", float("inf"))


# one batch, whatever is asked for when


@pytest.mark.parametrize("per_round", [4, 7, 13])
@pytest.mark.parametrize("seed", range(6))
def test_streaming_makes_the_batches_of_whole_rounds(tmp_path, seed, per_round):
    rounds = make_rollouts(
        tmp_path, make_engine(seed, None), f"rollout.prompts_per_round={per_round}", num_data_ranks=2
    )
    streaming = make_rollouts(
        tmp_path,
        make_engine(seed, seed),
        f"rollout.prompts_per_round={per_round}",
        STREAMING,
        num_data_ranks=2,
    )
    for step in range(4):
        for batch, expected in zip(next_batches(streaming, step), next_batches(rounds, step), strict=True):
            assert without_timed(batch.metrics) == without_timed(expected.metrics)
            assert len(batch.minibatches) == len(expected.minibatches)
            for microbatches, expected_microbatches in zip(
                batch.minibatches, expected.minibatches, strict=True
            ):
                for m, e in zip(microbatches, expected_microbatches, strict=True):
                    assert all(np.array_equal(getattr(m, name), getattr(e, name)) for name in vars(m))
        assert upcoming(streaming) == upcoming(rounds), "the next step begins with the same prompt"


def without_timed(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMED}


def test_streaming_from_a_real_model_makes_the_batches_of_whole_rounds(tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    rows = [json.loads(line) for line in (BASE.parent / "data/train.jsonl").read_text().splitlines()[:60]]
    prompts = [
        Prompt(i, np.array(tokenizer(row["prompt"])["input_ids"], np.int32), row["answer"])
        for i, row in enumerate(rows)
    ]
    options = [
        "rollout.prompts_per_step=2",
        "rollout.group_size=6",
        "rollout.prompts_per_round=5",
        "rollout.max_response_length=24",
    ]

    decoder = Decoder(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True))

    def steps(*more):
        config = make_config(tmp_path, *options, *more)
        engine = EmbeddedEngine(BASE, torch.float32, torch.device("cpu"), max_concurrent=20)
        engine.load_weights(load_file(BASE / "model.safetensors").items(), version=0)
        reward = Reward(config.reward.model_copy(update={"workers": 0}), 24, decoder=decoder)
        rollouts = Rollouts(config, 1, engine, PromptStream(prompts, 1), reward, (1,), None)
        return [rollouts.collect(step).kept for step in range(2)]

    in_rounds, streamed = steps(), steps(STREAMING)
    for groups, expected in zip(streamed, in_rounds, strict=True):
        assert [group.id for group in groups] == [group.id for group in expected] and len(groups) == 2
        for group, other in zip(groups, expected, strict=True):
            for sample, same in zip(group.samples, other.samples, strict=True):
                assert sample.tokens.tolist() == same.tokens.tolist()
                # batched with others
                assert sample.behavior_logprobs == pytest.approx(same.behavior_logprobs, abs=2e-5)


@many_cases
@given(
    seed=st.integers(0, 10**6),
    mixed=st.floats(0, 1),
    per_round=st.integers(4, 20),
    kind=st.sampled_from(["sglang", "embedded"]),
)
def test_every_prompt_has_one_turn_in_the_streams_order(tmp_path, seed, mixed, per_round, kind):
    engine = make_engine(seed, seed, mixed)
    rollouts = make_rollouts(
        tmp_path, engine, f"engine.kind={kind}", f"rollout.prompts_per_round={per_round}"
    )
    turns = []
    for step in range(5):
        rollouts.load_weights([], step)
        buffer = rollouts.collect(step)
        turns += decided(buffer)
        assert not engine.outstanding, "what nobody waits for is aborted"
        assert len(buffer.kept) == 4 or len(decided(buffer)) == 3 * per_round, (
            "enough, or as many as the cap allows"
        )
        assert all([sample.index for sample in group.samples] == [0, 1] for group in buffer.asked)
        assert upcoming(rollouts) == asking_order(len(turns) + 30)[len(turns) :], "lost or doubled"
    assert turns == asking_order(len(turns))


# how far ahead


def num_enough(mixed, share):
    """Least number of groups that are enough, if this share of them is mixed."""
    return next(n for n in itertools.count() if Chances([share] * n).is_enough(mixed))


@pytest.mark.parametrize(
    ("mixed", "share", "expected"),
    # 215/2 − √(215/4) = 100.2, 214: 99.7; 4/2 − √(4/4) = 1
    [(0, 0.3, 0), (-2, 0.3, 0), (5, 1.0, 5), (100, 0.5, 215), (1, 0.5, 4)],
)
def test_as_many_groups_are_asked_for_as_probably_hold_enough_mixed_ones(mixed, share, expected):
    assert num_enough(mixed, share) == expected


def test_binomial_luck_seldom_leaves_a_step_short_of_what_was_asked_for():
    rng = np.random.default_rng(0)
    for share in (0.1, 0.4, 0.8):
        # a normal variable: 0.159
        assert 0.1 < (rng.binomial(num_enough(128, share), share, 20_000) < 128).mean() < 0.17


def test_groups_are_asked_for_by_the_running_share_of_mixed_ones(tmp_path):
    def at_first(mixed):
        """Groups asked for before the first sample came in, at the twelfth step."""
        engine = make_engine(0, None, mixed)
        rollouts = make_rollouts(
            tmp_path, engine, "rollout.prompts_per_round=8", "rollout.max_rounds=20", STREAMING
        )
        for step in range(12):
            num_before, share = len(engine.submitted), rollouts.mixed_fraction
            rollouts.collect(step)
        assert len(engine.submitted[num_before]) // 2 == num_enough(4, share)
        return share

    assert at_first(0.15) < 0.35 < 0.8 < at_first(1.0)


def test_no_more_is_asked_for_than_the_cap_allows(tmp_path):
    engine = make_engine(1, 1, mixed=0.0)
    buffer = make_rollouts(tmp_path, engine, STREAMING).collect(0)
    assert len(engine.asked()) == len(decided(buffer)) == 4 * 3


def test_what_a_slow_reward_keeps_waiting_is_scored_together(tmp_path, monkeypatch):
    monkeypatch.setattr(pending, "BRIEF", 0.01)
    engine = make_engine(3, 3, mixed=0.3)
    rollouts = make_rollouts(
        tmp_path,
        engine,
        "rollout.prompts_per_round=40",
        "reward.function=tests.dapo.reward.reward_functions:slow",
        STREAMING,
    )
    calls = []
    score = rollouts.reward.score
    rollouts.reward.score = lambda pairs: (calls.append(len(pairs)), score(pairs))
    buffer = rollouts.collect(0)
    assert len(buffer.kept) == 4
    assert sum(calls) >= 2 * len(decided(buffer))
    assert max(calls) > 2 and len(calls) < len(decided(buffer))


@pytest.mark.parametrize("after", [1, 5, 12])
def test_interrupted_while_streaming_every_prompt_goes_back(tmp_path, after):
    engine = make_engine(7, 7, mixed=0.2)
    rollouts = make_rollouts(tmp_path, engine, STREAMING, is_interrupted=InterruptAfter(after))
    with pytest.raises(Interrupted):
        rollouts.collect(0)
    assert engine.asked() and not engine.outstanding
    assert upcoming(rollouts) == asking_order(30)


def test_who_is_waited_for_is_named(tmp_path):
    engine = make_engine(6, None, mixed=1.0)
    waiting = []
    rollouts = make_rollouts(
        tmp_path, engine, STREAMING, on_progress=lambda text, fraction: waiting.append(rollouts.waiting())
    )
    rollouts.collect(1)
    assert waiting[0] == "group 0 (1 of 2 samples) and 3 groups after it; 7 outstanding"
