"""What a reward function may return, and what it may ask for."""

import json
from dataclasses import replace

import pytest

from dapo.config import ConfigError
from dapo.types import RewardError
from tests.conftest import make_prompt, make_sample
from tests.dapo.reward.test_pool import RIGHT, WRONG, score
from tests.dapo.reward.test_reward import FUNCTIONS

# grades


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pair_says_what_a_response_is_worth_and_whether_it_is_correct(reward, workers):
    pool = reward(f"workers={workers}", f"function={FUNCTIONS}:pair")
    assert score(pool, ["0.9", "0.2", "-1"], "0.2") == [(False, 0.9), (True, 0.2), (False, -1.0)]
    pool = reward(f"workers={workers}", f"function={FUNCTIONS}:evaluated")
    given = ["(1, True)", "(__import__('numpy').float32(0.5), __import__('numpy').bool_(False))"]
    assert score(pool, given) == [(True, 1.0), (False, 0.5)]


@pytest.mark.parametrize(
    "text",
    [
        "()", "(1.0,)", "(1.0, True, 2)", "[1.0, True]", "(1.0, 1)", "(1.0, None)", "(True, True)",
        "('1', True)", "(float('nan'), True)", "(10**400, False)", "(True, 1.0)", "((1.0, True), True)",
    ],
)  # fmt: skip
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_pair_of_a_finite_number_and_a_bool_is_refused(reward, workers, text):
    pool = reward(f"workers={workers}", f"function={FUNCTIONS}:evaluated")
    with pytest.raises(
        RewardError, match=r"returned .* bool or finite float, or a pair \(finite float, bool\)$"
    ):
        score(pool, [text])


def test_a_number_is_correct_above_what_the_config_says_and_a_bool_or_a_pair_as_they_say(reward):
    both = json.dumps({f"{FUNCTIONS}:graded": 1.0, f"{FUNCTIONS}:long_bool": 0.5})
    pool = reward("workers=0", f"function={both}", "correct_above=0.5")
    assert score(pool, ["0.5", "0.6", "1"]) == [(False, 0.0), (True, 0.6 - 0.5), (True, 1.5)]
    pool = reward("workers=0", f"function={FUNCTIONS}:long_bool", "correct_above=2.0")
    assert score(pool, ["1", "2"]) == [RIGHT, WRONG]
    assert score(reward("workers=0", f"function={FUNCTIONS}:pair", "correct_above=2.0"), ["1"]) == [RIGHT]


def test_a_truncated_response_that_is_wrong_is_so_whatever_a_grade_says(reward):
    sample = make_sample(text="-3.0", is_truncated=True)
    options = "truncated_is_wrong=true", "correct_above=-5.0"
    reward("workers=0", f"function={FUNCTIONS}:graded", *options).score([(make_prompt(), sample)])
    assert (sample.is_correct, sample.reward) == (False, -3.0)


def test_a_shadow_disagrees_about_what_is_correct_not_about_what_it_is_worth(reward, tmp_path):
    shadow = f"shadow=[{FUNCTIONS}:pair]"
    pool = reward("workers=0", f"function={FUNCTIONS}:graded", "correct_above=0.5", shadow)
    assert score(pool, ["1", "0.2", "0.7"]) == [(True, 1.0), (False, 0.2), (True, 0.7)]
    [row] = [json.loads(line) for line in (tmp_path / "disputes.jsonl").read_text().splitlines()]
    assert row["verdicts"] == {f"{FUNCTIONS}:graded": 0.7, f"{FUNCTIONS}:pair": [0.7, False]}


# what a function asks for


class Origin:
    """Stands for a data file whose row i is {"level": i}; notes what is read."""

    def __init__(self):
        self.reads = []

    def read(self, prompt, names):
        self.reads.append((prompt.index, frozenset(names)))
        chat = [{"role": "user", "content": "x"}] if prompt.index else None
        return {"row": {"level": str(prompt.index)}, "prompt": f"p{prompt.index}", "messages": chat}


