"""The answer checker against the labelled set, and against responses made to stall it."""

import json
import time
from decimal import Decimal
from pathlib import Path

import pytest

from dapo.reward import answer_of, is_correct, is_same, refusal_of, tokens
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


COSTLY = "is too long, too deep or too large a number to be compared"
UNREAD = "is neither a number nor words nor mathematics that can be read"
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


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        ("34", None),
        ("1/2", None),
        ("36 dollars", None),
        ("The answer is $1.5$", None),
        (r"\text{no solution}", None),
        (r"x^2 + y^2 = 1", None),
        ("She has 10 + 14 of them.\n#### 24", None),
        ("Some work.\n####", "is blank"),
        ("nan", "is not a value"),
        ("NaN", "is not a value"),
        ("null", "is not a value"),
        ("None", "is not a value"),
        ("H2O", None),
        ("B12", None),
        ("{1,2,3}", None),
        ("3 hours 20 minutes", None),
        (r"\gcd(m,n)", None),
        (r"n \equiv 1 \pmod{3}", None),
        (r"\sum_{k=1}^n k", None),
        (r"\begin{cases} x & x>0 \\ 0 & x \le 0 \end{cases}", None),
        (r"\left\{\begin{array}{l} x=1 \\ y=2 \end{array}\right.", None),
        (r"\begin{cases} x & x>0 \\ 0 & x \le 0", UNREAD),
        (r"\max\{a, b", UNREAD),
        ("gcd(m, n", UNREAD),
        (r"We have x=3, so \boxed{34}", UNREAD),
        ("34 35", UNREAD),
        ("34 x +", UNREAD),
        ('["34"]', UNREAD),
        ("s3://bucket/34", UNREAD),
        ("/tmp/figure 34", UNREAD),
        ("34\0 x", UNREAD),
        ("all x of 34 " * 40, UNREAD),
        *((text, "is not a value") for text in ("-nan", "+NaN", "[None]", "[NA]", "TBD", "n.a.", "N.A.")),
        *(
            (text, "is the name of a file")
            for text in ("plot.eps", "a.ps", "a.svgz", "![](a.png)", "[image]")
        ),
        *((text, None) for text in ("none", "Na", "image", "-1", "[1,2]", "[0,1)", "34 ps", "x < 5")),
        ("figure.heic", "is the name of a file"),
        ("", "is blank"),
        (" \n", "is blank"),
        ("$$", "is blank"),
        (r"\boxed{}", "is blank"),
        ("figure_12.png", "is the name of a file"),
        ("images/3.JPG", "is the name of a file"),
        ("9^{9^{9}}", COSTLY),
        ("10^{99999999999}", COSTLY),
        ("1e999999999", COSTLY),
        ("99999999!", COSTLY),
        ("1000!", None),
        ("1001!", COSTLY),
        (r"\binom{99999999}{4999999}", COSTLY),
        (r"e^{e^{e^{e^{e}}}}", COSTLY),
        ("x+" * 600 + "1", COSTLY),
        ("(" * 100_000, COSTLY),
        ("{" * 41 + "1/2" + "}" * 41, COSTLY),
        (r"\frac{1}{", UNREAD),
        ("1/0", UNREAD),
        ("0^0", UNREAD),
        ("0^{-1}", UNREAD),
        (r"0^{\sqrt{2}-2}", UNREAD),
        (r"\ln 0", UNREAD),
        (r"(-1)!", UNREAD),
        ("(1,2)+1", UNREAD),
        (r"\frac{1}{x-x}", UNREAD),
        ("???", UNREAD),
        (r"\frac{1}{2} \unknown", UNREAD),
    ],
    ids=lambda text: str(text)[:30].encode("unicode_escape").decode(),
)
def test_a_ground_truth_that_nothing_could_equal_is_refused(answer, refusal):
    assert refusal_of(answer) == refusal


@pytest.mark.parametrize("name", sorted(set(HOSTILE) - {"thousands"}))
def test_a_hostile_ground_truth_is_refused(name):
    assert refusal_of(HOSTILE[name])


