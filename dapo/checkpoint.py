"""Save and resume everything: policy, optimizer, prompt position, groups carried over, counters.

<run.dir>/checkpoints/step-000010/ holds policy/ (Megatron's torch_dist format), rollouts.json,
carried.parquet if groups are carried over, and manifest.json (the model; size and checksum of every file). It
is written under a hidden name and renamed when every rank's part is on disk. So a directory with that name is
whole; damage that comes later is found by the checksums.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np

from dapo import config, files
from dapo.clock import timed
from dapo.config import ConfigError
from dapo.files import Sum
from dapo.mesh import Mesh
from dapo.model.shape import ModelShape
from dapo.policy.megatron import Policy
from dapo.policy.torch_dist import Save
from dapo.policy.weight_files import check_checkpoint


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


class Stateful(Protocol):
    """Holds the main rank's state beside the policy's."""

    def save(self, directory: Path) -> None:
        """Write it into `directory`. Main rank only."""

    def load(self, directory: Path) -> None:
        """Read what `save` wrote. Every rank calls it."""


class Checkpoints:
    """The checkpoints below one run directory. Every method is collective."""

    def __init__(self, run: config.Run, mesh: Mesh):
        self.run, self.mesh = run, mesh
        self.root = run.dir / "checkpoints"
        self.newest: int | None = None  # step of the newest whole checkpoint, as `find` found it
        self.saved = -1  # the step last saved or loaded, or being saved
        self._unfinished: tuple[Save, ModelShape] | None = None  # the checkpoint that is being saved

    def find(self, shape: ModelShape) -> None:
        """Look for the newest whole checkpoint, before anything is built or written.

        Raises:
            ConfigError: run.resume is "never" and the run directory already holds a run; none of its
                checkpoints is whole; or the newest is of another model.
        """
        self.newest = self._newest_whole()
        if self.newest is not None:
            self.mesh.on_main(check_checkpoint, self._path(self.newest), shape)

    def load(self, policy: Policy, sampler: Stateful) -> int:
        """Restore the checkpoint that `find` found. Return the step to continue with; 0 if there is none.

        Raises:
            ConfigError: it holds NaN, or the data has changed under the run.
        """
        self.mesh.on_main(self._remove_leftovers)
        if self.newest is None:
            return 0
        policy.load(self._path(self.newest) / "policy")
        sampler.load(self._path(self.newest))
        self.saved = self.newest
        return self.newest

    def maybe_save(self, step: int, policy: Policy, sampler: Stateful) -> None:
        """Save after every run.save_every steps and after the last, which leaves nothing unfinished."""
        is_last = step == self.run.steps
        if step % self.run.save_every == 0 or is_last:
            self.save(step, policy, sampler, wait=is_last or not self.run.async_save)
        elif self._unfinished and self.mesh.max(not self._unfinished[0].is_written()) == 0:
            self.save(self.saved, policy, sampler)

    @timed("checkpoint")
    def save(self, step: int, policy: Policy, sampler: Stateful, wait: bool = True) -> None:
        """Save the state after `step` steps; without `wait`, only begin to.

        After a failure nothing is left behind, and older checkpoints stay.

        Raises:
            CheckpointError: the disk is full or fails.
        """
        if step != self.saved:
            self._finish()
            with self._writing(step) as partial:
                self.mesh.on_main(_begin, partial, sampler)
                saving = policy.save(partial / "policy")
                num_bytes = int(self.mesh.sum(np.array([saving.num_bytes]))[0])
                self.mesh.on_main(files.require_space, self.root, num_bytes)
                saving.start(in_background=not wait)
            self.saved, self._unfinished = step, (saving, policy.shape)
        if wait:
            self._finish()

    def _finish(self) -> None:
        """Wait, on every rank, for the checkpoint that is being saved, and give it its name."""
        if self._unfinished is None:
            return
        (saving, shape), self._unfinished = self._unfinished, None
        with self._writing(self.saved) as partial:
            sums = self.mesh.gather(saving.finish())
            self.mesh.on_main(self._publish, partial, sums, shape)

    @contextmanager
    def _writing(self, step: int) -> Iterator[Path]:
        partial = files.hidden(self._path(step))
        try:
            yield partial
        except BaseException as error:
            self.saved = -1
            if self.mesh.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                free = files.free_gib(self.root)
                raise CheckpointError(
                    f"checkpoint {self._path(step)} cannot be written, {free:.1f} GiB free there: {error}; "
                    "those before it are whole"
                ) from error
            raise

    def _path(self, step: int) -> Path:
        return self.root / f"step-{step:06}"

    def _publish(self, partial: Path, sums: list[dict[str, Sum]], shape: ModelShape) -> None:
        written = {name: sum for rank_sums in sums for name, sum in rank_sums.items()}
        files.write_manifest(partial, written, {"step": self.saved, "model": asdict(shape)})
        files.publish(partial, self._path(self.saved))
        for step in superseded(self._steps(), self.saved, self.run.keep_checkpoints, self.run.keep_every):
            shutil.rmtree(self._path(step))

    def _steps(self) -> list[int]:
        """Return the steps that have a checkpoint, newest first."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.root.glob("step-*"))
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def _newest_whole(self) -> int | None:
        """Return the newest step whose checkpoint is whole. Every rank verifies a part of its files."""
        steps = self.mesh.on_main(self._steps_to_try)
        for step in steps:
            found = self.mesh.gather(files.damage(self._path(step), self.mesh.rank, self.mesh.world))
            damage = self.mesh.on_main(lambda found=found: next(filter(None, found), None))
            if damage is None:
                return int(step)
            if step == steps[-1]:
                raise ConfigError(
                    f"no checkpoint below {self.root} is whole; the last one tried, {self._path(step)}, is "
                    f"damaged ({damage}): restore one, or choose another run.dir to begin anew"
                )
            if self.mesh.is_main:
                print(
                    f"warning: checkpoint {self._path(step)} is damaged ({damage}): using the one before it",
                    file=sys.stderr,
                    flush=True,
                )
        return None

    def _steps_to_try(self) -> list[int]:
        steps = self._steps()
        if self.run.resume == "never" and steps:
            raise ConfigError(
                f"run.dir={self.run.dir} already holds a run and run.resume=never: choose another directory, "
                "or run.resume=auto"
            )
        return steps

    def _remove_leftovers(self) -> None:
        for leftover in self.root.glob(".step-*"):  # of a run that was killed while it saved
            shutil.rmtree(leftover)


def superseded(steps: list[int], saved: int, keep: int, keep_every: int | None) -> list[int]:
    """Return the steps whose checkpoints are removed once that of `saved` is there.

    The `keep` newest stay, and those of every `keep_every` steps. Checkpoints newer than `saved` were found
    damaged: they count for nothing and are replaced when their step comes.
    `superseded([40, 30, 23, 20], saved=23, keep=1, keep_every=20)` → []; with keep_every None → [20].
    """
    older = [step for step in sorted(steps, reverse=True) if step <= saved]
    return [step for step in older[keep:] if not keep_every or step % keep_every]


def _begin(partial: Path, sampler: Stateful) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "policy").mkdir(parents=True)
    sampler.save(partial)
