"""Save and resume everything: policy, optimizer, prompt position, groups carried over, counters.

<run.dir>/checkpoints/step-000010/ holds policy/ (Megatron's torch_dist format), rollouts.json,
carried.parquet if groups are carried over, and manifest.json (the model, every size and checksum). It is
written under a hidden name and renamed when every rank's part is on the
disk: what bears the name is whole, unless damaged later, and that is noticed.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

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
from dapo.rollout.rollouts import Rollouts, RolloutsElsewhere


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


class Checkpoints:
    """The checkpoints below one run directory. Every method is collective."""

    def __init__(self, options: config.Run, mesh: Mesh):
        self.options, self.mesh = options, mesh
        self.root = options.dir / "checkpoints"
        self.newest: int | None = None  # the step of the newest whole checkpoint: what `find` found
        self.saved = -1  # the step last saved or loaded, or being saved
        self._unfinished: tuple[Save, ModelShape] | None = None  # of the checkpoint that is being saved

    def find(self, shape: ModelShape) -> None:
        """Look for the newest whole checkpoint, before anything is built or written.

        Raises:
            ConfigError: run.resume is "never" and the run directory already holds a run; none of its
                checkpoints is whole; or the newest is of another model.
        """
        self.newest = self._newest_whole()
        if self.newest is not None:
            self.mesh.on_main(check_checkpoint, self._path(self.newest), shape)

    def load(self, policy: Policy, rollouts: Rollouts | RolloutsElsewhere) -> int:
        """Restore what `find` found; the step to go on with, 0 where there is nothing.

        Raises:
            ConfigError: it holds NaN, or the data has changed under the run.
        """
        self.mesh.on_main(self._remove_leftovers)
        if self.newest is None:
            return 0
        policy.load(self._path(self.newest) / "policy")
        if isinstance(rollouts, Rollouts):
            rollouts.load(self._path(self.newest))
        self.saved = self.newest
        return self.newest

    def maybe_save(self, step: int, policy: Policy, rollouts: Rollouts | RolloutsElsewhere) -> None:
        """Save if `step` steps are a multiple of run.save_every, or all of them. After all of them, nothing
        is left unfinished.
        """
        is_last = step == self.options.steps
        if step % self.options.save_every == 0 or is_last:
            self.save(step, policy, rollouts, wait=is_last or not self.options.async_save)
        elif self._unfinished and self.mesh.max(not self._unfinished[0].is_written()) == 0:
            self.save(self.saved, policy, rollouts)

    @timed("checkpoint")
    def save(
        self, step: int, policy: Policy, rollouts: Rollouts | RolloutsElsewhere, wait: bool = True
    ) -> None:
        """Save the state after `step` steps; without `wait`, only begin to. On failure nothing is left
        behind, and older checkpoints stay.

        Raises:
            CheckpointError: the disk is full, or the like.
        """
        if step != self.saved:
            self._finish()
            with self._writing(step) as partial:
                self.mesh.on_main(_begin, partial, rollouts)
                saving = policy.save(partial / "policy")
                self.mesh.on_main(
                    files.require_space, self.root, int(self.mesh.sum(np.array([saving.num_bytes]))[0])
                )
                saving.start(in_background=not wait)
            self.saved, self._unfinished = step, (saving, policy.shape)
        if wait:
            self._finish()

    def _finish(self) -> None:
        """Wait for the checkpoint that is being saved, on every rank, and give it its name."""
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
        written = {name: sum for of_rank in sums for name, sum in of_rank.items()}
        files.write_manifest(partial, written, {"step": self.saved, "model": asdict(shape)})
        files.publish(partial, self._path(self.saved))
        for step in superseded(
            self._steps(), self.saved, self.options.keep_checkpoints, self.options.keep_every
        ):
            shutil.rmtree(self._path(step))

    def _steps(self) -> list[int]:
        """Steps that have a checkpoint, newest first."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.root.glob("step-*"))
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def _newest_whole(self) -> int | None:
        """Every rank verifies its share of the files, so that what one process would take minutes for takes
        seconds.
        """
        steps = self.mesh.on_main(self._steps_to_try)
        for step in steps:
            found = self.mesh.gather(files.damage(self._path(step), self.mesh.rank, self.mesh.world))
            damage = self.mesh.on_main(lambda found=found: next(filter(None, found), None))
            if damage is None:
                return int(step)
            if step == steps[-1]:
                raise ConfigError(
                    f"no checkpoint below {self.root} is whole; the last one tried, {self._path(step)}, is "
                    f"damaged ({damage}): "
                    "restore one, or choose another run.dir to begin anew"
                )
            if self.mesh.is_main:
                warning = (
                    f"warning: checkpoint {self._path(step)} is damaged ({damage}): using the one before it"
                )
                print(warning, file=sys.stderr, flush=True)
        return None

    def _steps_to_try(self) -> list[int]:
        steps = self._steps()
        if self.options.resume == "never" and steps:
            raise ConfigError(
                f"run.dir={self.options.dir} already holds a run and run.resume=never: choose another "
                "directory, or run.resume=auto"
            )
        return steps

    def _remove_leftovers(self) -> None:
        for leftover in self.root.glob(".step-*"):  # of a run that was killed while it saved
            shutil.rmtree(leftover)


def superseded(steps: list[int], saved: int, keep: int, keep_every: int | None) -> list[int]:
    """Which checkpoints go when that of `saved` is there: all but the `keep` newest and those of every
    `keep_every` steps.

    What is newer than `saved` was found damaged: it counts for nothing, and is replaced when its step comes.
    `superseded([40, 30, 23, 20], saved=23, keep=1, keep_every=20)` → []; with keep_every None → [20].
    """
    older = [step for step in sorted(steps, reverse=True) if step <= saved]
    return [step for step in older[keep:] if not keep_every or step % keep_every]


def _begin(partial: Path, rollouts: Rollouts) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "policy").mkdir(parents=True)
    rollouts.save(partial)
