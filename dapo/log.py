"""The record of a run: a row a step on the console, a line in metrics.jsonl, TensorBoard, optionally others.

At the end the paper's curves are plotted. Of all these only metrics.jsonl can make a run fail, at its end.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from dapo import clock, files
from dapo.config import Config, ConfigError
from dapo.measure.profile import Profiler
from dapo.measure.step import Meter
from dapo.mesh import Mesh
from dapo.report import curves, glossary
from dapo.report.alarm import Alarm
from dapo.types import Interrupted, StorageError, reason

SLOW = 1.5  # × the ranks' mean time is worth a line


class Board(Protocol):
    """Shows a run's metrics elsewhere."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self, status: int) -> None:
        """End it; `status` is the run's exit status."""
        ...


class Log:
    """Records a run, on the main rank.

    A run that resumes at step `start` removes what an earlier attempt recorded from that step on. `record`
    holds the files that say what the run is, by name: they are written here, once nothing can be refused any
    more. Rows that metrics.jsonl has no room for are kept, and written when there is some.

    Raises:
        ConfigError: run.dir cannot be written.
        StorageError: at the end rows are left that could not be written.
    """

    def __init__(self, config: Config, console: Console, record: dict[str, str], start: int):
        self.config = config
        self.console = console
        self.path = config.run.dir / "metrics.jsonl"
        self.unwritten: list[str] = []
        try:
            rows = _rows_before(self.path, start)
            for name, text in (record | {"config.yaml": config.dump(), self.path.name: rows}).items():
                files.write_text(config.run.dir / name, text)
        except OSError as error:
            raise ConfigError(f"run.dir={config.run.dir} cannot be written: {error.strerror}") from error
        self.boards: dict[str, Board] = {}
        self._attempt("TensorBoard", self._open, "TensorBoard", TensorBoard, start)
        if config.run.wandb_project:
            self._attempt("W&B", self._open, "W&B", WandB, start)
        if config.run.tracker:
            self._attempt(config.run.tracker, self._open, config.run.tracker, _tracker(config), start)
        if start:
            console.say(f"going on from step {start} of {config.run.steps} in {config.run.dir}")
        self.start, self.began = start, time.perf_counter()
        self.slow: set[float] = set()  # ranks that were said to be slow
        self.alarm = Alarm(curves.read(self.path))
        clock.listen(console.progress)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Record one step."""
        values = {"step": step} | values | self.alarm.thresholds(values)
        alarm = self.alarm(step, values)
        if alarm and not self.config.rollout.replay:  # a dump's samples may be another policy's
            warn(alarm)
        # JSON has no word for the others, and no board a place
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._write_row(json.dumps(values, allow_nan=False) + "\n")
        for name, board in list(self.boards.items()):
            self._attempt(name, board.log, dict(values), step)  # a tracker may change its own
        steps, done = self.config.run.steps, step + 1 - self.start
        if step == self.start and "reward/no_answer" in values and not self.config.rollout.replay:
            share = 1 - values["reward/no_answer"]
            self.console.say(
                f"step {step}: {share:.1%} of the responses hold an answer that the reward reads"
            )
        self._say_slowest(step, values)
        left = (time.perf_counter() - self.began) / done * max(steps - step - 1, 0)
        self.console.row(values, steps, left)

    def close(self, kind: Any = None, error: BaseException | None = None, trace: Any = None) -> None:
        """Write what is left to write; say where everything is. `error` ended the run, None: it is done."""
        status = 0 if error is None else 128 + error.signal if isinstance(error, Interrupted) else 1
        for name, board in list(self.boards.items()):
            self._attempt(name, board.close, status)
        self._write_row("")
        places = {"metrics": self.path, "curves": self.path.with_name("curves.png")}
        self._attempt("curves.png", self._plot, places["curves"])
        clock.forget(self.console.progress)  # it would show itself again
        self.console.close()
        if error is None:
            self.console.say(f"finished: {self.config.run.steps} steps in {self.path.parent}")
            places = {"model": self.path.with_name("hf")} | places
        self.console.say("   ".join(f"{name}: {path}" for name, path in places.items() if path.exists()))
        if error is None:
            self.console.say(f"next: dapo report {self.path.parent}")
        if self.unwritten and error is None:
            count = len(self.unwritten)
            raise StorageError(f"{self.path} cannot be written: its last {count} rows are missing")

    def _say_slowest(self, step: int, values: dict[str, float]) -> None:
        """Name, once, a rank that computes far longer than the others, who wait for it."""
        rank, times = values.get("perf/slowest_rank", 0), values.get("perf/imbalance", 1.0)
        if times > SLOW and rank not in self.slow:
            self.slow.add(rank)
            text = f"rank {rank:.0f} computes its updates {times:.1f} times as long as the ranks' mean"
            self.console.say(f"step {step}: {text}")

    def _write_row(self, row: str) -> None:
        """Append the row, after those that could not be appended before."""
        self.unwritten += [row] if row else []
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self.unwritten))
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)  # no row without its end
            if len(self.unwritten) == 1:
                warn(f"{self.path} cannot be written: {error.strerror}; the run keeps its rows in memory")
        else:
            self.unwritten = []

    def _plot(self, path: Path) -> None:
        if rows := curves.read(self.path):
            curves.plot({self.path.parent.name: rows}, path)

    def _open(self, name: str, board: Callable[[Config, int], Board], start: int) -> None:
        made = board(self.config, start)
        if missing := [method for method in ("log", "close") if not callable(getattr(made, method, None))]:
            raise TypeError(f"what it returned has no {' and no '.join(missing)}")
        self.boards[name] = made

    def _attempt(self, name: str, act: Callable[..., object], *args: Any) -> None:
        """Do what a run can do without. What fails is named once, and left out from then on."""
        try:
            act(*args)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # another's code and service: anything
            self.boards.pop(name, None)
            warn(f"{name} failed: {reason(error)}; the run goes on without it")


def _rows_before(path: Path, start: int) -> str:
    """Return the rows of the steps before `start`, one a line. Damaged lines are left out, with a warning."""
    rows, damaged = "", []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows += f"{line}\n" if json.loads(line)["step"] < start else ""
        except (ValueError, LookupError, TypeError):
            damaged.append(str(number))
    if damaged and damaged != [str(len(lines))]:  # the last one, a crash has cut short
        warn(f"{path} is damaged in lines {', '.join(damaged)}: they are left out")
    return rows


class RankLog:
    """Every rank's end of a step: all measure it together, some profile it, the main rank records it."""

    def __init__(self, config: Config, mesh: Mesh, console: Console, record: dict[str, str], start: int):
        """See Log. Write the run's record and begin. Collective."""
        self.profiler = Profiler(config.run, mesh, warn)
        self.log = mesh.on_main_only(Log, config, console, record, start)
        self.meter = Meter(config, mesh)
        self.profiler.begin(start)

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """End the step. Collective."""
        self.profiler.end()
        values = self.meter.measured(values)
        if self.log:
            self.log(step, values)
        self.profiler.begin(step + 1)

    def close(self, *ending: Any) -> None:
        """See Log."""
        self.profiler.close()
        if self.log:
            self.log.close(*ending)