@pytest.mark.parametrize("brackets", ["(X)", "({X})", r"\left(X\right)", r"\frac{X}{1}"])
def test_brackets_are_read_40_deep_and_no_deeper(brackets):
    def nested(depth):
        text = "1/2"
        for _ in range(depth):
            text = brackets.replace("X", text)
        return text

    levels = brackets.count("(") + brackets.count("{X")
    assert is_correct("Answer: x = " + nested(40 // levels), "1/2")
    assert not is_correct("Answer: x = " + nested(40 // levels + 1), "1/2")
    assert not is_correct("Answer: x = " + nested(450), "1/2")
    assert not is_correct("Answer: x = 1/2", nested(450))


def test_what_is_too_deep_to_be_read_is_no_name():
    for depth in (tokens.MAX_DEPTH, tokens.MAX_DEPTH + 1, 140):
        opened, closed = "(" * depth, ")" * depth
        assert is_correct(f"Answer: {opened}x{closed} = 34", "34") is (depth == tokens.MAX_DEPTH)
        assert not is_correct(f"Answer: {opened}2x{closed} = 34", "34")


PI = "3.14159265358979323846"


@pytest.mark.parametrize(
    ("digits", "is_right"), [(10, False), (11, False), (12, True), (13, True), (20, True)]
)
def test_a_decimal_stands_for_an_irrational_number_from_12_digits_on(digits, is_right):
    decimal = f"{Decimal(PI):.{digits - 1}f}"
    wrong = str(Decimal(decimal) + Decimal(10) ** (1 - digits))
    assert is_correct(f"Answer: {decimal}", r"\pi") is is_right
    assert is_correct(r"Answer: \pi", decimal) is is_right
    assert is_correct(f"Answer: {decimal}e-30", r"\pi\cdot 10^{-30}") is is_right
    assert not is_correct(f"Answer: {wrong}", r"\pi")


@pytest.mark.parametrize(
    ("decimal", "other", "is_right"),
    [
        ("0.30000000000000004", "0.3", True),
        ("0.3333333333333333", "1/3", True),
        ("0.333333333333333", "1/3", False),
        ("0.333333333333", "1/3", False),
        ("0.3000000000000001", "0.3", False),
        ("12.000000000001", "12.000000000002", False),
        ("1234567890.123456781", "1234567890.123456782", False),
    ],
)
def test_rational_numbers_are_compared_exactly_but_for_the_noise_of_a_double(decimal, other, is_right):
    assert is_same(decimal, other) is is_right
    assert is_same(other, decimal) is is_right


@pytest.mark.parametrize(
    ("given", "gold", "is_right"),
    [
        ("2x - y + 1 = 0", "y = 2x + 1", True),
        (r"\frac{x}{3} + \frac{y}{2} = 1", "2x + 3y = 6", True),
        (r"\sqrt{2}x = \sqrt{6}", r"x - \sqrt{3} = 0", True),
        ("x = x", "y = 2x + 1", False),
        ("0 = 0", "y = 2x + 1", False),
        ("-2x > -4", "x < 2", True),
        ("-2x > -4", "x > 2", False),
        ("2x > 4", "x < 2", False),
        (r"3\sqrt{x} > 3y", r"\sqrt{x} > y", True),
        ("x > 2y", "2y < x", True),
        ("x > 2y", r"2y \le x", False),
        ("3 > x > 1", "(1, 3)", True),
        ("y > 2", "x > 2", False),
        (r"x \ne 2", r"x - 2 \ne 0", True),
        ("Area = 1/2", "1/2", True),
        ("Area = 1/3", "1/2", False),
        ("x = 2 or 1", "1, 2", True),
        ("x = 1, y = 2", "x = 2, y = 1", False),
        (r"\sin\cos x", r"\sin(\cos(x))", True),
        (r"\sin\cos x", r"\sin x\cos x", False),
        (r"\sin 2x y", r"\sin(2xy)", True),
        (r"\sin(x)y", r"y\sin x", True),
        (r"\ln x\ln y", r"\ln(y)\ln(x)", True),
    ],
)
def test_equations_and_inequalities_are_compared_as_mathematics(given, gold, is_right):
    assert is_correct(f"Answer: ${given}$", gold) is is_right


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        ("(34)", "34"), ("{34}", "34"), ("(x+1)", "x+1"), ("(1/2)", "1/2"), ("{x+1}", "x+1"),
        ("((1/2))", "1/2"), ("(1,2)", "(1,2)"), ("(no)", "no"), ("$34", "34"), ("$ 34$", "34"),
        ("$34$.", "34"), ("$x=1$ or $x=2$", "1,2"),
    ],
)  # fmt: skip
def test_brackets_and_dollars_that_only_group_are_taken_off(given, gold):
    assert is_correct(f"Answer: {given}", gold)


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        ("(1,234)", "1234"), ("[34]", "34"), ("[1/2]", "1/2"), (r"\{1/2\}", "1/2"), ("(1/2]", "1/2"),
        ("(1/2", "1/2"), ("1/2)", "1/2"), ("{x+1)", "x+1"), ("1$/$2$", "1/2"), ("$1$$/2$", "1/2"),
        ("$1/2$ $1/2$", "1/2"), ("$1/2$ $", "1/2"), ("3$4$", "34"), ("$3$ $4$", "34"), ("()", "1/2"),
        (r"\boxed{3}\boxed{4}", "34"), (r"\boxed{x}+\boxed{1}x", "x+1"),
    ],
)  # fmt: skip
def test_brackets_and_dollars_that_mean_something_stay(given, gold):
    assert not is_correct(f"Answer: {given}", gold)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Answer: **$34$**.<|im_end|>", "34"), ("Answer: 34\nAnswer: 35", "35"), ("34", None),
        ("Answer:", None), ("Answer: $$", None), ("Answer: <|im_end|>", None), ("", None),
        ("Answer: I don't know", "I don't know"),
    ],
)  # fmt: skip
def test_the_answer_of_a_response_is_none_where_nothing_is_answered(response, answer):
    assert answer_of(response) == answer


