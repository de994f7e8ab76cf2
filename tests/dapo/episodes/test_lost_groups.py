"""Lost groups and episodes in a step, in evaluation, in a checkpoint and in a dump."""

import re
from collections import Counter

import numpy as np
import pytest

from dapo.episodes.environment import Turn
from dapo.episodes.player import Begin
from dapo.episodes.stream import ABORTED, EpisodeEngine
from dapo.reward.pool import Reward
from dapo.rollout import dump, evaluate, probe
from dapo.rollout.prompts import PromptStream
from dapo.rollout.rollouts import Rollouts
from dapo.types import EpisodeError, Prompt, Sample
from tests.batches import next_batches
from tests.conftest import make_config
from tests.dapo.episodes.stage import FAMILY, Policy, encode, logprobs_of
from tests.dapo.episodes.test_stream import CHAT, SAID, Actors

NUM_PROMPTS = 40
WHY = "step raised KeyError: 'board' (game.py:7)"
NAMED = f"rollout.environment=actors: {WHY}"


class Scripted(Policy):
    """Says 1 or 0 in each turn, as `script[prompt]` has it for the sample: "10"."""

    def __init__(self, script):
        super().__init__()
        self.script, self.asked = script, []

    def answer(self, request):
        prompt, index = request.prompt.index, request.index % ABORTED
        tokens = encode(self.script(prompt)[index])
        n = len(tokens)
        self.asked.append((request.group, prompt))
        logprobs = logprobs_of(request.seed, request.prompt.tokens, n)
        versions = ((self.version, 0, n),)
        mask = np.ones(n, bool)
        return Sample(
            request.group, request.index, np.array(tokens, np.int32), logprobs, mask, versions, "stop"
        )


def make_rollouts(tmp_path, script, *overrides):
    """Episodes of two turns. A prompt whose script is "x" has an environment that always fails."""
    prompt_of: dict[int, int] = {}
    num_turns: Counter[int] = Counter()

    def act(message):
        if isinstance(message, Begin):
            prompt_of[message.episode] = message.row["prompt"]
            return None
        if "x" in script(prompt_of[message.episode]):
            return WHY
        num_turns[message.episode] += 1
        if num_turns[message.episode] == 1:
            return Turn([SAID], reward=0.5)
        is_correct = CHAT.text(np.frombuffer(message.tokens, np.int32).tolist()) == "1"
        return Turn(is_done=True, reward=0.5 if is_correct else -1.5, is_correct=is_correct)

    options = [
        "reward.workers=0",
        "reward.soft_overlong_punishment=false",
        "policy.tokens_per_microbatch=200",
    ]
    config = make_config(tmp_path, *options, *overrides)
    policy, actors = Scripted(lambda prompt: script(prompt).replace("x", "0")), Actors(act)
    engine = EpisodeEngine(
        policy,
        actors,
        4,
        config.run.seed,
        not config.engine.is_streaming,
        0.0,
        lambda prompt: {"prompt": prompt.index},
        lambda prompt: [],
    )
    prompts = [Prompt(i, np.zeros(0, np.int32), "") for i in range(NUM_PROMPTS)]
    reward = Reward(config.reward, config.rollout.max_response_length, by_environment=True)
    stream = PromptStream(prompts, seed=5)
    made = Rollouts(
        config,
        1,
        engine,
        stream,
        reward,
        stop_ids=FAMILY.stop_ids,
        vocab_size=FAMILY.tokenizer.get_vocab_size(),
    )
    return made, policy


def order(count):
    prompts = [Prompt(i, np.zeros(0, np.int32), "") for i in range(NUM_PROMPTS)]
    return [prompt.index for prompt in PromptStream(prompts, seed=5).take(count)]


def by_place(*scripts):
    """A script by place in the order of asking; "10" beyond the ones given."""
    places = {prompt: script for prompt, script in zip(order(len(scripts)), scripts, strict=True)}
    return lambda prompt: places.get(prompt, "10")


LONG = "rollout.max_response_length=100"
STREAMING = ("engine.kind=sglang", LONG)
AHEAD = (*STREAMING, "rollout.max_staleness=1", "run.steps=4")
MODES = {"in rounds": (LONG,), "streaming": STREAMING, "ahead": AHEAD}


@pytest.mark.parametrize("mode", MODES)
def test_a_lost_group_leaves_the_step_and_the_batch_is_whole(tmp_path, mode):
    rollouts, policy = make_rollouts(tmp_path, by_place("10", "xx", "11", "01"), *MODES[mode])
    [batch] = next_batches(rollouts, 0)
    metrics = batch.metrics
    assert (metrics["groups/kept"], metrics["groups/lost"], metrics["groups/all_correct"]) == (4, 1, 1)
    assert metrics["rollout/accuracy"] == pytest.approx((4 + 2) / 10), (
        "of the five groups that had their turn"
    )
    assert metrics["episode/turns"] == 2
    counts = Counter(prompt for _, prompt in dict.fromkeys(policy.asked))
    assert counts[order(2)[1]] == 1, "its prompt does not come again at once"
    samples = sum(len(m.cu_seqlens) - 1 for microbatches in batch.minibatches for m in microbatches)
    assert samples == 8
    rollouts.close()


