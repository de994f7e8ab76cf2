"""Save and resume everything: policy, optimizer, prompt position, open groups, counters.

<run.dir>/checkpoints/step-000010/ holds policy/ (Megatron's torch_dist format), rollouts.json,
carried.parquet of open groups' samples, and manifest.json (the model; size and checksum of every file). It is
written under a hidden name and renamed when every rank's part is on disk. So a directory with that name is
whole; damage that comes later is found by the checksums. A run that is sent back to a step renames the newer
ones, to aside-step-000020 and so on, and removes none of them.
"""

from __future__ import annotations

import itertools
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import torch

from dapo import config, files
from dapo.clock import timed
from dapo.config import ConfigError
from dapo.files import Sum
from dapo.mesh import FailedElsewhere, Mesh
from dapo.model.shape import ModelShape
from dapo.policy.chunks import Damaged
from dapo.policy.megatron import Policy, PolicyError
from dapo.policy.torch_dist import Save
from dapo.policy.weight_files import check_checkpoint
from dapo.rollout.pending import RolloutError
from dapo.types import StorageError, reason


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
        self._candidates: list[int] = []  # steps that have one, the newest first, without the damaged ones
        self.saved = -1  # the step last saved or loaded, or being saved
        self._unfinished: tuple[Save, ModelShape] | None = None  # the checkpoint that is being saved

    def find(self, shape: ModelShape) -> Path | None:
        """Look for the newest whole checkpoint, or that of step run.resume, before anything is built or
        written. Return its directory.

        Raises:
            ConfigError: run.resume is "never" and the run directory already holds a run; none of its
                checkpoints is whole, or the chosen one is not; the run has done more than run.steps steps; or
                the checkpoint is of another model.
        """
        self._candidates = self.mesh.on_main(self._steps_to_try)
        self.newest = self._newest_whole()
        if self.newest is None:
            return None
        self.mesh.on_main(self._check, self.newest, shape)
        return self._path(self.newest)

    def load(self, policy: Policy, sampler: Stateful) -> int:
        """Restore the checkpoint that `find` found. Return the step to continue with; 0 if there is none.

        If its tensors prove damaged when they are read, the one before it is restored.

        Raises:
            ConfigError: it holds NaN, or the data has changed under the run; or no checkpoint is whole.
        """
        while self.newest is not None:
            try:
                policy.load(self._path(self.newest) / "policy")
                break
            except Damaged as error:
                self._pass_over(self.newest, str(error))
                self.newest = self._newest_whole()
                self.mesh.on_main(self._check, self.newest, policy.shape)
        if self.newest is not None:
            sampler.load(self._path(self.newest))
            self.saved = self.newest
        self.mesh.on_main(self._tidy)
        return self.newest or 0

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
            PolicyError: a parameter is not finite.
        """
        if step != self.saved:
            self._finish()
            policy.check_finite()
            with self._writing(step) as partial:
                self.mesh.on_main(_begin, partial, sampler)
                saving = policy.save(partial / "policy")
                num_bytes = int(self.mesh.sum(np.array([saving.num_bytes]))[0])
                self.mesh.on_main(files.require_space, self.root, num_bytes)
                saving.start(in_background=not wait)
            self.saved, self._unfinished = step, (saving, policy.shape)
        if wait:
            self._finish()

    @timed("checkpoint")
    def close(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the checkpoint that is being saved its name, if the run ends by an error that all ranks have.

        Raises:
            CheckpointError: the disk is full or fails.
        """
        if isinstance(error, PolicyError | RolloutError | FailedElsewhere):
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
            if isinstance(error, OSError | StorageError | MemoryError | torch.OutOfMemoryError):
                free = files.free_gib(self.root)
                raise CheckpointError(
                    f"checkpoint {self._path(step)} cannot be written, {free:.1f} GiB free there: "
                    f"{reason(error)}; those before it are whole"
                ) from error
            raise

    def _path(self, step: int) -> Path:
        return self.root / f"step-{step:06}"

    def _publish(self, partial: Path, sums: list[dict[str, Sum]], shape: ModelShape) -> None:
        written = {name: sum for rank_sums in sums for name, sum in rank_sums.items()}
        files.write_manifest(partial, written, {"step": self.saved, "model": asdict(shape)})
        files.publish(partial, self._path(self.saved))
        for step in superseded(self._steps(), self.saved, self.run.keep_checkpoints, self.run.keep_every):
            try:
                files.remove(self._path(step))
            except OSError as error:  # another process reads it over NFS, for example
                _warn(f"checkpoint {self._path(step)} cannot be removed: {error.strerror}")

    def _steps(self) -> list[int]:
        """Return the steps that have a checkpoint, newest first."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.root.glob("step-*"))
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def _newest_whole(self) -> int | None:
        """Return the newest step whose checkpoint is whole, as far as its manifest says. Every rank verifies
        a part of its files; tensors have checksums of their own.
        """
        while self._candidates:
            step = self._candidates[0]
            found = self.mesh.gather(files.damage(self._path(step), self.mesh.rank, self.mesh.world))
            damage = self.mesh.on_main(lambda found=found: next(filter(None, found), None))
            if damage is None:
                return step
            self._pass_over(step, damage)
        return None

    def _pass_over(self, step: int, damage: str) -> None:
        """Drop a damaged checkpoint from the candidates. Raise ConfigError if no other is left."""
        self._candidates.remove(step)
        if not self._candidates:
            remedy = "restore one, or choose another run.dir to begin anew"
            tried = f"no checkpoint below {self.root} is whole; the last one tried, {self._path(step)},"
            if isinstance(self.run.resume, int):
                tried = f"run.resume={step}: {self._path(step)}"
                remedy = f"choose another step, or restore it; {self._known()}"
            raise ConfigError(f"{tried} is damaged ({damage}): {remedy}")
        if self.mesh.is_main:
            _warn(f"checkpoint {self._path(step)} is damaged ({damage}): using the one before it")

    def _steps_to_try(self) -> list[int]:
        steps, resume = self._steps(), self.run.resume
        if resume == "never" and steps:
            raise ConfigError(
                f"run.dir={self.run.dir} already holds a run and run.resume=never: choose another directory, "
                "or run.resume=auto"
            )
        if not isinstance(resume, int):
            return steps
        if resume not in steps:
            raise ConfigError(f"run.resume={resume}: no such checkpoint below {self.root}; {self._known()}")
        return [resume]

    def _known(self) -> str:
        return f"there are steps {', '.join(map(str, self._steps())) or '(none)'}"

    def _check(self, step: int, shape: ModelShape) -> None:
        """Raise ConfigError if the run cannot go on from this step."""
        if step > self.run.steps:
            done = f"run.dir={self.run.dir} has done {step} steps, more than run.steps={self.run.steps}"
            raise ConfigError(f"{done}: raise it, go back with run.resume=STEP, or choose another run.dir")
        check_checkpoint(self._path(step), shape)

    def _tidy(self) -> None:
        """Remove what a run left that was killed while it saved. Set aside what is newer than run.resume."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in self.root.glob(".step-*"):
                files.remove(leftover)
            newer = [step for step in self._steps() if isinstance(self.run.resume, int) and step > self.saved]
            for path in map(self._path, newer):
                aside = _unused(path.with_name(f"aside-{path.name}"))
                path.rename(aside)
                _warn(f"run.resume={self.run.resume}: {path} is newer, and is kept as {aside.name}")
        except OSError as error:
            raise ConfigError(f"run.dir: {self.root} cannot be written: {error.strerror}") from error


def superseded(steps: list[int], saved: int, keep: int, keep_every: int | None) -> list[int]:
    """Return the steps whose checkpoints are removed once that of `saved` is there.

    The `keep` newest stay, and those of every `keep_every` steps. Checkpoints newer than `saved` were found
    damaged: they count for nothing and are replaced when their step comes.
    `superseded([40, 30, 23, 20], saved=23, keep=1, keep_every=20)` → []; with keep_every None → [20].
    """
    older = [step for step in sorted(steps, reverse=True) if step <= saved]
    return [step for step in older[keep:] if not keep_every or step % keep_every]


def _unused(path: Path) -> Path:
    """Return a path that does not exist: this one, or with -2, -3, … at its end."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _begin(partial: Path, sampler: Stateful) -> None:
    files.remove(partial)
    (partial / "policy").mkdir(parents=True)
    sampler.save(partial)
