"""Writes and reads a policy: checkpoints of all ranks, and the model as a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from dapo.clock import timed
from dapo.config import Config, ConfigError
from dapo.mesh import Mesh
from dapo.model.shape import ModelShape
from dapo.policy import torch_dist, weight_files, write_weights
from dapo.policy.chunks import Damaged, Reader
from dapo.policy.optimizer_state import OwnState, group_settings
from dapo.policy.weights import Weights

# settings of the optimizer's groups that the config decides at a restart too; the scheduler sets the others
SETTINGS = ("max_lr", "min_lr", "betas", "eps")
# a module's state that is left out of checkpoints: FP8 scales, which the allowed recipes compute anew
EXTRA_STATE = "._extra_state"  # a number follows for each of a rank's experts but the first


class PolicyError(RuntimeError):
    """A number is not finite, so nothing can be learnt from it. Every rank raises it."""


class Saved:
    """Base of Policy: saves it, and loads it in any layout. Every method is collective."""

    config: Config
    mesh: Mesh
    shape: ModelShape
    transformer: TransformerConfig
    chunks: list[Any]  # of the model, on this rank
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    _weights: Weights
    _kept: weight_files.Kept  # tensors beside the language model
    _saving: torch_dist.Save | None  # it reads parameters and optimizer state

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, full tensor) of the whole model on every rank."""
        raise NotImplementedError

    @timed("export")
    def save_hf(self, target: Path, beside: Mapping[str, bytes] = write_weights.NONE) -> None:
        """Write the model as a Hugging Face directory, `beside` it other files: whole or not at all."""
        weights = self.weights()
        about = self.shape, self.transformer.params_dtype, self.config.policy.model

        def write() -> None:
            try:
                if self.mesh.is_main:
                    write_weights.save_hf(
                        [weights], *about, target, may_replace=True, beside=beside, kept=self._kept
                    )
            finally:
                for _ in weights:  # every rank drains them, even if the disk has failed
                    pass

        self.mesh.together(write)

    def check_finite(self) -> None:
        """Raise PolicyError on every rank if a parameter is not finite: it must not reach a checkpoint."""
        if broken := self._broken_parameters():
            raise PolicyError(f"{named(broken)}: nothing is saved; resume from the checkpoint before")

    def _broken_parameters(self) -> list[str]:
        """Return the names of all ranks' parameters that are not finite, on every rank. Collective."""
        found = self.mesh.gather(self._weights.broken())
        return self.mesh.on_main(lambda: sorted({name for names in found for name in names}))

    def save(self, directory: Path) -> torch_dist.Save:
        """Plan a checkpoint of model, optimizer and scheduler in an existing, empty directory: `start` it."""
        copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
        tensors, _ = self._sharded_state()
        others = {"optimizer": group_settings(self.optimizer), "num_updates": self.scheduler.num_steps}
        self._saving = torch_dist.Save(tensors | others, directory, copies, self.mesh.barrier)
        return self._saving

    def _detach_save(self) -> None:
        """Let a checkpoint that is being written have its own copy of what is about to change."""
        if self._saving and not self._saving.is_written():
            self._saving.detach()
        self._saving = None

    def load(self, directory: Path) -> None:
        """Restore what `save` planned, in any layout.

        Raises:
            Damaged: the files are not what was written; what the policy holds now is of no use.
            ConfigError: a parameter is not finite.
        """
        now = [{key: group[key] for key in SETTINGS} for group in self.optimizer.param_groups]
        tensors, own = self._sharded_state(Reader(directory))
        state, damage = torch_dist.load(tensors, directory)
        damages = self.mesh.gather(damage)
        if damage := self.mesh.on_main(lambda: next(filter(None, damages), None)):
            raise Damaged(damage)
        for i, chunk in enumerate(self.chunks):
            missing, unexpected = chunk.load_state_dict(state["model"][f"chunk{i}"], strict=False)
            lacking = [name for name in missing if EXTRA_STATE not in name]
            assert not lacking and not unexpected, (lacking, unexpected)
        saved = state["optimizer"]
        for part in [saved] if "optimizer" in saved else saved.values():
            for group in part["optimizer"]["param_groups"]:  # Megatron finds a group by them, too
                group.update({key: now[0][key] for key in ("max_lr", "min_lr")})
        with torch.no_grad():
            self.optimizer.load_state_dict(saved)
            own.take()
        for group, settings in zip(self.optimizer.param_groups, now, strict=True):
            group.update(settings)  # as the config says now
        self.scheduler.num_steps = 0
        self.scheduler.step(state["num_updates"])
        if broken := self._broken_parameters():
            raise ConfigError(f"{directory}: {named(broken)}: use an earlier checkpoint")

    def _sharded_state(self, saved: Reader | None = None) -> tuple[dict[str, Any], OwnState]:
        """Return this rank's parts of a checkpoint's tensors; and, of those, the optimizer's.

        `saved`: the checkpoint that is to be read; None: one is to be written.
        """
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        model = {}
        for i, chunk in enumerate(self.chunks):
            entries = chunk.sharded_state_dict(metadata=metadata).items()
            model[f"chunk{i}"] = {name: entry for name, entry in entries if EXTRA_STATE not in name}
        own = OwnState(self.optimizer, model, saved)
        return {"model": model, "state": own.boxes}, own


def named(broken: list[str]) -> str:
    """Name parameters that are not finite."""
    return f"{len(broken)} parameters hold NaN or infinite values, first {broken[0]}"
