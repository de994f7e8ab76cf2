import json
import re
import sys
from types import ModuleType
from typing import ClassVar

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dapo import clock
from dapo.config import ConfigError, load
from dapo.log import Console, Log, check_installed, duration
from dapo.report import glossary
from dapo.report.curves import plot, read
from dapo.types import Interrupted, StorageError
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


@pytest.mark.parametrize("num_rows", [0, 1, 4])
def test_the_plot_is_a_picture_of_every_monitor_of_every_run_over_its_steps(tmp_path, monkeypatch, num_rows):
    """Of run b the last row lacks the metrics of an update, as a step without a mixed group does."""
    monitors = glossary.monitors()
    rows = [
        {"step": 10 * i} | {metric.name: i + place / 8 for place, metric in enumerate(monitors)}
        for i in range(num_rows)
    ]
    runs = {"a": rows, "b": [*rows, {"step": 99, "policy/entropy": 0.5}]}
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *args, **options: (drawn.append(figure), save(figure, *args, **options)),
    )
    plot(runs, tmp_path / "curves.png")
    [figure] = drawn
    assert [axes.get_title(loc="left") for axes in figure.axes] == [metric.title for metric in monitors]
    for axes, metric in zip(figure.axes, monitors, strict=True):
        assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
            name: [[row["step"], row[metric.name]] for row in rows if metric.name in row]
            for name, rows in runs.items()
        }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    height, width, _ = (pixels := imread(tmp_path / "curves.png")).shape
    assert width == 1320 and height > 600 and pixels.min() < 0.5 < pixels.max()


HEADER = "   step   acc reward length kept asked entropy  clip↑ |grad|   gap  tok/s   left"
ROW = {
    "step": 3,
    "rollout/accuracy": 0.42,
    "rollout/reward": -0.123,
    "rollout/length": 812.3,
    "groups/kept": 16,
    "groups/asked": 64,
    "policy/entropy": 0.4321,
    "policy/clip_high": 0.0012,
    "policy/grad_norm": 0.123,
    "policy/mismatch": 3e-6,
    "perf/tokens_per_second": 123456,
}


def make_config_with_directory(tmp_path):
    config = make_config(tmp_path)
    config.run.dir.mkdir(exist_ok=True)
    return config


def make_log(tmp_path, start):
    return Log(make_config_with_directory(tmp_path), Console(), {}, start)


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


@pytest.mark.parametrize("damage", [b"\0\0\xff\0", b'{"step": 1, "lo', b"[1]", b"3", b'{"loss": 0.5}'])
def test_rows_behind_a_damaged_line_stay_when_a_run_resumes(tmp_path, damage, capsys):
    config = make_config_with_directory(tmp_path)
    path = config.run.dir / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + damage + b'\n{"step": 2}\n{"step": 3}\n')
    Log(config, Console(), {}, start=3).close()
    assert path.read_text() == '{"step": 0}\n{"step": 2}\n'
    assert f"{path} is damaged in lines 2: they are left out" in capsys.readouterr().err


def test_a_row_holds_the_steps_values_and_the_console_its_first_ones(tmp_path, capsys):
    log = make_log(tmp_path, 0)
    log.began -= 100  # as if the first step had taken so long
    log(0, {"rollout/tokens": 120, "rollout/accuracy": 0.25, "eval/accuracy": 0.5})
    log(1, {"rollout/accuracy": 0.75})
    log.close()
    first, second = read(log.path)
    assert first == {"step": 0, "rollout/tokens": 120, "rollout/accuracy": 0.25, "eval/accuracy": 0.5}
    assert second == {"step": 1, "rollout/accuracy": 0.75}
    assert (log.path.parent / "curves.png").exists() and list((log.path.parent / "tensorboard").iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 0: accuracy 0.500 on held-out problems"
    assert lines[1].startswith("step=0/2 acc=0.250 reward= ") and lines[2].startswith("step=1/2 acc=0.750 ")
    assert lines[1].endswith(" left=2m") and lines[2].endswith(" left=0s"), (
        "the first step took 100 s, one is left"
    )
    assert lines[3] == f"finished: 2 steps in {tmp_path / 'run'}"
    assert lines[-1] == f"next: dapo report {tmp_path / 'run'}"


def plain(printed):
    """Terminal's output without its colours and with what a carriage return overwrites removed."""
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed).splitlines()
    return [line.rpartition("\r")[2] for line in lines]


