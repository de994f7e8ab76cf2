"""From responses to their correctness and their reward: functions in worker processes or behind HTTP,
weights, length, shadow verifiers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dapo import config
from dapo.config import ConfigError
from dapo.reward import remote
from dapo.reward.overlong import soft_overlong_penalty
from dapo.reward.worker import Failure, Job, Verdict, import_function, judge
from dapo.reward.workers import Workers
from dapo.types import Prompt, Sample


class Reward:
    """Marks samples: `is_correct` from the first function (Eq. 7), `reward` from all of them by weight and
    from the length (Eq. 13).

    A function that does not return within `reward.time_limit`, or that ends its process, has called its
    response wrong. Shadow verifiers mark nothing: where one of them contradicts `is_correct`, the sample goes
    to `disputes`, a JSONL file.

    Raises:
        ConfigError: a function cannot be imported.
    """

    def __init__(self, options: config.Reward, max_response_length: int, disputes: Path | None = None):
        self.options, self.max_length, self.disputes = options, max_response_length, disputes
        self.weights = {options.function: 1.0} if isinstance(options.function, str) else options.function
        self.functions = [*self.weights, *options.shadow]
        self.local = [function for function in self.functions if not remote.is_remote(function)]
        self.imported = [self._import(function) for function in self.local]
        self.workers = (
            Workers(self.local, options.workers, options.time_limit)
            if self.local and options.workers
            else None
        )
        self.num_compared = self.num_disputed = 0

    def score(self, pairs: Sequence[tuple[Prompt, Sample]]) -> None:
        """Set every sample's is_correct and reward. True is worth +1, False −1; a float is its own worth, and
        correct above 0.

        Raises:
            ConfigError: a function raised, or returned neither bool nor finite float; a remote one cannot be
                reached.
        """
        verdicts = self._judge(pairs)
        for i, (_, sample) in enumerate(pairs):
            self._mark(sample, [of_function[i] for of_function in verdicts[: len(self.weights)]])
        for i, (prompt, sample) in enumerate(pairs if self.options.shadow else []):
            self._compare(prompt, sample, [of_function[i] for of_function in verdicts])

    def take_metrics(self) -> dict[str, float]:
        """What happened since the last call: calls without a verdict, and the share of samples on which a
        shadow verifier disagreed.
        """
        metrics: dict[str, float] = {"reward/timeouts": 0, "reward/crashes": 0}
        if self.workers:
            metrics = {
                "reward/timeouts": self.workers.num_timeouts,
                "reward/crashes": self.workers.num_crashes,
            }
            self.workers.num_timeouts = self.workers.num_crashes = 0
        if self.options.shadow:
            metrics["reward/disagreement"] = self.num_disputed / max(self.num_compared, 1)
            self.num_compared = self.num_disputed = 0
        return metrics

    def close(self) -> None:
        if self.workers:
            self.workers.close()

    def _judge(self, pairs: Sequence[tuple[Prompt, Sample]]) -> list[list[Verdict]]:
        """[functions][pairs]: what each function says of each pair."""
        jobs = [
            [Job(i, sample.text, prompt.answer) for prompt, sample in pairs] for i in range(len(self.local))
        ]
        if self.workers:
            found = self.workers.judge([job for of_function in jobs for job in of_function])
            local = [found[i * len(pairs) : (i + 1) * len(pairs)] for i in range(len(self.local))]
        else:
            local = [
                [judge(function, job.response, job.answer) for job in jobs[i]]
                for i, function in enumerate(self.imported)
            ]
        given = dict(zip(self.local, local, strict=True))
        for url in self.functions:
            if remote.is_remote(url):
                sent = [Job(0, sample.text, prompt.answer) for prompt, sample in pairs]
                given[url] = remote.judge(url, sent, self.options.workers, self.options.time_limit)
        return [self._verdicts(function, pairs, given[function]) for function in self.functions]

    def _verdicts(
        self, function: str, pairs: Sequence[tuple[Prompt, Sample]], given: list[Verdict | Failure | None]
    ) -> list[Verdict]:
        verdicts: list[Verdict] = []
        for (prompt, _), verdict in zip(pairs, given, strict=True):
            if isinstance(verdict, Failure):
                raise ConfigError(
                    f"{self._name(function)} {verdict.what} for prompt {prompt.index}; expected bool or "
                    "finite float"
                )
            verdicts.append(False if verdict is None else verdict)
        return verdicts

    def _mark(self, sample: Sample, verdicts: list[Verdict]) -> None:
        if self.options.truncated_is_wrong and sample.is_truncated:
            verdicts = [min(verdicts[0], False if isinstance(verdicts[0], bool) else -1.0), *verdicts[1:]]
        sample.is_correct = verdicts[0] > 0
        worths = [
            (1.0 if verdict else -1.0) if isinstance(verdict, bool) else verdict for verdict in verdicts
        ]
        sample.reward = sum(
            weight * worth for weight, worth in zip(self.weights.values(), worths, strict=True)
        )
        if self.options.soft_overlong_punishment:
            sample.reward += soft_overlong_penalty(
                sample.length, self.max_length, self.options.overlong_cache
            )

    def _compare(self, prompt: Prompt, sample: Sample, verdicts: list[Verdict]) -> None:
        self.num_compared += 1
        if all((verdict > 0) == (verdicts[0] > 0) for verdict in verdicts[len(self.weights) :]):
            return
        self.num_disputed += 1
        if self.disputes:
            given = dict(zip(self.functions, verdicts, strict=True))
            row = {
                "prompt": prompt.index,
                "group": sample.group,
                "sample": sample.index,
                "answer": prompt.answer,
                "verdicts": given,
            }
            with self.disputes.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"response": sample.text}) + "\n")

    def _import(self, function: str) -> Callable[[str, str], Any]:
        try:
            return import_function(function)
        except ValueError as error:
            raise ConfigError(f"{self._name(function).partition('=')[0]}={error}") from error

    def _name(self, function: str) -> str:
        return f"reward.{'function' if function in self.weights else 'shadow'}={function}"
