"""`make gpu-check` without a GPU: its stages in their order, and what is left when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
# runs stages of (name, seconds, source of a Python program), which stand in argv[2] as JSON
CHECK = """
import json, sys
from pathlib import Path
import gpu_check
stages = [
    gpu_check.Stage(name, seconds, [[sys.executable, "-c", source]])
    for name, seconds, source in json.loads(sys.argv[2])
]
sys.exit(gpu_check.check(stages, Path(sys.argv[1]), {}))
"""
# says in a file of its own what it is about to write
MEASURE = """
import os, time, figures
witness = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for number in range(40):
    time.sleep(0.005)
    os.write(witness, f"{os.environ['DAPO_STAGE']} {number}\\n".encode())
    figures.write(f"{number}", number)
"""
# starts a process in a session of its own, which leaves another behind
HANG = """
import figures, os, subprocess, sys, time
figures.write("before", 1)
orphan = "import os, time; open(os.environ['WITNESS'], 'a').write(f'{os.getpid()}\\\\n'); time.sleep(600)"
popen = f"subprocess.Popen([sys.executable, '-c', {orphan!r}], start_new_session=True)"
leave = f"import subprocess, sys; {popen}"
subprocess.run([sys.executable, "-c", leave], start_new_session=True)
time.sleep(600)
"""


def start(out: Path, *stages: tuple[str, float, str]) -> subprocess.Popen[str]:
    """Start a check of these stages, in a process group of its own."""
    env = os.environ | {"PYTHONPATH": str(BENCHMARKS), "WITNESS": str(out.with_name("witness"))}
    command = [sys.executable, "-c", CHECK, str(out), json.dumps(stages)]
    output = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=output, stderr=output, text=True, start_new_session=True)


def figures_of(out: Path) -> list[dict[str, Any]]:
    lines = (out / "figures.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def lines_of(witness: Path) -> list[str]:
    return witness.read_text().splitlines() if witness.exists() else []


@pytest.mark.parametrize("moment", [1, 30, 60])
def test_a_kill_at_any_moment_leaves_every_figure_measured_so_far(moment: int, tmp_path: Path) -> None:
    out, witness = tmp_path / "out", tmp_path / "witness"
    check = start(out, ("first", 30, MEASURE), ("second", 30, MEASURE))
    deadline = time.monotonic() + 300
    while len(lines_of(witness)) < moment and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(check.pid, signal.SIGKILL)
    check.communicate()
    time.sleep(0.2)  # the stage's process is no child of this one: it cannot be waited for
    measured = lines_of(witness)
    kept = [f"{f['stage']} {f['name']}" for f in figures_of(out) if f["name"] not in ("commit", "ended")]
    assert moment <= len(measured) < 80, "killed in the middle"
    assert kept in (measured, measured[:-1]), "the last one was being written, at most"
    summary = (out / "summary.md").read_text()
    rows = [line for line in summary.splitlines() if line.startswith("| ") and "ended" not in line]
    assert len(rows) - 3 in (len(kept), len(kept) - 1), "beside two lines of heading, and the commit"
    assert "0 failed" in summary, "the table is whole"


def test_a_stage_that_hangs_is_killed_with_all_it_has_started_and_the_next_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check = start(out, ("hangs", 2, HANG), ("next", 30, MEASURE))
    printed, errors = check.communicate(timeout=300)
    assert check.returncode == 1, errors
    [orphan] = lines_of(tmp_path / "witness")[:1]
    assert not Path(f"/proc/{orphan}").exists() or "(zombie)" in Path(f"/proc/{orphan}/status").read_text()
    by_name = {(figure["stage"], figure["name"]): figure for figure in figures_of(out)}
    assert ("hangs", "before") in by_name and ("next", "39") in by_name
    assert "killed after 2 s" in by_name["hangs", "ended"]["note"]
    assert by_name["next", "ended"]["note"] == "done"
    assert printed.rstrip().endswith("- hangs: ended: killed after 2 s, its limit")
    assert "\n1 failed:\n" in printed


def test_a_stage_may_use_what_those_before_it_have_left(tmp_path: Path) -> None:
    check = start(tmp_path / "out", ("quick", 20, "pass"), ("slow", 0, "import time; time.sleep(1)"))
    assert check.communicate(timeout=300) and check.returncode == 0


def test_failures_are_collected_and_the_stages_after_them_run(tmp_path: Path) -> None:
    out, tests = tmp_path / "out", tmp_path / "test_two.py"
    tests.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'one is not two'\n")
    arguments = ["-p", "figures", "--rootdir", str(tmp_path), str(tests)]
    pytest_ = f"import pytest, sys; sys.exit(pytest.main({arguments}))"
    fails = "import sys; print('fine so far'); sys.exit('error: no such device')"
    check = start(out, ("fails", 30, fails), ("tests", 240, pytest_), ("last", 30, MEASURE))
    printed, errors = check.communicate(timeout=300)
    assert check.returncode == 1, errors
    assert "- fails: ended: exit status 1: error: no such device" in printed
    assert "- tests: test_bad: failed: AssertionError: one is not two" in printed
    by_name = {(figure["stage"], figure["name"]): figure for figure in figures_of(out)}
    assert by_name["tests", "test_good"]["note"] == "passed" and not by_name["tests", "test_good"]["failed"]
    assert by_name["last", "ended"]["note"] == "done"
    assert "\n3 failed:\n" in printed, "the stage, the test and its stage"


def test_an_earlier_check_is_not_mixed_with_another(tmp_path: Path) -> None:
    for status, words in ((0, "0 failed"), (2, "holds an earlier check")):
        check = start(tmp_path / "out", ("stage", 30, "pass"))
        printed = "".join(check.communicate(timeout=300))
        assert check.returncode == status and words in printed


def test_a_line_that_a_kill_has_cut_costs_only_itself(tmp_path: Path) -> None:
    (tmp_path / "figures.jsonl").write_text('\n{"at": 1, "stage": "", "na')
    program = "import figures; figures.write('next', 2.5, 's'); print(len(figures.newest(figures.Path('.'))))"
    env = os.environ | {"PYTHONPATH": str(BENCHMARKS), "DAPO_OUT": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "1", done.stderr
    assert "| next | 2.5 s |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    ("checkout", "variables", "expected"),
    [
        ("project", {"PATH": "/nowhere"}, "unknown"),  # there is no git
        ("project", {"PATH": "/nowhere", "DAPO_COMMIT": "abc1234"}, "abc1234"),
        ("", {}, "unknown"),  # the checkout is another's, around this one
    ],
)
def test_results_have_a_heading_without_git(
    checkout: str, variables: dict[str, str], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "project/benchmarks").mkdir(parents=True)
    (tmp_path / "project/benchmarks/record.py").write_text((BENCHMARKS / "record.py").read_text())
    author = ["-c", "user.name=nobody", "-c", "user.email=nobody"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path / checkout, check=True)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "project/benchmarks")} | variables
    program = "import record; print(record.commit())"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout == f"{expected}\n", done.stderr


def test_the_rehearsal(tmp_path: Path) -> None:
    """The same script with tiny sizes: every stage in its order, its figures, its pages."""
    out = tmp_path / "out"
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(out), "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = figures_of(out)
    names: dict[str, list[str]] = {}
    for figure in figures:
        names.setdefault(figure["stage"], []).append(figure["name"])
    assert list(names) == ["", "train-0.5b", "loss", "kernels", "loss-rest", "train-1.5b", "learning"]
    assert {"generated/s", "scored/s", "learnt/s", "MFU", "peak memory"} <= set(names["train-0.5b"])
    for contender in ("dapo", "plain torch"):
        assert any(name.startswith(f"{contender}: T 256") for name in names["loss"])
    assert any(name.startswith("On logits alone") for name in names["loss"])
    collected = names["kernels"][:-1] + names["learning"][:-1]
    assert len(collected) == len(set(collected)) == number_of_gpu_tests(), "each test once"
    pages = {"policy_loss_first_tiny.md", "policy_loss_tiny.md", "train_gpu_tiny.md"}
    # few files, and no folders: easily carried away
    assert {path.name for path in out.iterdir()} == pages | {"figures.jsonl", "summary.md", "log.txt"}


def number_of_gpu_tests() -> int:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "--collect-only", "-q"]
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return sum(int(line.rpartition(": ")[2]) for line in done.stdout.splitlines() if ".py: " in line)


def test_the_first_figures_come_within_four_minutes_and_all_within_nine() -> None:
    program = "import gpu_check, json; print(json.dumps([s.seconds for s in gpu_check.stages(False)]))"
    env = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    seconds = json.loads(done.stdout)
    assert sum(seconds[:2]) <= 4 * 60 and sum(seconds) <= 9 * 60


def test_the_wheels_hold_the_megatron_that_installs() -> None:
    [pin] = [line for line in (BENCHMARKS / "gpu_wheels.txt").read_text().splitlines() if "megatron" in line]
    assert f'"{pin}; ' in (ROOT / "setup.py").read_text()