def test_on_a_terminal_rows_are_a_table_whose_headers_are_explained_once(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console = Console()
    for step in range(21):
        console.row(ROW | {"step": step}, 40, 300)
    lines = plain(capsys.readouterr().out)
    explained = lines[: lines.index(HEADER)]
    assert max(map(len, lines)) == len(HEADER) == 80
    assert lines.count(HEADER) == 2, "every 20 rows"
    assert lines[len(explained) + 1] == (
        "   0/40 0.420 -0.123    812   16    64  0.4321 0.0012  0.123 3e-06 123456     5m"
    )
    for header in ("acc", "kept", "gap", "tok/s", "left"):
        assert f"{header}: " in " ".join(explained)
    assert not any("acc: " in line for line in lines[len(explained) :])


def test_elsewhere_a_step_is_one_line_for_grep(capsys):
    Console().row(ROW, 40, 300)
    assert capsys.readouterr().out == (
        "step=3/40 acc=0.420 reward=-0.123 length=812 kept=16 asked=64 entropy=0.4321 clip↑=0.0012 "
        "|grad|=0.123 gap=3e-06 tok/s=123456 left=5m\n"
    )


@pytest.mark.parametrize("start", [0, 3])
def test_after_the_first_step_it_says_once_how_many_responses_had_an_answer(tmp_path, capsys, start):
    log = make_log(tmp_path, start)
    log(start, {"reward/no_answer": 0.875})
    log(start + 1, {"reward/no_answer": 0.5})
    log.close()
    said, out = f"step {start}: 12.5% of the responses hold an answer", capsys.readouterr().out
    assert said in out and out.count("hold an answer") == 1
    log = make_log(tmp_path, 0)
    log(0, {"reward/undecided": 0.0})
    assert "hold an answer" not in capsys.readouterr().out, "its module finds none"


def test_a_rank_that_keeps_the_others_waiting_is_named_once(tmp_path, capsys):
    log = make_log(tmp_path, 0)
    for step, (rank, imbalance) in enumerate([(1, 1.5), (1, 1.75), (1, 2.0), (0, 1.6)]):
        log(step, {"perf/slowest_rank": rank, "perf/imbalance": imbalance})
    said = [line for line in capsys.readouterr().out.splitlines() if "computes" in line]
    assert said == [
        "step 1: rank 1 computes its updates 1.8 times as long as the ranks' mean",
        "step 3: rank 0 computes its updates 1.6 times as long as the ranks' mean",
    ]


def test_a_mismatch_that_jumps_is_said_once_also_by_a_run_that_resumes_meanwhile(tmp_path, capsys):
    log = make_log(tmp_path, 0)
    for step, value in enumerate([2e-3, 2e-3, float("nan"), 2e-3, 0.05, 0.06]):
        log(step, {"policy/mismatch": value})
    log.close()
    assert [row.get("policy/mismatch_threshold") for row in read(log.path)] == [
        None,
        *[pytest.approx(0.02)] * 5,
    ]
    resumed = make_log(tmp_path, 5)
    for step, value in enumerate([0.06, 2e-3, 0.05], start=5):
        resumed(step, {"policy/mismatch": value})
    resumed.close()
    again = make_log(tmp_path, 4)
    again(4, {"policy/mismatch": 0.07})
    again.close()
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0].removeprefix("warning: ") for line in said] == [
        "step 2: |old − behavior| is nan",
        "step 4: |old − behavior| is 0.05",
        "step 7: |old − behavior| is 0.05",
        "step 4: |old − behavior| is 0.07",
    ]


def test_of_a_step_that_is_replayed_nothing_was_read(tmp_path, capsys):
    config = make_config(tmp_path, f"rollout.replay={tmp_path}")
    config.run.dir.mkdir()
    Log(config, Console(), {}, 0)(0, {"reward/no_answer": 0.0})
    assert "hold an answer" not in capsys.readouterr().out


