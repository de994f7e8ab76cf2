"""The layout: how ranks share a model."""

from __future__ import annotations

from math import lcm

from dapo.config.options import ConfigError, Positive, Section


class Parallel(Section):
    """The layout. What is left of the world after tensor × pipeline × context are data-parallel ranks."""

    tensor: Positive = 8
    """Ranks that share every matrix, with sequence parallelism whenever > 1."""
    pipeline: Positive = 1
    """Stages of layers, one after the other."""
    virtual_pipeline: Positive = 1
    """Chunks of layers on each pipeline stage, in turns: less waiting at both ends of an update."""
    context: Positive = 1
    """Ranks that share the tokens of every sequence: for responses too long for one."""
    expert: Positive = 1
    """Ranks of a pipeline stage that share a layer's experts, each with whole ones."""

    @property
    def model_size(self) -> int:
        """Number of ranks that a microbatch takes: world size / data-parallel ranks."""
        return self.tensor * self.pipeline * self.context

    @property
    def least_world(self) -> int:
        """Number of processes of the smallest world in this layout."""
        return lcm(self.model_size, self.expert * self.pipeline)

    @property
    def sequence_multiple(self) -> int:
        """Multiple to which a sequence is padded, in tokens: a context rank has two equal chunks of it."""
        return 1 if self.context == 1 else 2 * self.context

    @property
    def pack_multiple(self) -> int:
        """Multiple to which a microbatch is padded, in tokens: sequence parallelism splits it further."""
        return self.sequence_multiple * self.tensor

    def data(self, world: int) -> int:
        """Return the number of data-parallel ranks of `world` processes.

        Raises:
            ConfigError: tensor × pipeline × context does not divide the world, or expert a stage's ranks.
        """
        if world % self.model_size:
            context = f" × parallel.context={self.context}" if self.context > 1 else ""
            layout = f"parallel.tensor={self.tensor} × parallel.pipeline={self.pipeline}{context}"
            raise ConfigError(
                f"world size {world} is not a multiple of {layout}: launch {self.model_size} processes, or a "
                "multiple, or change the layout"
            )
        stage = world // self.pipeline
        if stage % self.expert:
            raise ConfigError(
                f"parallel.expert={self.expert} does not divide the {stage} ranks of a pipeline stage (world "
                f"size {world} / parallel.pipeline={self.pipeline}), who share its experts"
            )
        return world // self.model_size
