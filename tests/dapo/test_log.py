import json

import pytest

from dapo import clock
from dapo.log import Console, Log
from dapo.report import glossary
from dapo.report.curves import plot, read
from tests.conftest import make_config


def test_reading_leaves_out_a_last_line_that_a_crash_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "loss": i / 3} for i in range(3)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    last = len(json.dumps(rows[-1]) + "\n")
    for missing in range(2, last):  # 1: only the newline is missing, and the row is whole
        path.write_text(whole[:-missing])
        assert read(path) == rows[:2]
    path.write_text(whole[:-1])
    assert read(path) == rows


def test_reading_where_nothing_was_written_gives_no_rows(tmp_path):
    assert read(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 0, "eval/accuracy": 0.1}],
        [{"step": i, **{metric.name: i * 0.1 for metric in glossary.monitors()}} for i in range(4)],
    ],
    ids=["empty", "one", "full"],
)
def test_plot_writes_a_png(tmp_path, rows):
    plot({"a": rows, "b": rows[1:]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


HEADER = (
    "step accuracy  reward  length  kept  asked entropy   prob  clip↑  clip↓  |grad| mismatch    sec   tok/s"
)


def make_config_with_directory(tmp_path):
    config = make_config(tmp_path)
    config.run.dir.mkdir(exist_ok=True)
    return config


def make_log(tmp_path, start):
    return Log(make_config_with_directory(tmp_path), Console(), start)


def test_a_log_that_resumes_at_a_step_removes_the_rows_from_that_step_on(tmp_path):
    log = make_log(tmp_path, 0)
    for step in range(5):
        log(step, {"loss": float(step)})
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')  # the crash
    resumed = make_log(tmp_path, 3)
    assert [row["step"] for row in read(log.path)] == [0, 1, 2]
    resumed(3, {"loss": 30.0})
    assert [(row["step"], row["loss"]) for row in read(log.path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    log.close()
    resumed.close()


def test_a_row_holds_the_steps_values_times_and_memory(tmp_path, capsys):
    clock.timed("setup")(lambda: None)()  # before the first step: no step's time
    log = make_log(tmp_path, 0)
    log.last -= 100  # as if the first step had taken so long
    log(0, {"rollout/tokens": 120, "rollout/accuracy": 0.25, "eval/accuracy": 0.5})
    clock.timed("update")(lambda: None)()
    log(1, {"rollout/accuracy": 0.75})
    log.close()
    first, second = read(log.path)
    assert first["perf/tokens_per_second"] == pytest.approx(120 / first["time/step"])
    assert first["time/step"] > 100 > second["time/step"]
    assert "time/setup" not in first and "time/update" not in first and second["time/update"] >= 0
    assert 0 < first["perf/peak_memory_gib"] < 1024
    assert (log.path.parent / "curves.png").exists() and list((log.path.parent / "tensorboard").iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 0: accuracy 0.500 on held-out problems"
    assert (
        lines[1] == HEADER and lines[2].startswith("   0    0.250 ") and lines[3].startswith("   1    0.750 ")
    )
    assert [len(line) for line in lines[2:]] == [len(HEADER)] * 2


def test_a_terminal_shows_progress_below_the_rows_from_the_first_report_on(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console = Console()
    console.close()
    assert capsys.readouterr().out == "", "a rank that reports no progress leaves the terminal alone"
    console.progress("step 0: 1/4 groups")
    console.progress("step 0: 2/4 groups")
    console.close()
    assert "step 0: 2/4 groups" in capsys.readouterr().out


def test_a_log_that_resumes_says_from_where(tmp_path, capsys):
    make_log(tmp_path, 0).close()
    assert capsys.readouterr().out == ""
    make_log(tmp_path, 3).close()
    assert capsys.readouterr().out == f"going on from step 3 of 2 in {tmp_path / 'run'}\n"


def test_phases_are_shown_on_the_console_as_they_begin(tmp_path, monkeypatch):
    phases = []
    console = Console()
    monkeypatch.setattr(console, "progress", phases.append)
    Log(make_config_with_directory(tmp_path), console, 0).close()
    clock.timed("outer")(clock.timed("inner")(lambda: None))()
    assert phases == ["outer", "inner"]


def test_a_phase_that_fails_is_timed_too_and_taken_once():
    @clock.timed("broken")
    def fail():
        raise KeyError

    clock.take()
    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
    assert list(clock.take()) == ["time/broken"]
    assert clock.take() == {}
