"""The answer checker against the labelled set, and against responses made to stall it."""

import sys
import time

import pytest

from dapo.config import ConfigError
from dapo.reward import answer, is_correct, refusal_of
from tests.dapo.reward.answer_cases import CASES


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.gold} ¦ {case.response[-40:]}".encode("unicode_escape").decode()
)
def test_the_checker_agrees_with_the_label(case):
    assert is_correct(case.response, case.gold) is case.is_right


def test_the_labelled_set_is_large_balanced_and_without_repetition():
    assert len(CASES) >= 300
    assert len({(case.response, case.gold) for case in CASES}) == len(CASES)
    assert 0.4 < sum(case.is_right for case in CASES) / len(CASES) < 0.6


def test_work_before_the_answer_line_changes_no_verdict():
    for case in CASES:
        assert (
            is_correct("First, $x = 35$.\n\\boxed{36}\nThen:\n" + case.response, case.gold) is case.is_right
        ), case


HOSTILE = {
    "brackets": "(" * 10**6,
    "closed brackets": "([{" * 200_000 + "34" + "}])" * 200_000,
    "backslashes": "\\" * 10**6,
    "macros": "\\a" * 500_000,
    "a long macro": "\\" + "a" * 10**6,
    "boxes": r"\boxed{" * 100_000,
    "unevenly closed boxes": r"\boxed{" * 100_000 + "34" + "}" * 99_999,
    "NUL": "\0" * 10**6,
    "34 and NUL": "34\0",
    "dollars": "$" * 10**6,
    "equals": "x=" * 500_000,
    "spaces": "34" + " " * 10**6 + "x",
    "zeros": "34." + "0" * 10**6 + "5",
    "thousands": "1" + ",111" * 250_000,
    "stars": "3" + "*" * 10**6 + "4",
    "answers": "Answer:" * 100_000,
    "lone surrogates": "34\ud800",
    "powers": "9^" * 100_000 + "9",
    "a tower": "9^{9^{9^{9^9}}}",
    "a huge exponent": "10^{99999999999}",
    "factorials": "99999999!",
    "nested factorials": "((9!)!)!",
    "a huge binomial": r"\binom{99999999}{4999999}",
}


@pytest.mark.parametrize("gold", ["34", r"\frac{1}{2}"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_is_wrong_and_costs_time_in_proportion_to_its_length(name, gold):
    start = time.process_time()
    assert not is_correct("Answer: " + HOSTILE[name], gold)
    assert not is_correct(HOSTILE[name], gold)
    assert time.process_time() - start < 20, "in proportion to the square of its length it would be hours"


def test_a_million_digits_are_compared_exactly():
    gold = "1234567890" * 100_000
    assert is_correct(f"Answer: $\\boxed{{+0{gold}.0}}$", gold)
    assert not is_correct(f"Answer: {gold[:-1]}1", gold)


def test_without_math_verify_integers_are_checked_and_other_mathematics_names_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    answer._math_verify.cache_clear()
    assert (
        is_correct("Answer: 34", "34")
        and is_correct("Answer: $1/2$", "1/2")
        and is_correct("Answer: 0.5", "1/2")
    )
    with pytest.raises(ConfigError, match="pip install math-verify"):
        is_correct("Answer: 2x", "x+x")
    answer._math_verify.cache_clear()


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        ("34", None),
        ("1/2", None),
        ("She has 10 + 14 of them.\n#### 24", None),
        ("nan", "is not a value"),
        ("", "is blank"),
        (" \n", "is blank"),
        ("figure_12.png", "is the name of a file"),
        ("9^{9^{9}}", "is too long, too deep or too large a number to be compared"),
        ("(" * 100_000, "is too long, too deep or too large a number to be compared"),
        (r"\frac{1}{", "is neither a number nor words nor mathematics that can be read"),
    ],
)
def test_a_ground_truth_that_nothing_could_equal_is_refused(answer, refusal):
    assert refusal_of(answer) == refusal