@pytest.mark.parametrize("mode", MODES)
def test_many_lost_groups_among_whole_ones_stop_nothing(tmp_path, mode):
    """They are known to be lost after all others, or before: what counts is the order of asking."""
    scripts = ["xx", "10", "10"] * 10
    more = "rollout.prompts_per_step=20", "rollout.prompts_per_round=40", "optim.prompts_per_minibatch=20"
    rollouts, _ = make_rollouts(tmp_path, by_place(*scripts), *MODES[mode], *more)
    [batch] = next_batches(rollouts, 0)
    assert batch.metrics["groups/kept"] == 20
    assert batch.metrics["groups/lost"] >= 9
    rollouts.close()


@pytest.mark.parametrize("mode", MODES)
def test_when_everything_is_lost_the_run_stops_with_the_reason(tmp_path, mode):
    rollouts, _ = make_rollouts(tmp_path, lambda prompt: "xx", *MODES[mode])
    with pytest.raises(EpisodeError, match=f"groups.*lost, the last because of {re.escape(NAMED)}"):
        next_batches(rollouts, 0)
    rollouts.close()


def test_a_group_that_is_lost_in_its_first_wave_is_not_asked_for_the_rest(tmp_path):
    script = by_place("1010", "xxxx", "1100")
    options = ("rollout.group_size=4", "rollout.first_wave=2")
    rollouts, policy = make_rollouts(
        tmp_path, lambda p: script(p) * (4 // len(script(p))), *options, *STREAMING
    )
    [batch] = next_batches(rollouts, 0)
    assert (batch.metrics["groups/kept"], batch.metrics["groups/lost"]) == (4, 1)
    lost = order(2)[1]
    assert {group for group, prompt in policy.asked if prompt == lost} == {1}
    rollouts.close()


def test_a_problem_that_is_lost_is_left_out_of_an_evaluation_and_counted(tmp_path):
    rollouts, _ = make_rollouts(
        tmp_path, lambda prompt: ["11", "10", "xx"][prompt % 3], LONG, "eval.samples=2"
    )
    problems = [Prompt(i, np.zeros(0, np.int32), "") for i in range(6)]
    scores = evaluate.run(rollouts, {"games": problems}, "evaluating")["games"]
    assert (scores.problems, scores.mean, scores.reward["lost"]) == (4, 0.75, 2)
    assert scores.per_problem == [1.0, 0.5, None] * 2
    with pytest.raises(EpisodeError, match=f"all problems of lost are lost.* of {re.escape(NAMED)}"):
        evaluate.run(rollouts, {"lost": problems[2:3]}, "evaluating")
    rollouts.close()


def test_a_response_that_is_lost_is_no_probe(tmp_path):
    rollouts, _ = make_rollouts(tmp_path, by_place("10", "xx"), LONG)
    prompts = [rollouts.prompts.prompts[i] for i in order(3)]
    groups = probe.responses(rollouts.engine, prompts, rollouts.sampling, 0)
    assert [group.prompt.index for group in groups] == [order(3)[0], order(3)[2]]
    assert all(len(group.prompt.tokens) and group.samples[0].length for group in groups)
    rollouts.close()


def contents(groups):
    return [
        (g.id, g.prompt.index, g.prompt.tokens.tolist(), s.index, s.tokens.tolist(), s.loss_mask.tolist(),
         s.behavior_logprobs.tolist(), s.versions, s.finish_reason, s.is_correct, s.reward, s.text,
         s.episode and s.episode.messages, s.episode and s.episode.num_turns)
        for g in groups for s in g.samples
    ]  # fmt: skip


def test_groups_that_are_carried_keep_the_prompts_that_environments_wrote(tmp_path):
    """With lost ones among them, which stay lost."""
    script = by_place("10", "10", "10", "10", "01", "xx", "10", "10")
    rollouts, _ = make_rollouts(tmp_path, script, *AHEAD)
    next_batches(rollouts, 0)
    while not rollouts.collector.turned.num_kept:
        pass
    rollouts.save(tmp_path)
    saved = dump.read_groups(tmp_path / "carried.parquet")
    assert saved and all(len(group.prompt.tokens) for group in saved if not group.is_lost)
    rollouts.close()
    again, _ = make_rollouts(tmp_path, script, *AHEAD)
    again.load(tmp_path)
    carried = [group for group in again.carried if group.samples]
    assert contents(carried) == contents(saved)
    [batch] = next_batches(again, 1)
    assert batch.metrics["groups/kept"] == 4
    again.close()


def test_a_replayed_step_is_the_one_that_was_dumped(tmp_path):
    script = by_place("10", "xx", "11", "01", "00")
    rollouts, _ = make_rollouts(tmp_path, script, LONG, "rollout.dump_share=1.0")
    batches = next_batches(rollouts, 0)
    rollouts.close()
    path = dump.path_of(tmp_path / "run/rollouts", 0)
    samples = [sample for group in dump.read(path, 4).asked for sample in group.samples]
    assert all(sample.episode.num_turns == 2 and len(sample.episode.messages) == 4 for sample in samples)
    assert all(0 < sample.num_written < sample.length for sample in samples)
    paths = f"rollout.replay={tmp_path / 'run/rollouts'}", f"run.dir={tmp_path / 'again'}"
    replayed, policy = make_rollouts(tmp_path, script, LONG, "rollout.dump_share=1.0", *paths)
    for batch, expected in zip(next_batches(replayed, 0), batches, strict=True):
        assert len(batch.minibatches) == len(expected.minibatches) > 0
        for ours, theirs in zip(batch.minibatches, expected.minibatches, strict=True):
            for m, e in zip(ours, theirs, strict=True):
                assert not m.loss_mask.all()
                assert not [n for n in vars(m) if not np.array_equal(getattr(m, n), getattr(e, n))]
    assert policy.asked == []
    replayed.close()