class TensorBoard:
    """An event file, written row by row: SummaryWriter's thread prints a traceback if the disk is full."""

    def __init__(self, config: Config, start: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary = Event, Summary
        folder = config.run.dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{os.uname().nodename}.{os.getpid()}"
        self.writer = RecordWriter((folder / name).open("wb"))
        self._write(file_version="brain.Event:2")
        # TensorBoard forgets events of an earlier attempt from this step on
        self._write(step=start, session_log=SessionLog(status=SessionLog.START))

    def log(self, values: dict[str, float], step: int) -> None:
        scalars = [self.summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self.summary(value=scalars))

    def close(self, status: int) -> None:
        self.writer.close()

    def _write(self, **fields: Any) -> None:
        self.writer.write(self.event(wall_time=time.time(), **fields).SerializeToString())
        self.writer.flush()


class WandB:
    """The run at Weights & Biases: one for a run directory, which keeps its id, however often it resumes."""

    def __init__(self, config: Config, start: int):
        import wandb

        kept, name = config.run.dir / "wandb-id", config.run.dir.name
        id = kept.read_text() if start and kept.is_file() else secrets.token_hex(8)
        options, place = config.model_dump(mode="json"), str(config.run.dir)
        project = config.run.wandb_project
        self.run = wandb.init(project=project, name=name, id=id, dir=place, config=options, resume="allow")
        files.write_text(kept, id)

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self, status: int) -> None:
        self.run.finish(exit_code=status)


