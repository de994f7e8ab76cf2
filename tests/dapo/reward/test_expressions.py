"""What mathematics is read to its last character, and what is not read at all rather than guessed."""

from __future__ import annotations

from fractions import Fraction

import pytest

from dapo.reward import values
from dapo.reward.answer import choice_of, is_same, read_mathematics, words_of
from dapo.reward.tokens import Ambiguous, Costly, Unreadable
from dapo.reward.units import unit_of

UNREADABLE = [
    "x)", "1 +", "", "()", "[5]", "(5]", "[5)", r"\{1)", r"(1\}", "[0, 1", "(1, 2, 3]", "[1, 2, 3)", "|x",
    "{1, 2", r"\begin{vmatrix}1\end{vmatrix}", r"\begin{pmatrix}1\end{bmatrix}",
    r"\begin{pmatrix}1, 2\end{pmatrix}", r"0.1\overline{x}", r"0.1\overline{}", r"0.1\overline 6",
    r"0.1\overline{6", "1.5_2", "2 3", "1.5 1/2", "2 1.5/2", "2 1/x", "2 1/2.5", "x_{a{b}}", "x_{a",
    r"\lfloor x\rceil", r"\lceil x\rfloor", r"\lfloor x", r"\sin_2 x", r"\ln_2 8", r"\log^{-1} x",
    r"\ln^{-1} x", r"\overline{34}", r"\overline{A3}", r"\overline{A", r"\foo", r"\frac{1}", r"\frac{1}{2",
    r"\frac 1.5 2", r"\sqrt[3 8", r"\sqrt[3}8", r"\text 5", r"\boxed{5", "x^", "x^{2", "2^-", "2^*3",
    "2^/3", "x^±2", r"\binom{4}", "3 +* 4", "1 2/3/", "&",
]  # fmt: skip
READABLE = [
    "= 34", "(1, 2]", "[1, 2)", "(1, 2, 3)", r"\{1, 2\}", r"\{\}", "{1, 2}", "|x|", "|x| + |y|",
    r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", r"0.1\overline{6}", "101_2", "2 1/2", "x_{ab}", "x_1'",
    r"\lfloor x \rfloor", r"\lceil x \rceil", r"\sin x", r"\sin^{-1} x", r"\sin^2 2x", r"\log_2 8",
    r"\ln(x+1)", r"\overline{AB}", r"\frac12", r"\frac{1}{2}", r"\sqrt[3]{8}", r"\binom{4}{2}", "x^{2}",
    "2^-3", "2^{-3}", "5!", r"1 \cup 2", "1:2", r"30°", r"2\frac{1}{2}", "2 * -3", "6 / -2",
]  # fmt: skip


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_is_not_understood_to_its_last_character_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable) as found:
        read_mathematics(text)
    assert type(found.value) is Unreadable, "neither two meanings nor too much"


@pytest.mark.parametrize("text", READABLE)
def test_what_stands_beside_it_is_read(text: str) -> None:
    assert read_mathematics(text).statements


@pytest.mark.parametrize("text", ["5!!", r"2 \cdot 1\frac12", r"2\frac{7}{2}"])
def test_what_may_mean_two_things_is_ambiguous(text: str) -> None:
    with pytest.raises(Ambiguous):
        read_mathematics(text)


@pytest.mark.parametrize("text", ["1e1001", "1e-1001", "1e100000", "(" * 60 + "1" + ")" * 60])
def test_what_would_cost_too_much_is_not_computed(text: str) -> None:
    with pytest.raises(Costly):
        read_mathematics(text)


def test_an_exponent_ends_before_the_argument() -> None:
    assert is_same(r"\sin^2 2x", r"\sin^{2}(2x)") and is_same("x^-2", "1/x^2")
    assert not is_same(r"\sin^2 2x", r"\sin^{22}(x)")


def test_the_costliest_that_is_read() -> None:
    assert read_mathematics("1e1000").statements and read_mathematics("1e-1000").statements


