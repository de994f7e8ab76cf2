"""A tokenizer that is not the model's is refused when it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dapo.config import ConfigError
from dapo.model.tokenizer import check_vocabulary, load_tokenizer, stop_ids

BASE = Path(__file__).parents[3] / "examples/arithmetic/base"


def with_rows(folder: Path, rows: int | None) -> Path:
    """The example's model directory, of 25 tokens, whose config.json names another number of rows."""
    model = shutil.copytree(BASE, folder / "model")
    described = json.loads((model / "config.json").read_text()) | {"vocab_size": rows}
    if rows is None:
        del described["vocab_size"]
    (model / "config.json").write_text(json.dumps(described))
    return model


@pytest.mark.parametrize("rows", [25, 26, 32, 128, None])
def test_a_vocabulary_may_have_rows_to_spare(rows: int | None, tmp_path: Path) -> None:
    model = with_rows(tmp_path, rows)
    check_vocabulary(model, load_tokenizer(model))


@pytest.mark.parametrize("rows", [24, 10])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused_with_both(rows: int, tmp_path: Path) -> None:
    model = with_rows(tmp_path, rows)
    with pytest.raises(ConfigError, match=rf"policy\.model=.*with id 24, .* vocab_size of {rows}:"):
        check_vocabulary(model, load_tokenizer(model))


def test_a_token_that_was_added_counts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(with_rows(tmp_path, 25))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ConfigError, match=r"the token '\[PAD\]' with id 25"):
        check_vocabulary(tmp_path / "model", tokenizer)


def damaged(folder: Path, name: str, change: object) -> Path:
    """The example's model directory; bytes replace a file, a dict changes it."""
    path = shutil.copytree(BASE, folder / "model") / name
    content = path.read_bytes()
    text = change if isinstance(change, bytes) else json.dumps(json.loads(content) | change).encode()
    path.write_bytes(text)
    return path.parent


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"use_cache": "yes"}),
        ("tokenizer.json", {"model": 3}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": 5, "merges": []}}),
        ("tokenizer.json", b"{{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", {"eos_token": 5}),
    ],
)
def test_a_damaged_file_is_no_tokenizer_in_one_line(name: str, change: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no usable tokenizer there") as refused:
        load_tokenizer(damaged(tmp_path, name, change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", {"eos_token_id": "x"}, "config.json: eos_token_id='x'; expected a token's id"),
        ("generation_config.json", {"eos_token_id": [1, True]}, r"eos_token_id=\[1, True\]; expected"),
        ("generation_config.json", b"{{", "generation_config.json: not JSON"),
        ("generation_config.json", b"[" * 100_000, "generation_config.json: not JSON"),
    ],
)
def test_a_damaged_file_names_no_end(name: str, change: object, said: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(BASE)
    with pytest.raises(ConfigError, match=said):
        stop_ids(damaged(tmp_path, name, change), tokenizer)


def test_every_end_that_the_files_name_ends_a_response(tmp_path: Path) -> None:
    model = damaged(tmp_path, "generation_config.json", {"eos_token_id": [5, 7]})
    assert stop_ids(model, load_tokenizer(model)) == (1, 5, 7)
    (model / "generation_config.json").unlink()
    assert stop_ids(model, load_tokenizer(model)) == (1,)
