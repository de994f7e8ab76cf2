"""Clean data files once, so that training reads little: distinct prompts as JSONL, conflicts aside.

    python tools/prepare_data.py dapo-math-17k.parquet [more.jsonl …] --out train.jsonl [--skip-malformed]

Writes OUT and, if there are any, OUT.conflicts.json: prompts whose copies disagree on the answer, which are
left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dapo.config import ConfigError
from dapo.rollout.data_files import Summary, distinct_rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--skip-malformed", action="store_true", help="count malformed rows instead of stopping at the first"
    )
    args = parser.parse_args(argv)
    if args.out.exists():
        print(f"error: {args.out} exists; name another file, or remove it", file=sys.stderr)
        return 1
    lines, conflicts = [], []
    try:
        for path in args.files:
            summary = Summary(path)
            for row in distinct_rows(path, summary, args.skip_malformed):
                lines.append(
                    json.dumps({"prompt": row.prompt, "answer": row.answer}, ensure_ascii=False) + "\n"
                )
                summary.prompts += 1
            conflicts += summary.conflicts
            print(summary)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    partial = args.out.with_name(args.out.name + ".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.rename(args.out)
    if conflicts:
        args.out.with_name(args.out.name + ".conflicts.json").write_text(
            json.dumps(conflicts, indent=1, ensure_ascii=False)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
