"""Models and data by their names on the Hugging Face hub: org/name, org/name@revision, and for data
org/name@revision:file.

A path that is there is used as it is. The rest is fetched by huggingface_hub into its cache, as its
environment variables say (HF_HUB_OFFLINE, HF_HOME, HF_TOKEN).
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Set
from pathlib import Path
from typing import Any

from dapo.config import Config, ConfigError
from dapo.config.plain_yaml import inline

NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[^:@]+))?(:(?P<file>[^:]+))?")
SNAPSHOT = re.compile(
    r"(models|datasets)--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(/|$)"
)
DESCRIPTION = ["*.json", "*.jinja", "*.txt", "*.model"]  # of a model: its shape, its tokenizer
WEIGHTS = ["*.safetensors"]
DATA = (".parquet", ".jsonl")
EVERYTHING = frozenset({"weights", "train", "eval"})
# a file's split, by a word in its name or its folders' names: train-00000-of-00005.parquet, en/test/0.jsonl
TRAIN = re.compile(r"(?<![a-z])train(?![a-z])", re.IGNORECASE)
OTHER = re.compile(r"(?<![a-z])(test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)


def overrides(config: Config, needs: Set[str] = EVERYTHING) -> list[str]:
    """Fetch what a config names on the hub. Return the local paths as overrides, none if all is here.

    Args:
        needs: what is fetched, beside the model's shape and tokenizer: "weights", and "train" and "eval", the
            data of both.

    Raises:
        ConfigError: there is neither such a path nor such a name, or it cannot be fetched.
    """
    train, evaluated = config.data.train, config.eval.data
    paths: dict[str, Any] = {"policy.model": model(config.policy.model, "weights" in needs)}
    if "train" in needs:
        if isinstance(train, dict):
            paths["data.train"] = {data_file(path, "data.train"): weight for path, weight in train.items()}
        elif isinstance(train, list):
            paths["data.train"] = [file for path in train for file in data_files(path, "data.train")]
        else:
            found = data_files(train, "data.train")
            paths["data.train"] = found[0] if len(found) == 1 else found
    if "eval" in needs and evaluated is not None:
        sets = evaluated if isinstance(evaluated, dict) else {"": evaluated}
        files = {name: data_file(path, "eval.data") for name, path in sets.items()}
        paths["eval.data"] = files if isinstance(evaluated, dict) else files[""]
    given = {"policy.model": config.policy.model, "data.train": train, "eval.data": evaluated}
    return [f"{key}={inline(_text(path))}" for key, path in paths.items() if path != given[key]]


def origins(config: Config) -> dict[str, list[str]]:
    """Return org/name@commit of what is in the hub's cache, by option."""
    train, evaluated = config.data.train, config.eval.data
    paths = {
        "policy.model": [config.policy.model],
        "data.train": [train] if isinstance(train, Path) else list(train),
        "eval.data": list(evaluated.values())
        if isinstance(evaluated, dict)
        else [evaluated]
        if evaluated
        else [],
    }
    found = {option: [name for path in each if (name := _origin(path))] for option, each in paths.items()}
    return {option: names for option, names in found.items() if names}


def _text(value: Any) -> Any:
    """Return paths as texts, in whatever holds them."""
    if isinstance(value, dict):
        return {_text(key): _text(each) for key, each in value.items()}
    return (
        [_text(each) for each in value]
        if isinstance(value, list)
        else str(value)
        if isinstance(value, Path)
        else value
    )


def model(path: Path, has_weights: bool = True, option: str = "policy.model") -> Path:
    """Return the directory of a model. Raise ConfigError."""
    found, patterns = _parsed(path), DESCRIPTION + (WEIGHTS if has_weights else [])
    return _fetch(found, "model", patterns, f"{option}={path}") if found and not found["file"] else path


def data_files(path: Path, option: str) -> list[Path]:
    """Return a data file, or those of a data set of the hub: the one that is named, or its training split's;
    for eval.data those of another split, if there is one.

    Raises:
        ConfigError: it cannot be fetched, or has no file that can be read.
    """
    if not (found := _parsed(path)):
        return [path]
    what, file = f"{option}={path}", found["file"]
    if file and (".." in Path(file).parts or set(file) & set("*?[")):
        raise ConfigError(f"{what}: {file} is no file's path in a data set")
    folder = _fetch(found, "dataset", [file] if file else [f"*{suffix}" for suffix in DATA], what)
    if file:
        return [folder / file]
    splits: dict[str, list[Path]] = {"train": [], "other": [], "none": []}
    for each in sorted(each for each in folder.rglob("*") if each.suffix in DATA):
        name = str(each.relative_to(folder))
        splits["other" if OTHER.search(name) else "train" if TRAIN.search(name) else "none"].append(each)
    is_training = option == "data.train"
    first, second = ("train", "none") if is_training else ("other", "none")
    if files := splits[first] or splits[second] or ([] if is_training else splits["train"]):
        return files
    there = ", ".join(each.name for each in splits["other"][:5]) or f"no {' or '.join(DATA)} file"
    raise ConfigError(
        f"{what}: it has no training data ({there}): name a file, as org/name:folder/file.parquet"
    )


def data_file(path: Path, option: str) -> Path:
    """Return the one file that `data_files` finds. Raise ConfigError if there are several."""
    files = data_files(path, option)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        several = f"{option}={path} has {len(files)} files ({names})"
        raise ConfigError(f"{several}: name one, as org/name:folder/file.parquet")
    return files[0]


def _origin(path: Path) -> str | None:
    """Return org/name@commit of a path in the hub's cache, None for any other."""
    found = SNAPSHOT.search(str(path))
    return f"{found['org']}/{found['name']}@{found['commit']}" if found else None


def _parsed(path: Path) -> dict[str, str | None] | None:
    """Return the parts of a name; None if it is a path: it is there, or cannot be a name."""
    found = NAME.fullmatch(str(path))
    if not found or path.exists() or (path.suffix in DATA and not found["file"]):
        return None
    return found.groupdict()


def _fetch(name: dict[str, Any], kind: str, patterns: list[str], what: str) -> Path:
    """Return the folder of a snapshot. Local ranks wait for each other by the cache's locks."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if os.environ.get("LOCAL_RANK", "0") != "0":
        disable_progress_bars()
    try:
        folder = huggingface_hub.snapshot_download(
            name["repo"], revision=name["revision"], repo_type=kind, allow_patterns=patterns
        )
    except (OSError, HFValidationError, RevisionResolutionError) as error:
        neither = f"there is no such path, and the hub's {kind} of this name could not be fetched"
        why = textwrap.shorten(str(error), 200, placeholder=" …")
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set, and it is not in the cache"
        raise ConfigError(f"{what}: {neither} ({why})") from error
    return Path(folder)
