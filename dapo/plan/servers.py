"""SGLang servers on the trainer's GPUs: does all fit while they generate? They are idle while it learns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dapo.config import Config, ConfigError
from dapo.model.parameters import num_parameters
from dapo.plan.memory import GIB, Rank
from dapo.plan.time import Hardware

# GiB of a server beside weights and cache: context, communication, CUDA graphs, activations; and of these the
# context stays while the trainer learns. Assumptions
WORKING, CONTEXT = 4.0, 1.5
# as SGLang 0.5.23 chooses where mem-fraction-static is not set: it leaves nothing to a trainer
DEFAULT_FRACTION = 0.97
FRACTION = "engine.sglang.mem-fraction-static"


def are_colocated(config: Config) -> bool:
    """Return True if the run starts its servers on the trainer's GPUs."""
    return config.engine.kind == "sglang" and bool(_options(config).get("enable-memory-saver"))


def _options(config: Config) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in config.engine.sglang.items()}


@dataclass(frozen=True)
class Servers:
    """Servers and the trainer on one GPU, while the servers generate. Memory is in GiB."""

    ranks: list[Rank]  # of the trainer, one of each pipeline stage
    hardware: Hardware

    @cached_property
    def options(self) -> dict[str, Any]:
        return _options(self.ranks[0].config)

    @property
    def fraction(self) -> float:
        """Fraction of the GPU that a server takes for weights and cache."""
        value = self.options.get("mem-fraction-static", DEFAULT_FRACTION)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise ConfigError(f"{FRACTION}={value!r}: expected a number between 0 and 1")
        return value

    @property
    def static(self) -> float:
        """Memory of weights and cache. SGLang counts from what is free when a server starts."""
        return self.fraction * (self.hardware.memory - self.hardware.runtime)

    @property
    def least(self) -> float:
        """Memory of the weights, and of the longest sample's keys and values."""
        rank, tensor = self.ranks[0], self.options.get("tp-size") or self.options.get("tensor-parallel-size")
        shape, split = rank.shape, tensor if isinstance(tensor, int) and tensor > 0 else 1
        num_delta = sum(count for kind, count in shape.kinds().items() if kind.is_delta)
        width = 2 * max(1, shape.num_kv_heads // split) * shape.head_dim
        if latent := shape.latent:  # what keys and values are made of, on every GPU
            width = latent.kv_rank + shape.num_rotated
        cache = (shape.num_layers - num_delta) * width * rank.longest
        # a DeltaNet has a state of its sequence in float32, however long that is
        state = 4 * num_delta * shape.delta.values * shape.delta.key_dim / split if shape.delta else 0
        return (rank.value_bytes * (num_parameters(shape) / split + cache) + state) / GIB

    @property
    def trainer(self) -> float:
        """Memory that the trainer keeps: all but the parameters is freed, or waits in main memory."""
        return max(rank.params for rank in self.ranks) / GIB + self.hardware.runtime

    @property
    def page_locked(self) -> float:
        """Main memory in which a rank's optimizer state waits, for good."""
        return max(rank.optimizer for rank in self.ranks) / GIB

    @property
    def problem(self) -> str:
        """Description of what does not fit; "" if all does."""
        named = f"{FRACTION}={self.fraction}"
        if self.static < self.least:
            takes = f"its weights and one sample's cache take {self.least:.1f}"
            return f"{named} gives a server {self.static:.1f} GiB of a GPU: {takes}"
        too_much = self.static + WORKING + self.trainer - self.hardware.memory
        if too_much <= 0:
            return ""
        if "mem-fraction-static" not in self.options:
            named += ", which SGLang takes if it is not set"
        they = f"they take {self.static + WORKING:.1f} GiB of a GPU ({named}), the trainer {self.trainer:.1f}"
        return f"out of memory while servers generate: {they}: {too_much:.1f} GiB too much"

    @property
    def other_fractions(self) -> list[float]:
        """Fractions to try in place of this one, the nearest first; none if it fits."""
        tried = [n / 20 for n in range(2, 20)] if self.problem else []
        return sorted(tried, key=lambda fraction: abs(fraction - self.fraction))

    def describe(self, ranks: int) -> str:
        """Return a line about a machine with `ranks` of the trainer's ranks."""
        held = f"{self.static:.1f} GiB of a GPU for weights and cache, the trainer {self.trainer:.1f}"
        waits = (
            f"its optimizer's state waits in {ranks * self.page_locked:.0f} GiB of page-locked main memory"
        )
        return f"while servers generate they hold {held}; {waits} of a machine with {ranks} devices"
