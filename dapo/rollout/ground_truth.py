"""Can a reward function use a ground truth, and are two of them one? Its module says, if it has a say."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dapo import config
from dapo.config import ConfigError
from dapo.reward.remote import is_remote
from dapo.reward.worker import Function
from dapo.rollout.rows import Messages, prompt_and_answer, task_and_answer


@dataclass(frozen=True)
class GroundTruths:
    """Calls `refusal_of` and `is_same` of a reward function's module; texts are compared if it has none."""

    function: str
    # makes a prompt and a ground truth of a row and its place
    read: Callable[[Any, str], tuple[str | Messages, str]] = prompt_and_answer
    refusal_of: Callable[[str], str | None] = lambda answer: None
    is_same: Callable[[str, str], bool] = lambda a, b: a == b

    @staticmethod
    def of_environment(path: str) -> GroundTruths:
        """Return those of rows that an environment reads: it judges for itself."""
        return GroundTruths(path, read=task_and_answer)

    @staticmethod
    def of(reward: config.Reward) -> GroundTruths:
        """Find what the module of the first function defines. Raise ConfigError if it cannot be imported."""
        function = next(iter(reward.weights))
        if is_remote(function):
            return GroundTruths(function)
        try:
            Function(function)
        except ValueError as error:
            raise ConfigError(f"reward.function={error}") from error
        module = vars(sys.modules[function.partition(":")[0]])
        defined = {name: module[name] for name in ("refusal_of", "is_same") if name in module}
        if "refusal_of" in defined:
            defined["refusal_of"] = functools.lru_cache(1 << 16)(defined["refusal_of"])
        return GroundTruths(function, **defined)

    def refusal(self, answer: str) -> str | None:
        """Say why the reward function cannot use `answer`; None: it can."""
        found: str | None = self._call("refusal_of", self.refusal_of, answer)
        return found

    def agree(self, answers: Iterable[str]) -> bool:
        """True if all are one answer: 34, 34.0 and $34$."""
        first, *others = answers
        return all(self._call("is_same", self.is_same, first, other) for other in others)

    def _call(self, name: str, function: Callable[..., Any], *answers: str) -> Any:
        try:
            return function(*answers)
        except ConfigError:
            raise
        except Exception as error:  # the user's function may raise anything
            raised = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ConfigError(f"{name} of reward.function={self.function} raised {raised}") from error
