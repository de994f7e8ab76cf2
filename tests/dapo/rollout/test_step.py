"""What the main rank does around sampling: evaluation, dumps, the engine's memory, the end of a run."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from dapo.report import glossary
from dapo.rollout import dump, evaluate
from dapo.rollout import rollouts as module
from dapo.rollout.buffer import Buffer
from dapo.rollout.pending import Chances, GroupSampler
from dapo.rollout.rollouts import RolloutError
from dapo.types import EngineError, Interrupted
from tests.batches import next_batches
from tests.conftest import make_prompt
from tests.dapo.rollout.test_pending import make_engine
from tests.dapo.rollout.test_rollouts import ScriptedEngine, by_place, make_rollouts, seeds_by_id

SETS = {"easy": [make_prompt(i) for i in range(2)], "hard": [make_prompt(i) for i in (7, 8, 9)]}
EVAL = ("eval.samples=4", "eval.every=3", "run.steps=7")
# of 4 samples; a token 1 at the end is a right answer
SCRIPT = {0: "1111", 1: "1002", 7: "2201", 8: "0000", 9: "3001"}


def make_eval(tmp_path, *overrides, engine=None, **more):
    def length(request):
        return 32 if request.prompt.index == 8 else 4

    engine = engine or ScriptedEngine(SCRIPT.__getitem__, length=length)
    return make_rollouts(tmp_path, engine, "reward.workers=0", *EVAL, *overrides, **more)


# evaluation


@pytest.mark.parametrize("step", range(9))
def test_evaluation_comes_every_so_many_steps_and_after_the_last(tmp_path, step):
    engine = ScriptedEngine(SCRIPT.__getitem__)
    metrics = evaluate.metrics_at(step, make_eval(tmp_path, engine=engine), SETS)
    assert bool(metrics) == bool(engine.submitted) == (step in (0, 3, 6, 7))


def test_without_held_out_sets_there_is_no_evaluation(tmp_path):
    engine = ScriptedEngine(SCRIPT.__getitem__)
    assert evaluate.metrics_at(0, make_eval(tmp_path, engine=engine), {}) == {} and not engine.submitted


def test_every_set_has_its_own_metrics(tmp_path):
    """By hand: 4 and 1 right of 4; then 1, 0 and 1 right of 4, and the second of these fills the limit."""
    found = evaluate.metrics_at(3, make_eval(tmp_path), SETS)
    expected = {
        "eval/accuracy": (5 / 8 + 2 / 12) / 2,
        "eval/easy/mean": 5 / 8,
        "eval/easy/mean_half_width": 1.96 * 0.375,  # s = 0.75 / √2, over √2
        "eval/easy/majority": 1 / 2,
        "eval/easy/pass": 1.0,
        "eval/easy/length": 4.0,
        "eval/easy/truncated": 0.0,
        "eval/hard/mean": 2 / 12,
        "eval/hard/mean_half_width": 1.96 * np.std([0.25, 0, 0.25], ddof=1) / 3**0.5,
        "eval/hard/majority": 0.0,
        "eval/hard/pass": 2 / 3,
        "eval/hard/length": 40 / 3,
        "eval/hard/truncated": 1 / 3,
    }
    counts = ("timeouts", "crashes", "undecided", "no_answer")
    zeros = {f"eval/{name}/{count}": 0 for name in SETS for count in counts}
    assert found == pytest.approx(expected | zeros)
    assert all(glossary.find(name) for name in found)


def test_a_set_of_one_problem_has_no_interval_and_a_reward_without_answers_no_majority(tmp_path):
    reward = "reward.function=tests.dapo.reward.reward_functions:long_bool"
    found = evaluate.metrics_at(0, make_eval(tmp_path, reward), {"one": SETS["easy"][:1]})
    assert "eval/one/mean" in found
    assert not {"eval/one/mean_half_width", "eval/one/majority", "eval/one/no_answer"} & found.keys()


def test_calls_of_evaluation_are_counted_apart_from_those_of_training(tmp_path):
    """A response that hangs its reward is counted where it was scored."""
    engine = ScriptedEngine(lambda prompt: "1000" if prompt not in (7, 8) else "1009")
    rollouts = make_eval(tmp_path, "rollout.group_size=4", engine=engine)
    judged = rollouts.reward._judge

    def with_a_crash(pairs):
        replies = judged(pairs)
        for of_function in replies.values():
            for i, (_, sample) in enumerate(pairs):
                if sample.text == "Answer: 9":
                    of_function[i] = None
        return replies

    rollouts.reward._judge = with_a_crash
    evaluated = evaluate.metrics_at(0, rollouts, SETS)
    assert evaluated["eval/easy/undecided"] == 0 and evaluated["eval/hard/undecided"] == 2 / 12
    engine.script = lambda prompt: "1000"
    [batch] = next_batches(rollouts, 0)
    assert batch.metrics["reward/undecided"] == 0, "evaluation's"
    engine.script = lambda prompt: "1009"
    [batch] = next_batches(rollouts, 1)
    assert batch.metrics["reward/undecided"] == 1 / 4


def test_an_evaluation_that_was_broken_off_while_it_was_scored_leaves_no_counts(tmp_path, monkeypatch):
    rollouts = make_eval(tmp_path)

    def interrupted(*_):
        raise Interrupted

    with monkeypatch.context() as patch:
        silent = {"dapo.reward:is_correct": [None] * 8}
        patch.setattr(rollouts.reward, "_judge", lambda pairs: silent)
        patch.setattr(rollouts.reward, "_mark", interrupted)
        with pytest.raises(Interrupted):
            evaluate.metrics_at(0, rollouts, SETS)
    assert evaluate.metrics_at(0, rollouts, SETS)["eval/easy/undecided"] == 0


@pytest.mark.parametrize("after", [1, 6, 12])
def test_an_interrupted_evaluation_gives_up_its_requests(tmp_path, after):
    engine, seen = ScriptedEngine(SCRIPT.__getitem__), iter(range(1, 100))
    rollouts = make_eval(tmp_path, engine=engine, is_interrupted=lambda: next(seen) >= after)
    with pytest.raises(Interrupted):
        evaluate.metrics_at(0, rollouts, SETS)
    assert engine.aborted and not engine.outstanding
    assert rollouts._samplers == [] and "no group" not in rollouts.waiting()


def test_no_seed_is_shared_between_sets_nor_with_training_and_all_are_the_same_each_time(tmp_path):
    def seeds(step):
        engine = ScriptedEngine(lambda prompt: "1000")
        evaluate.metrics_at(step, make_eval(tmp_path, engine=engine), {name: SETS["easy"] for name in "abc"})
        return seeds_by_id(engine)

    engine = ScriptedEngine(lambda prompt: "1000")
    make_eval(tmp_path, "rollout.group_size=4", engine=engine).collect(0)
    first, trained = seeds(0), seeds_by_id(engine)
    assert len(first) == len(set(first.values())) == 3 * 2 * 4
    assert first == seeds(3)
    assert not set(first) & set(trained) and not set(first.values()) & set(trained.values())


# a step


def test_a_reward_whose_every_call_ends_its_process_is_named_after_the_first_step(tmp_path):
    function = "tests.dapo.reward.reward_functions:dying"
    options = (f"reward.function={function}", "reward.workers=2", "rollout.max_rounds=1")
    rollouts = make_rollouts(tmp_path, ScriptedEngine(lambda prompt: "10"), *options)
    with pytest.raises(RolloutError) as error:
        next_batches(rollouts, 0)
    rollouts.close()
    assert str(error.value).startswith(
        f"reward.function={function} decided about none of the step's 4 groups: "
    )
    assert "0 calls ran past reward.time_limit=5.0, 8 ended their process" in str(error.value)


def test_with_only_every_group_is_dumped_and_nothing_is_learnt(tmp_path):
    engine = ScriptedEngine(by_place("11", "10", "00", "01"))
    rollouts = make_rollouts(tmp_path, engine, "rollout.only=true", "rollout.prompts_per_round=12")
    [batch] = next_batches(rollouts, 3)
    rollouts.dumps.close()
    assert batch.minibatches == [] and batch.metrics["groups/kept"] == 4
    rows = pq.read_table(dump.path_of(tmp_path / "run" / "rollouts", 3)).to_pylist()
    assert len(rows) == 2 * batch.metrics["groups/asked"] == 24
    assert {row["kind"] for row in rows} == {"kept", "all_correct", "all_wrong", "surplus"}


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_one_log_prob_that_is_not_finite_among_finite_ones_ends_the_run(tmp_path, value, place):
    class Damaged(ScriptedEngine):
        def answer(self, request):
            sample = super().answer(request)
            if request.prompt.index == 5 and request.index == 1:
                sample.behavior_logprobs[place] = value
            return sample

    rollouts = make_rollouts(tmp_path, Damaged(lambda prompt: "00"), "rollout.max_rounds=10")
    with pytest.raises(RolloutError, match="prompt 5: the engine's log-probs are not finite"):
        next_batches(rollouts, 0)


def test_a_log_prob_that_is_not_finite_of_a_token_that_the_policy_did_not_write_is_not_read(tmp_path):
    class Foreign(ScriptedEngine):
        def answer(self, request):
            sample = super().answer(request)
            sample.loss_mask[1], sample.behavior_logprobs[1] = False, np.nan
            return sample

    engine = Foreign(lambda prompt: "10")
    assert next_batches(make_rollouts(tmp_path, engine), 0)


@pytest.mark.parametrize("replayed", [False, True])
def test_the_engine_releases_its_memory_once_a_step_when_all_samples_are_in(tmp_path, replayed):
    class Watched(ScriptedEngine):
        def answer(self, request):
            self.done.append("sampled")
            return super().answer(request)

        def release_memory(self):
            assert not self.outstanding
            self.done.append("released")

    if replayed:
        before = make_rollouts(tmp_path, ScriptedEngine(lambda prompt: "10"), "rollout.dump_share=1.0")
        before.next_batch(0)
        before.dumps.close()
    engine = Watched(lambda prompt: "10")
    engine.done = []
    options = [f"rollout.replay={tmp_path / 'run' / 'rollouts'}"] if replayed else []
    make_rollouts(tmp_path, engine, *options).next_batch(0)
    assert engine.done == ["sampled"] * (8 * (not replayed)) + ["released"]


def test_a_step_whose_servers_keep_their_memory_is_given_back(tmp_path, monkeypatch):
    def fails() -> None:
        raise EngineError("no answer")

    engine = ScriptedEngine(lambda _: "10")
    rollouts = make_rollouts(tmp_path, engine)
    monkeypatch.setattr(engine, "release_memory", fails)
    with pytest.raises(EngineError):
        next_batches(rollouts, 0)
    asked = engine.asked()
    assert asked and [visit.index for visit in rollouts.prompts.take(len(asked))] == asked


def test_closing_ends_the_engine_and_the_rewards_processes(tmp_path):
    rollouts = make_rollouts(tmp_path, ScriptedEngine(lambda prompt: "10"), "reward.workers=1")
    next_batches(rollouts, 0)
    closed, processes = [], [worker.guardian for worker in rollouts.reward.workers.workers]
    rollouts.engine.close = lambda: closed.append(True)
    assert processes and all(process.is_alive() for process in processes)
    rollouts.close()
    for process in processes:
        process.join(10)
    assert closed == [True] and not any(process.is_alive() for process in processes)


def test_while_streaming_as_many_groups_are_outstanding_as_probably_fill_the_buffer(tmp_path, monkeypatch):
    """At every wait, not only at the first: else the engine runs dry at the end of a step."""
    buffers, waits = [], []
    wait = GroupSampler.wait

    def kept(*arguments):
        buffers.append(Buffer(*arguments))
        return buffers[-1]

    def watched(sampler):
        pending, buffer = sampler.pending, buffers[-1]
        lacking = buffer.capacity - len(buffer.kept) - pending.num_mixed
        chances = [rollouts._estimate_mixed(len(buffer.kept), len(buffer.decided))] * len(pending.unknown)
        waits.append(
            (
                Chances(chances).is_enough(lacking),
                Chances(chances[1:]).is_enough(lacking),
                pending.num_samples,
            )
        )
        wait(sampler)

    monkeypatch.setattr(module, "Buffer", kept)
    monkeypatch.setattr(GroupSampler, "wait", watched)
    options = ("reward.workers=0", "engine.kind=sglang", "rollout.prompts_per_round=10")
    rollouts = make_rollouts(tmp_path, make_engine(3, 3, mixed=0.3), *options)
    rollouts.collect(0)
    assert len(waits) > 5
    assert all(enough or num_samples == 60 for enough, _, num_samples in waits)
    assert not waits[0][1], "and no more"


def test_the_state_of_a_step_is_json(tmp_path):
    rollouts = make_rollouts(tmp_path, ScriptedEngine(lambda prompt: "00"))
    next_batches(rollouts, 0)
    assert json.loads(json.dumps(rollouts.state_dict(), allow_nan=False))["num_empty_steps"] == 1
