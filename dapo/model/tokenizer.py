"""A model directory's tokenizer, and the token ids that end a response."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from dapo.config import ConfigError
from dapo.model.shape import of_text, read_config

# fields of config.json: of who wrote it, and of training
NO_EFFECT = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "initializer_range",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
CLEANS_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


def load_tokenizer(model: Path) -> Any:
    """Load the tokenizer of a Hugging Face directory. Raise ConfigError if there is none."""
    wrong = f"policy.model={model}: no usable tokenizer there"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except Exception as error:  # of any kind: a damaged tokenizer.json raises Exception itself
        raise ConfigError(f"{wrong}: {' '.join(str(error).split())}") from error
    # transformers makes up an empty one if there is no file
    if not tokenizer(string.printable, add_special_tokens=False)["input_ids"]:
        raise ConfigError(f"{wrong}: it makes no tokens of text")
    return tokenizer


def decoder_json(tokenizer: Any) -> str | None:
    """Return the JSON of a tokenizers.Tokenizer whose `decode` gives the same text as the tokenizer's own.

    None if the tokenizer does more than that.
    """
    kind, fast = type(tokenizer), transformers.PreTrainedTokenizerFast
    if not issubclass(kind, fast) or kind.decode is not fast.decode or kind._decode is not fast._decode:
        return None
    backend = tokenizer.backend_tokenizer
    # transformers leaves a text of BPE as it is, unless another option says so, which older ones do not have
    is_left = type(backend.model).__name__ == "BPE" and not getattr(tokenizer, CLEANS_BPE, True)
    if tokenizer.clean_up_tokenization_spaces and not is_left:
        return None
    try:
        described = str(backend.to_str())
    except Exception:  # noqa: BLE001  # tokenizers raises it itself, where a part of it is written in Python
        return None
    elsewhere = tokenizers.Tokenizer.from_str(described)
    for id in tokenizer.added_tokens_decoder:  # the model's files may disagree about which are special
        if elsewhere.decode([id], skip_special_tokens=True) != tokenizer.decode(
            [id], skip_special_tokens=True
        ):
            return None
    return described


def check_vocabulary(model: Path, tokenizer: Any) -> None:
    """Raise ConfigError if the tokenizer has ids that the model has no row for. Rows to spare are usual."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    rows = of_text(read_config(model)).get("vocab_size")
    if isinstance(rows, int) and largest >= rows:
        both = f"its tokenizer has the token {token!r} with id {largest}, config.json a vocab_size of {rows}"
        raise ConfigError(f"policy.model={model}: {both}: use the model's own tokenizer, or add rows to it")


def stop_ids(model: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a response, for every engine alike. Raise ConfigError if there are none."""
    # all that the model's files name: a server would stop at them anyway
    ids = {tokenizer.eos_token_id, *_listed(model, "config.json"), *_listed(model, "generation_config.json")}
    ids.discard(None)
    if not ids:
        sources = "neither the tokenizer nor config.json nor generation_config.json"
        raise ConfigError(f"policy.model={model}: {sources} names an EOS token")
    return tuple(sorted(ids))


def differences(a: Path, b: Path) -> list[str]:
    """Return what a server that was started with one model would do otherwise with the other's weights: the
    fields of config.json that differ, and "stop tokens".
    """
    both = (of_text(read_config(model)) for model in (a, b))
    x, y = ({name: value for name, value in raw.items() if name not in NO_EFFECT} for raw in both)
    differ = sorted(name for name in x.keys() | y.keys() if x.get(name) != y.get(name))
    stops = [stop_ids(model, load_tokenizer(model)) for model in (a, b)]
    return differ + (["stop tokens"] if stops[0] != stops[1] else [])


def _listed(model: Path, name: str) -> list[int | None]:
    """Return eos_token_id of one of the model's files. Raise ConfigError if it is neither id nor ids."""
    if name != "config.json" and not (model / name).is_file():
        return []
    found = of_text(read_config(model, name)).get("eos_token_id")
    ids: list[Any] = found if isinstance(found, list) else [found]
    if not all(id is None or type(id) is int for id in ids):
        raise ConfigError(f"{model / name}: eos_token_id={found!r}; expected a token's id, or a list of them")
    return ids