@pytest.mark.parametrize(
    ("given", "other"), [("34", "34.0"), ("34", "$34$"), ("1/2", "0.5"), ("#### 24", "24")]
)
def test_two_ways_to_write_a_ground_truth_are_one_answer(given, other):
    assert is_same(given, other) and is_same(other, given)
    assert not is_same(given, "35") and not is_same("35", given)


def test_the_set_whose_labels_came_first_is_agreed_with_and_no_wrong_answer_accepted():
    lines = (Path(__file__).parents[3] / "benchmarks/answer_cases.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    verdicts = [is_correct(case["response"], case["answer"]) for case in cases]
    num_right = sum(case["is_right"] for case in cases)
    assert len(cases) >= 400 and 0.45 < num_right / len(cases) < 0.55
    pairs = list(zip(cases, verdicts, strict=True))
    assert not [case for case, verdict in pairs if verdict and not case["is_right"]]
    refused = [case for case, verdict in pairs if case["is_right"] and not verdict]
    assert len(refused) <= 2, refused  # a union, "ways to do it"


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (r"\lfloor \pi \rfloor + 1/2", "7/2", "9/2"),
        ("1/6", r"0.1\overline{6}", r"0.1\overline{7}"),
        ("1/6", r"0.1\overline{6}", r"0.1\overline{x}"),
        ("12 + 1/2", "25/2", "12_x + 1/2"),
        ("3/2", r"\frac{\lg 1000}{2}", r"\frac{\ln 1000}{2}"),
        (r"\sin(1)/2", r"\frac{\sin(1)}{2}", r"\frac{\sin_2(1)}{2}"),
        ("(1, 2, 3)", "(1,2,3)", "(1, 2, 3]"),
        (
            r"\begin{pmatrix}1\\2\end{pmatrix}",
            r"\begin{pmatrix}1\\2\end{pmatrix}",
            r"\begin{pmatrix}3\\2\end{pmatrix}",
        ),
        (
            r"\begin{pmatrix}1&5\\2&6\end{pmatrix}",
            r"\begin{bmatrix}1&5\\2&6\end{bmatrix}",
            r"\begin{pmatrix}1&7\\2&6\end{pmatrix}",
        ),
    ],
)
def test_every_part_of_an_answer_counts(gold, right, wrong):
    assert is_correct(f"Answer: ${right}$", gold) and not is_correct(f"Answer: ${wrong}$", gold)


@pytest.mark.parametrize(
    "gold", [r"\begin{pmatrix}1/0\\1\end{pmatrix}", "(1, 2/0)", "x = 1/0", r"\{1/0, 2\}"]
)
def test_a_part_without_a_value_is_refused(gold):
    assert refusal_of(gold)


def test_brackets_are_counted_by_how_deep_they_are():
    tokens.check_size("(1)" * 100 + "{" * tokens.MAX_DEPTH + "}" * tokens.MAX_DEPTH)
    for bracket in "({[":
        with pytest.raises(tokens.Costly, match=f"{tokens.MAX_DEPTH + 1} brackets deep"):
            tokens.check_size("(1)" * 100 + bracket * (tokens.MAX_DEPTH + 1))
