"""The record of a run: a row a step on the console, a line in metrics.jsonl, TensorBoard, optionally W&B.

At the end the paper's curves are plotted.
"""

from __future__ import annotations

import json
import resource
import time
from typing import Any

from dapo import clock, files
from dapo.config import Config
from dapo.report import curves, glossary


class Log:
    """Records a run, on the main rank.

    A run that resumes at step `start` removes what an earlier attempt recorded from that step on.
    """

    def __init__(self, config: Config, console: Console, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.config = config
        self.console = console
        self.path = config.run.dir / "metrics.jsonl"
        kept = [row for row in curves.read(self.path) if row["step"] < start]
        files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.tensorboard = SummaryWriter(str(config.run.dir / "tensorboard"), purge_step=start)
        self.wandb = _start_wandb(config) if config.run.wandb_project else None
        if start:
            console.say(f"going on from step {start} of {config.run.steps} in {config.run.dir}")
        self.last = time.perf_counter()
        clock.listen(console.progress)
        clock.take()

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Record one step, with the seconds and the memory it took."""
        now = time.perf_counter()
        measured = {"time/step": now - self.last, "perf/peak_memory_gib": peak_memory_gib()}
        values = {"step": step} | values | clock.take() | measured
        self.last = now
        if "rollout/tokens" in values:
            values["perf/tokens_per_second"] = values["rollout/tokens"] / values["time/step"]
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)
        self.console.row(values)

    def close(self) -> None:
        self.tensorboard.close()
        rows = curves.read(self.path)
        if rows:
            curves.plot({self.config.run.dir.name: rows}, self.config.run.dir / "curves.png")
        if self.wandb:
            self.wandb.finish()
        self.console.close()


class SilentLog:
    """Records nothing: it stands in for the Log on all ranks but the main one."""

    def __call__(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Console:
    """Prints a row a step, and below it, on a terminal, the progress of the current step.

    A rank that reports neither prints nothing.
    """

    def __init__(self) -> None:
        import rich.console

        self.rich = rich.console.Console(highlight=False, soft_wrap=True)
        self.status = self.rich.status("") if self.rich.is_terminal else None
        self.num_rows = 0

    def progress(self, text: str) -> None:
        if self.status:
            self.status.update(text)
            self.status.start()  # does nothing if it is shown already

    def say(self, text: str) -> None:
        self.rich.print(text, markup=False)

    def row(self, values: dict[str, float]) -> None:
        if "eval/accuracy" in values:
            self.say(f"step {values['step']}: accuracy {values['eval/accuracy']:.3f} on held-out problems")
        if "rollout/accuracy" not in values:
            return
        columns = glossary.columns()
        if self.num_rows % 20 == 0:
            self.say(" ".join(f"{column.header:>{column.width}}" for column in columns.values()))
        self.num_rows += 1
        self.say(" ".join(column.text(values.get(name)) for name, column in columns.items()))

    def close(self) -> None:
        if self.status:
            self.status.stop()


def peak_memory_gib() -> float:
    """Most GiB that this process has used since it started: allocated by torch on a GPU, else resident."""
    import torch  # takes seconds: a report reads and plots metrics without it

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _start_wandb(config: Config) -> Any:
    import wandb

    run, options = config.run, config.model_dump(mode="json")
    return wandb.init(project=run.wandb_project, name=run.dir.name, config=options, resume="allow")
