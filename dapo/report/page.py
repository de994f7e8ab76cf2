"""One HTML page of one run or several: curves to zoom into, and a browser of dumped samples. It needs no
network, and reading no torch.

python -m dapo report RUN [RUN …] [--out PATH] [--samples MIB]. report.html is the page without its data.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dapo.config import ConfigError
from dapo.report import curves
from dapo.rollout.dump import COLUMNS, KINDS, TRACE_COLUMNS, path_of, read_rows, traces_path_of

TEMPLATE = Path(__file__).with_name("page.html")
PREVIEW = 160  # characters of a prompt in the list of groups
MIB = 1 << 20


@dataclass
class Run:
    """What a run's directory says, as far as it was written."""

    directory: Path
    label: str
    rows: list[dict[str, Any]]  # of metrics.jsonl
    options: dict[str, Any]  # of config.yaml: {"optim.lr": 1e-6}
    warnings: list[str]


@dataclass
class Embedded:
    """A run's samples in the page: groups as `index` lists them, and each one's content, compressed."""

    index: list[dict[str, Any]] = field(default_factory=list)
    blobs: list[str] = field(default_factory=list)
    num_samples: int = 0
    num_bytes: int = 0

    def sorted(self) -> Embedded:
        """By step, kind and asking order."""
        self.index.sort(key=lambda entry: (entry["step"], KINDS.index(entry["kind"]), entry["group"]))
        return self