def test_a_number_that_is_too_large_is_costly_and_not_only_without_value() -> None:
    large = ("number", Fraction(2) ** 10_000, 0)
    two, half = ("number", Fraction(2), 0), ("number", Fraction(2) ** ((1 << 13) - 1), 0)
    assert values.evaluate(large) == 2**10_000
    assert values.evaluate(("product", two, ("product", half, half))) == 2 ** ((1 << 14) - 1)
    with pytest.raises(Costly):
        values.evaluate(("product", two, ("product", two, ("product", half, half))))
    with pytest.raises(Costly):
        values.evaluate(("function", "sin", ("number", Fraction(10**7), 0)))
    with pytest.raises(Costly):
        values.evaluate(("product", large, large))
    with pytest.raises(Unreadable) as found:
        values.evaluate(("quotient", large, ("number", Fraction(0), 0)))
    assert not isinstance(found.value, Costly)


def test_an_answer_may_begin_with_its_sign_of_equality() -> None:
    assert is_same("= 34", "34") and not is_same("= 34", "43")


def test_a_double_stands_for_the_fraction_that_it_is_nearest_to_whatever_its_sign() -> None:
    assert is_same("0.14285714285714285", "1/7") and is_same("-0.14285714285714285", "-1/7")
    assert is_same(r"1.4285714285714285 \times 10^{-1}", "1/7") and not is_same(r"1.43 \times 10^{-1}", "1/7")
    assert not is_same(r"1.4285714285714285 \times 9^{-1}", "1/7")
    assert not is_same("-0.14285714285714", "-1/7") and not is_same("-0.14285714285714285", "1/7")


def test_words_stand_in_text_or_not() -> None:
    assert words_of(r"\text{No solution}") == words_of("no  Solution") == "no solution"
    assert words_of(r"\text{No} \text{solution}") == "no solution"


def test_a_chain_of_relations_has_at_most_eight_sides() -> None:
    assert read_mathematics(" = ".join("12345678")).statements
    with pytest.raises(Unreadable, match="relations"):
        read_mathematics(" = ".join("123456789"))
    with pytest.raises(Unreadable):
        read_mathematics("< 3 <")


def test_a_choice_is_short_and_no_answer_is_like_another() -> None:
    assert choice_of("B) " + "x" * 297) == ("B", "x" * 297) and choice_of("B) " + "x" * 298) is None
    assert not is_same("", "34") and not is_same("34", "") and not is_same("", "")


def test_what_stands_before_an_integer_may_be_a_sign_that_nobody_reads() -> None:
    assert is_same("□ = 34", "34") and is_same("25 + 9 = 34", "34") and not is_same("25 + 8 = 34", "34")


def test_words_and_choices_are_short_texts() -> None:
    assert words_of("ab" * 150) == "ab" * 150 and words_of("ab" * 150 + "a") is None


@pytest.mark.parametrize(
    ("given", "gold", "expected"),
    [
        ("5 square feet", "5 ft^2", True),
        ("5 sq ft", "5 ft^2", True),
        ("5 sq. ft.", "5 ft^2", True),
        ("5 Sq ft", "5 square feet", True),
        ("5 cubic feet", "5 ft^3", True),
        ("5 cu ft", "5 ft^3", True),
        ("5 square", "5", False),
        ("5 square feet", "5 ft^3", False),
        ("5 cubic feet", "5 ft^2", False),
        ("5 square feet", "5 ft", False),
        ("5 square units", "5 ft^2", True),
        ("5 ms", "5 ms", True),
        ("5 ms", "5 m", False),
    ],
)
def test_powers_of_units_are_words_or_numbers(given: str, gold: str, expected: bool) -> None:
    assert is_same(given, gold) == expected


def test_a_unit_is_a_short_text() -> None:
    assert unit_of("e" * 120) == "e" * 120 and unit_of("e" * 121) is None


def test_the_parts_of_a_union_have_no_order_whatever_their_brackets() -> None:
    assert is_same(r"(1,2) \cup (3,4]", r"(3,4] \cup (1,2)")
    assert not is_same(r"(1,2) \cup (3,4]", r"(3,4) \cup (1,2]")
