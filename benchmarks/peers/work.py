"""One run of one trainer: its task, its clock, its reward.

A trainer's file calls `main(run)`; `run` trains as the task says and calls the clock. Imported in
environments without most of dapo's requirements: only torch, safetensors and `dapo.reward` may be used here.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dapo.reward.answer import is_correct
from dapo.reward.overlong import soft_overlong_penalty


@dataclass(frozen=True)
class Task:
    """All that a trainer needs to know of the arithmetic example; made by `peers.arithmetic`."""

    seed: int
    steps: int
    every: int  # steps between two saves of the weights
    folder: str  # the run's own; weights are saved here
    model: str
    prompts: list[str]  # at least an epoch, in the order of our stream
    answers: list[str]
    prompts_per_step: int
    prompts_per_minibatch: int
    group_size: int
    max_tokens: int
    overlong_cache: int
    stop_ids: list[int]
    learning_rate: float
    weight_decay: float
    clip_grad: float
    options: list[str]  # of the trainer, one of its arms

    @property
    def updates(self) -> int:
        """Number of updates a step."""
        return self.prompts_per_step // self.prompts_per_minibatch

    def rows(self) -> list[tuple[str, str]]:
        """Return the prompts, with answers, that so many steps ask."""
        pairs = zip(self.prompts, self.answers, strict=True)
        return list(pairs)[: self.prompts_per_step * self.steps]


class Clock:
    """Measure a step's CPU seconds (of all threads), wall seconds and tokens; save weights outside of it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.run: dict[str, list[float]] = {name: [] for name in ("cpu", "wall", "tokens")}
        self.memory_before = 0.0
        self.num_steps, self._tokens = 0, 0

    def start(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Begin the first step."""
        self._save(weights)
        self.memory_before = memory("VmRSS")
        self._begin()

    def generated(self, tokens: int) -> None:
        self._tokens += tokens

    def end_step(self, weights: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> None:
        """End a step and begin the next one."""
        self.run["cpu"].append(time.process_time() - self._cpu)
        self.run["wall"].append(time.perf_counter() - self._wall)
        self.run["tokens"].append(self._tokens)
        self.num_steps, self._tokens = self.num_steps + 1, 0
        if self.num_steps % self.task.every == 0:
            self._save(weights())
        self._begin()

    def _begin(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def _save(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights}
        save_file(tensors, f"{self.task.folder}/{self.num_steps:04}.safetensors")


def rewards(
    task: Task, responses: Sequence[str], token_ids: Sequence[Sequence[int]], answers: Sequence[str]
) -> list[float]:
    """Return the example's reward of each response: ±1, less the soft overlong penalty; without an end it is
    wrong.
    """
    found = []
    for response, ids, answer in zip(responses, token_ids, answers, strict=True):
        is_right = ids[-1] in task.stop_ids and is_correct(response, answer)
        penalty = soft_overlong_penalty(len(ids), task.max_tokens, task.overlong_cache)
        found.append((1.0 if is_right else -1.0) + penalty)
    return found


def memory(field: str) -> float:
    """Return a field of /proc/self/status in MB: VmRSS is the resident memory now, VmHWM its maximum.

    ru_maxrss would not do: it begins at the size of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    [kilobytes] = re.findall(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024 / 1e6


def main(run: Callable[[Task, Clock], None], **versions: str) -> None:
    """Train as the task in the file says that is named on the command line; print what was measured."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(1)
    clock = Clock(task)
    run(task, clock)
    found: dict[str, Any] = clock.run
    found |= {"before": clock.memory_before, "peak": memory("VmHWM"), "versions": versions}
    Path(f"{task.folder}/measured.json").write_text(json.dumps(found))
