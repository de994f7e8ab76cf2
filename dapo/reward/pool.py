"""The reward of a response: verdicts of functions, in worker processes or behind HTTP, weights and length."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo import config
from dapo.config import ConfigError
from dapo.reward import remote
from dapo.reward.overlong import soft_overlong_penalty
from dapo.reward.worker import Failure, Job, Verdict, import_function, judge
from dapo.reward.workers import Workers
from dapo.types import Interrupted, Prompt, Sample


@dataclass(eq=False)
class Reward:
    """Marks samples: `is_correct` by the first function (Eq. 7), `reward` by all of them and the length.

    A call that does not return within `reward.time_limit`, or that ends its process, counts as wrong. Shadow
    verifiers mark nothing: a sample on which one of them contradicts `is_correct` is written to `disputes`,
    a JSONL file.

    Raises:
        ConfigError: a function cannot be imported.
    """

    reward: config.Reward
    max_response_length: int
    disputes: Path | None = None
    is_interrupted: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        reward = self.reward
        self.weights = {reward.function: 1.0} if isinstance(reward.function, str) else reward.function
        self.functions = [*self.weights, *reward.shadow]
        self.local = {name: self._import(name) for name in self.functions if not remote.is_remote(name)}
        self.workers: Workers | None = None
        if self.local and reward.workers:
            self.workers = Workers(list(self.local), reward.workers, reward.time_limit, self.is_interrupted)
        self.num_compared = 0
        self.num_disputed = 0

    def score(self, pairs: Sequence[tuple[Prompt, Sample]]) -> None:
        """Set every sample's is_correct and reward.

        True is worth +1, False −1; a number is worth itself, and means correct above 0.

        Raises:
            ConfigError: a function raised, or returned neither bool nor finite float; a remote one cannot be
                reached.
            Interrupted: the run is to stop. No sample has been marked.
        """
        verdicts = self._judge(pairs)
        for i, (_, sample) in enumerate(pairs):
            self._mark(sample, [each[i] for each in verdicts[: len(self.weights)]])
        for i, (prompt, sample) in enumerate(pairs if self.reward.shadow else []):
            self._compare(prompt, sample, [each[i] for each in verdicts])

    def take_metrics(self) -> dict[str, float]:
        """Count, since the last call, calls without a verdict and disagreements of shadow verifiers."""
        metrics: dict[str, float] = {"reward/timeouts": 0, "reward/crashes": 0}
        if self.workers:
            metrics["reward/timeouts"] = self.workers.num_timeouts
            metrics["reward/crashes"] = self.workers.num_crashes
            self.workers.num_timeouts = self.workers.num_crashes = 0
        if self.reward.shadow:
            metrics["reward/disagreement"] = self.num_disputed / max(self.num_compared, 1)
            self.num_compared = self.num_disputed = 0
        return metrics

    def close(self) -> None:
        if self.workers:
            self.workers.close()

    def _judge(self, pairs: Sequence[tuple[Prompt, Sample]]) -> list[list[Verdict]]:
        """Return the verdict of each function on each pair, [functions][pairs]."""
        jobs = [Job(0, sample.text, prompt.answer) for prompt, sample in pairs]
        found: dict[str, list[Verdict | Failure | None]] = {}
        if self.workers:
            calls = [job._replace(function=i) for i in range(len(self.local)) for job in jobs]
            verdicts = self.workers.judge(calls)
            for i, name in enumerate(self.local):
                found[name] = verdicts[i * len(jobs) : (i + 1) * len(jobs)]
        else:
            for name, function in self.local.items():
                found[name] = [self._call(function, job) for job in jobs]
        limits = self.reward.workers, self.reward.time_limit
        for name in filter(remote.is_remote, self.functions):
            found[name] = remote.judge(name, jobs, *limits, is_interrupted=self.is_interrupted)
        return [self._checked(name, pairs, found[name]) for name in self.functions]

    def _call(self, function: Callable[[str, str], Any], job: Job) -> Verdict | Failure:
        if self.is_interrupted():
            raise Interrupted
        return judge(function, job.response, job.answer)

    def _checked(
        self, name: str, pairs: Sequence[tuple[Prompt, Sample]], found: list[Verdict | Failure | None]
    ) -> list[Verdict]:
        """Return the verdicts, False where a call had none. Raise ConfigError if a call failed."""
        verdicts: list[Verdict] = []
        for (prompt, _), verdict in zip(pairs, found, strict=True):
            if isinstance(verdict, Failure):
                failed = f"{self._option(name)}={name} {verdict.what} for prompt {prompt.index}"
                raise ConfigError(f"{failed}; expected bool or finite float")
            verdicts.append(False if verdict is None else verdict)
        return verdicts

    def _mark(self, sample: Sample, verdicts: list[Verdict]) -> None:
        if self.reward.truncated_is_wrong and sample.is_truncated:
            verdicts = [min(verdicts[0], False if isinstance(verdicts[0], bool) else -1.0), *verdicts[1:]]
        sample.is_correct = verdicts[0] > 0
        values = [(1.0 if v else -1.0) if isinstance(v, bool) else v for v in verdicts]
        sample.reward = sum(w * value for w, value in zip(self.weights.values(), values, strict=True))
        if self.reward.soft_overlong_punishment:
            limits = self.max_response_length, self.reward.overlong_cache
            sample.reward += soft_overlong_penalty(sample.length, *limits)

    def _compare(self, prompt: Prompt, sample: Sample, verdicts: list[Verdict]) -> None:
        """Count the sample; write it to `disputes` if a shadow verifier contradicts the first function."""
        self.num_compared += 1
        if all((verdict > 0) == (verdicts[0] > 0) for verdict in verdicts[len(self.weights) :]):
            return
        self.num_disputed += 1
        if self.disputes:
            row = {"prompt": prompt.index, "group": sample.group, "sample": sample.index}
            given = {"answer": prompt.answer, "verdicts": dict(zip(self.functions, verdicts, strict=True))}
            with self.disputes.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | given | {"response": sample.text}) + "\n")

    def _import(self, name: str) -> Callable[[str, str], Any]:
        try:
            return import_function(name)
        except ValueError as error:
            raise ConfigError(f"{self._option(name)}={error}") from error

    def _option(self, name: str) -> str:
        return "reward.function" if name in self.weights else "reward.shadow"
