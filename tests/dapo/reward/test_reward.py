import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo.config import ConfigError
from dapo.reward import answer_of, boxed, either, is_correct, soft_overlong_penalty
from dapo.reward.pool import Reward, what_is_read
from dapo.types import RewardError
from tests.conftest import make_config, make_prompt, make_sample

FUNCTIONS = "tests.dapo.reward.reward_functions"

# Eq. 13


@pytest.mark.parametrize(
    ("length", "penalty"),
    [
        (0, 0),
        (16_384, 0),
        (16_385, -1 / 4096),
        (18_432, -0.5),
        (20_479, -4095 / 4096),
        (20_480, -1),
        (20_481, -1),
        (10**6, -1),
    ],
)
def test_soft_overlong_penalty_at_the_papers_corners(length, penalty):
    assert soft_overlong_penalty(length, 20_480, 4_096) == penalty


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 50_000), st.integers(0, 50_000), st.integers(2, 40_000), st.data())
def test_soft_overlong_penalty_is_between_minus_one_and_zero_and_never_rises_with_length(
    a, b, max_length, data
):
    cache = data.draw(st.integers(1, max_length - 1))
    shorter, longer = sorted([a, b])
    assert (
        -1
        <= soft_overlong_penalty(longer, max_length, cache)
        <= soft_overlong_penalty(shorter, max_length, cache)
        <= 0
    )


# Eq. 7


@pytest.mark.parametrize(
    "line",
    [
        "Answer: 34", "**Answer:** 34", "**Answer**: 34", "**Answer: 34**", "Answer: **34**", "Answer: 34.",
        "Answer: 34.0", "Answer: 034", "Answer: +34", r"Answer: \(34\)", r"Answer: \[34\]", "Answer: $34$",
        "Answer: $34$.", r"Answer: \boxed{34}", "Answer: `34`", r"Answer: $\boxed{34}$", "Answer：34",
        "answer:34", "ANSWER :  34  ", "Answer: 34\r\n", "The final answer: 34", "Answer: 34\nThat was it.",
        "\n\nAnswer: 34\n\n",
    ],
)  # fmt: skip
def test_34_is_found_however_it_is_dressed(line):
    assert is_correct("Some work.\n" + line, "34")
    assert not is_correct("Some work.\n" + line, "35")


@pytest.mark.parametrize(
    "line",
    [
        "", "34", "Answer:", "Answer: ", "Answer: thirty-four", "Answer:\n34", "Answer: 34.5",
        "Answer: 34.05", "Answer: 3.4e1", "Answer: 3 4", "Answer: 34 or 35", "Answer: 35, 34",
        "Answer: 34, 34", "Answer: $34$ $34$", "Answer: 34 Answer: 34", "Answer: 33+1", "Answer: 68/2",
        "Answer: 340", "Answer: -34", "Answer: −34", "Answer: --34", "Answer: 0x22", "Answer: 3_4",
        "Answer: 3,4", r"Answer: \boxed{}", r"Answer: 3\boxed{4}", "Answer: 3**4", "Answer: 3$4$",
        r"Answer: 3\[4\]", "Answer: $3$$4$",
    ],
)  # fmt: skip
def test_what_is_not_34_alone_on_the_answer_line_is_wrong(line):
    assert not is_correct("34\n" + line, "34")


@pytest.mark.parametrize(
    ("given", "gold", "expected"),
    [
        ("-7", "-7", True),
        ("−7", "-7", True),
        ("-7", "−7", True),
        ("7", "-7", False),
        ("-0", "0", True),
        ("0.00", "0", True),
        ("0", "", False),
        ("", "0", False),
        ("1,234,567", "1234567", True),
        ("1234567", "1,234,567", True),
        ("12,34,567", "1234567", False),
        ("34", " 34 ", True),
        ("34", "34.0", True),
        ("34", "+034", True),
        ("x+1", "x+1", True),
        ("$x+1$", "x+1", True),
        ("$x+1$", "$x+1$", True),
        ("x + 1", "x+1", True),
        ("1/2", "1/2", True),
        ("0.5", "1/2", True),
    ],
)
def test_an_answer_is_compared_as_an_integer_or_else_as_mathematics(given, gold, expected):
    assert is_correct(f"Answer: {given}", gold) is expected


def test_integers_of_5000_digits_are_compared_exactly():  # beyond what int() accepts, and far beyond float
    gold = "123456789" * 555 + "12345"
    assert len(gold) == 5000
    assert is_correct(f"Answer: {gold}", gold) and is_correct(f"Answer: +0{gold}.0", gold)
    assert not is_correct(f"Answer: {gold[:-1]}6", gold)
    assert not is_correct(f"Answer: {gold}0", gold)
    assert not is_correct(f"Answer: -{gold}", gold)


