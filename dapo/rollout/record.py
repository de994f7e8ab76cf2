"""The forecast's record of a run's prompts as a file, prompts.parquet: a row a prompt that was asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from dapo import files
from dapo.config import ConfigError
from dapo.rollout.forecast import Forecast, Odds, Rules

# column → type; `forecast` is the chance of a mixed group, α and β are those after the last group
COLUMNS = {
    "index": "int64", "asked": "int32", "samples": "int32", "correct": "int32", "forecast": "float64",
    "alpha": "float64", "beta": "float64", "step": "int32", "epoch": "int32", "shift_then": "float64",
    "is_dropped": "bool",
}  # fmt: skip
OWN = tuple(name for name in COLUMNS if name not in ("index", "forecast"))  # arrays of a Forecast
# keys of what else a Forecast holds, as JSON, and of its checksum, in the file's metadata
ABOUT, CHECKSUM = b"dapo", b"dapo.checksum"
NAME = "prompts.parquet"  # in a checkpoint, and in run.dir as it was saved last


def write(path: Path, forecast: Forecast, data: str) -> None:
    """Write what is known, whole or not at all. `data`: a hash of the prompts.

    Raises:
        StorageError: the disk is full or fails.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    prompts = np.flatnonzero(forecast.asked)
    chances = forecast.table(prompts, forecast.num_steps)[:, Odds._fields.index("mixed")]
    arrays = {"index": prompts, "forecast": chances} | {
        name: getattr(forecast, name)[prompts] for name in OWN
    }
    about = {
        "data": data,
        "group_size": forecast.rules.group_size,
        "drop_above": forecast.rules.drop_above,
        "num_prompts": len(forecast.asked),
        "num_steps": forecast.num_steps,
        "prior": forecast.prior,
        "prior_shift": forecast.prior_shift,
        "shift": forecast.shift,
        "visits": [[*key, count] for key, count in forecast.visits.items()],
        "of_formula": forecast.of_formula.tolist(),
        "of_mixed": forecast.of_mixed.tolist(),
        "spared": forecast.spared.tolist(),
    }
    schema = pa.schema({name: pa.type_for_alias(kind) for name, kind in COLUMNS.items()})
    text = json.dumps(about).encode()
    metadata = {ABOUT: text, CHECKSUM: _checksum(text)}
    table = pa.table([arrays[name] for name in COLUMNS], schema.with_metadata(metadata))
    partial = path.with_suffix(".partial")
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def read(path: Path, forecast: Forecast, data: str) -> None:
    """Fill a Forecast of the same data with what `write` was given; bit-equal.

    Raises:
        ConfigError: the file is damaged, or of other data, or of another group_size.
    """
    table, about = read_table(path)
    wanted = {"data": data, "num_prompts": len(forecast.asked)}
    if any(about[name] != value for name, value in wanted.items()):
        raise ConfigError(
            f"{path} is the record of other prompts than data.train holds: use the same data, or a new "
            "run.dir"
        )
    _check_group_size(path, about, forecast.rules)
    _fill(forecast, table, about)


def forecast_of(path: Path, rules: Rules) -> Forecast:
    """Return the Forecast that a record holds, of whatever data.

    Raises:
        ConfigError: the file is damaged, or of another group_size.
    """
    table, about = read_table(path)
    _check_group_size(path, about, rules)
    forecast = Forecast(about["num_prompts"], rules)
    _fill(forecast, table, about)
    return forecast


def _check_group_size(path: Path, about: dict[str, Any], rules: Rules) -> None:
    if about["group_size"] != rules.group_size:
        raise ConfigError(
            f"{path} is a record of groups of {about['group_size']} samples, rollout.group_size="
            f"{rules.group_size}: use the same group_size, or a new run.dir"
        )


def _fill(forecast: Forecast, table: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    for name in OWN:
        getattr(forecast, name)[table["index"]] = table[name]
    prior, forecast.prior_shift, forecast.shift = about["prior"], about["prior_shift"], about["shift"]
    forecast.prior, forecast.num_steps = (prior[0], prior[1]), about["num_steps"]
    forecast.visits = {(correct, samples): count for correct, samples, count in about["visits"]}
    for name in ("of_formula", "of_mixed", "spared"):
        setattr(forecast, name, np.array(about[name]))
    if about["drop_above"] != (drop_above := forecast.rules.drop_above):
        forecast.is_dropped &= forecast.alpha > drop_above * (forecast.alpha + forecast.beta)


def read_table(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return a record's columns, and what else it says. Raises ConfigError if it is damaged or none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            if metadata[CHECKSUM] != _checksum(metadata[ABOUT]):
                raise ValueError("its metadata have changed")
            about: dict[str, Any] = json.loads(metadata[ABOUT])
            table = file.read(list(COLUMNS), use_threads=False)
            if table.num_rows != file.metadata.num_rows:
                raise pa.ArrowInvalid(f"{file.metadata.num_rows - table.num_rows} rows are missing")
            if any(table[name].type != pa.type_for_alias(kind) for name, kind in COLUMNS.items()):
                raise pa.ArrowInvalid("a column of another type")
            columns = {name: table[name].to_numpy() for name in COLUMNS}
    except (pa.ArrowException, OSError, LookupError, ValueError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"{path} is damaged, or no record of prompts: {said}: remove it to begin a new record"
        ) from None
    return columns, about


def _checksum(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).hexdigest().encode()
