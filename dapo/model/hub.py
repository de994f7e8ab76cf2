"""Models and data by their names on the Hugging Face hub: org/name, org/name@revision, and for data
org/name@revision:file.

A path that is there is used as it is. The rest is fetched by huggingface_hub into its cache, as its
environment variables say (HF_HUB_OFFLINE, HF_HOME, HF_TOKEN).
"""

from __future__ import annotations

import os
import re
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


def overrides(config: Config, has_weights: bool = True) -> list[str]:
    """Fetch what a config names on the hub. Return the local paths as overrides, none if all is here.

    Args:
        has_weights: False leaves a model's weights where they are.

    Raises:
        ConfigError: there is neither such a path nor such a name, or it cannot be fetched.
    """
    train, evaluated = config.data.train, config.eval.data
    paths: dict[str, Any] = {"policy.model": model(config.policy.model, has_weights)}
    if isinstance(train, dict):
        files = {path: data_files(path, "data.train") for path in train}
        paths["data.train"] = {_one(files[path], path): weight for path, weight in train.items()}
    elif isinstance(train, list):
        paths["data.train"] = [file for path in train for file in data_files(path, "data.train")]
    else:
        found = data_files(train, "data.train")
        paths["data.train"] = found[0] if len(found) == 1 else found
    if isinstance(evaluated, dict):
        paths["eval.data"] = {
            name: _one(data_files(path, "eval.data"), path) for name, path in evaluated.items()
        }
    elif evaluated is not None:
        paths["eval.data"] = _one(data_files(evaluated, "eval.data"), evaluated)
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
    """Return a data file, or those of a data set of the hub: all, or the one that is named.

    Raises:
        ConfigError: it cannot be fetched, or has no file that can be read.
    """
    if not (found := _parsed(path)):
        return [path]
    what = f"{option}={path}"
    patterns = [found["file"]] if found["file"] else [f"*{suffix}" for suffix in DATA]
    folder = _fetch(found, "dataset", patterns, what)
    if found["file"]:
        return [folder / found["file"]]
    files = sorted(file for file in folder.rglob("*") if file.suffix in DATA)
    if train := [file for file in files if "train" in file.name]:
        files = train
    if not files:
        raise ConfigError(f"{what}: no {' or '.join(DATA)} file in it")
    return files


def _one(files: list[Path], path: Path) -> Path:
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise ConfigError(
            f"{path} has {len(files)} files ({names}): name one, as org/name:folder/file.parquet"
        )
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
        raise ConfigError(f"{what}: {neither} ({' '.join(str(error).split())[:160]})") from error
    return Path(folder)