def asked(reward, texts, truncated=()):
    """As `score`, of two samples of each prompt; and what was read."""
    origin = Origin()
    prompts = [replace(make_prompt(i), origin=origin) for i in range(len(texts) // 2)]
    pairs = [
        (prompts[i // 2], make_sample(group=i // 2, index=i, text=text, is_truncated=i in truncated))
        for i, text in enumerate(texts)
    ]
    reward.score(pairs)
    return [sample.is_correct for _, sample in pairs], origin.reads


@pytest.mark.parametrize("workers", [0, 2])
def test_a_function_sees_what_it_names_of_each_sample(reward, workers):
    chat = [{"role": "user", "content": "x"}]
    first, second = [{"level": "0"}, "p0", None], [{"level": "1"}, "p1", chat]
    texts = [json.dumps([*first, False]), json.dumps([*first, True]), json.dumps([*second, False]), "[]"]
    found, reads = asked(reward(f"workers={workers}", f"function={FUNCTIONS}:seeing"), texts, truncated=[1])
    assert found == [True, True, True, False]
    names = {"row", "prompt", "messages"}
    assert reads == [(0, names), (1, names)], "a prompt once"


@pytest.mark.parametrize("workers", [0, 1])
def test_each_of_several_functions_sees_what_it_asks_for_and_shadows_do(reward, workers, tmp_path):
    both = json.dumps({f"{FUNCTIONS}:level": 1.0, f"{FUNCTIONS}:long_bool": 0.5, f"{FUNCTIONS}:called": 0.25})
    pool = reward(f"workers={workers}", f"function={both}", f"shadow=[{FUNCTIONS}:unfinished]")
    found, reads = asked(pool, ["0", "p0", "0", "1"], truncated=[0, 2])
    assert found == [True, False, False, True], "a row that a function changes is another's no longer"
    assert reads == [(0, {"row", "prompt"}), (1, {"row", "prompt"})]
    assert [
        json.loads(line)["sample"] for line in (tmp_path / "disputes.jsonl").read_text().splitlines()
    ] == [2, 3]


@pytest.mark.parametrize("name", ["long_bool", "unfinished"])
def test_nothing_is_read_that_no_function_asks_for(reward, name):
    assert asked(reward("workers=1", f"function={FUNCTIONS}:{name}"), ["1", "2"], truncated=[0]) == (
        [True, False],
        [],
    )


def test_a_worker_is_sent_only_what_its_function_asks_for(reward, monkeypatch):
    both = json.dumps({f"{FUNCTIONS}:unfinished": 1.0, f"{FUNCTIONS}:long_bool": 0.5})
    pool, sent = reward("workers=1", f"function={both}"), []
    monkeypatch.setattr(pool.workers, "judge", lambda jobs, together: sent.extend(jobs) or [None] * len(jobs))
    score(pool, ["1"])
    assert [(job.function, job.extras) for job in sent] == [(0, (("truncated", False),)), (1, ())]


@pytest.mark.parametrize(
    ("name", "what"),
    [("demanding", "'tolerance'"), ("by_position", "'row'"), ("first_row", "'row'"), ("alone", "too many")],
)
@pytest.mark.parametrize("option", ["function={}", "shadow=[{}]"])
def test_a_function_that_needs_what_nobody_knows_is_refused_at_once(reward, option, name, what):
    path = f"{FUNCTIONS}:{name}"
    expected = (
        r"expected f\(response, answer\), and by name any of row, prompt, messages, truncated, conversation$"
    )
    with pytest.raises(ConfigError, match=rf"^reward\.\w+={path}: .*{what}.*; {expected}") as error:
        reward(option.format(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [("later", "async"), ("one_by_one", "generator"), ("Callable", "class"), ("swapped", "swap them")],
)
def test_what_would_return_no_verdict_is_refused_at_once(reward, name, what):
    with pytest.raises(ConfigError, match=rf"^reward\.function={FUNCTIONS}:{name} .*{what}"):
        reward(f"function={FUNCTIONS}:{name}", "shadow=[]")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_that_cannot_be_printed_is_named_by_its_kind(reward, workers):
    pool = reward(f"workers={workers}", f"function={FUNCTIONS}:evil", "shadow=[]")
    with pytest.raises(RewardError, match=r"raised Unprintable: Unprintable \(.*reward_functions.py:\d+\)"):
        score(pool, ["1"])


def test_a_function_that_does_not_say_its_parameters_gets_two(reward):
    assert score(reward("workers=0", f"function={FUNCTIONS}:in_c", "shadow=[]"), []) == []
