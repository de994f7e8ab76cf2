"""The nouns of the algorithm: a Prompt is answered by a Group of Samples, which an Engine produces on
Request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch  # takes seconds; a report of a run needs none of it

FinishReason = Literal["stop", "length", "abort"]


class Interrupted(Exception):
    """The user, or the scheduler, asked the run to stop: every rank saves, then leaves."""

    is_saved = False  # set where that has been done: there is nothing to save before the policy is built


class EngineError(Interrupted):
    """The engine cannot go on, the policy could: every rank saves, then leaves with this one line."""


class WeightsLost(EngineError):
    """Every server that had the policy's weights is gone, and some start again: after a sync the same can be
    asked for anew.
    """


@dataclass(frozen=True, slots=True)
class Prompt:
    """A task and its ground truth. `index` is its row in the data, the same in every epoch."""

    index: int
    tokens: np.ndarray  # int32 [p]
    answer: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an engine samples. Nothing is inherited from a model's generation_config."""

    temperature: float
    max_tokens: int
    stop_ids: tuple[int, ...]
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """One response wanted: sample `index` of group `group`. The seed alone decides the randomness."""

    group: int
    index: int
    tokens: np.ndarray  # int32 [p], the prompt
    seed: int
    sampling: Sampling

    @property
    def id(self) -> str:
        return f"{self.group}.{self.index}"


@dataclass(slots=True)
class Sample:
    """One response as the engine produced it (n tokens), then marked by the reward and the advantage."""

    group: int
    index: int
    tokens: np.ndarray  # int32 [n], stop token included
    # float32 [n], log π_θold as the engine reports it, at the sampling temperature
    behavior_logprobs: np.ndarray
    loss_mask: np.ndarray  # bool [n], False where the policy did not write the token
    versions: tuple[tuple[int, int, int], ...]  # (weight version, start, end): who wrote which tokens
    finish_reason: FinishReason
    text: str = ""
    is_correct: bool = False
    reward: float = 0.0
    advantage: float = 0.0

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def is_truncated(self) -> bool:
        """The length limit ended it, not a stop token."""
        return self.finish_reason == "length"


@dataclass(slots=True)
class Group:
    """The G samples of one prompt. Identified by its own id, never by its prompt's text."""

    id: int
    prompt: Prompt
    samples: list[Sample] = field(default_factory=list)

    @property
    def num_correct(self) -> int:
        return sum(sample.is_correct for sample in self.samples)

    @property
    def is_mixed(self) -> bool:
        """0 < #correct < G (Eq. 11). On correctness, never on the shaped reward: only such a group tells
        right from wrong.
        """
        return 0 < self.num_correct < len(self.samples)


class Engine(Protocol):
    """A sampler of π_θold. Requests go in, samples come out in any order; weights are replaced between
    rollouts.
    """

    def submit(self, requests: Iterable[Request]) -> None: ...

    def completed(self) -> Iterator[Sample]:
        """Samples as they finish, until nothing that was submitted is outstanding. More may be submitted, or
        aborted, meanwhile.

        Whoever stops reading aborts what is outstanding, and can read again.
        """
        ...

    def abort(self, ids: Iterable[str]) -> None:
        """Forget these requests: nothing comes back for them."""
        ...

    def prepare_weights(self, version: int) -> None:
        """Refuse now what `load_weights` would have to refuse: no rank has entered the weights' collectives
        yet.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...

    def waiting(self) -> str:
        """What is outstanding, and where, for a person to read; called from another thread, when all seems
        stuck.
        """
        ...

    def release_memory(self) -> None:
        """Nothing is sampled until the next weights: what only sampling needs is free for the trainer."""
        ...

    def close(self) -> None: ...
