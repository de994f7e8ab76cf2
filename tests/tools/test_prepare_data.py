"""tools/prepare_data.py, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dapo.config import Reward
from dapo.rollout.data_files import distinct_rows
from dapo.rollout.ground_truth import GroundTruths

ROOT = Path(__file__).parents[2]


def prepare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/prepare_data.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_copies_and_conflicts_are_left_out(tmp_path: Path) -> None:
    rows = [("a", 1), ("b", 2), ("a", 1), ("b", 3), ("c", "Zürich")]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "answer": a}) + "\n" for p, a in rows)
    )
    done = prepare(tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "5 rows, 2 prompts; left out: 1 copies, 2 with conflicting answers" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [{"prompt": "a", "answer": "1"}, {"prompt": "c", "answer": "Zürich"}]
    [conflict] = json.loads((tmp_path / "out.jsonl.conflicts.json").read_text())
    assert conflict["answers"] == {"2": 1, "3": 1}


def test_nothing_is_overwritten_or_left_half_written(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b"\n')
    done = prepare(tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 2
    assert "in.jsonl, line 2: not JSON" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    (tmp_path / "out.jsonl").write_text("mine")
    assert (
        "exists" in prepare(tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--skip-malformed").stderr
    )
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHAT = [{"role": "user", "content": "c"}]


def test_several_files_are_one_and_the_result_is_read_as_the_files_were(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2})
    second = write(
        tmp_path / "b.jsonl",
        {"prompt": "a", "answer": "1.0"},
        {"prompt": "b", "answer": 3},
        {"prompt": CHAT, "answer": 0.00001},
    )
    for name in ("out.parquet", "out.jsonl"):
        done = prepare(first, second, "--out", tmp_path / "new" / name)
        assert done.returncode == 0, done.stderr
        one, two = done.stdout.splitlines()
        assert one.endswith("2 rows, 1 prompts; left out: 1 with conflicting answers")
        assert two.endswith("3 rows, 1 prompts; left out: 1 copies, 1 with conflicting answers")
        [(_, rows)] = distinct_rows([tmp_path / "new" / name], GroundTruths.of(Reward()), False)
        assert [(row.prompt, row.answer) for row in rows] == [("a", "1"), (CHAT, "0.00001")]
        [conflict] = json.loads((tmp_path / "new" / f"{name}.conflicts.json").read_text())
        assert conflict["answers"] == {"2": 1, "3": 1}


def test_prepared_chats_have_the_published_schema(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", {"prompt": CHAT, "answer": "1"})
    assert prepare(data, "--out", tmp_path / "out.parquet").returncode == 0
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [
        {"prompt": CHAT, "reward_model": {"ground_truth": "1"}}
    ]


@pytest.mark.parametrize(
    ("rows", "arguments", "said"),
    [
        ([{"prompt": "a", "answer": 1}], ["--out", "out.csv"], "out.csv: expected .jsonl or .parquet"),
        ([{"prompt": "a", "answer": "nan"}], ["--out", "out.jsonl"], "line 1: the ground truth 'nan' "),
        ([{"prompt": "a", "answer": "nan"}], ["--out", "out.jsonl", "--skip-malformed"], "no prompts in"),
        ([{"prompt": "a", "answer": 1}], ["--out", "out.jsonl", "--reward", "nowhere:f"], "reward.function="),
    ],
)
def test_what_cannot_be_prepared_is_one_line(tmp_path: Path, rows: list, arguments: list, said: str) -> None:
    data = write(tmp_path / "a.jsonl", *rows)
    out = tmp_path / arguments[1]
    done = prepare(data, "--out", out, *arguments[2:])
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not out.exists()


def test_a_reward_of_ones_own_may_have_any_ground_truth(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", {"prompt": "a", "answer": "nan"})
    done = prepare(
        data, "--out", tmp_path / "out.jsonl", "--reward", "tests.dapo.reward.reward_functions:graded"
    )
    assert done.returncode == 0, done.stderr
