"""The command line: its last line, its exit status, and overrides wherever they stand."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from signal import SIGHUP, SIGTERM
from types import SimpleNamespace
from typing import Any

import pytest

import dapo.command.run
import dapo.mesh
import dapo.train
from dapo import files
from dapo.__main__ import main
from dapo.config import ConfigError
from dapo.mesh import FailedElsewhere
from dapo.policy.megatron import PolicyError
from dapo.types import EngineError, Interrupted
from dapo.watch.last_line import ERROR_FILE


def by(signal: int) -> Interrupted:
    stop = Interrupted()
    stop.signal = signal
    return stop


CONFIG = Path(__file__).parents[2] / "examples/arithmetic/config.yaml"


@pytest.mark.parametrize(
    ("stop", "is_saved", "status", "line"),
    [
        (Interrupted(), False, 130, "interrupted"),
        (by(SIGTERM), True, 143, "interrupted; saved in RUN, the same command goes on from there"),
        (by(SIGHUP), False, 129, "interrupted"),
        (Interrupted(), True, 130, "interrupted; saved in RUN, the same command goes on from there"),
        (EngineError("no server is left"), False, 1, "error: no server is left"),
        (
            EngineError("no server is left"),
            True,
            1,
            "error: no server is left; saved in RUN, the same command goes on from there",
        ),
    ],
)
def test_what_was_not_saved_is_not_said_to_be(
    stop: Interrupted,
    is_saved: bool,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def train(*_: Any) -> None:
        stop.is_saved = is_saved
        raise stop

    mesh = SimpleNamespace(is_main=True, wait_for_main=lambda: None)
    monkeypatch.setattr(dapo.mesh, "Mesh", lambda parallel: mesh)
    monkeypatch.setattr(dapo.train, "train", train)
    assert main(["train", str(CONFIG), f"run.dir={tmp_path}"]) == status
    assert capsys.readouterr().err == line.replace("RUN", str(tmp_path)) + "\n"


def run_with(monkeypatch: pytest.MonkeyPatch, error: BaseException, *options: str) -> int:
    """Run `dapo train` whose train() raises this."""

    def train(*_: Any) -> None:
        raise error

    mesh = SimpleNamespace(is_main=True, is_first_to_fail=lambda: True, wait_for_main=lambda: None)
    monkeypatch.setattr(dapo.mesh, "Mesh", lambda parallel: mesh)
    monkeypatch.setattr(dapo.train, "train", train)
    return main(["train", str(CONFIG), *options])


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (ConfigError("x=1: no"), 2, ["error: x=1: no"]),
        (PolicyError("not finite"), 1, ["error: not finite"]),
        (FailedElsewhere("x=1: no", is_users=True), 2, []),
        (FailedElsewhere("not finite"), 1, []),
        (KeyboardInterrupt(), 130, ["interrupted; not saved"]),
    ],
)
def test_what_the_user_wrote_is_status_2_and_what_broke_is_1_on_every_rank(
    error: BaseException,
    status: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_with(monkeypatch, error) == status
    assert capsys.readouterr().err.splitlines() == lines


def test_ctrl_c_while_a_run_starts_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dapo.command.run, "guard", interrupt)
    assert main(["train", str(CONFIG)]) == 130
    assert capsys.readouterr().err == "interrupted; not saved\n"


def test_a_run_sent_back_to_a_step_is_not_continued_by_the_same_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = by(SIGTERM)
    stop.is_saved = True
    assert run_with(monkeypatch, stop, "run.resume=3", "run.dir=r") == 143
    assert capsys.readouterr().err == "interrupted; saved in r, run.resume=auto goes on from there\n"


@pytest.mark.parametrize(
    ("option", "words"), [("optim.lrr=1", "unknown key optim.lrr"), ("parallel.tensor=4", "world size 3")]
)
def test_before_the_ranks_know_each_other_the_first_to_fail_prints_whichever_it_is(
    option: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (1, 0, 2):
        (tmp_path / f"attempt_0/{rank}").mkdir(parents=True)
        monkeypatch.setenv(ERROR_FILE, str(tmp_path / f"attempt_0/{rank}/error.json"))
        monkeypatch.setenv("RANK", str(rank))
        assert main(["train", str(CONFIG), option]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "CONFIG", "--diff", "paper", "optim.lr=5e-7"],
        ["plan", "CONFIG", "optim.lr=5e-7", "--diff", "paper"],
        ["plan", "--diff", "paper", "CONFIG", "optim.lr=5e-7"],
        ["plan", "CONFIG", "run.seed=1", "--diff", "paper", "optim.lr=5e-7"],
        ["plan", "CONFIG", "--gpu", "h100", "--diff", "paper", "optim.lr=5e-7"],
    ],
)
def test_overrides_stand_anywhere_behind_the_command(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("CONFIG", str(CONFIG)) for argument in arguments]) == 0
    assert "optim.lr: 5e-07; paper: 1e-06" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "config"),
        (["train", "a.yaml", "--nonsense"], "--nonsense"),
        (["traim"], "traim"),
        ([], "command"),
        (["plan", "a.yaml", "--world-size", "two"], "two"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line and "--help" in line


PRINTS = """
import os, sys
from dapo.watch import streams
streams.keep_open()
for i in range(20_000):
    print("clip↑ – a line that nobody reads", i)
