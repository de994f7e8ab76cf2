"""The forecast's formulas against exact fractions and sampling; what it learns; the record as a file."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from math import comb, lgamma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo.config import ConfigError
from dapo.rollout import forecast, record
from dapo.rollout.forecast import Asked, Forecast, Odds, Rules, dice

GROUP = 8
WHOLE = Odds(1.0, 1.0, 0.5, 0.5, 1.0, 1.0, 1.0)
BETAS = [(1, 1), (1, 3), (5, 2), (2, 40)]


def beta_moment(alpha: int, beta: int, right: int, wrong: int) -> Fraction:
    """E[p^right (1 − p)^wrong] = B(α + right, β + wrong) / B(α, β) with factorials."""

    def b(x: int, y: int) -> Fraction:
        return Fraction(1, comb(x + y - 2, x - 1) * (x + y - 1))

    return b(alpha + right, beta + wrong) / b(alpha, beta)


@pytest.mark.parametrize(("alpha", "beta"), BETAS)
def test_chances_are_those_of_a_beta_binomial(alpha: int, beta: int) -> None:
    a, b = np.array([float(alpha)]), np.array([float(beta)])
    right, wrong = beta_moment(alpha, beta, GROUP, 0), beta_moment(alpha, beta, 0, GROUP)
    assert forecast.all_correct(a, b, GROUP)[0] == pytest.approx(float(right), rel=1e-14)
    assert forecast.mixed(a, b, GROUP)[0] == pytest.approx(float(1 - right - wrong), rel=1e-13)
    assert forecast.mixed(a, b, 1)[0] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(("alpha", "beta"), BETAS)
def test_after_a_first_wave_the_rest_is_what_bayes_says(alpha: int, beta: int) -> None:
    """P(mixed | k wrong) = P(k wrong and not all G) / P(k wrong), exactly, while nothing is calibrated."""
    known = Forecast(1, Rules(GROUP, first_wave=3))
    known.asked[:], known.alpha[:], known.beta[:] = 1, alpha, beta
    [odds] = known.odds(np.array([0]), 0)
    for found, wrong in ((odds.after_wrong, (0, 1)), (odds.after_right, (1, 0))):
        some, every = (beta_moment(alpha, beta, n * wrong[0], n * wrong[1]) for n in (3, GROUP))
        assert found == pytest.approx(float(1 - every / some), rel=1e-12)


def test_a_shift_moves_the_mean_in_logits_and_keeps_the_evidence() -> None:
    alpha, beta = forecast.shifted(np.array([1.0, 6.0]), np.array([3.0, 2.0]), 0.7)
    assert alpha + beta == pytest.approx([4.0, 8.0])
    assert np.log(alpha / beta) == pytest.approx(np.log([1 / 3, 3.0]) + 0.7)


def test_the_prior_is_the_likeliest_of_all() -> None:
    rng = np.random.default_rng(0)
    visits: dict[tuple[int, int], int] = {}
    for p in rng.beta(0.4, 1.3, 4000):
        n = 16 if rng.random() < 0.7 else 4
        key = int(rng.binomial(n, p)), n
        visits[key] = visits.get(key, 0) + 1

    def likelihood(a: float, b: float) -> float:
        one = lgamma(a + b) - lgamma(a) - lgamma(b)
        return sum(
            m * (one + lgamma(a + c) + lgamma(b + n - c) - lgamma(a + b + n)) for (c, n), m in visits.items()
        )

    a, b = forecast.fit_prior(visits)
    assert a == pytest.approx(0.4, rel=0.08) and b == pytest.approx(1.3, rel=0.08)
    steps = (0.9, 1.0, 1.1)
    assert max(itertools.product(steps, steps), key=lambda s: likelihood(a * s[0], b * s[1])) == (1.0, 1.0)


def test_few_visits_that_came_out_alike_leave_much_open() -> None:
    """Alone, their likelihood is largest where nothing else can ever come out."""
    chances = [
        forecast.mixed(*np.array(forecast.fit_prior({(0, 8): n}))[:, None], 8)[0] for n in (1, 10, 1000)
    ]
    assert chances[0] > 0.3 > chances[1] > 0.05 > chances[2] > 0
    assert min(forecast.fit_prior({(0, 8): 10**9})) == 0.02


def asked(prompt: int, correct: int, samples: int = GROUP, **more: float) -> Asked:
    values = {"epoch": 0, "odds": WHOLE, "num_correct_at_first": correct, "weight": 1.0} | more
    return Asked(prompt=prompt, num_correct=correct, num_samples=samples, **values)  # type: ignore[arg-type]


def test_evidence_fades_towards_the_prior() -> None:
    known = Forecast(2, Rules(GROUP))
    known.learn(3, [asked(0, 8)])
    (a0, b0), prior = (known.alpha[0], known.beta[0]), known.prior
    assert (a0, b0) == pytest.approx((prior[0] + 8, prior[1]))
    alpha, beta = known.posterior(np.array([0, 1]), 13)
    assert alpha == pytest.approx([prior[0] + 8 * 0.98**10, prior[0]])
    assert beta == pytest.approx([prior[1], prior[1]])


def test_a_prompt_of_which_nothing_is_known_has_the_runs_prior_even_if_its_neighbours_are_known() -> None:
    known = Forecast(3, Rules(GROUP))
    known.learn(0, [asked(0, 8), asked(2, 3)])
    [odds] = known.odds(np.array([1]), 1)
    assert (odds.alpha, odds.beta) == pytest.approx(known.prior)


def test_two_groups_of_one_prompt_in_a_step_both_count() -> None:
    known = Forecast(1, Rules(GROUP))
    known.learn(0, [asked(0, 8), asked(0, 2)])
    assert (known.asked[0], known.samples[0], known.correct[0]) == (2, 16, 10)
    assert known.alpha[0] + known.beta[0] == pytest.approx(sum(known.prior) + 16)
    assert known.visits == {(10, 16): 1}


def test_the_shift_follows_a_policy_that_learns() -> None:
    """By half a Newton step of the logit that would make the expected counts the found ones."""
    n = 40
    known = Forecast(n, Rules(GROUP, first_wave=3))
    known.learn(0, [asked(i, i % (GROUP + 1), num_correct_at_first=2) for i in range(n)])
    assert known.shift == 0.0, "first visits say nothing of a shift"
    alpha, beta = known.posterior(np.arange(n), 1)
    mean = alpha / (alpha + beta)
    expected, slope = 3 * mean.sum(), (3 * mean * beta / (alpha + beta + 1)).sum()
    known.learn(1, [asked(i, 5, num_correct_at_first=1 + i % 2) for i in range(n)])
    assert known.shift == pytest.approx(0.5 * min((1.5 * n - expected) / (slope + 1), 0.5))
    assert 0 < known.shift <= 0.25
    before = known.shift
    known.learn(2, [asked(i, 0, num_correct_at_first=0) for i in range(n)])
    assert known.shift == pytest.approx(before - 0.25)


def test_the_shift_goes_no_further_than_a_quarter_of_a_logit_a_step() -> None:
    rng, n = np.random.default_rng(1), 4000
    known = Forecast(n, Rules(GROUP))
    known.learn(0, [asked(i, int(rng.binomial(GROUP, 0.5))) for i in range(n)])
    for step in range(1, 8):
        before = known.shift
        known.learn(step, [asked(i, int(rng.binomial(GROUP, 1 / (1 + np.exp(-1))))) for i in range(n)])
        assert 0 <= known.shift - before <= 0.25 + 1e-12
    assert known.shift == pytest.approx(0.9, abs=0.15)


@pytest.mark.parametrize("correct", [0, GROUP])
def test_where_all_come_out_alike_for_thousands_of_steps_the_shift_has_no_end_but_slows_down(
    correct: int,
) -> None:
    """By likelihood alone it would grow by a quarter each step."""
    known = Forecast(100, Rules(GROUP))
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        for step in range(4000):
            known.learn(step, [asked(i, correct) for i in range(30)])
        table = known.table(np.arange(100), 4000)
    assert 0 < abs(known.shift) < 30 and np.isfinite(table).all()
    for step in range(4000, 4060):
        known.learn(step, [asked(i, GROUP // 2) for i in range(30)])
    [odds] = known.odds(np.array([0]), 4060)
    assert odds.formula > 0.5


def test_few_known_prompts_move_no_shift() -> None:
    known = Forecast(20, Rules(GROUP))
    for step in range(5):
        known.learn(step, [asked(i, GROUP) for i in range(20)])
    assert known.shift == 0.0


def test_the_calibration_learns_from_what_became_of_groups_by_their_weights() -> None:
    """Formulas say 0.5, half as many are mixed; of the stopped ones the spared stand for all."""
    odds = WHOLE._replace(formula=0.55, mixed=0.55)
    known = Forecast(100, Rules(GROUP))
    some = [asked(i, 4, odds=odds) for i in range(10)] + [asked(i, 0, odds=odds) for i in range(30)]
    stopped = [asked(i, 0, 4, odds=odds, weight=0.0) for i in range(50)]
    spared = [asked(i, 1, odds=odds, num_correct_at_first=0, weight=10.0) for i in range(6)]
    known.learn(0, some + stopped + spared)
    assert known.of_formula[5] == pytest.approx([100, 55, 70])
    corrected = known.calibrated(np.array([0.55, 0.05]))
    assert corrected[0] == pytest.approx(0.55 * (70 + 32 * 0.55) / (55 + 32 * 0.55))
    assert corrected[1] == pytest.approx(0.05), "a tenth without groups stays as the formulas have it"
    assert known.ece == pytest.approx(0.15) and known.stopped_mixed == 1.0
    known.learn(1, [])
    assert known.of_formula[5, 0] == 100, "a step without groups tells nothing"


def test_prompts_that_are_likely_mixed_are_asked_for_and_the_floor_brings_all_back() -> None:
    rules = Rules(GROUP, is_skipping=True, floor=0.2, sharpness=0.35)
    known = Forecast(3, rules)
    known.asked[:], known.alpha[:], known.beta[:] = 1, [4, 200, 30], [4, 1, 1]
    some, none, few = known.odds(np.arange(3), 0)
    assert (some.ask, none.ask) == (1.0, 0.2) and none.mixed < 0.07
    assert few.ask == pytest.approx(few.mixed / 0.35) and 0.2 < few.ask < 1
    off = Forecast(3, Rules(GROUP))
    assert {odds.ask for odds in off.odds(np.arange(3), 0)} == {1.0}


def test_only_where_a_verdict_could_stop_it_a_group_has_a_first_wave() -> None:
    known = Forecast(2, Rules(GROUP, first_wave=4, stop_below=0.15))
    hard, open_ = WHOLE._replace(after_wrong=0.1, after_right=0.9), WHOLE._replace(after_wrong=0.2)
    assert known.num_at_first(hard) == 4 and known.num_at_first(open_) == GROUP
    assert [known.is_doomed(hard, correct) for correct in (0, 1, 4)] == [True, False, False]
    easy = WHOLE._replace(after_wrong=0.9, after_right=0.1)
    assert [known.is_doomed(easy, correct) for correct in (0, 3, 4)] == [False, False, True]
    assert not Forecast(2, Rules(GROUP)).is_doomed(hard, 0)


def test_a_prompt_that_is_solved_more_often_than_is_wanted_leaves_for_good() -> None:
    known = Forecast(3, Rules(GROUP, drop_above=0.8))
    known.learn(0, [asked(0, 8), asked(1, 4)])
    assert known.is_dropped.tolist() == [True, False, False]
    known.learn(1, [asked(0, 0), asked(0, 0), asked(0, 0)])
    assert known.is_dropped[0]


def test_dice_are_hashes_of_their_names_and_even() -> None:
    assert dice(b"ask", 1, 2, 3) == dice(b"ask", 1, 2, 3)
    assert len({dice(kind, *names) for kind in (b"ask", b"proof") for names in [(1, 2), (2, 1), (1, 3)]}) == 6
    drawn = np.array([dice(b"ask", 7, 0, prompt) for prompt in range(4000)])
    assert drawn.min() >= 0 and drawn.max() < 1
    assert np.histogram(drawn, 10, (0, 1))[0] == pytest.approx([400] * 10, abs=90)


# as a file


def learnt(rules: Rules = Rules(GROUP)) -> Forecast:  # noqa: B008
    rng, known = np.random.default_rng(3), Forecast(200, rules)
    for step in range(6):
        prompts = rng.choice(120, 40, replace=False).tolist()
        odds = known.odds(np.array(prompts), step)
        known.learn(
            step,
            [
                asked(i, int(rng.binomial(GROUP, i / 120)), odds=o, epoch=step // 2)
                for i, o in zip(prompts, odds, strict=True)
            ],
        )
    return known


def test_what_is_read_goes_on_to_the_bit(tmp_path: Path) -> None:
    known, again = learnt(), Forecast(200, Rules(GROUP))
    path = tmp_path / "run" / "prompts.parquet"
    record.write(path, known, "digest")
    record.read(path, again, "digest")
    for name, value in vars(known).items():
        assert np.array_equal(value, getattr(again, name)), name
    everyone, more = np.arange(200), [asked(i, 3) for i in range(50)]
    for each in (known, again):
        each.learn(6, more)
    assert known.odds(everyone, 7) == again.odds(everyone, 7)
    assert list(path.parent.iterdir()) == [path]


def test_a_user_reads_what_each_prompt_did_and_is_expected_to_do(tmp_path: Path) -> None:
    known, path = learnt(), tmp_path / "prompts.parquet"
    record.write(path, known, "digest")
    rows = pq.read_table(path).to_pylist()
    assert [row["index"] for row in rows] == np.flatnonzero(known.asked).tolist()
    row = rows[10]
    assert (
        row["asked"] == known.asked[row["index"]] and row["correct"] <= row["samples"] == GROUP * row["asked"]
    )
    assert row["forecast"] == known.odds(np.array([row["index"]]), 6)[0].mixed
    assert path.stat().st_size < 200 * 64 + 9000


def test_two_million_prompts_are_written_in_at_most_64_bytes_each(tmp_path: Path) -> None:
    rng, known = np.random.default_rng(0), Forecast(2_000_000, Rules(16))
    known.asked += 3
    for name in ("alpha", "beta", "shift_then"):
        setattr(known, name, rng.random(2_000_000) + 1)
    for name in ("samples", "correct", "step", "epoch"):
        setattr(known, name, rng.integers(0, 2**12, 2_000_000).astype(np.int32))
    path = tmp_path / "prompts.parquet"
    record.write(path, known, "digest")
    assert path.stat().st_size <= 64 * 2_000_000
    again = Forecast(2_000_000, Rules(16))
    record.read(path, again, "digest")
    assert np.array_equal(again.alpha, known.alpha)
    assert (
        sum(value.nbytes for value in vars(known).values() if isinstance(value, np.ndarray))
        <= 64 * 2_000_000 + 1000
    )


@pytest.mark.parametrize(
    ("known", "data", "said"),
    [
        (Forecast(200, Rules(GROUP)), "other", "record of other prompts than data.train holds"),
        (Forecast(201, Rules(GROUP)), "digest", "record of other prompts than data.train holds"),
        (Forecast(200, Rules(16)), "digest", "groups of 8 samples, rollout.group_size=16: use the same"),
    ],
)
def test_a_record_of_something_else_is_refused(tmp_path: Path, known: Forecast, data: str, said: str) -> None:
    path = tmp_path / "prompts.parquet"
    record.write(path, learnt(), "digest")
    with pytest.raises(ConfigError, match=said):
        record.read(path, known, data)
    assert not known.asked.any()


def test_a_damaged_record_is_refused_wherever_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    record.write(path, learnt(), "digest")
    whole = path.read_bytes()
    for broken in (b"", whole[:-5], whole[:1000], b"no parquet"):
        path.write_bytes(broken)
        known = Forecast(200, Rules(GROUP))
        with pytest.raises(ConfigError, match="is damaged, or no record of prompts"):
            record.read(path, known, "digest")
        assert not known.asked.any()


def test_a_bit_that_has_changed_is_found_or_changes_nothing(tmp_path: Path) -> None:
    """A page's header has no checksum, its numbers have; in the file's footer what else a Forecast holds."""
    path, right = tmp_path / "prompts.parquet", learnt()
    record.write(path, right, "digest")
    whole, found = path.read_bytes(), 0
    places = range(20, len(whole), len(whole) // 250)
    for i in places:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 8]) + whole[i + 1 :])
        known = Forecast(200, Rules(GROUP))
        try:
            record.read(path, known, "digest")
        except ConfigError:
            found += 1
            assert not known.asked.any()
        else:
            assert np.array_equal(known.alpha, right.alpha) and np.array_equal(known.correct, right.correct)
            assert np.array_equal(known.of_mixed, right.of_mixed) and known.visits == right.visits
    assert found > 0.6 * len(places)


def test_a_dump_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"index": [1]}).replace_schema_metadata({"dapo": json.dumps({})}), path)
    with pytest.raises(ConfigError, match="no record of prompts"):
        record.read(path, Forecast(2, Rules(GROUP)), "digest")
