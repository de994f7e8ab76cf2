"""One HTML page of one run or several: curves to zoom into, and a browser of dumped samples.

python -m dapo report RUN [RUN …] [--out PATH] [--samples MIB]. The page needs no network, and making it no
torch. page.html is the page without its data.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dapo.config import ConfigError
from dapo.report import alarm, curves, glossary
from dapo.report.samples import Embedded, embed
from dapo.rollout import record
from dapo.rollout.dump import KINDS

TEMPLATE = Path(__file__).with_name("page.html")
MIB = 1 << 20


@dataclass
class Run:
    """The content of a run's directory, as far as it was written."""

    directory: Path
    label: str
    rows: list[dict[str, Any]]  # of metrics.jsonl
    options: dict[str, Any]  # of config.yaml: {"optim.lr": 1e-6}
    warnings: list[str]
    num_samples: int = 0  # in the page
    # of groups with a forecast chance in each tenth, of late: how many, expected mixed, found mixed
    calibration: list[list[float | None]] | None = None

    @property
    def model(self) -> str | None:
        return self.options.get("policy.model")


def write(directories: Sequence[Path], out: Path | None, samples_mib: float) -> tuple[str, list[str]]:
    """Make the page, and a PNG of the paper's curves beside it.

    Args:
        out: the page; None: report.html in the first run's directory.
        samples_mib: how much of the page samples may take, all runs together.

    Returns:
        One line that says what was made, and warnings of what was left out.

    Raises:
        ConfigError: a directory is not a run's, a dump is damaged, or `out` cannot be written.
    """
    out = out or directories[0] / "report.html"
    if out.suffix == ".png" or out.is_dir():
        raise ConfigError(f"--out {out}: cannot be written: it is to be an HTML file; the PNG goes beside it")
    text, runs = make(directories, samples_mib)
    try:
        partial = out.with_name(f".{out.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.rename(out)
        curves.plot({run.label: run.rows for run in runs}, out.with_suffix(".png"))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from error
    size, num_samples = len(text) / MIB, sum(run.num_samples for run in runs)
    made = f"{out} ({size:.1f} MiB, {num_samples} samples) and {out.with_suffix('.png').name}"
    return made, [warning for run in runs for warning in run.warnings]


def make(directories: Sequence[Path], samples_mib: float) -> tuple[str, list[Run]]:
    """Return the page and the runs that are in it; see `write`. Raise ConfigError."""
    check_size(samples_mib)
    runs = [read(directory, label) for directory, label in zip(directories, labels(directories), strict=True)]
    budget = int(samples_mib * MIB / len(runs))
    samples = [embed(run.directory, run.model, budget) for run in runs]
    for run, embedded in zip(runs, samples, strict=True):
        run.warnings += embedded.warnings
        run.num_samples = embedded.num_samples
    return page(runs, samples), runs


def check_size(samples_mib: float) -> None:
    """Raise ConfigError if a page cannot hold so many MiB of samples."""
    if not samples_mib >= 0:
        raise ConfigError(f"--samples={samples_mib}: how many MiB of samples the page may hold, 0 for none")


def read(directory: Path, label: str) -> Run:
    """Read a run that has finished, is still running, or stopped in the middle of a line.

    Raises:
        ConfigError: no directory, no metrics.jsonl in it, or no whole row in that.
    """
    path, warnings = directory / "metrics.jsonl", []
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory: name the run.dir of a run")
    try:
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        rows = curves.read(path)
    except FileNotFoundError:
        missing = "has no metrics.jsonl: not a run's directory, or its first step is still being made"
        raise ConfigError(f"{directory} {missing}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    if not rows:
        raise ConfigError(f"{path} has no whole row: the run has not finished a step yet")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            expected = "expected an object with a whole number `step`"
            raise ConfigError(f"{path}:{number} is not a row of metrics: {expected}")
    if len(rows) < num_lines:
        more = num_lines - len(rows) - 1
        warnings.append(f"{path}:{len(rows) + 1} is cut short: left out, with {more} lines after it")
    options: dict[str, Any] = {}
    try:
        options = dict(_flat(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        warnings.append(f"{directory / 'config.yaml'} cannot be read, the page shows no options: {reason}")
    warnings += [f"{directory}: {line}" for line in alarm.lines(rows)]
    run = Run(directory, label, rows, options, warnings)
    if (directory / record.NAME).exists():
        try:
            _, about = record.read_table(directory / record.NAME)
            run.calibration = [[curves.rounded(value) for value in tenth] for tenth in about["of_mixed"]]
        except ConfigError as error:
            warnings.append(f"the page shows no calibration: {error}")
    return run


def _flat(options: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items() if isinstance(options, dict) else ():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def labels(directories: Sequence[Path]) -> list[str]:
    """Name each run by the end of its path, as short as the names still differ.

    `labels([a/x, b/x])` → ["a/x", "b/x"]; the same path twice is numbered.
    """
    paths = [directory.resolve().parts[1:] or ("/",) for directory in directories]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    counts = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, counts, strict=True)]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the options that differ between the runs: {"optim.lr": ["1e-06", "2e-06"]}."""
    if len(runs) < 2:
        return {}
    keys = dict.fromkeys(key for run in runs for key in run.options if key != "run.dir")
    values = {key: [str(run.options.get(key, "–")) for run in runs] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def page(runs: Sequence[Run], samples: Sequence[Embedded]) -> str:
    """Fill the template with the data.

    Samples are base64, the rest is JSON without "<": nothing in them can be read as HTML.
    """
    data = {
        "runs": [
            {
                "label": run.label,
                "directory": str(run.directory),
                "model": run.model,
                "warnings": run.warnings,
                "columns": curves.columns(run.rows),
                "calibration": run.calibration,
                "groups": embedded.index,
                "numSamples": embedded.num_samples,
                "numDumped": embedded.num_dumped,
                "numSteps": embedded.num_steps,
            }
            for run, embedded in zip(runs, samples, strict=True)
        ],
        "differences": differences(runs),
        "metrics": glossary.described(key for run in runs for row in run.rows for key in row),
        "kinds": KINDS,
        "numColors": len(curves.COLORS),
    }
    blobs = [
        f'<script type="text/plain" id="b{i}-{j}">{blob}</script>'
        for i, embedded in enumerate(samples)
        for j, blob in enumerate(embedded.blobs)
    ]
    return _fill(
        TEMPLATE.read_text(encoding="utf-8"),
        title=html.escape(" · ".join(run.label for run in runs)),
        colors=" ".join(f"--c{i}: {color};" for i, color in enumerate(curves.COLORS)),
        data=json.dumps(data).replace("<", "\\u003c"),
        blobs="\n".join(blobs),
    )


def _fill(template: str, **values: str) -> str:
    """Replace each «name» in one pass, so that what is filled in is not searched."""
    return re.sub("«(" + "|".join(values) + ")»", lambda found: values[found[1]], template)
