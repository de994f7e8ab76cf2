"""Save and resume everything: policy, optimizer, prompt position, groups carried over, counters.

<run.dir>/checkpoints/step-000010/ holds policy/ (Megatron's torch_dist format), rollouts.json, carried.parquet if groups
are carried over, and manifest.json (every file and its size).
It is written under a name that starts with a dot and renamed when whole: what bears the name is whole, unless damaged later.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from dapo import config
from dapo.clock import timed
from dapo.config import ConfigError
from dapo.mesh import Mesh
from dapo.policy.megatron import Policy
from dapo.rollout import Rollouts, RolloutsElsewhere


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


class Checkpoints:
    """The checkpoints below one run directory. Every method is collective."""

    def __init__(self, options: config.Run, mesh: Mesh):
        self.options, self.mesh = options, mesh
        self.root = options.dir / "checkpoints"
        self.saved = -1  # the step last saved or loaded

    def load(self, policy: Policy, rollouts: Rollouts | RolloutsElsewhere) -> int:
        """Restore the newest whole checkpoint; the step to go on with, 0 where there is none.

        Raises:
            ConfigError: run.resume is "never" and the run directory already holds a run.
        """
        step: int | None = self.mesh.on_main(self._newest_whole)
        if step is None:
            return 0
        policy.load(self._path(step) / "policy")
        if isinstance(rollouts, Rollouts):
            rollouts.load(self._path(step))
        self.saved = step
        return step

    def maybe_save(self, step: int, policy: Policy, rollouts: Rollouts | RolloutsElsewhere) -> None:
        """Save if `step` steps are a multiple of run.save_every, or all of them."""
        if step % self.options.save_every == 0 or step == self.options.steps:
            self.save(step, policy, rollouts)

    @timed("checkpoint")
    def save(self, step: int, policy: Policy, rollouts: Rollouts | RolloutsElsewhere) -> None:
        """Save the state after `step` steps. On failure nothing is left behind, and older checkpoints stay."""
        if step == self.saved:
            return
        partial = self.root / f".step-{step:06}"
        self.mesh.on_main(_make_empty, partial / "policy")
        try:
            policy.save(partial / "policy")
            self.mesh.on_main(self._publish, step, partial, rollouts)
        except BaseException as error:
            if self.mesh.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                free = shutil.disk_usage(self.root).free / 2**30
                raise CheckpointError(
                    f"checkpoint {self._path(step)} cannot be written, {free:.1f} GiB free there: {error}; those before it are whole"
                ) from error
            raise
        self.saved = step

    def _path(self, step: int) -> Path:
        return self.root / f"step-{step:06}"

    def _publish(self, step: int, partial: Path, rollouts: Rollouts) -> None:
        rollouts.save(partial)
        manifest = {
            "step": step,
            "files": {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()},
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in (partial, *partial.rglob("*")):  # on the disk before it bears the name
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        shutil.rmtree(self._path(step), ignore_errors=True)
        os.rename(partial, self._path(step))
        for old in self._steps()[self.options.keep_checkpoints :]:
            shutil.rmtree(self._path(old))

    def _steps(self) -> list[int]:
        """Steps that have a checkpoint, newest first."""
        return sorted((int(p.name.removeprefix("step-")) for p in self.root.glob("step-*")), reverse=True)

    def _newest_whole(self) -> int | None:
        steps = self._steps()
        if self.options.resume == "never":
            if steps:
                raise ConfigError(
                    f"run.dir={self.options.dir} already holds a run and run.resume=never: choose another directory, or run.resume=auto"
                )
            return None
        for step in steps:
            damage = _damage(self._path(step))
            if damage is None:
                return step
            print(f"warning: checkpoint {self._path(step)} is damaged ({damage}): using the one before it", file=sys.stderr, flush=True)
        return None


def _make_empty(path: Path) -> None:
    shutil.rmtree(path.parent, ignore_errors=True)
    path.mkdir(parents=True)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if all its files are there at their sizes."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        return f"manifest.json: {error}"
    for name, size in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None
