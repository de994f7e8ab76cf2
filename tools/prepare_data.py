"""Clean data files once, so that training reads little: distinct prompts, conflicts aside.

    python tools/prepare_data.py dapo-math-17k.parquet [more.jsonl …] --out train.parquet [--skip-malformed]

OUT is parquet or JSONL, by its name. Several files count as one. Writes OUT and, if there are any,
OUT.conflicts.json: prompts whose copies disagree on the answer, which are left out. OUT has prompts and
ground truths only: a reward function that asks for the other columns of a row needs the original files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dapo import config
from dapo.config import ConfigError
from dapo.rollout.data_files import Row, distinct_rows
from dapo.rollout.ground_truth import GroundTruths


def write_jsonl(rows: list[Row], path: Path) -> None:
    """Write {prompt, answer}, one a line."""
    lines = (json.dumps({"prompt": row.prompt, "answer": row.answer}, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def write_parquet(rows: list[Row], path: Path) -> None:
    """Write the schema of DAPO-Math-17k; prompts that are not all text, or all messages, as JSON text."""
    chats = [row.prompt for row in rows if not isinstance(row.prompt, str)]
    is_plain = all(set(message) == {"role", "content"} for chat in chats for message in chat)
    is_json = bool(chats) and not (is_plain and len(chats) == len(rows))

    def prompt(row: Row) -> Any:
        is_text = not is_json or isinstance(row.prompt, str)
        return row.prompt if is_text else json.dumps(row.prompt, ensure_ascii=False)

    table = [{"prompt": prompt(row), "reward_model": {"ground_truth": row.answer}} for row in rows]
    pq.write_table(pa.Table.from_pylist(table), path)


WRITERS: dict[str, Callable[[list[Row], Path], None]] = {".jsonl": write_jsonl, ".parquet": write_parquet}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--skip-malformed", action="store_true", help="count malformed rows instead of stopping at the first"
    )
    parser.add_argument(
        "--reward",
        default=config.Reward().function,
        help="reward.function of the run, whose module says which ground truths can be used",
    )
    args = parser.parse_args(argv)
    try:
        prepare(args.files, args.out, args.reward, args.skip_malformed)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(paths: list[Path], out: Path, reward: str, skip_malformed: bool) -> None:
    """Read all files, then write. Raise ConfigError, and write nothing, if something is wrong."""
    if out.suffix not in WRITERS:
        raise ConfigError(f"--out {out}: expected .jsonl or .parquet")
    if out.exists():
        raise ConfigError(f"--out {out} exists; name another file, or remove it")
    truths = GroundTruths.of(config.Reward(function=reward))
    rows, conflicts = list[Row](), list[dict]()
    for summary, found in distinct_rows(paths, truths, skip_malformed):
        summary.prompts = len(found)
        rows += found
        conflicts += summary.conflicts
        print(summary)
    if not rows:
        raise ConfigError(f"no prompts in {', '.join(map(str, paths))}")
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[out.suffix](rows, partial)
        partial.rename(out)
        if conflicts:
            text = json.dumps(conflicts, indent=1, ensure_ascii=False)
            out.with_name(out.name + ".conflicts.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
