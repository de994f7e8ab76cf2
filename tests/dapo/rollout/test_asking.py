"""What a step asks for when it follows a forecast, whatever finishes first and wherever a run goes on."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dapo.config import ConfigError
from dapo.rollout import asking, pending
from dapo.rollout.pending import RolloutError
from dapo.rollout.prompts import PromptStream, Visit
from dapo.rollout.rollouts import Rollouts
from dapo.types import Interrupted, StorageError
from tests.batches import next_batches
from tests.dapo.rollout.test_pending import InterruptAfter, contents, decided, make_rollouts
from tests.dapo.rollout.test_rollouts import NUM_PROMPTS, ScriptedEngine, seeds_by_id

STREAMING = "engine.kind=sglang"
BOTH = [
    "rollout.group_size=4", "rollout.forecast=skip", "rollout.forecast_floor=0.2", "rollout.first_wave=2",
    "rollout.forecast_sharpness=0.9", "rollout.stop_below=0.6", "rollout.max_rounds=6",
]  # fmt: skip
SKIP = [option for option in BOTH if "first_wave" not in option]
WAVE = [option for option in BOTH if "forecast=" not in option]


@pytest.fixture(autouse=True)
def no_scoring_call_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "BRIEF", float("inf"))


def make_engine(seed: int, order: int | None) -> ScriptedEngine:
    """A third of the prompts is mixed, in many ways; the others are all right or all wrong."""
    rng = random.Random(seed)
    ways = ["0011", "0001", "1101", "1010"], ["1111"], ["0000"], ["0000"]
    scripts = [rng.choice(rng.choice(ways)) for _ in range(NUM_PROMPTS)]
    return ScriptedEngine(scripts.__getitem__, order, length=lambda request: 1 + request.seed % 24)


def steps(rollouts: Rollouts, first: int, end: int) -> list[Any]:
    """What each step kept, asked and passed over."""
    found = []
    for step in range(first, end):
        rollouts.load_weights([], step)
        next_batches(rollouts, step)
        passed = [(v.index, v.epoch, v.number, is_asked) for v, _, is_asked in rollouts.asking.passed]
        found.append((passed, upcoming(rollouts), state_of(rollouts)))
    return found


def upcoming(rollouts: Rollouts) -> list[Visit]:
    """What comes by next. How much of it was taken and put back depends on what finished first."""
    visits = rollouts.prompts.take(100)
    rollouts.prompts.put_back(visits)
    return visits


def state_of(rollouts: Rollouts) -> dict[str, Any]:
    forecast = rollouts.forecast
    return {
        name: getattr(v, "tolist", lambda v=v: v)() for name, v in vars(forecast).items() if name != "rules"
    }


@pytest.mark.parametrize("options", [BOTH, SKIP, WAVE], ids=["both", "skip", "first wave"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_finishes_first_the_same_is_asked_for_kept_and_learnt(
    tmp_path: Path, seed: int, options: list[str]
) -> None:
    rounds = make_rollouts(tmp_path, make_engine(seed, None), *options)
    streaming = make_rollouts(tmp_path, make_engine(seed, seed), *options, STREAMING)
    for step in range(8):
        one, other = rounds.collect(step), streaming.collect(step)
        assert [*map(contents, one.kept)] == [*map(contents, other.kept)]
        assert decided(one) == decided(other)
        for each, buffer in ((rounds, one), (streaming, other)):
            each.forecast.learn(step, each.asking.outcomes(buffer.decided))
        assert state_of(rounds) == state_of(streaming)
        assert upcoming(rounds) == upcoming(streaming), "the next step begins with the same prompt"


def test_a_resumed_run_asks_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    options = [*BOTH, STREAMING]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = make_rollouts(tmp_path / "a", make_engine(1, 5), *options)
    first = make_rollouts(tmp_path / "b", make_engine(1, 5), *options)
    expected = steps(whole, 0, 9)
    steps(first, 0, 5)
    (tmp_path / "saved").mkdir()
    first.save(tmp_path / "saved")
    again = make_rollouts(tmp_path / "b", make_engine(1, 5), *options)
    again.load(tmp_path / "saved")
    assert steps(again, 5, 9) == expected[5:]
    assert state_of(first) == state_of(make_and_load(tmp_path, options))
    assert (tmp_path / "b" / "run" / "prompts.parquet").exists() or list(tmp_path.rglob("prompts.parquet"))


def make_and_load(tmp_path: Path, options: list[str]) -> Rollouts:
    again = make_rollouts(tmp_path / "b", make_engine(1, 5), *options)
    again.load(tmp_path / "saved")
    return again


def test_an_interrupted_step_is_asked_for_again_in_the_same_way(tmp_path: Path) -> None:
    interrupt = InterruptAfter(40, is_on=False)
    rollouts = make_rollouts(tmp_path, make_engine(2, 2), *BOTH, STREAMING, is_interrupted=interrupt)
    whole = make_rollouts(tmp_path, make_engine(2, 2), *BOTH, STREAMING)
    assert steps(rollouts, 0, 3) == steps(whole, 0, 3)
    interrupt.is_on = True
    with pytest.raises(Interrupted):
        rollouts.collect(3)
    interrupt.is_on = False
    assert steps(rollouts, 3, 5) == steps(whole, 3, 5)


def test_hopeless_prompts_are_passed_over_and_their_groups_end_early(tmp_path: Path) -> None:
    """Where the first two samples tell mixed prompts from the others."""
    costs, scripts = [], random.Random(0).choices(["0110", "1000", "1111", "0000", "0000"], k=NUM_PROMPTS)
    for options in ([], SKIP, WAVE, BOTH):
        engine = ScriptedEngine(scripts.__getitem__, 3)
        plain = ["rollout.group_size=4", "rollout.max_rounds=30"]
        rollouts = make_rollouts(tmp_path, engine, *(options or plain), STREAMING, plain[1])
        ledgers = [next_batches(rollouts, step)[0].metrics for step in range(12)]
        ledger = {name: sum(each[name] for each in ledgers[4:]) for name in ledgers[0]}
        decided = sum(ledger[f"groups/{kind}"] for kind in ("kept", "all_correct", "all_wrong"))
        costs.append(decided * 4 - 2 * ledger.get("groups/stopped", 0))
        assert ledger["groups/kept"] == 8 * 4
        assert bool(ledger.get("groups/skipped")) == (options in (SKIP, BOTH))
        assert bool(ledger.get("groups/stopped")) == (options in (WAVE, BOTH))
    assert costs[3] < min(costs[1:3]) and max(costs[1:3]) < 0.9 * costs[0], costs


def test_no_prompt_comes_twice_in_a_step_while_there_are_others(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda prompt: "0000")
    rollouts = make_rollouts(tmp_path, engine, *SKIP, "rollout.max_empty_steps=9", "rollout.max_rounds=9")
    for step in range(3):
        rollouts.collect(step)
        asked = Counter(visit.index for visit, _, is_asked in rollouts.asking.passed if is_asked)
        assert len(rollouts.asking.passed) >= 36 and set(asked.values()) == {1}
        rollouts.forecast.learn(step, [])


def test_after_a_whole_pass_nothing_is_skipped_and_after_two_prompts_come_again(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda prompt: "0000")
    rollouts = make_rollouts(tmp_path, engine, *SKIP, "rollout.prompts_per_round=40", "rollout.max_rounds=5")
    rollouts.forecast.asked[:] = 1
    rollouts.forecast.beta[:] = 10_000
    rollouts.collect(0)
    taken = [is_asked for _, _, is_asked in rollouts.asking.passed]
    assert sum(taken) == 200
    assert sum(taken[:NUM_PROMPTS]) < 0.5 * NUM_PROMPTS
    assert sum(taken[: 2 * NUM_PROMPTS]) == NUM_PROMPTS, "each once"
    assert all(taken[2 * NUM_PROMPTS :])


def test_where_each_prompt_was_asked_for_once_each_weighs_the_same(tmp_path: Path) -> None:
    """Those that the first pass left out are in the second."""
    engine = ScriptedEngine(lambda prompt: "0000" if prompt % 4 else "1111")
    rollouts = make_rollouts(tmp_path, engine, *SKIP, "rollout.prompts_per_round=40", "rollout.max_rounds=1")
    rollouts.forecast.asked[:], rollouts.forecast.beta[:] = 1, 3
    rollouts.forecast.beta[::4] = 10_000
    buffer = rollouts.collect(0)
    assert len({group.prompt.index for group in buffer.decided}) == NUM_PROMPTS
    found = rollouts.asking.ledger(buffer)["forecast/accuracy_plain"]
    passed = len(rollouts.asking.passed) / NUM_PROMPTS
    assert passed > 1.5 and found == pytest.approx(0.25, abs=0.02)


def test_a_stopped_group_is_turned_away_as_what_its_samples_say_and_leaves_room(tmp_path: Path) -> None:
    """The cap counts samples: what stopping saved may be asked for."""
    engine = ScriptedEngine(lambda prompt: "0000" if prompt % 2 else "1111")
    rollouts = make_rollouts(tmp_path, engine, *WAVE, "rollout.prompts_per_round=8", "rollout.max_rounds=2")
    rollouts.forecast.asked[:], rollouts.forecast.alpha[:], rollouts.forecast.beta[:] = 1, 0.05, 0.05
    buffer = rollouts.collect(0)
    sizes = Counter(len(group.samples) for group in buffer.decided)
    assert set(sizes) == {2, 4} and sizes[2] > 3 * sizes[4]
    assert 15 * 4 < sum(size * count for size, count in sizes.items()) <= 16 * 4
    assert len(buffer.all_correct) > 8 and len(buffer.all_wrong) > 8
    spared = [group for group in buffer.decided if len(group.samples) == 4]
    drawn = [asking.dice(b"proof", rollouts.config.run.seed, group.id) for group in spared]
    assert max(drawn) < asking.PROOF
    outcomes = rollouts.asking.outcomes(buffer.decided)
    assert {(each.num_samples, each.weight) for each in outcomes} == {(2, 0.0), (4, 10.0)}


def test_samples_are_those_that_a_whole_request_would_have_drawn(tmp_path: Path) -> None:
    engine = make_engine(0, 0)
    make_rollouts(tmp_path, engine, *WAVE, STREAMING).collect(0)
    seeds = seeds_by_id(engine)
    assert all(seed == pending.sample_seed(0, *map(int, id.split("."))) for id, seed in seeds.items())
    at_first = [request for requests in engine.submitted for request in requests if request.index < 2]
    assert len(at_first) < len(seeds), "some go on"


def test_first_waves_are_marked_and_what_they_show_counts_in_what_is_asked_for(tmp_path: Path) -> None:
    kinds = [i // 6 % 3 for i in range(NUM_PROMPTS)]
    engine = ScriptedEngine(lambda prompt: ["0100", "0001", "0000"][kinds[prompt]])
    rollouts = make_rollouts(tmp_path, engine, *WAVE)
    rollouts.forecast.asked[:], rollouts.forecast.alpha[:], rollouts.forecast.beta[:] = 1, 0.05, 0.05
    whole = [i for i in range(NUM_PROMPTS) if kinds[i] == 2]
    rollouts.forecast.alpha[whole] = rollouts.forecast.beta[whole] = 9
    buffer = rollouts.collect(0)
    requests = [request for requests in engine.submitted for request in requests]
    assert all(r.priority == (r.index < 2 and kinds[r.prompt.index] < 2) for r in requests)
    assert {kinds[group.prompt.index] for group in buffer.decided} == {0, 1, 2}
    for group in buffer.decided:
        odds = rollouts.asking.questions[group.id].odds
        seen = [1.0, odds.after_wrong, odds.mixed][kinds[group.prompt.index]]
        assert rollouts.asking.chance(group) == seen


def test_a_run_whose_prompts_are_all_solved_ends_with_one_line(tmp_path: Path) -> None:
    engine = ScriptedEngine(lambda prompt: "11")
    rollouts = make_rollouts(
        tmp_path, engine, "rollout.drop_above=0.5", "rollout.max_empty_steps=99", "rollout.max_rounds=9"
    )
    with pytest.raises(RolloutError, match=rf"drop_above=0.5: all {NUM_PROMPTS} prompts have left"):
        for step in range(9):
            next_batches(rollouts, step)
    assert rollouts.forecast.is_dropped.all()


def test_a_prompt_that_has_left_is_not_asked_for(tmp_path: Path) -> None:
    rollouts = make_rollouts(tmp_path, make_engine(0, 0), "rollout.group_size=4", "rollout.drop_above=0.7")
    left: set[int] = set()
    for step in range(8):
        next_batches(rollouts, step)
        asked = {visit.index for visit, _, is_asked in rollouts.asking.passed if is_asked}
        assert not asked & left
        left = {i for i in range(NUM_PROMPTS) if rollouts.forecast.is_dropped[i]}
    assert left


@pytest.mark.parametrize("options", [BOTH, ["rollout.group_size=4"]], ids=["used", "off"])
def test_a_record_of_other_groups_is_refused_where_it_is_used_and_left_where_it_is_not(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_rollouts(tmp_path, make_engine(1, 5), *options)
    steps(first, 0, 2)
    first.save(tmp_path)
    engine = ScriptedEngine(lambda prompt: "01000000")
    again = make_rollouts(tmp_path, engine, *options, "rollout.group_size=8")
    if options == BOTH:
        with pytest.raises(ConfigError, match=r"groups of 4 samples, rollout.group_size=8"):
            again.load(tmp_path)
        return
    again.load(tmp_path)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and line.endswith("the record of prompts begins anew")
    next_batches(again, 2)
    assert again.forecast.asked.sum() == 4


def test_files_with_weights_have_dice_of_their_own_epochs(tmp_path: Path) -> None:
    """A small file comes round more often than a large one, and its prompts draw anew each time."""

    def rollouts() -> Rollouts:
        made = make_rollouts(tmp_path, make_engine(4, 4), *BOTH, STREAMING)
        made.prompts = PromptStream(made.prompts.prompts, 5, [(8, 1.0), (NUM_PROMPTS - 8, 1.0)])
        return made

    whole, first, again = rollouts(), rollouts(), rollouts()
    expected = steps(whole, 0, 8)
    assert whole.prompts.epochs[0] > 2 * whole.prompts.epochs[20] > 0
    steps(first, 0, 4)
    (tmp_path / "saved").mkdir()
    first.save(tmp_path / "saved")
    again.load(tmp_path / "saved")
    assert steps(again, 4, 8) == expected[4:]


@pytest.mark.parametrize("options", [BOTH, ["rollout.group_size=4"]], ids=["used", "off"])
@pytest.mark.parametrize("seed", range(4))
def test_a_step_that_failed_is_made_anew(
    tmp_path: Path, seed: int, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = make_rollouts(tmp_path, make_engine(seed, seed), *options, STREAMING)
    whole = make_rollouts(tmp_path, make_engine(seed, seed + 1), *options, STREAMING)
    assert steps(rollouts, 0, 2) == steps(whole, 0, 2)

    def fails(*arguments: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched, pytest.raises(StorageError):
        patched.setattr(rollouts.dumps, "write", fails)
        rollouts.next_batch(2)
    assert state_of(rollouts) == state_of(whole)
    rollouts.mixed_fraction = whole.mixed_fraction
    assert steps(rollouts, 2, 5) == steps(whole, 2, 5)


def test_prompts_that_have_left_come_back_when_the_option_is_raised(tmp_path: Path) -> None:
    def resumed(drop_above: str) -> Rollouts:
        again = make_rollouts(tmp_path, make_engine(0, 0), "rollout.group_size=4", drop_above)
        again.load(tmp_path)
        return again

    rollouts = make_rollouts(tmp_path, make_engine(0, 0), "rollout.group_size=4", "rollout.drop_above=0.6")
    steps(rollouts, 0, 6)
    rollouts.save(tmp_path)
    left, known = rollouts.forecast.is_dropped, rollouts.forecast
    assert (resumed("rollout.drop_above=0.6").forecast.is_dropped == left).all()
    some = resumed("rollout.drop_above=0.9").forecast.is_dropped
    assert (some == left & (known.alpha / (known.alpha + known.beta) > 0.9)).all()
    assert 0 < some.sum() < left.sum()
    assert not resumed("rollout.drop_above=null").forecast.is_dropped.any()
