import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo.config import ConfigError, Data
from dapo.rollout import parquet
from dapo.rollout.prompts import PromptStream, digest, load_prompts, load_stream
from dapo.types import RewardError
from tests.conftest import make_prompt


class Tokenizer:
    """One token a character. A chat becomes `<role>content` per message, then `<assistant>`."""

    def __init__(self, chat_template="yes"):
        self.chat_template = chat_template

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, tokens, skip_special_tokens=False, clean_up_tokenization_spaces=True):
        assert not skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(map(chr, tokens))

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        if not messages:
            raise ValueError("Cannot apply chat template to an empty conversation.")  # as transformers does
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def text_of(prompt):
    return "".join(map(chr, prompt.tokens))


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def dapo_math_row(index, question, truth="34"):
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": question}],
        "ability": "MATH",
        "reward_model": {"ground_truth": truth, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": str(index)},
    }


def load_with_summary(path, max_length=100, too_long="error", tokenizer=None, on_error="stop"):
    options = Data(train=path, max_prompt_length=max_length, too_long=too_long, on_error=on_error)
    return load_prompts(path, tokenizer or Tokenizer(), options)


def load(path, **options):
    return load_with_summary(path, **options)[0]


def test_jsonl_gives_text_and_chats_in_file_order_and_skips_empty_lines(tmp_path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2"}]
    path = write_lines(
        tmp_path / "t.jsonl",
        {"prompt": "1+1=", "answer": 2},
        "",
        {"prompt": chat, "answer": "4", "more": "ignored"},
    )
    prompts = load(path)
    assert [(p.index, text_of(p), p.answer) for p in prompts] == [
        (0, "1+1=", "2"),
        (1, "<system>be brief<user>2+2<assistant>", "4"),
    ]
    assert all(p.tokens.dtype == np.int32 for p in prompts)


def test_jsonl_is_read_as_utf8(tmp_path):
    (tmp_path / "t.jsonl").write_bytes('{"prompt": "∫₀¹ x² dx", "answer": "⅓"}'.encode())
    [prompt] = load(tmp_path / "t.jsonl")
    assert (text_of(prompt), prompt.answer) == ("∫₀¹ x² dx", "⅓")


@pytest.mark.parametrize("num_first", [1, 2])
def test_parquet_of_several_messages_keeps_all_of_them(tmp_path, num_first):
    """Rows of one message are read column by column."""
    system = {"role": "system", "content": "be brief"}
    rows = [dapo_math_row(i, f"q{i}") for i in range(4)]
    for row in rows[-num_first:]:
        row["prompt"] = [system, *row["prompt"]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    expected = ["<system>be brief" * (i >= 4 - num_first) + f"<user>q{i}<assistant>" for i in range(4)]
    assert [text_of(prompt) for prompt in load(tmp_path / "t.parquet")] == expected

    pq.write_table(pa.Table.from_pylist(rows[-num_first:]), tmp_path / "only.parquet")
    assert [text_of(prompt) for prompt in load(tmp_path / "only.parquet")] == expected[-num_first:]


def test_parquet_in_the_schema_of_dapo_math_is_read_row_by_row(tmp_path):
    rows = [dapo_math_row(i, f"question {i}", str(10**30 + i)) for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    prompts = load(tmp_path / "t.parquet")
    assert [p.index for p in prompts] == [0, 1, 2, 3, 4]
    assert [text_of(p) for p in prompts] == [f"<user>question {i}<assistant>" for i in range(5)]
    assert [p.answer for p in prompts] == [str(10**30 + i) for i in range(5)]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{not json", ["not JSON"]),
        ("[1, 2]", ["list", "{prompt, answer}"]),
        ({"prompt": "x", "answer": [2]}, ["'answer'", "list"]),
        ({"prompt": [{"role": "wizard", "content": "x"}], "answer": "2"}, ["'wizard'", "user"]),
        ({"answer": "2"}, ["'prompt'"]),
        ({"prompt": "x"}, ["'answer'"]),
        ({"prompt": "x", "answer": None}, ["'answer'"]),
        ({"prompt": 3, "answer": "2"}, ["'prompt'", "int"]),
        ({"prompt": ["x"], "answer": "2"}, ["'prompt'", "list"]),
        ({"prompt": [], "answer": "2"}, ["'prompt'"]),
        ({"prompt": "", "answer": "2"}, ["empty"]),
        ({"prompt": " \n", "answer": "2"}, ["empty"]),
        ({"prompt": [{"role": "user", "content": " "}], "answer": "2"}, ["empty"]),
        ({"prompt": [{"role": "user", "content": []}], "answer": "2"}, ["empty"]),
        ({"prompt": "x" * 11, "answer": "2"}, ["11 tokens", "max_prompt_length=10"]),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path, bad, words):
    path = write_lines(tmp_path / "t.jsonl", {"prompt": "x", "answer": "2"}, "", bad)
    with pytest.raises(ConfigError) as error:
        load(path, max_length=10)
    assert all(word in str(error.value) for word in [f"{path}, line 3", *words]), error.value


@pytest.mark.parametrize("line", [b'{"prompt": "\xff", "answer": "1"}', b"P\0K\0\xff\xfe", b"\x1f\x8b\0\0"])
def test_a_line_that_is_not_utf8_is_refused_with_file_and_line(tmp_path, line):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"prompt": "x", "answer": "1"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=r"t\.jsonl, line 2: not JSON: 'utf-8' codec"):
        load(path)


def test_a_chat_without_a_chat_template_is_refused_with_file_and_line(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", {"prompt": [{"role": "user", "content": "x"}], "answer": "2"})
    with pytest.raises(ConfigError, match=r"t\.jsonl, line 1: .*no chat template"):
        load(path, tokenizer=Tokenizer(chat_template=None))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row.pop("prompt"), ["'prompt'", "data_source"]),
        (lambda row: row.pop("reward_model"), ["reward_model.ground_truth", "data_source"]),
        (lambda row: row["reward_model"].pop("ground_truth"), ["row 1", "reward_model.ground_truth"]),
        (lambda row: row.update(reward_model="34"), ["row 1", "reward_model.ground_truth"]),
        (lambda row: row["reward_model"].update(ground_truth=None), ["row 1", "reward_model.ground_truth"]),
        (lambda row: row.update(prompt=7), ["row 1", "int"]),
    ],
)
def test_a_parquet_file_of_another_schema_is_refused_by_name(tmp_path, change, words):
    row = dapo_math_row(0, "question")
    change(row)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "t.parquet")
    assert all(word in str(error.value) for word in ["t.parquet", *words]), error.value