@settings(derandomize=True, deadline=None)
@given(
    st.integers(),
    st.integers(-1, 1),
    st.integers(0, 3),
    st.sampled_from(["{}", "{:,}", "{}.", "{}.00", "**{}**", r"\({}\)"]),
)
def test_is_correct_is_equality_of_integers(gold, difference, zeros, form):
    assert is_correct(
        "Answer: " + form.format(gold + difference), "0" * zeros + str(gold) if gold >= 0 else str(gold)
    ) is (difference == 0)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Answer: 34\nAnswer: 35", False),
        ("Answer: 35\nWait.\n**Answer:** 34", True),
        ("Answer: 34\nAnswer:", False),
    ],
)
def test_the_last_answer_line_counts(response, expected):
    assert is_correct(response, "34") is expected


def test_an_answer_far_from_the_end_still_counts():  # the widely used checker reads the last 300 characters
    assert is_correct("Answer: 34\n" + "I am sure. " * 1000, "34")


@pytest.mark.parametrize(
    "response",
    [
        "answer" * 50_000, "answer" + "*" * 200_000, "answer" + " " * 200_000,
        "Answer:" + " " * 200_000 + "x", "**" * 100_000 + "Answer", "Answer:" + r"\boxed{" * 50_000,
        "Answer: " + "1,111" * 50_000, "Answer: " + "1" * 200_000 + "x", "Answer: 34.\n" * 50_000,
    ],
    ids=range(9),
)  # fmt: skip
def test_no_response_takes_long_to_check(response):  # a quadratic pattern would take minutes
    start = time.process_time()
    assert is_correct(response, "34") == response.startswith("Answer: 34.")
    assert time.process_time() - start < 20


# answer formats

READ = {  # response → what is read in each format: the last line with "Answer:", the last box, either
    "so 7": (None, None, None),
    "Answer: 34": ("34", None, "34"),
    r"so \boxed{34}.": (None, "34", "34"),
    "Answer: 1\n" r"or \boxed{2}": ("1", "2", "2"),
    r"\boxed{2}" "\nAnswer: 1\nThat was it.": ("1", "2", "1"),
    r"Answer: $\boxed{34}$": ("34", "34", "34"),
    r"Answer: 1, so \boxed{2}": (r"1, so \boxed{2}", "2", r"1, so \boxed{2}"),
    r"\boxed{1} Answer: 2": ("2", "1", "2"),
    r"\boxed{1}, \boxed{2}": (None, "2", "2"),
    "Answer:\n" r"\boxed{3}": (None, "3", "3"),
    r"\boxed{3}" "\nAnswer:": (None, "3", None),
    r"\boxed {\frac{1}{2}} and } {": (None, r"\frac{1}{2}", r"\frac{1}{2}"),
    r"\boxed{\text{a \} b}}": (None, r"a \} b", r"a \} b"),
    r"{ \boxed{1} then \boxed{2": (None, None, None),
    "\\boxed{1\n+1}": (None, "1\n+1", "1\n+1"),
    r"\boxed{}": (None, None, None),
    r"\boxed 5": (None, None, None),
}


@pytest.mark.parametrize(("response", "found"), READ.items())
def test_each_format_reads_its_last_answer(response, found):
    assert tuple(answer_of(response, name) for name in ("answer_line", "boxed", "either")) == found
    assert (answer_of(response), boxed.answer_of(response), either.answer_of(response)) == found


def test_an_answer_in_a_box_is_checked_as_one_on_a_line():
    assert is_correct(r"so \boxed{0.5}", "1/2", answer_format="boxed") and boxed.is_correct(
        r"\boxed{34}", "34"
    )
    assert not is_correct(r"so \boxed{0.5}", "1/2") and not boxed.is_correct("Answer: 34", "34")
    assert either.is_correct("Answer: 34", "34") and either.is_correct(r"\boxed{34}", "34")


@pytest.mark.parametrize(
    "response",
    [r"\boxed{" * 50_000, r"\boxed" + " " * 200_000, r"\boxed{" + "{" * 200_000, r"\boxed{7}" "\n" * 50_000],
    ids=range(4),
)
def test_no_response_takes_long_to_find_a_box_in(response):
    start = time.process_time()
    assert not boxed.is_correct(response, "34") and not either.is_correct(response, "34")
    assert time.process_time() - start < 20


@pytest.mark.parametrize("workers", [0, 1])
def test_the_default_reward_and_its_votes_read_the_answer_format(tmp_path, workers):
    options = [f"reward.workers={workers}", "reward.answer_format=boxed"]
    reward = Reward(make_config(tmp_path, *options).reward, 32)
    pairs = [(make_prompt(), make_sample(text=text)) for text in (r"\boxed{1}", "Answer: 1", r"\boxed{2}")]
    reward.score(pairs)
    assert [sample.is_correct for _, sample in pairs] == [True, False, False]
    assert reward.take_metrics()["reward/no_answer"] == 1 / 3
    assert reward.answer_of(r"Answer: 2, \boxed{1}") == "1" and reward.same([("0.5", "1/2")]) == [True]
    reward.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], 'dapo.reward:is_correct reads the last line with "Answer:" of a response: prompts have to ask'),
        (["answer_format=boxed"], r"reads the last \boxed{…} of"),
        (["answer_format=either"], r'reads the last line with "Answer:" or \boxed{…} of'),
        (["function={'a:b': 1.0, 'dapo.reward:is_correct': 0.5}", "answer_format=boxed"], "boxed"),
    ],
)
def test_which_answers_are_read_is_said(tmp_path, options, said):
    assert said in what_is_read(make_config(tmp_path, *[f"reward.{option}" for option in options]).reward)
    assert what_is_read(make_config(tmp_path, "reward.function=a:b").reward) == ""


