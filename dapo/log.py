"""What a step looked like: a row on the console, a line in metrics.jsonl, TensorBoard, optionally W&B; at the
end the paper's curves.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from typing import Any

from dapo import clock, files
from dapo.config import Config
from dapo.report import curves

COLUMNS = {  # console header → metric, format
    "step": ("step", "4.0f"),
    "accuracy": ("rollout/accuracy", "8.3f"),
    "reward": ("rollout/reward", "7.3f"),
    "length": ("rollout/length", "7.1f"),
    "kept": ("groups/kept", "5.0f"),
    "asked": ("groups/asked", "6.0f"),
    "entropy": ("policy/entropy", "7.4f"),
    "prob": ("policy/probability", "6.3f"),
    "clip↑": ("policy/clip_high", "6.4f"),
    "clip↓": ("policy/clip_low", "6.4f"),
    "|grad|": ("policy/grad_norm", "7.3f"),
    "mismatch": ("policy/mismatch", "8.1e"),
    "sec": ("time/step", "6.2f"),
    "tok/s": ("perf/tokens_per_second", "7.0f"),
}


class Log:
    """The main rank's record of a run. Going on from step `start` forgets what an earlier attempt wrote from
    there on.
    """

    def __init__(self, config: Config, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.config, self.path = config, config.run.dir / "metrics.jsonl"
        kept = [row for row in curves.read(self.path) if row["step"] < start]
        files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.tensorboard = SummaryWriter(str(config.run.dir / "tensorboard"), purge_step=start)
        self.console = Console()
        self.wandb = _start_wandb(config) if config.run.wandb_project else None
        self.last = time.perf_counter()
        clock.take()

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Record one step, with the seconds and the memory it took."""
        now = time.perf_counter()
        values = {
            "step": step,
            **values,
            **clock.take(),
            "time/step": now - self.last,
            "perf/peak_memory_gib": peak_memory_gib(),
        }
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
    """What the other ranks have in place of a Log."""

    def __call__(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Console:
    """One row a step, and below it, on a terminal, where the current step is."""

    def __init__(self) -> None:
        import rich.console

        self.rich = rich.console.Console(highlight=False, soft_wrap=True)
        self.status = self.rich.status("") if self.rich.is_terminal else None
        if self.status:
            self.status.start()
        self.num_rows = 0

    def progress(self, text: str) -> None:
        if self.status:
            self.status.update(text)

    def say(self, text: str) -> None:
        self.rich.print(text, markup=False)

    def row(self, values: dict[str, float]) -> None:
        if "eval/accuracy" in values:
            self.say(f"step {values['step']}: accuracy {values['eval/accuracy']:.3f} on held-out problems")
        if "rollout/accuracy" not in values:
            return
        if self.num_rows % 20 == 0:
            self.say(" ".join(f"{name:>{_width(form)}}" for name, (_, form) in COLUMNS.items()))
        self.num_rows += 1
        self.say(
            " ".join(
                format(values[key], form) if key in values else " " * _width(form)
                for key, form in COLUMNS.values()
            )
        )

    def close(self) -> None:
        if self.status:
            self.status.stop()


def mean(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Key by key: `mean([{"loss": 1}, {"loss": 3}])` → {"loss": 2}; nothing of nothing."""
    return {
        key: sum(update[key] for update in updates) / len(updates) for key in (updates[0] if updates else {})
    }


def peak_memory_gib() -> float:
    """Of this process since it started: on a GPU what torch allocated there, else resident memory."""
    import torch  # takes seconds: a report reads and plots metrics without it

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _width(form: str) -> int:
    return int(form.split(".")[0])


def _start_wandb(config: Config) -> Any:
    import wandb

    return wandb.init(
        project=config.run.wandb_project,
        name=config.run.dir.name,
        config=config.model_dump(mode="json"),
        resume="allow",
    )