def test_a_row_is_strict_json(tmp_path, capsys):
    """A value that is no finite number is left out: no JSON reader but Python's takes NaN and Infinity."""
    log = make_log(tmp_path, 0)
    log(0, {"policy/loss": float("nan"), "rollout/reward": float("inf"), "policy/lr": 0.5})
    log.close()

    def refuse(name):
        raise AssertionError(name)

    [row] = [json.loads(line, parse_constant=refuse) for line in log.path.read_text().splitlines()]
    assert row["policy/lr"] == 0.5 and not {"policy/loss", "rollout/reward"} & row.keys()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (45.4, "45s"), (60, "1m"), (3599, "1h00m"), (11_100, "3h05m"), (187_200, "2d04h")],
)
def test_a_duration_is_brief(seconds, text):
    assert duration(seconds) == text


def test_a_terminal_shows_progress_below_the_rows_from_the_first_report_on(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console = Console()
    console.close()
    assert capsys.readouterr().out == "", "a rank that reports no progress leaves the terminal alone"
    console.progress("step 0: 1/4 groups", 0.25)
    console.progress("step 0: 2/4 groups", 0.5)
    console.close()
    line = [line for line in plain(capsys.readouterr().out) if "groups" in line][-1]
    assert line.endswith("step 0: 2/4 groups")
    assert line.count("━") >= 19, "a bar of 20 characters"


def test_a_log_that_resumes_says_from_where(tmp_path, capsys):
    make_log(tmp_path, 0).close()
    assert "going on" not in capsys.readouterr().out
    make_log(tmp_path, 3).close()
    assert capsys.readouterr().out.startswith(f"going on from step 3 of 2 in {tmp_path / 'run'}\n")


def test_phases_are_shown_on_the_console_as_they_begin_until_the_log_is_closed(tmp_path, monkeypatch):
    phases = []
    console = Console()
    monkeypatch.setattr(console, "progress", phases.append)
    log = Log(make_config_with_directory(tmp_path), console, {}, 0)
    outer = clock.timed("outer")(clock.timed("inner")(lambda: None))
    outer()
    log.close()
    outer()
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


def test_what_says_what_a_run_is_is_written_when_it_begins(tmp_path):
    config = make_config_with_directory(tmp_path)
    Log(config, Console(), {"data.json": "[1]"}, 0).close()
    assert load(config.run.dir / "config.yaml") == config
    assert (config.run.dir / "data.json").read_text() == "[1]"


def test_at_the_end_it_says_where_everything_is(tmp_path, capsys):
    log = make_log(tmp_path, 0)
    (tmp_path / "run/hf").mkdir()
    log(0, {"rollout/accuracy": 0.5})
    log.close()
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"finished: 2 steps in {tmp_path}/run",
        f"model: {tmp_path}/run/hf   metrics: {log.path}   curves: {tmp_path}/run/curves.png",
        f"next: dapo report {tmp_path}/run",
    ]
    log = make_log(tmp_path, 1)
    log.close(ZeroDivisionError, ZeroDivisionError(), None)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"metrics: {log.path}   curves: {tmp_path}/run/curves.png", (
        "the model there is of an earlier run"
    )


def test_tensorboard_shows_each_value_and_of_steps_that_were_repeated_the_later(tmp_path):
    log = make_log(tmp_path, 0)
    for step in range(4):
        log(step, {"loss": step + 0.5})
    log.close()
    log = make_log(tmp_path, 2)
    log(2, {"loss": 20.0})
    log.close()
    found = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == set().union(*read(log.path)) > {"loss"}
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(0, 0.5), (1, 1.5), (2, 20.0)]