def _tracker(config: Config) -> Callable[[Config, int], Board]:
    """Return what makes the tracker of run.tracker. Raise ConfigError."""
    option, (module, colon, name) = (
        f"run.tracker={config.run.tracker}",
        str(config.run.tracker).partition(":"),
    )
    expected = "expected module:name, found on PYTHONPATH"
    if not colon:
        raise ConfigError(f"{option}: {expected}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError, SyntaxError) as error:
        raise ConfigError(f"{option}: {reason(error)}; {expected}") from error
    if not callable(found):
        raise ConfigError(f"{option} is {type(found).__name__}; expected a class or a function")
    return found  # type: ignore[no-any-return]


def check_installed(config: Config) -> None:
    """Raise ConfigError if there is no wandb for run.wandb_project, or no tracker as run.tracker says."""
    if config.run.tracker:
        _tracker(config)
    if config.run.wandb_project and importlib.util.find_spec("wandb") is None:
        option = f"run.wandb_project={config.run.wandb_project}"
        raise ConfigError(f"{option}: wandb is not installed: pip install wandb, or leave the option out")


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Console:
    """Prints a row a step: on a terminal a table, with the progress of the current step below it; elsewhere
    name=value pairs, for grep.

    A rank that reports neither prints nothing.
    """

    def __init__(self) -> None:
        import rich.console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        self.rich = rich.console.Console(highlight=False, soft_wrap=True)
        self.num_rows = 0
        self.bar: Progress | None = None
        if self.rich.is_terminal:
            parts = SpinnerColumn(), BarColumn(bar_width=20), TextColumn("{task.description}", markup=False)
            self.bar = Progress(*parts, console=self.rich, transient=True)
            self.task = self.bar.add_task("", total=None)

    def progress(self, text: str, fraction: float | None = None) -> None:
        """Show what the run does, and the `fraction` of it that is done, if that is known."""
        if self.bar:
            total = None if fraction is None else 1.0
            self.bar.update(self.task, description=text, total=total, completed=fraction or 0.0)
            self.bar.start()  # does nothing if it is shown already

    def say(self, text: str) -> None:
        self.rich.print(text, markup=False)

    def row(self, values: dict[str, float], steps: int, left: float) -> None:
        """Print a step of `steps`, on a terminal in 80 characters. `left` estimates the seconds to come."""
        if "eval/accuracy" in values:
            self.say(f"step {values['step']}: accuracy {values['eval/accuracy']:.3f} on held-out problems")
        if "rollout/accuracy" not in values:
            return
        columns = glossary.columns()
        cells = {column.header: column.text(values.get(name)) for name, column in columns.items()}
        cells["step"] = f"{values['step']:.0f}/{steps}".rjust(columns["step"].width)
        cells["left"] = f"{duration(left):>6}"
        if not self.rich.is_terminal:
            self.say(" ".join(f"{header}={cell.strip()}" for header, cell in cells.items()))
            return
        if not self.num_rows:
            self.say(_explained(columns))
        if self.num_rows % 20 == 0:
            self.say(" ".join(f"{header:>{len(cell)}}" for header, cell in cells.items()))
        self.num_rows += 1
        self.say(" ".join(cells.values()))

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def _explained(columns: dict[str, glossary.Column]) -> str:
    """Return what the headers stand for, in lines of 80 characters."""
    titles = {metric.name: metric.curve or metric.name for metric in glossary.METRICS}
    said = [f"{column.header}: {titles[name]}" for name, column in columns.items()]
    said = [text for text in said if len(set(text.split(": "))) > 1]
    return textwrap.fill(" · ".join([*said, "left: time left", "all: dapo metrics"]), 80)


def duration(seconds: float) -> str:
    """Write seconds briefly: `duration(45)` → "45s", `duration(11_100)` → "3h05m", "2d04h"."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f}s"
    if minutes < 60:
        return f"{minutes}m"
    hours = minutes // 60
    return f"{hours}h{minutes % 60:02}m" if hours < 24 else f"{hours // 24}d{hours % 24:02}h"