def write(directories: Sequence[Path], out: Path | None, samples_mib: float) -> tuple[str, list[str]]:
    """Make the page, and a PNG of the paper's curves beside it; returns what was made, in a line, and
    warnings of what was left out.

    Args:
        out: the page; None: report.html in the first run's directory.
        samples_mib: how much of the page samples may take, shared by the runs.

    Raises:
        ConfigError: a directory is not a run's, a dump is damaged, or `out` cannot be written.
    """
    if not samples_mib >= 0:
        raise ConfigError(f"--samples={samples_mib}: how many MiB of samples the page may hold, 0 for none")
    out = out or directories[0] / "report.html"
    if out.suffix == ".png" or out.is_dir():
        raise ConfigError(f"--out {out}: cannot be written: it is to be an HTML file; the PNG goes beside it")
    runs = [read(directory, label) for directory, label in zip(directories, labels(directories), strict=True)]
    embedded = [embed(run, int(samples_mib * MIB / len(runs))) for run in runs]
    text = page(runs, embedded)
    try:
        partial = out.with_name(f".{out.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.rename(out)
        curves.plot({run.label: run.rows for run in runs}, out.with_suffix(".png"))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from error
    made = f"{out} ({len(text) / MIB:.1f} MiB, {sum(e.num_samples for e in embedded)} samples) and {out.with_suffix('.png').name}"
    return made, [warning for run in runs for warning in run.warnings]


# what a run's directory says


def read(directory: Path, label: str) -> Run:
    """Read a run that has finished, is going on, or ended in the middle of a line.

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
        raise ConfigError(
            f"{directory} has no metrics.jsonl: not a run's directory, or its first step is still being made"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    if not rows:
        raise ConfigError(f"{path} has no whole row: the run has not finished a step yet")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ConfigError(
                f"{path}:{number} is not a row of metrics: expected an object with a whole number `step`"
            )
    if len(rows) < num_lines:
        warnings.append(
            f"{path}:{len(rows) + 1} is cut short: left out, with {num_lines - len(rows) - 1} lines after it"
        )
    options: dict[str, Any] = {}
    try:
        options = dict(_flat(yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        warnings.append(
            f"{directory / 'config.yaml'} cannot be read, the page shows no options: "
            f"{' '.join(str(error).split())}"
        )
    return Run(directory, label, rows, options, warnings)


def labels(directories: Sequence[Path]) -> list[str]:
    """As much of each path's end as tells the runs apart: `labels([a/x, b/x])` → ["a/x", "b/x"]; the same
    path twice is numbered.
    """
    paths = [directory.resolve().parts[1:] or ("/",) for directory in directories]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [
        name if name not in names[:i] else f"{name} ({names[:i].count(name) + 1})"
        for i, name in enumerate(names)
    ]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The options that the runs do not share: {"optim.lr": ["1e-06", "2e-06"]}."""
    if len(runs) < 2:
        return {}
    keys = dict.fromkeys(key for run in runs for key in run.options if key != "run.dir")
    values = {key: [str(run.options.get(key, "–")) for run in runs] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Every number of metrics.jsonl, six digits of it, by name and row; None where a row lacks it or it is
    not finite.
    """
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    return {key: [_rounded(row.get(key)) for row in rows] for key in keys}


def _rounded(value: Any) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, int | float) and math.isfinite(value) else None


def _flat(options: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items() if isinstance(options, dict) else ():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


# samples


def embed(run: Run, budget: int) -> Embedded:
    """As many of the run's dumped groups as fit into `budget` bytes: first one group of each kind, of steps
    spread evenly; then the others.

    Raises:
        ConfigError: a dump cannot be read.
    """
    embedded = Embedded()
    steps = dumped_steps(run.directory) if budget else []
    tokenizer = Tokenizer.of(run) if steps else None
    for passed in (slice(0, 1), slice(1, None)):
        for i in spread(len(steps)):
            for group in read_groups(run.directory / "rollouts", steps[i], passed):
                entry, content = describe(steps[i], group, tokenizer)
                blob = base64.b64encode(
                    gzip.compress(json.dumps(content).encode(), compresslevel=5, mtime=0)
                ).decode()
                size = len(blob) + len(json.dumps(entry))
                if embedded.num_bytes + size > budget:
                    return embedded.sorted()
                embedded.index.append(entry | {"blob": len(embedded.blobs)})
                embedded.blobs.append(blob)
                embedded.num_samples += len(content["samples"])
                embedded.num_bytes += size
    return embedded.sorted()


def dumped_steps(directory: Path) -> list[int]:
    names = (
        re.fullmatch(r"step-(\d+)\.parquet", path.name)
        for path in (directory / "rollouts").glob("step-*.parquet")
    )
    return sorted(int(name[1]) for name in names if name)


def spread(count: int) -> list[int]:
    """0 … count − 1 in an order of which every beginning is spread evenly, the last one first: `spread(5)` →
    [4, 0, 2, 1, 3].
    """
    width = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda i: (i != count - 1, int(f"{i:0{width}b}"[::-1], 2)))


def read_groups(rollouts: Path, step: int, which: slice) -> list[list[dict[str, Any]]]:
    """Of each kind in a step's dump the groups `which`: the rows of their samples, with those of the traces
    where there are any.

    Raises:
        ConfigError: a file is damaged or is no dump.
    """
    path, traces_path = path_of(rollouts, step), traces_path_of(rollouts, step)
    rows = read_rows(path, {name: COLUMNS[name] for name in ("kind", "group")})
    by_kind = {
        kind: list(dict.fromkeys(row["group"] for row in rows if row["kind"] == kind)) for kind in KINDS
    }
    wanted = [group for kind in KINDS for group in by_kind[kind][which]]
    if not wanted:
        return []
    traces = {}
    if traces_path.exists():
        traces = {(row["group"], row["index"]): row for row in read_rows(traces_path, TRACE_COLUMNS, wanted)}
    groups: dict[int, list[dict[str, Any]]] = {group: [] for group in wanted}
    for row in read_rows(path, COLUMNS, wanted):
        groups[row["group"]].append({"trace": traces.get((row["group"], row["index"])), **row})
    if not all(groups.values()):
        raise ConfigError(f"{path} is damaged: it names groups of which it holds no sample")
    return list(groups.values())


def describe(
    step: int, rows: list[dict[str, Any]], tokenizer: Tokenizer | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A group's line in the list, and its content."""
    first = rows[0]
    prompt = (
        tokenizer.text(first["prompt_tokens"]) if tokenizer else f"({len(first['prompt_tokens'])} tokens)"
    )
    outcomes = "".join(
        ("C" if row["is_correct"] else "W") if _is_truncated(row) else "c" if row["is_correct"] else "w"
        for row in rows
    )
    entry = {
        "step": step,
        "group": first["group"],
        "kind": first["kind"],
        "preview": " ".join(prompt.split())[:PREVIEW],
        "outcomes": outcomes,
    }
    samples = [_describe_sample(row, tokenizer) for row in rows]
    return entry, {"prompt": prompt, "answer": first["answer"], "samples": samples}


def _describe_sample(row: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    logprobs = np.array(row["behavior_logprobs"], np.float64)
    sample = {
        "index": row["index"],
        "correct": row["is_correct"],
        "truncated": _is_truncated(row),
        "finish": row["finish_reason"],
        "reward": _rounded(row["reward"]),
        "advantage": _rounded(row["advantage"]),
        "tokens": len(row["tokens"]),
        "probability": _rounded(float(np.exp(logprobs).mean())) if len(logprobs) else None,
    }
    pieces = tokenizer.pieces(row["tokens"]) if tokenizer else None
    if pieces is None:
        return sample | {"text": row["text"]}
    # −log p in hundredths
    sample |= {"pieces": pieces, "surprise": np.rint(-100 * logprobs).clip(0, 9999).astype(int).tolist()}
    if not all(row["loss_mask"]):
        sample["foreign"] = np.flatnonzero(~np.array(row["loss_mask"])).tolist()
    if row["trace"]:
        trace = {
            name: np.array(row["trace"][name])
            for name in ("old_logprobs", "logprobs", "clipped_low", "clipped_high")
        }
        clipped = np.flatnonzero(trace["clipped_low"] | trace["clipped_high"])
        ratios = np.exp(trace["logprobs"] - trace["old_logprobs"])
        sample["clips"] = [
            [int(i), "high" if trace["clipped_high"][i] else "low", _rounded(float(ratios[i]))]
            for i in clipped
        ]
    return sample


def _is_truncated(row: dict[str, Any]) -> bool:
    return bool(row["finish_reason"] == "length")


class Tokenizer:
    """A run's tokenizer.json, without the library around it: token by token, for shading."""

    def __init__(self, path: Path):
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._anchor: list[int] = self._tokenizer.encode("0", add_special_tokens=False).ids[
            -1:
        ]  # some decoders strip the first token's space
        self._pieces: dict[int, str] = {}

    @classmethod
    def of(cls, run: Run) -> Tokenizer | None:
        """From the run's policy.model, or the model it has exported; else None, and the run's warnings say
        so.
        """
        model = run.options.get("policy.model")
        for folder in ([Path(model)] if model else []) + [run.directory / "hf"]:
            if (folder / "tokenizer.json").is_file():
                return cls(folder / "tokenizer.json")
        run.warnings.append(
            f"no tokenizer.json in policy.model={model} or {run.directory / 'hf'}: prompts and shading are "
            "left out"
        )
        return None

    def text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def pieces(self, ids: list[int]) -> list[str] | None:
        """The text of each token; a character that several make is the last one's. None where the parts are
        not the whole text.
        """
        pieces: list[str] = []
        pending: list[int] = []
        for i, token in enumerate(ids, start=1):
            piece = self._piece(token) if not pending else "\ufffd"
            if "\ufffd" in piece:
                pending.append(token)
                piece = self._after_anchor(pending)
                # UTF-8 has at most four bytes a character
                if piece.endswith("\ufffd") and len(pending) < 4 and i < len(ids):
                    pieces.append("")
                    continue
                pending = []
            pieces.append(piece)
        return pieces if "".join(pieces) == self._after_anchor(ids) else None

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._after_anchor([token])
        return self._pieces[token]

    def _after_anchor(self, ids: list[int]) -> str:
        return self.text(self._anchor + ids)[len(self.text(self._anchor)) :]


# the page


def page(runs: Sequence[Run], embedded: Sequence[Embedded]) -> str:
    """The template with the data in it. Samples are base64, the rest is JSON without "<": nothing in them can
    be read as HTML.
    """
    data = {
        "runs": [
            {
                "label": run.label,
                "directory": str(run.directory),
                "model": run.options.get("policy.model"),
                "warnings": run.warnings,
                "columns": columns(run.rows),
                "groups": samples.index,
                "numSamples": samples.num_samples,
                "numDumped": _num_dumped(run.directory),
                "numSteps": len(dumped_steps(run.directory)),
            }
            for run, samples in zip(runs, embedded, strict=True)
        ],
        "differences": differences(runs),
    }
    blobs = (
        f'<script type="text/plain" id="b{r}-{i}">{b}</script>'
        for r, e in enumerate(embedded)
        for i, b in enumerate(e.blobs)
    )
    return _fill(
        TEMPLATE.read_text(encoding="utf-8"),
        title=html.escape(" · ".join(run.label for run in runs)),
        data=json.dumps(data).replace("<", "\\u003c"),
        blobs="\n".join(blobs),
    )


def _fill(template: str, **values: str) -> str:
    """Replace each «name», in one pass: what is filled in is not looked at again."""
    return re.sub("«(" + "|".join(values) + ")»", lambda found: values[found[1]], template)


def _num_dumped(directory: Path) -> int:
    return sum(_num_rows(path_of(directory / "rollouts", step)) for step in dumped_steps(directory))


def _num_rows(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError):
        return 0
