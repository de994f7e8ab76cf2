"""Reading the tensors of a Hugging Face directory."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dapo.config import ConfigError
from dapo.model.shape import of_text, read_config

WEIGHTS = {".safetensors", ".distcp"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# config.json says the same, and every model computes it from there
SAMPLE = 1 << 16  # bytes, of each of three places in a file of weights
INERT = re.compile(r"(?:^|\.)rotary_emb\.inv_freq$")


def open_safetensors(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor by name: from the index if there is one, else of all safetensors files.

    Inert tensors are left out.

    Raises:
        ConfigError: there are none, one is damaged, a file or a tensor of the index is missing, or two files
            have a tensor.
    """
    index = directory / "model.safetensors.index.json"
    where = _indexed(index) if index.is_file() else {}
    paths = sorted({directory / name for name in where.values()} or directory.glob("*.safetensors"))
    if not paths:
        raise ConfigError(f"{directory}: no *.safetensors there; the model has no weights")
    found: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            missing = f"{path.name} is missing, one of {len(paths)} files that {index.name} names"
            raise ConfigError(f"{directory}: {missing}")
        try:
            with safe_open(path, framework="pt") as file:
                names = {name for name in file.keys() if where.get(name, path.name) == path.name}  # noqa: SIM118
        except SafetensorError as error:
            raise ConfigError(f"{path}: damaged or cut short: {error}") from error
        if lacking := sorted({name for name, file_name in where.items() if file_name == path.name} - names):
            raise ConfigError(f"{path}: tensor {lacking[0]} is not in it, though {index.name} says so")
        if twice := sorted(names & found.keys()):
            both = f"tensor {twice[0]} is in {found[twice[0]].name} and in {path.name}"
            raise ConfigError(f"{directory}: {both}: remove one of them, or add an index that names one")
        found.update(dict.fromkeys(sorted(names), path))
    return {name: path for name, path in found.items() if not INERT.search(name)}


def fingerprints(directory: Path) -> dict[str, str]:
    """Return hashes of a model's config.json and of its weights; "not there" of what is not there.

    Of the weights: names and sizes of the files, and bytes from each one's beginning, middle and end, so that
    a model of any size takes milliseconds. Also of a directory that Megatron wrote.
    """
    config = directory / "config.json"
    weights = [path for path in sorted(directory.rglob("*")) if path.suffix in WEIGHTS]
    return {
        "the hash of policy.model's config.json": _hash([config.read_bytes()] if config.is_file() else []),
        "the hash of policy.model's weights": _hash(
            part for path in weights for part in _sample(path, str(path.relative_to(directory)))
        ),
    }


def _sample(path: Path, name: str) -> Iterator[bytes]:
    size = path.stat().st_size
    yield f"{name}\0{size}\0".encode()
    with path.open("rb") as file:
        for place in (0, size // 2, max(0, size - SAMPLE)):
            file.seek(place)
            yield file.read(SAMPLE)


def _hash(parts: Iterable[bytes]) -> str:
    state, is_there = hashlib.blake2b(digest_size=6), False
    for part in parts:
        state.update(part)
        is_there = True
    return state.hexdigest() if is_there else "not there"


def _indexed(index: Path) -> dict[str, str]:
    """Return the file name of each tensor by name."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in where.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: no index of safetensors files: {error!r}") from error


def read_tensor(path: Path, name: str, part: tuple[int | slice, ...] = ()) -> Tensor:
    """Read a tensor, or a part of it."""
    with safe_open(path, framework="pt") as file:
        return file.get_slice(name)[part] if part else file.get_tensor(name)  # type: ignore[no-any-return]


def read_headers(files: dict[str, Path]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the dtype, such as BF16, and the shape of each tensor by name, as the file's header has them."""
    found = {}
    for path in set(files.values()):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, where in files.items() if where == path):
                tensor = file.get_slice(name)
                found[name] = tensor.get_dtype(), tuple(tensor.get_shape())
    return found


def stored_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of any model, but for inert ones, and for a tied model's copy of its embedding.

    Raises:
        ConfigError: no config.json there, or it is broken; a tied model's head is no copy; or as
            `open_safetensors`.
    """
    is_tied = of_text(read_config(directory)).get("tie_word_embeddings", False)
    files = open_safetensors(directory)
    for name, path in files.items():
        if name == EMBEDDING and is_tied:
            yield name, read_tied(directory, files)
        elif not (name == HEAD and is_tied):
            yield name, read_tensor(path, name)


def read_tied(directory: Path, files: dict[str, Path], name: str = EMBEDDING) -> Tensor:
    """Return the embedding, `name` in files, of a model whose head it is too.

    Raises:
        ConfigError: the files hold another head, which would be lost.
    """
    embedding = read_tensor(files[name], name)
    if HEAD in files:
        head = read_tensor(files[HEAD], HEAD)
        if head.shape != embedding.shape or not (head == embedding).all():
            raise ConfigError(
                f"{directory}: {HEAD} is not {name}, though config.json says tie_word_embeddings=true: "
                "set it false there if this is the model's head, or remove the tensor"
            )
    return embedding
