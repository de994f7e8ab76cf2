"""From a response to its correctness and its reward."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import numpy as np

from dapo import config
from dapo.config import ConfigError
from dapo.reward.overlong import soft_overlong_penalty
from dapo.types import Prompt, Sample

Verdict = bool | float


class Reward:
    """Marks samples: `is_correct` from the rule (Eq. 7), `reward` from the rule and the length (Eq. 13).

    Raises:
        ConfigError: reward.function cannot be imported.
    """

    def __init__(self, options: config.Reward, max_response_length: int):
        self.options, self.max_length = options, max_response_length
        self.function = _import(options.function)

    def score(self, prompt: Prompt, sample: Sample) -> None:
        """Set the sample's is_correct and reward. True is worth +1, False −1; a float is its own reward, and correct above 0.

        Raises:
            ConfigError: the function returned neither bool nor finite float.
        """
        verdict = self.function(sample.text, prompt.answer)
        if isinstance(verdict, np.generic):
            verdict = verdict.item()
        if not isinstance(verdict, bool | int | float) or not math.isfinite(verdict):
            raise ConfigError(
                f"reward.function={self.options.function} returned {verdict!r} for prompt {prompt.index}; expected bool or finite float"
            )
        if self.options.truncated_is_wrong and sample.is_truncated:
            verdict = min(verdict, False) if isinstance(verdict, bool) else min(verdict, -1.0)
        sample.is_correct = verdict > 0
        sample.reward = (1.0 if verdict else -1.0) if isinstance(verdict, bool) else float(verdict)
        if self.options.soft_overlong_punishment:
            sample.reward += soft_overlong_penalty(sample.length, self.max_length, self.options.overlong_cache)


def _import(path: str) -> Callable[[str, str], Verdict]:
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"reward.function={path}: {error}; expected module:name of f(response, answer)") from error
    if not callable(function):
        raise ConfigError(f"reward.function={path} is {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]
