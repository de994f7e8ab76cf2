"""A tokenizer that is not the model's is refused when it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers

from dapo.config import ConfigError
from dapo.model.tokenizer import (
    CLEANS_BPE,
    check_vocabulary,
    decoder_json,
    differences,
    load_tokenizer,
    stop_ids,
)

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


def test_a_model_with_a_vision_tower_has_its_fields_in_text_config(tmp_path: Path) -> None:
    a, b = (with_rows(tmp_path / name, 24) for name in "ab")
    for model, more in ((a, {"eos_token_id": 7, "dtype": "float32"}), (b, {"eos_token_id": 7})):
        text = json.loads((model / "config.json").read_text()) | more
        (model / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    tokenizer = load_tokenizer(BASE)
    assert stop_ids(a, tokenizer) == (1, 7)
    with pytest.raises(ConfigError, match="a vocab_size of 24:"):
        check_vocabulary(a, tokenizer)
    assert differences(a, b) == []


# text in another process


TEXT = [
    "It's 3 . 5 , isn't it ? <s> Überall Größe 你好 🙂 ! \\n\\n  x = 1",
    "do n't stop . </s> we 've won",
] * 3


def trained(kind: str) -> tokenizers.Tokenizer:
    """A small tokenizer of each kind that models have."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "BPE":
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = tokenizers.trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "Unigram":
        made = tokenizers.Tokenizer(tokenizers.models.Unigram())
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        made.decoder = tokenizers.decoders.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.decoder = tokenizers.decoders.WordPiece(cleanup=False)
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=special, show_progress=False
        )
    made.train_from_iterator(TEXT, trainer)
    return made


def as_loaded(folder: Path, kind: str, **options: Any) -> Any:
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained(kind), bos_token="<s>", eos_token="</s>", **options
    )
    fast.add_special_tokens({"pad_token": "<pad>"})  # saved in one of two files
    fast.add_tokens(["<think>", "ab cd"])
    fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("cleans", [False, True])
@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordPiece", "example"])
def test_a_text_is_the_same_wherever_it_is_decoded_or_not_decoded_elsewhere(
    kind: str, cleans: bool, tmp_path: Path
) -> None:
    option = {"clean_up_tokenization_spaces": cleans}
    example = kind == "example"
    tokenizer = load_tokenizer(BASE) if example else as_loaded(tmp_path, kind, **option)
    if cleans and kind in ("Unigram", "WordPiece"):
        ids = tokenizer("a . b")["input_ids"]
        assert tokenizer.decode(ids) != tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
        assert decoder_json(tokenizer) is None
        return
    found = decoder_json(tokenizer)
    assert found
    elsewhere = tokenizers.Tokenizer.from_str(found)
    rng, size = np.random.default_rng(0), len(tokenizer) + 5  # a model may have more rows
    own = [tokenizer(text)["input_ids"] for text in TEXT[:2]]
    for ids in [[], list(range(size)), *own, *rng.integers(0, size, (200, 40)).tolist()]:
        text = tokenizer.decode(np.array(ids, np.int32), skip_special_tokens=True)
        assert elsewhere.decode(ids, skip_special_tokens=True) == text


def test_a_tokenizer_that_decodes_in_its_own_way_is_left_to_it(tmp_path: Path) -> None:
    class Shouting(transformers.PreTrainedTokenizerFast):  # type: ignore[misc]
        def _decode(self, *given: Any, **named: Any) -> str:
            return str(super()._decode(*given, **named)).upper()

    class Cutting(transformers.PreTrainedTokenizerFast):  # type: ignore[misc]
        def decode(self, *given: Any, **named: Any) -> str:
            return str(super().decode(*given, **named))[:1]

    assert decoder_json(Shouting(tokenizer_object=trained("BPE"))) is None
    assert decoder_json(Cutting(tokenizer_object=trained("BPE"))) is None
    corrupting = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained("BPE"), clean_up_tokenization_spaces=True, **{CLEANS_BPE: True}
    )
    assert corrupting.decode(corrupting("a .")["input_ids"]) == "a."
    assert decoder_json(corrupting) is None


@pytest.mark.parametrize("is_special", [True, False])
def test_files_that_disagree_about_a_special_token_are_left_to_this_process(
    is_special: bool, tmp_path: Path
) -> None:
    made = trained("BPE")
    made.add_special_tokens(["<think>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    fast.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = {
        str(id): {"content": token.content, "special": is_special or token.content != "<think>", **fields}
        for id, token in made.get_added_tokens_decoder().items()
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("<think>a</think>")["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    found = decoder_json(tokenizer)
    if found is None:
        assert not is_special
    else:
        assert tokenizers.Tokenizer.from_str(found).decode(ids, skip_special_tokens=True) == text


def test_one_with_a_part_written_in_python_is_left_to_this_process() -> None:
    class Own:
        def pre_tokenize(self, text: Any) -> None: ...

    made = trained("BPE")
    made.pre_tokenizer = tokenizers.pre_tokenizers.PreTokenizer.custom(Own())
    assert decoder_json(transformers.PreTrainedTokenizerFast(tokenizer_object=trained("BPE")))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=trained("BPE"))
    fast.backend_tokenizer.pre_tokenizer = made.pre_tokenizer
    assert decoder_json(fast) is None