def test_the_row_number_counts_through_all_row_groups(tmp_path):
    rows = [dapo_math_row(i, "question" if i < 4 else "a question that is too long") for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    with pytest.raises(ConfigError, match=r"t\.parquet, row 5"):
        load(tmp_path / "t.parquet", max_length=30)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("nowhere.jsonl", None, "does not exist"),
        ("t.csv", "a,b", "expected .jsonl or .parquet"),
        ("t.parquet", "not parquet", "not parquet"),
        ("t.jsonl", "\n\n", "no prompts"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"{name}.*{words}"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("too_long", "expected"),
    [("drop", ["short", "0123456789"]), ("truncate", ["short", "123456789a", "0123456789"])],
)
def test_a_long_prompt_is_dropped_or_cut_on_the_left_and_indices_stay_dense(tmp_path, too_long, expected):
    lines = [{"prompt": p, "answer": "1"} for p in ("short", "0123456789a", "0123456789")]
    prompts = load(write_lines(tmp_path / "t.jsonl", *lines), max_length=10, too_long=too_long)
    assert [text_of(p) for p in prompts] == expected
    assert [p.index for p in prompts] == list(range(len(expected)))


@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_stream_whose_prompts_are_all_dropped_is_refused(tmp_path, is_weighted):
    path, other = (
        write_lines(tmp_path / f"{name}.jsonl", {"prompt": name * 2, "answer": "1"}) for name in "ab"
    )
    train = {path: 1.0, other: 2.0} if is_weighted else [path, other]
    options = {"max_prompt_length": 1, "too_long": "drop"}
    with pytest.raises(ConfigError, match=r"a\.jsonl: no prompts in it \(data.max_prompt_length=1, data.too"):
        load_stream(Data(train=train, **options), Tokenizer(), seed=0)


def test_dropping_every_prompt_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"t\.jsonl: no prompts.*max_prompt_length=1, data\.too_long=drop"):
        load(
            write_lines(tmp_path / "t.jsonl", {"prompt": "xx", "answer": "1"}), max_length=1, too_long="drop"
        )


def make_stream(num_prompts=7, seed=3):
    return PromptStream([make_prompt(i) for i in range(num_prompts)], seed)


