"""What the report page shows of dumped samples: which of them, token by token."""

from pathlib import Path

import numpy as np
import tokenizers

from dapo.report import samples
from dapo.rollout import dump
from tests.dapo.report.builders import HOSTILE, make_run, make_tokenizer


def test_every_beginning_of_the_order_is_spread_evenly():
    assert samples.spread(0) == []
    for count in range(1, 70):
        order = samples.spread(count)
        assert sorted(order) == list(range(count)) and order[0] == count - 1
        for taken in (4, 8, 16):
            if taken < count:
                gaps = np.diff([-1, *sorted(order[:taken]), count])
                assert gaps.max() <= 2 * count / taken + 1


# tokens


def test_the_pieces_of_a_text_are_its_tokens_and_a_split_character_is_its_last_tokens(tmp_path):
    made = make_tokenizer(tmp_path)
    tokenizer = samples.Tokenizer(tmp_path / "tokenizer.json")
    for text in ["the answer é😀 is", "😀", HOSTILE, ""]:
        ids = made.encode(text).ids
        pieces = tokenizer.pieces(ids)
        assert "".join(pieces) == text and len(pieces) == len(ids)
    assert tokenizer.pieces(made.encode("é!").ids) == ["", "é", "!"]


def test_the_pieces_of_half_a_character_are_its_replacement(tmp_path):
    ids = make_tokenizer(tmp_path).encode("the 😀").ids
    pieces = samples.Tokenizer(tmp_path / "tokenizer.json").pieces(ids[:-1])
    assert pieces[-1] == "\ufffd" and pieces[0] == "the"


def test_a_decoder_that_strips_a_leading_space_keeps_it_between_tokens(tmp_path):
    tokenizer = tokenizers.SentencePieceBPETokenizer()
    tokenizer.train_from_iterator(["0 the answer the answer"], vocab_size=20, show_progress=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("the answer the answer").ids
    pieces = samples.Tokenizer(tmp_path / "tokenizer.json").pieces(ids)
    assert pieces is not None and len(pieces) == len(ids) >= 4
    assert "".join(pieces).strip() == "the answer the answer"


# samples in the page


def read_groups(run: Path, part: slice = slice(None)):
    return samples.read_groups(run / "rollouts", 0, part)


def described(run: Path, rows) -> tuple[dict, dict]:
    return samples.describe(0, rows, samples.Tokenizer.find([run / "hf"]))


def test_what_fits_is_spread_over_steps_and_counted(tmp_path):
    run = make_run(tmp_path / "run", dumps=16)
    whole = samples.embed(run, None, 1 << 20)
    assert whole.num_samples == 16 * 3 * 2
    assert [entry["kind"] for entry in whole.index[:3]] == ["kept", "all_correct", "all_wrong"]
    quarter = samples.embed(run, None, whole.num_bytes // 4)
    steps = sorted({entry["step"] for entry in quarter.index})
    assert whole.num_bytes / 5 < quarter.num_bytes <= whole.num_bytes / 4
    assert {0, 15} <= set(steps) and len(steps) >= 4 and np.diff(steps).max() <= 8
    nothing = samples.embed(run, None, 0)
    assert (nothing.num_samples, nothing.num_dumped, nothing.num_steps) == (0, 16 * 3 * 2, 16)


def test_a_group_says_of_each_sample_what_the_dump_and_its_traces_say(tmp_path):
    run = make_run(tmp_path / "run")
    entry, content = described(run, read_groups(run, slice(0, 1))[0])
    assert (entry["kind"], entry["outcomes"]) == ("kept", "cW")
    assert entry["preview"] == content["prompt"] == "what is 2? the answer"
    first, second = content["samples"]
    assert "".join(first["pieces"]) == "the answer" and first["correct"] and not first["truncated"]
    assert "".join(second["pieces"]) == "is the number" and second["finish"] == "length"
    n = second["tokens"]
    assert second["surprise"] == [round(300 * i / (n - 1)) for i in range(n)]
    assert second["clips"] == [[1, "low", 0.367879], [2, "high", 2.71828]]


def test_a_step_made_anew_has_lost_the_traces_of_the_attempt_before(tmp_path):
    rollouts = make_run(tmp_path / "run") / "rollouts"
    assert dump.traces_path_of(rollouts, 0).exists()
    with dump.Writer() as writer:
        writer.write(dump.path_of(rollouts, 0), dump.read(dump.path_of(rollouts, 0), 8), fraction=1.0)
    assert not dump.traces_path_of(rollouts, 0).exists()


def test_a_group_without_traces_has_no_clips(tmp_path):
    run = make_run(tmp_path / "run")
    dump.traces_path_of(run / "rollouts", 0).unlink()
    for rows in read_groups(run):
        assert all("clips" not in sample for sample in described(run, rows)[1]["samples"])


def test_tokens_that_the_policy_did_not_write_are_marked(tmp_path):
    run = make_run(tmp_path / "run")
    row = read_groups(run)[0][0]
    row["loss_mask"][1] = False
    assert described(run, [row])[1]["samples"][0]["foreign"] == [1]