# Eq. 7 + Eq. 13


def score(tmp_path, *options, text="Answer: 1", length=4, is_truncated=False):
    """(is_correct, reward) of one sample; L_max 32, L_cache 8."""
    config = make_config(tmp_path, *[f"reward.{option}" for option in options])
    sample = make_sample(length, text=text, is_truncated=is_truncated)
    Reward(config.reward, config.rollout.max_response_length).score([(make_prompt(), sample)])
    return sample.is_correct, sample.reward


@pytest.mark.parametrize(
    ("function", "text", "expected"),
    [
        ("dapo.reward:is_correct", "Answer: 1", (True, 1.0)),
        ("dapo.reward:is_correct", "Answer: 2", (False, -1.0)),
        (f"{FUNCTIONS}:long_bool", "1", (True, 1.0)),
        (f"{FUNCTIONS}:long_bool", "", (False, -1.0)),
        (f"{FUNCTIONS}:graded", "0.25", (True, 0.25)),
        (f"{FUNCTIONS}:graded", "0.0", (False, 0.0)),
        (f"{FUNCTIONS}:graded", "-0.5", (False, -0.5)),
        (f"{FUNCTIONS}:counted", "1", (True, 1.0)),
        (f"{FUNCTIONS}:counted", "0", (False, 0.0)),
    ],
)
def test_a_bool_is_worth_plus_or_minus_one_and_a_number_itself(tmp_path, function, text, expected):
    assert score(tmp_path, f"function={function}", text=text) == expected


@pytest.mark.parametrize(("length", "penalty"), [(24, 0), (28, -0.5), (32, -1)])
@pytest.mark.parametrize("text", ["Answer: 1", "Answer: 2"])
def test_soft_overlong_punishment_is_added_to_the_reward_and_leaves_correctness(
    tmp_path, text, length, penalty
):
    is_right, plain = score(tmp_path, "soft_overlong_punishment=false", text=text, length=length)
    assert plain == (1 if is_right else -1)
    assert score(tmp_path, text=text, length=length) == (is_right, plain + penalty)


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ([], "Answer: 1", (True, 0.0)),
        (["truncated_is_wrong=true"], "Answer: 1", (False, -2.0)),
        (["truncated_is_wrong=true"], "Answer: 2", (False, -2.0)),
        (["truncated_is_wrong=true", f"function={FUNCTIONS}:graded"], "0.5", (False, -2.0)),
        (["truncated_is_wrong=true", f"function={FUNCTIONS}:graded"], "-3.0", (False, -4.0)),
        (["truncated_is_wrong=true", "soft_overlong_punishment=false"], "Answer: 1", (False, -1.0)),
    ],
)
def test_a_truncated_response_is_wrong_only_where_the_task_asks_for_an_end(tmp_path, options, text, expected):
    assert score(tmp_path, *options, text=text, length=32, is_truncated=True) == expected


def test_a_finished_response_of_full_length_is_not_truncated(tmp_path):
    assert score(tmp_path, "truncated_is_wrong=true", length=32) == (True, 0.0)


@pytest.mark.parametrize(
    ("name", "text"),
    [("graded", "nan"), ("graded", "inf"), ("graded", "-inf"), ("silent", ""), ("wordy", "")],
)
def test_a_function_that_returns_no_finite_number_is_named_with_what_it_returned(tmp_path, name, text):
    returned = {"silent": "None", "wordy": "'yes'"}.get(name, text)
    with pytest.raises(
        RewardError, match=rf"reward\.function={FUNCTIONS}:{name} returned {returned} for prompt 0"
    ):
        score(tmp_path, f"function={FUNCTIONS}:{name}", text=text)


@pytest.mark.parametrize(
    "path",
    [
        "nowhere:f",
        "dapo.reward:nothing",
        "dapo.reward",
        ":f",
        "dapo.reward:",
        "a b:c",
        ".relative:f",
        f"{FUNCTIONS}:NOT_A_FUNCTION",
    ],
)
def test_a_function_that_cannot_be_imported_is_refused_before_the_run(tmp_path, path):
    with pytest.raises(ConfigError, match=r"reward\.function="):
        Reward(make_config(tmp_path, f"reward.function='{path}'").reward, 32)


def test_the_reward_is_finite_for_every_verdict(tmp_path):
    assert all(
        math.isfinite(score(tmp_path, f"function={FUNCTIONS}:graded", text=text)[1])
        for text in ("0.0", "-1e300", "1e300")
    )
