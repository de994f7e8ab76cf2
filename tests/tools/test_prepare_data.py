"""tools/prepare_data.py, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def prepare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/prepare_data.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_copies_and_conflicts_are_left_out(tmp_path: Path) -> None:
    rows = [("a", 1), ("b", 2), ("a", 1), ("b", 3), ("c", "½")]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows)
    )
    done = prepare(tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "5 rows, 2 prompts; left out: 1 copies, 2 with conflicting answers" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"prompt": "a", "answer": "1"}, {"prompt": "c", "answer": "½"}]
    [conflict] = json.loads((tmp_path / "out.jsonl.conflicts.json").read_text())
    assert conflict["answers"] == {"2": 1, "3": 1}


def test_nothing_is_overwritten_or_left_half_written(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b"\n')
    done = prepare(tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 1
    assert "in.jsonl, line 2: not JSON" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    (tmp_path / "out.jsonl").write_text("mine")
    assert (
        "exists" in prepare(tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--skip-malformed").stderr
    )
    assert (tmp_path / "out.jsonl").read_text() == "mine"