print("⠋ it failed", file=sys.stderr)
file = open(sys.argv[1], "w")
file.write(str(file.fileno()))
file.close()
sys.stdout.flush()
os._exit(7)
"""


@pytest.mark.parametrize(
    ("shell", "error"),
    [
        ("{} | head -1", "⠋ it failed"),
        ("{} >&-", "⠋ it failed"),
        ("{} >&- 2>&-", ""),
        ("{} > /dev/full 2> /dev/full", ""),
        ("PYTHONIOENCODING=ascii {} > /dev/null", "? it failed"),
    ],
)
def test_output_that_cannot_be_written_is_dropped(shell: str, error: str, tmp_path: Path) -> None:
    command = shell.format(f"{sys.executable} -c '{PRINTS}' {tmp_path / 'number'}")
    environment = os.environ | {"PYTHONUTF8": "1"}
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        encoding="utf-8",
        env=environment,
    )
    assert done.returncode == 7
    assert done.stderr.strip() == error
    assert int((tmp_path / "number").read_text()) > 2, "a file has the number of a closed stream"


@pytest.mark.parametrize("shell", ["{} | head -1", "{} >&-", "PYTHONIOENCODING=ascii {} > /dev/null"])
def test_a_command_whose_output_nobody_reads_is_done(shell: str) -> None:
    command = shell.format(f"{sys.executable} -m dapo metrics")
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_tmpdir_too_long_for_sockets_is_replaced_before_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("x" * 145)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert run_with(monkeypatch, ConfigError("the end")) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: TMPDIR={folder} has ") and error == "error: the end"
    assert len(os.environ["TMPDIR"]) < 20


SCORES = """
import sys
from pathlib import Path
from dapo import config
from dapo.reward.pool import Reward
from dapo.watch import streams
from tests.conftest import make_config, make_prompt, make_sample

if __name__ == "__main__":
    streams.keep_open()
    config = make_config(Path(sys.argv[1]), "reward.function=prints:is_right", "reward.workers=1")
    reward = Reward(config.reward, 32)
    samples = [make_sample(text="x"), make_sample(text="y")]
    reward.score([(make_prompt(), sample) for sample in samples])
    reward.close()
    print([sample.is_correct for sample in samples], file=sys.stderr)
"""


def test_a_reward_function_may_print_where_nobody_reads(tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(
        "def is_right(response, answer):\n    print('x' * 10**6, flush=True)\n    return response == 'x'\n"
    )
    (tmp_path / "scores.py").write_text(SCORES)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{CONFIG.parents[2]}"}
    command = f"{sys.executable} {tmp_path / 'scores.py'} {tmp_path} | true"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=100
    )
    assert done.stderr == "[True, False]\n"


def test_an_evaluation_does_not_write_where_a_run_is_going_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        dapo.mesh,
        "Mesh",
        lambda parallel: SimpleNamespace(
            is_main=True, is_first_to_fail=lambda: True, wait_for_main=lambda: None
        ),
    )
    with files.run_directory(tmp_path / "run"):
        assert main(["eval", str(CONFIG), f"run.dir={tmp_path / 'run'}"]) == 2
        assert not (tmp_path / "run/eval.json").exists()
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