class Full:
    """A file on a disk that is full while `is_full`; of what is written then, a half arrives."""

    def __init__(self, file):
        self.file = file
        self.is_full = False

    def write(self, data):
        if self.is_full:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def test_rows_that_a_full_disk_did_not_take_are_written_when_there_is_room(tmp_path, monkeypatch, capsys):
    log = make_log(tmp_path, 0)
    is_full, opened = [False], type(log.path).open

    def open_full(path, mode="r", **options):
        file = opened(path, mode, **options)
        if path == log.path and mode == "a":
            file = Full(file)
            file.is_full = is_full[0]
        return file

    monkeypatch.setattr(type(log.path), "open", open_full)
    for step in range(5):
        is_full[0] = step in (1, 2)
        log(step, {"loss": float(step)})
        if step == 2:
            assert [row["step"] for row in read(log.path)] == [0]
    log.close()
    assert [row["step"] for row in read(log.path)] == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.count("No space left on device; the run keeps its rows in memory") == 1


def test_a_run_whose_last_rows_cannot_be_written_does_not_end_well(tmp_path, capsys):
    log = make_log(tmp_path, 0)
    log.path.unlink()
    log.path.mkdir()
    for step in range(2):
        log(step, {"loss": 1.0})
    with pytest.raises(StorageError, match=r"metrics.jsonl cannot be written: its last 2 rows are missing"):
        log.close()
    log.close(Interrupted, Interrupted(), None)  # what ended it is what is said


def test_a_tensorboard_that_cannot_write_is_left_out(tmp_path, capsys):
    log = make_log(tmp_path, 0)
    tensorboard = log.boards["TensorBoard"]
    tensorboard.writer._writer = Full(tensorboard.writer._writer)
    tensorboard.writer._writer.is_full = True
    for step in range(3):
        log(step, {"loss": 1.0})
    log.close()
    assert len(read(log.path)) == 3
    assert capsys.readouterr().err == (
        "warning: TensorBoard failed: [Errno 28] No space left on device; the run goes on without it\n"
    )


class FakeWandB(ModuleType):
    """Stands in for wandb, and notes what a run asks of it."""

    def __init__(self, fails_at=()):
        super().__init__("wandb")
        self.fails_at = fails_at
        self.calls = []

    def init(self, **options):
        self._note("init", options["id"], options["resume"])
        return self

    def log(self, values, step):
        self._note("log", step)

    def finish(self, exit_code):
        self._note("finish", exit_code)

    def _note(self, name, *args):
        self.calls.append((name, *args))
        if name in self.fails_at:
            raise RuntimeError(f"the network is down\nat {name}")


def make_log_at_wandb(tmp_path, monkeypatch, start=0, fails_at=()):
    wandb = FakeWandB(fails_at)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "run").mkdir(exist_ok=True)
    return Log(make_config(tmp_path, "run.wandb_project=mine"), Console(), {}, start), wandb


@pytest.mark.parametrize("fails_at", ["init", "log", "finish"])
def test_a_wandb_that_fails_is_left_out_and_named_once(tmp_path, monkeypatch, capsys, fails_at):
    log, wandb = make_log_at_wandb(tmp_path, monkeypatch, fails_at=[fails_at])
    for step in range(2):
        log(step, {"loss": 1.0})
    log.close()
    assert len(read(log.path)) == 2
    assert [call[0] for call in wandb.calls].count(fails_at) == 1
    said = f"warning: W&B failed: the network is down at {fails_at}; the run goes on without it\n"
    assert capsys.readouterr().err == said


def test_a_run_directory_is_one_run_at_wandb_until_it_begins_anew(tmp_path, monkeypatch):
    ids = []
    for start in (0, 2, 5, 0):
        log, wandb = make_log_at_wandb(tmp_path, monkeypatch, start)
        log.close()
        name, id, resume = wandb.calls[0]
        assert name == "init" and resume == "allow" and id
        ids.append(id)
    assert ids[0] == ids[1] == ids[2] != ids[3]


@pytest.mark.parametrize(("error", "status"), [(None, 0), (ZeroDivisionError(), 1), (Interrupted(), 130)])
def test_wandb_is_given_the_exit_status(tmp_path, monkeypatch, error, status):
    log, wandb = make_log_at_wandb(tmp_path, monkeypatch)
    log.close(type(error), error, None)
    assert wandb.calls[-1] == ("finish", status)


