"""Rows as people's files have them: which are read, how, and which are refused by file and row."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo.config import ConfigError, Reward
from dapo.rollout.data_files import Row, Summary, distinct_rows
from dapo.rollout.ground_truth import GroundTruths
from dapo.rollout.rows import BadRow, prompt_and_answer

DEFAULT = GroundTruths.of(Reward())
CHAT = [{"role": "user", "content": "2+2"}]


def refusal_of(answer: str) -> str | None:
    """A module of one's own: see `test_a_reward_module_of_ones_own_decides`."""
    return "is odd" if answer == "odd" else 1 / 0 if answer == "worse" else None  # type: ignore[return-value]


def is_same(a: str, b: str) -> bool:
    return a.lower() == b.lower()


def reward(response: str, answer: str) -> bool:
    return response == answer


OWN = GroundTruths.of(Reward(function=f"{__name__}:reward"))


def write(path: Path, *rows: Any) -> Path:
    """Write rows as .jsonl (text as it stands), or .parquet."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path, truths: GroundTruths = DEFAULT, skip: bool = False) -> tuple[Summary, list[Row]]:
    [file] = distinct_rows([path], truths, skip)
    return file


def pairs(rows: list[Row]) -> list[tuple[Any, str]]:
    return [(row.prompt, row.answer) for row in rows]


FORMATS = pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])


@FORMATS
@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({"answer": "34"}, "34"),
        ({"reward_model": {"ground_truth": "34"}}, "34"),
        ({"reward_model": {"ground_truth": "34"}, "answer": "so it is 34\n#### 34"}, "34"),
        ({"answer": "35", "reward_model": {"ground_truth": "34"}}, "34"),
        ({"answer": "34", "reward_model": {"ground_truth": None, "style": "rule"}}, "34"),
        ({"answer": 34, "reward_model": {"ground_truth": "7"}}, "7"),
        ({"answer": "34", "reward_model": None}, "34"),
        ({"reward_model": '{"ground_truth": "34"}'}, "34"),
        ({"answer": "so it is 34\n#### 34"}, "so it is 34\n#### 34"),
    ],
)
def test_the_rules_ground_truth_comes_before_an_answer_in_every_format(
    tmp_path: Path, name: str, columns: dict[str, Any], answer: str
) -> None:
    path = write(tmp_path / name, {"prompt": "q"} | columns, {"prompt": "r"} | columns)
    assert pairs(read(path)[1]) == [("q", answer), ("r", answer)]


def test_a_ground_truth_that_is_null_among_others_is_named_by_its_column(tmp_path: Path) -> None:
    rows = [{"prompt": p, "reward_model": {"ground_truth": truth}} for p, truth in [("a", "1"), ("b", None)]]
    with pytest.raises(ConfigError, match=r"row 2: no column 'reward_model\.ground_truth'"):
        read(write(tmp_path / "t.parquet", *rows))


def test_a_ground_truth_is_taken_from_the_column_that_has_it_row_by_row(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": "1", "reward_model": {"ground_truth": None}},
        {"prompt": "b", "answer": None, "reward_model": {"ground_truth": "2"}},
        {"prompt": "c", "answer": "4", "reward_model": {"ground_truth": "3"}},
    ]
    for name in ("t.jsonl", "t.parquet"):
        assert pairs(read(write(tmp_path / name, *rows))[1]) == [("a", "1"), ("b", "2"), ("c", "3")]


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("0.00001", "0.00001"),
        ("1e-05", "0.00001"),
        ("10000000000000000.0", "10000000000000000.0"),
        ("1e16", "10000000000000000"),
        ("1.50", "1.50"),
        ("-2", "-2"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("0.1234567890123456789", "0.1234567890123456789"),
    ],
)
def test_a_json_number_keeps_its_digits(tmp_path: Path, number: str, answer: str) -> None:
    path = write(tmp_path / "t.jsonl", f'{{"prompt": "q", "answer": {number}}}')
    assert pairs(read(path)[1]) == [("q", answer)]


@pytest.mark.parametrize(
    ("number", "answer"),
    [(0.00001, "0.00001"), (1e16, "10000000000000000"), (0.1, "0.1"), (7, "7"), (Decimal("1.50"), "1.50")],
)
def test_a_parquet_number_has_no_exponent(tmp_path: Path, number: Any, answer: str) -> None:
    path = write(tmp_path / "t.parquet", {"prompt": "q", "answer": number})
    assert pairs(read(path)[1]) == [("q", answer)]


@FORMATS
@pytest.mark.parametrize("answer", ["nan", "", "  \n", "#### ", "photo.png", "None"])
def test_a_ground_truth_that_cannot_be_used_is_refused_or_skipped(
    tmp_path: Path, name: str, answer: str
) -> None:
    path = write(tmp_path / name, {"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": answer})
    with pytest.raises(ConfigError, match=rf"{name}, (line|row) 2: the ground truth ") as error:
        read(path)
    assert repr(answer) in str(error.value)
    summary, rows = read(path, skip=True)
    assert pairs(rows) == [("p", "1")] and (summary.rows, summary.skipped) == (2, 1)
    assert f"1 malformed; the first malformed: {error.value}" in str(summary)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), True])
@FORMATS
def test_what_is_no_number_is_no_ground_truth(tmp_path: Path, name: str, number: Any) -> None:
    with pytest.raises(ConfigError, match=r"column 'answer' is (nan|inf|bool); expected text or a number"):
        read(write(tmp_path / name, {"prompt": "q", "answer": number}), OWN)


def test_copies_with_one_answer_written_differently_are_copies(tmp_path: Path) -> None:
    answers = ["so\n#### 34", "34", 34.0, "$34$", "034", "thus\n#### 34"]
    path = write(tmp_path / "t.jsonl", *({"prompt": "q", "answer": answer} for answer in answers))
    summary, rows = read(path)
    assert pairs(rows) == [("q", "so\n#### 34")] and (summary.copies, summary.conflicting) == (5, 0)


def test_a_reward_module_of_ones_own_decides(tmp_path: Path) -> None:
    same = [{"prompt": "q", "answer": "A"}, {"prompt": "q", "answer": "a"}, {"prompt": "r", "answer": "nan"}]
    assert pairs(read(write(tmp_path / "t.jsonl", *same), OWN)[1]) == [("q", "A"), ("r", "nan")]
    with pytest.raises(ConfigError, match="line 1: the ground truth 'odd' is odd"):
        read(write(tmp_path / "t.jsonl", {"prompt": "q", "answer": "odd"}), OWN)
    with pytest.raises(ConfigError, match=f"refusal_of of reward.function={__name__}:reward raised ZeroDiv"):
        read(write(tmp_path / "t.jsonl", {"prompt": "q", "answer": "worse"}), OWN, skip=True)


@pytest.mark.parametrize("function", ["tests.dapo.reward.reward_functions:graded", "http://127.0.0.1:1/x"])
def test_where_a_reward_has_no_say_texts_are_compared(tmp_path: Path, function: str) -> None:
    truths = GroundTruths.of(Reward(function={function: 1.0, "dapo.reward:is_correct": 0.5}))
    rows = [{"prompt": "q", "answer": ""}, {"prompt": "r", "answer": "34"}, {"prompt": "r", "answer": "34.0"}]
    summary, kept = read(write(tmp_path / "t.jsonl", *rows), truths)
    assert pairs(kept) == [("q", "")] and summary.conflicting == 2


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"prompt": "half \\ud83d", "answer": "1"}', ["'\\ud83d'", "surrogate"]),
        ('{"prompt": "q", "answer": "\\udc00"}', ["'\\udc00'", "surrogate"]),
        ('{"prompt": [{"role": "user", "content": "\\ud800"}], "answer": "1"}', ["'\\ud800'", "surrogate"]),
        ('{"prompt": "q", "answer": ' + "[" * 100_000 + "1" + "]" * 100_000 + "}", ["nested too deeply"]),
        ('{"prompt": "q", "answer": "1", "more": ' + '{"a":' * 100_000 + "1" + "}" * 100_001, ["too deeply"]),
        ('{"prompt": "q", "answer": 1, "answer": 2}', ["'answer' is given twice"]),
        (
            '{"prompt": "q", "answer": ' + "1" * 5000 + "}",
            ["not JSON", "digits, more than 4300: write it as text"],
        ),
        ('{"prompt": 1.5, "answer": 1}', ["'prompt'", "Number"]),
    ],
    ids=str,
)
def test_a_line_that_nobody_can_read_is_refused_or_skipped(
    tmp_path: Path, bad: str, words: list[str]
) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": "p", "answer": "1"}, bad, {"prompt": "r", "answer": "1"})
    with pytest.raises(ConfigError) as error:
        read(path)
    assert all(word in str(error.value) for word in [f"{path}, line 2", *words]), error.value
    summary, rows = read(path, skip=True)
    assert [row.prompt for row in rows] == ["p", "r"] and (summary.rows, summary.skipped) == (3, 1)


def test_a_prompt_that_is_nested_too_deeply_is_refused() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    row = {"prompt": [{"role": "user", "content": "q", "more": nested}], "answer": "1"}
    with pytest.raises(BadRow, match=r"^here: column 'prompt' is nested too deeply$"):
        prompt_and_answer(row, "here")


@pytest.mark.parametrize("is_simple", [True, False])
def test_parquet_text_that_is_not_utf8_is_refused_or_skipped(tmp_path: Path, is_simple: bool) -> None:
    prompts = pa.array([b"p", b"\xff", b"p"], pa.binary()).view(pa.string())
    answers = pa.array(["1", "1", "1"]) if is_simple else pa.array([1, 1, 1])
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"prompt": prompts, "answer": answers}), path)
    with pytest.raises(ConfigError, match=r"t\.parquet, row 2: not UTF-8"):
        read(path)
    summary, rows = read(path, skip=True)
    assert pairs(rows) == [("p", "1")]
    assert (summary.rows, summary.skipped, summary.copies) == (3, 1, 1)


def test_a_parquet_file_that_is_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", *({"prompt": f"q{i}", "answer": "1"} for i in range(1000)))
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"data file .*t\.parquet"):
        read(path)


@FORMATS
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "2"}, {"type": "text", "text": "+2"}], "2+2"),
        (["2", "+2"], "2+2"),
        ("2+2", "2+2"),
    ],
)
def test_content_in_parts_is_their_text(tmp_path: Path, name: str, content: Any, text: str) -> None:
    message = {"role": "user", "content": content}
    path = write(tmp_path / name, {"prompt": [message], "answer": "4"})
    assert pairs(read(path)[1]) == [([{"role": "user", "content": text}], "4")]


@FORMATS
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "content is NoneType"),
        (7, "content is int"),
        ([{"type": "text", "text": None}], "content is NoneType"),
        ([{"type": "image", "image": "x"}], "content of type 'image'"),
    ],
)
def test_content_that_is_no_text_is_refused_or_skipped(
    tmp_path: Path, name: str, content: Any, words: str
) -> None:
    path = write(tmp_path / name, {"prompt": [{"role": "user", "content": content}], "answer": "4"})
    with pytest.raises(ConfigError, match=rf"{name}, (line|row) 1: .*{words}"):
        read(path)
    assert read(path, skip=True)[0].skipped == 1


def test_a_call_of_a_tool_needs_no_content_and_fields_that_are_null_are_absent(tmp_path: Path) -> None:
    call = [{"name": "f", "x": 0.5}]
    chat = [
        {"role": "user", "content": "a", "name": None},
        {"role": "assistant", "content": None, "tool_calls": call},
    ]
    [row] = read(write(tmp_path / "t.jsonl", {"prompt": chat, "answer": "4"}))[1]
    assert row.prompt == [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": call}]
    assert json.dumps(row.prompt[1]) == json.dumps({"role": "assistant", "tool_calls": call})


def test_single_messages_that_differ_in_another_field_are_two_prompts(tmp_path: Path) -> None:
    chats = [[CHAT[0] | {"name": name}] for name in ("ann", "bob", "ann")]
    path = write(tmp_path / "t.parquet", *({"prompt": chat, "answer": "4"} for chat in chats))
    assert [row.prompt for row in read(path)[1]] == chats[:2]


@FORMATS
def test_messages_in_a_text_column_are_messages(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": text, "answer": "4"} for text in (json.dumps(CHAT), f" {json.dumps(CHAT, indent=1)}")]
    summary, kept = read(write(tmp_path / name, *rows))
    assert pairs(kept) == [(CHAT, "4")] and summary.copies == 1


def test_the_role_need_not_be_a_messages_first_field(tmp_path: Path) -> None:
    chat = [{"name": "ann", "role": "user", "content": "2+2"}]
    path = write(tmp_path / "t.jsonl", {"prompt": json.dumps(chat), "answer": "4"})
    assert pairs(read(path)[1]) == [(chat, "4")]


def test_one_message_in_a_text_column_is_no_list_of_them(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": json.dumps(CHAT[0]), "answer": "4"})
    with pytest.raises(ConfigError, match="line 1: column 'prompt' is dict; expected text or a list"):
        read(path)


@pytest.mark.parametrize("is_rule", [False, True])
def test_a_parquet_number_of_32_bits_keeps_its_digits(tmp_path: Path, is_rule: bool) -> None:
    numbers = pa.array([0.1, 1e-5, 34.0, None], pa.float32())
    rule = pa.StructArray.from_arrays([numbers], ["ground_truth"])
    columns = {"prompt": list("abcd"), "answer": ["1", "1", "1", "4"], "reward_model": rule}
    if not is_rule:
        columns = {"prompt": list("abc"), "answer": numbers.slice(0, 3)}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    answers = [answer for _, answer in pairs(read(tmp_path / "t.parquet")[1])]
    assert answers == ["0.1", "0.00001", "34.0", "4"][: len(answers)] and len(answers) == 3 + is_rule


def test_a_parquet_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["1"])]
    pq.write_table(pa.Table.from_arrays(columns, ["prompt", "prompt", "answer"]), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"t\.parquet: column 'prompt' is there twice; remove one"):
        read(tmp_path / "t.parquet")


@FORMATS
@pytest.mark.parametrize("text", [repr(CHAT), json.dumps(CHAT)[:-1], '[{"content": "x", "role": "wizard"}]'])
def test_messages_in_a_text_column_that_cannot_be_read_are_refused(
    tmp_path: Path, name: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{name}, (line|row) 1: .*(looks like JSON|wizard)"):
        read(write(tmp_path / name, {"prompt": text, "answer": "4"}))


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"from": "human", "value": "hi"}], "chat role None is not known"),
        ([{"value": "hi", "weight": 1, "from": "human"}], "chat role None is not known"),
        ({"messages": CHAT}, "column 'prompt' is dict"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "column 'prompt' is dict"),
    ],
)
def test_messages_of_other_formats_are_refused_in_a_text_column_too(
    tmp_path: Path, messages: Any, said: str, as_text: bool
) -> None:
    prompt = json.dumps(messages) if as_text else messages
    with pytest.raises(ConfigError, match=rf"t\.jsonl, line 1: {said}"):
        read(write(tmp_path / "t.jsonl", {"prompt": prompt, "answer": "1"}))


@pytest.mark.parametrize(
    "text", ['{"value": 3} is what?', "[1, 2]", '[{"x": 1}]', "{", '"role": "user"', '["role"]']
)
def test_other_text_in_brackets_is_text(tmp_path: Path, text: str) -> None:
    assert pairs(read(write(tmp_path / "t.jsonl", {"prompt": text, "answer": "4"}))[1]) == [(text, "4")]


def test_several_files_are_one_without_copies_or_conflicts_between_them(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", *({"prompt": p, "answer": 1} for p in "aabc"))
    second = write(
        tmp_path / "b.parquet",
        *(
            {"prompt": p, "answer": a}
            for p, a in [("a", "1"), ("b", "2"), ("d", "1"), ("d", "1"), ("b", "1")]
        ),
    )
    (one, kept), (two, more) = distinct_rows([first, second], DEFAULT, False)
    assert ([row.prompt for row in kept], [row.prompt for row in more]) == (["a", "c"], ["d"])
    assert (one.rows, one.copies, one.conflicting) == (4, 1, 1)
    assert (two.rows, two.copies, two.conflicting) == (5, 2, 2)
    [conflict] = one.conflicts
    assert (conflict["prompt"], conflict["answers"], two.conflicts) == ("b", {"1": 2, "2": 1}, [])


def test_a_reward_that_cannot_be_imported_is_refused_with_the_data() -> None:
    with pytest.raises(ConfigError, match=r"^reward\.function=nowhere:f"):
        GroundTruths.of(Reward(function="nowhere:f"))
    with pytest.raises(ConfigError, match=r"^reward\.function=.*:demanding: .*'tolerance'; expected f\("):
        GroundTruths.of(Reward(function="tests.dapo.reward.reward_functions:demanding"))