def take(stream, count):
    return [prompt.index for prompt in stream.take(count)]


def test_the_order_is_a_function_of_the_seed_alone():
    # the same in every process: a run that resumes goes on in it
    assert take(make_stream(7, seed=3), 14) == [5, 6, 2, 1, 4, 3, 0, 4, 3, 1, 6, 0, 2, 5]
    assert take(make_stream(50, seed=1), 50) != take(make_stream(50, seed=2), 50)


def test_the_data_of_an_earlier_version_s_checkpoint_is_recognised():
    assert digest([make_prompt(0), make_prompt(1)]) == "a95d5e5e1604e1679825619d3ffc6b74"


def test_every_epoch_is_another_permutation_of_all_prompts():
    epochs = np.array(take(make_stream(50), 200)).reshape(4, 50)
    assert (np.sort(epochs) == np.arange(50)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_how_many_are_taken_at_a_time_does_not_change_the_order():
    by_three, at_once = make_stream(), make_stream()
    assert [index for _ in range(8) for index in take(by_three, 3)] == take(at_once, 24)


def test_what_was_put_back_comes_first_and_the_rest_follows_unchanged():
    stream, untouched = make_stream(), make_stream()
    taken = stream.take(5)
    stream.put_back(taken[2:])
    assert take(stream, 12) == take(untouched, 14)[2:]


def test_what_was_put_back_last_comes_first_each_in_its_own_order():
    stream = make_stream()
    first, second = stream.take(2), stream.take(2)
    stream.put_back(second)
    stream.put_back(first)
    assert take(stream, 4) == [p.index for p in first + second]


@pytest.mark.parametrize("position", range(16))  # 7 prompts: through two ends of an epoch
def test_a_resumed_stream_goes_on_from_any_position(position):
    stream = make_stream()
    taken = stream.take(position)
    stream.put_back(taken[position // 2 :])
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = make_stream()
    resumed.load_state_dict(state)
    assert take(resumed, 20) == take(stream, 20)


def test_a_saved_state_does_not_change_when_the_stream_goes_on():
    stream = make_stream()
    stream.put_back(stream.take(3))
    state = stream.state_dict()
    expected = take(stream, 5)
    resumed = make_stream()
    resumed.load_state_dict(state)
    assert take(resumed, 5) == expected


def test_resuming_on_a_file_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="checkpoint"):
        make_stream(8).load_state_dict(make_stream(7).state_dict())


@pytest.mark.parametrize(
    "other", [{"tokens": np.array([1, 2, 3], np.int32)}, {"answer": "2"}], ids=["tokens", "answer"]
)
def test_resuming_on_a_file_of_other_prompts_is_refused(other):
    changed = PromptStream([replace(make_prompt(0), **other), *(make_prompt(i) for i in range(1, 7))], seed=3)
    with pytest.raises(ConfigError, match="checkpoint"):
        changed.load_state_dict(make_stream(7).state_dict())


def test_copies_are_left_out_and_counted(tmp_path):
    rows = [dapo_math_row(i, f"question {i % 3}", str(i % 3)) for i in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=7)
    prompts, summary = load_with_summary(tmp_path / "t.parquet")
    assert [(text_of(p), p.answer) for p in prompts] == [
        (f"<user>question {i}<assistant>", str(i)) for i in range(3)
    ]
    assert (summary.rows, summary.prompts, summary.copies) == (300, 3, 297)
    assert "300 rows, 3 prompts; left out: 297 copies" in str(summary)


def test_prompts_whose_copies_disagree_are_dropped_and_listed(tmp_path):
    lines = [
        {"prompt": "a", "answer": 1},
        {"prompt": "b", "answer": 2},
        {"prompt": "a", "answer": 3},
        {"prompt": "a", "answer": "1"},
    ]
    prompts, summary = load_with_summary(write_lines(tmp_path / "t.jsonl", *lines))
    assert [text_of(p) for p in prompts] == ["b"]
    [conflict] = summary.conflicts
    assert (conflict["prompt"], conflict["answers"], summary.conflicting) == ("a", {"1": 2, "3": 1}, 3)
    assert conflict["place"].endswith("t.jsonl, line 1")


def test_a_chat_and_a_text_of_the_same_words_are_two_prompts(tmp_path):
    lines = [{"prompt": "x", "answer": 1}, {"prompt": [{"role": "user", "content": "x"}], "answer": 2}]
    assert len(load(write_lines(tmp_path / "t.jsonl", *lines))) == 2


def test_malformed_rows_can_be_skipped_and_every_row_is_accounted_for(tmp_path):
    good = [{"prompt": p, "answer": "1"} for p in ("a", "a", "b", "c" * 20, "d" * 30)]
    lines = [
        *good,
        "{not json",
        {"prompt": 3, "answer": 1},
        {"prompt": "e", "answer": 1},
        {"prompt": "e", "answer": 2},
    ]
    prompts, s = load_with_summary(
        write_lines(tmp_path / "t.jsonl", *lines), max_length=10, too_long="drop", on_error="skip"
    )
    assert [text_of(p) for p in prompts] == ["a", "b"]
    assert (s.rows, s.prompts, s.copies, s.skipped, s.conflicting, s.dropped) == (9, 2, 1, 2, 2, 2)
    assert s.rows == s.prompts + s.copies + s.skipped + s.conflicting + s.dropped
    options = Data(train=tmp_path / "t.jsonl", max_prompt_length=10, too_long="drop", on_error="skip")
    stream, summaries = load_stream(options, Tokenizer(), seed=0)
    assert [text_of(p) for p in stream.prompts] == ["a", "b"] and summaries == [s]
    with pytest.raises(ConfigError, match=r"t\.jsonl, line 6: not JSON"):
        load_stream(options.model_copy(update={"on_error": "stop"}), Tokenizer(), seed=0)


def sources(tmp_path, **sizes):
    return {
        name: write_lines(
            tmp_path / f"{name}.jsonl", *({"prompt": f"{name}{i}", "answer": 1} for i in range(size))
        )
        for name, size in sizes.items()
    }


def test_several_files_are_one_stream(tmp_path):
    files = sources(tmp_path, a=4, b=3)
    stream, summaries = load_stream(Data(train=list(files.values())), Tokenizer(), seed=0)
    assert sorted(text_of(stream.prompts[v.index]) for v in stream.take(7)) == [
        "a0",
        "a1",
        "a2",
        "a3",
        "b0",
        "b1",
        "b2",
    ]
    assert [s.prompts for s in summaries] == [4, 3]


def test_a_file_of_copies_alone_is_no_mistake_among_several_that_are_one(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", {"prompt": "x", "answer": 1})
    copies = write_lines(tmp_path / "b.jsonl", {"prompt": "x", "answer": 1})
    stream, summaries = load_stream(Data(train=[first, copies]), Tokenizer(), seed=0)
    assert [text_of(p) for p in stream.prompts] == ["x"] and [s.copies for s in summaries] == [0, 1]
    assert stream.prompts[0].origin[0] == {"prompt": "x", "answer": 1}


def test_weights_mix_files_evenly_whatever_their_sizes(tmp_path):
    files = sources(tmp_path, a=40, b=3)
    stream, _ = load_stream(Data(train={files["a"]: 1.0, files["b"]: 3.0}), Tokenizer(), seed=0)
    drawn = [text_of(stream.prompts[v.index])[0] for v in stream.take(40)]
    assert all(abs(drawn[:n].count("b") - 0.75 * n) <= 1 for n in range(1, 41))
    assert "".join(drawn[:8]) == "babbbabb", "each is of the file that is furthest behind"
    stream.put_back(stream.take(2))
    resumed, _ = load_stream(Data(train={files["a"]: 1.0, files["b"]: 3.0}), Tokenizer(), seed=0)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.take(60) == stream.take(60)


def test_a_prompts_row_is_read_from_its_file_with_all_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH", 4)
    lines = [{"prompt": f"q{i} ∫", "answer": i, "source": f"s{i}"} for i in range(3)]
    first = write_lines(tmp_path / "a.jsonl", lines[0], "", lines[0], lines[1], lines[2])
    rows = [dapo_math_row(i, f"question {i // 2}", str(i // 2)) for i in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=3)
    options = Data(train=[first, tmp_path / "b.parquet"], max_prompt_length=100)
    stream, _ = load_stream(options, Tokenizer(), seed=0)
    assert [prompt.index for prompt in stream.prompts] == list(range(8))
    table = stream.prompts[0].origin
    assert [table[i] for i in range(3)] == lines
    assert [table[3 + i] for i in (4, 0, 1, 2, 3)] == [*rows[8:9], *rows[:8:2]]


CHAT = [{"role": "user", "content": "2+3="}]


def read(prompt, *names):
    return prompt.origin.read(prompt, names)


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_what_a_prompt_was_made_of_can_be_read_again(tmp_path, name):
    """Of an evaluated set, too. Messages are those that the template was given."""
    rows = [
        {"prompt": [CHAT[0] | {"name": None}], "answer": "5", "level": 3, "tags": ["a", "b"]},
        {"prompt": CHAT, "answer": "5", "level": 4, "tags": []},  # a copy: the first one's columns count
        {"prompt": [{"role": "user", "content": "6="}], "answer": "6", "level": None, "tags": ["c"]},
    ]
    if name == "t.jsonl":
        write_lines(tmp_path / name, *rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    [first, second], _ = load_prompts(tmp_path / name, Tokenizer(), Data(train="x", max_prompt_length=40))
    assert read(first, "row", "messages", "prompt") == {
        "row": {"level": 3, "tags": ["a", "b"]},
        "messages": CHAT,
        "prompt": "<user>2+3=<assistant>",
    }
    assert read(second, "row")["row"] == {"level": None, "tags": ["c"]}


def test_text_has_no_messages_and_a_prompt_that_was_cut_is_what_the_model_saw(tmp_path):
    row = dapo_math_row(0, "x") | {"prompt": "a long question", "answer": "the solution"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    [prompt], _ = load_prompts(tmp_path / "t.parquet", Tokenizer(), Data(train="x", max_prompt_length=8))
    assert read(prompt, "prompt", "messages") == read(prompt, "row") | {
        "prompt": "question",
        "messages": None,
    }
    del row["prompt"]
    assert read(prompt, "row")["row"] == row, "the ground truth is reward_model's"


def test_only_what_is_asked_for_is_read(tmp_path):
    path = write_lines(tmp_path / "t.jsonl", {"prompt": "q", "answer": 1})
    [prompt], _ = load_prompts(path, Tokenizer(), Data(train="x"))
    path.unlink()
    assert read(prompt, "prompt") == {"prompt": "q"}


@pytest.mark.parametrize("damage", ["gone", "other", "shorter"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_data_that_cannot_be_read_again_stops_the_run_in_one_line(tmp_path, name, damage):
    path, rows = tmp_path / name, [{"prompt": p, "answer": "1"} for p in ("a", "b")]
    pq.write_table(pa.Table.from_pylist(rows), path) if "parquet" in name else write_lines(path, *rows)
    [_, prompt], _ = load_prompts(path, Tokenizer(), Data(train="x"))
    if damage == "gone":
        path.unlink()
    elif damage == "other":
        path.write_text("something else that is no row of any kind of data, and long enough")
    elif "parquet" in name:
        pq.write_table(pa.Table.from_pylist(rows[:1]), path)
    else:
        write_lines(path, rows[0])
    with pytest.raises(
        RewardError, match=rf"^data file .*{name} cannot be read again: .*restore it$"
    ) as error:
        read(prompt, "row")
    assert "\n" not in str(error.value)


def test_an_epoch_is_shuffled_once(monkeypatch):
    shuffled, make = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: shuffled.append(seed) or make(seed))
    stream = PromptStream([make_prompt(i) for i in range(5)], seed=3)
    drawn = [prompt.index for _ in range(12) for prompt in stream.take(1)]
    assert sorted(drawn[:5]) == sorted(drawn[5:10]) == list(range(5))
    assert len(shuffled) == 3


def test_epochs_do_not_depend_on_what_was_taken_ahead_and_put_back():
    def make():
        return PromptStream([make_prompt(i) for i in range(12)], seed=3, sources=[(4, 1.0), (8, 1.0)])

    for count in range(30):
        one, other = make(), make()
        one.take(count)
        ahead = other.take(count + 9)
        other.put_back(ahead[count:])
        assert one.epochs.tolist() == other.epochs.tolist()
    assert one.epochs.tolist() == [3] * 4 + [1] * 8


@pytest.mark.parametrize("returned", [[3, 4], [[3, 0], [4, 1]], [[3, 0, 8], [4, 1, 9]]])
def test_visits_that_were_put_back_have_numbers_also_where_an_older_version_kept_none(
    returned,
) -> None:
    stream = PromptStream([make_prompt(i) for i in range(10)], seed=0)
    stream.take(10)
    stream.load_state_dict(stream.state_dict() | {"returned": returned})
    visits = stream.take(3)
    assert [(visit.index, visit.number) for visit in visits[:2]] == [(3, 8), (4, 9)] and visits[
        2
    ].number == 10