class Tracker:
    """A tracker of a user's, which notes what a run asks of it."""

    made: ClassVar[list["Tracker"]] = []

    def __init__(self, config, start):
        self.calls = [("start", str(config.run.dir), start)]
        self.made.append(self)

    def log(self, values, step):
        self.calls.append(("log", step, values["loss"]))

    def close(self, status):
        self.calls.append(("close", status))


class Broken(Tracker):
    def log(self, values, step):
        super().log(values, step)
        raise KeyError("mine")


def test_a_tracker_by_import_path_gets_every_step_and_the_status(tmp_path):
    (tmp_path / "run").mkdir()
    Tracker.made.clear()
    config = make_config(tmp_path, "run.tracker=tests.dapo.test_log:Tracker")
    log = Log(config, Console(), {}, 3)
    for step in (3, 4):
        log(step, {"loss": 0.5 * step})
    log.close(ZeroDivisionError, ZeroDivisionError(), None)
    [tracker] = Tracker.made
    assert tracker.calls == [
        ("start", str(config.run.dir), 3),
        ("log", 3, 1.5),
        ("log", 4, 2.0),
        ("close", 1),
    ]


def test_a_tracker_that_fails_is_left_out_and_named_once(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    Tracker.made.clear()
    log = Log(make_config(tmp_path, "run.tracker=tests.dapo.test_log:Broken"), Console(), {}, 0)
    for step in range(3):
        log(step, {"loss": 1.0})
    log.close()
    assert [call[0] for call in Tracker.made[0].calls] == ["start", "log"]
    assert len(read(log.path)) == 3
    said = "warning: tests.dapo.test_log:Broken failed: 'mine'; the run goes on without it\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere:Tracker", "No module named 'nowhere'; expected module:name"),
        ("tests.dapo.test_log:none", "has no attribute 'none'; expected module:name"),
        ("tests.dapo.test_log:STEP", "is int; expected a class or a function"),
        ("not a path", "expected module:name"),
        ("tests.dapo.test_log.Tracker", "Tracker: expected module:name"),
    ],
)
def test_a_tracker_that_is_none_is_refused_before_the_run(tmp_path, path, said):
    with pytest.raises(ConfigError, match=said):
        check_installed(make_config(tmp_path, f"run.tracker='{path}'"))


STEP = 3


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("not even this")


class Evil(Tracker):
    error: BaseException = Unprintable()

    def log(self, values, step):
        values.clear()
        raise self.error


@pytest.mark.parametrize("error", [Unprintable(), SystemExit(5)])
def test_whatever_a_tracker_does_the_run_goes_on_and_keeps_its_values(tmp_path, monkeypatch, capsys, error):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(Evil, "error", error)
    log = Log(make_config(tmp_path, "run.tracker=tests.dapo.test_log:Evil"), Console(), {}, 0)
    log(0, {"loss": 1.0, "rollout/accuracy": 0.5})
    log.close()
    printed = capsys.readouterr()
    assert "tests.dapo.test_log:Evil failed: " in printed.err and "acc=0.500" in printed.out


def make_nothing(config, start):
    return None


def test_a_tracker_without_its_methods_is_left_out_with_a_warning(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    log = Log(make_config(tmp_path, "run.tracker=tests.dapo.test_log:make_nothing"), Console(), {}, 0)
    log(0, {"loss": 1.0})
    log.close()
    said = "make_nothing failed: what it returned has no log and no close; the run goes on without it\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_wandb_that_is_not_installed_is_refused_before_the_run(tmp_path, monkeypatch):
    check_installed(make_config(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_installed(make_config(tmp_path))
    with pytest.raises(
        ConfigError, match=r"run.wandb_project=mine: wandb is not installed: pip install wandb"
    ):
        check_installed(make_config(tmp_path, "run.wandb_project=mine"))


def test_curves_that_cannot_be_plotted_do_not_end_a_run(tmp_path, capsys):
    log = make_log(tmp_path, 0)
    log(0, {"rollout/accuracy": 0.5})
    (tmp_path / "run/curves.png").mkdir()
    log.close()
    assert "warning: curves.png failed: " in capsys.readouterr().err
