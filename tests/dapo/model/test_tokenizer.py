"""A tokenizer that is not the model's is refused when it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dapo.config import ConfigError
from dapo.model.tokenizer import check_vocabulary, load_tokenizer

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
