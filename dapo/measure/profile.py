"""Records chosen steps of chosen ranks by torch's profiler: traces for ui.perfetto.dev, memory on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dapo import clock
from dapo.config import ConfigError, Run
from dapo.mesh import Mesh
from dapo.types import reason

EVENTS = 100_000  # of a memory's history, the last ones: a few KB each


class Profiler:
    """Records the steps of run.profile, if this rank is one of its ranks.

    A trace has what the CPU did and, where there is one, the GPU; and the phases of `clock.timed` as ranges.
    What goes wrong with it is a warning: a run does without traces.

    Raises:
        ConfigError: a rank of run.profile.ranks is none of the run.
    """

    def __init__(self, run: Run, mesh: Mesh, warn: Callable[[str], None]):
        if others := [rank for rank in run.profile.ranks if rank >= mesh.world]:
            raise ConfigError(f"run.profile.ranks={others}: this run's last rank is {mesh.world - 1}")
        self.steps = run.profile.steps if mesh.rank in run.profile.ranks else []
        self.directory, self.rank, self.warn = run.dir / "profile", mesh.rank, warn
        self.has_gpu = mesh.device.type == "cuda"
        self._recording: tuple[int, profile] | None = None

    def begin(self, step: int) -> None:
        """Record from now on, if the step is one of those."""
        if step not in self.steps:
            return
        with self._or_warn():
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.has_gpu else [])]
            recording = profile(activities=activities)
            recording.start()
            self._recording = step, recording
            clock.put_into(record_function)
            if self.has_gpu:
                torch.cuda.memory._record_memory_history(max_entries=EVENTS, stacks="python")

    def end(self) -> None:
        """Write what has been recorded since `begin`, if anything."""
        if self._recording is None:
            return
        step, recording = self._recording
        name = f"step-{step:06}-rank-{self.rank}"
        with self._or_warn():
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.has_gpu:
                torch.cuda.memory._dump_snapshot(str(self.directory / f"{name}-memory.pickle"))
        self.close()
        with self._or_warn():
            recording.export_chrome_trace(str(self.directory / f"{name}.json.gz"))

    def close(self) -> None:
        """Stop recording; write nothing."""
        if self._recording is None:
            return
        (_, recording), self._recording = self._recording, None
        clock.put_into()
        with self._or_warn():
            recording.stop()
            if self.has_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)

    @contextmanager
    def _or_warn(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  # torch's, the driver's, the disk's: anything
            self.warn(f"run.profile failed: {reason(error)}; the run goes on")
