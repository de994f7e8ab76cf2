"""The reward of a response: verdicts of functions, in worker processes or behind HTTP, weights and length."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo import config, http
from dapo.clock import heartbeat
from dapo.config import DEFAULT_FUNCTION, ConfigError
from dapo.reward import remote
from dapo.reward.overlong import soft_overlong_penalty
from dapo.reward.worker import Failure, Function, Job, Reply, Verdict
from dapo.reward.workers import Workers
from dapo.types import Interrupted, Prompt, RewardError, Sample, StorageError

if TYPE_CHECKING:
    import numpy as np

READS = {
    "answer_line": 'line with "Answer:"',
    "boxed": r"\boxed{…}",
    "either": r'line with "Answer:" or \boxed{…}',
}


@dataclass(frozen=True)
class Decoder:
    """Makes the text of a response's token ids [n]: `here` in this process.

    Workers do it by `tokenizer`, the JSON of a tokenizers.Tokenizer that gives the same text, if any does.
    """

    here: Callable[[np.ndarray], str]
    tokenizer: str | None = None


@dataclass(eq=False)
class Reward:
    """Marks samples: `is_correct` by the first function (Eq. 7), `reward` by all of them and the length.

    A call that does not return within `reward.time_limit`, or that ends its process, counts as wrong. Shadow
    verifiers mark nothing: a sample on which one of them contradicts `is_correct` is written to `disputes`,
    a JSONL file.

    Without a `decoder`, samples have their text already; else they get it, from a worker if one can. Samples
    of several turns have it: that of the last turn.

    `by_environment`: the samples come with a reward and whether they are correct, from their environments.
    No function is called; length counts as ever.

    Counts begin anew with each `take_metrics`. Several threads may score: one call waits for the other.

    Raises:
        ConfigError: a function cannot be imported.
    """

    reward: config.Reward
    max_response_length: int
    disputes: Path | None = None
    is_interrupted: Callable[[], bool] = lambda: False
    decoder: Decoder | None = None
    by_environment: bool = False

    def __post_init__(self) -> None:
        reward = self.reward
        self.weights = reward.weights
        self.functions = [] if self.by_environment else [*self.weights, *reward.shadow]
        self.local = {name: self._import(name) for name in self.functions if not remote.is_remote(name)}
        self.asked = {name for function in self.local.values() for name in function.extras}
        first = None if self.by_environment else self.local.get(self.functions[0])
        self.answer_of = None if first is None else first.answer_of
        self.finds_answers = self.answer_of is not None
        self._is_same = None if first is None else first.is_same
        self.workers: Workers | None = None
        if self.local and reward.workers:
            limits = reward.time_limit, reward.memory_limit
            paths = [*map(self._path, self.local), *([self._is_same] if self._is_same else [])]
            tokenizer = self.decoder.tokenizer if self.decoder else None
            self.workers = Workers(paths, reward.workers, *limits, self.is_interrupted, tokenizer)
        if len(self.local) < len(self.functions):
            http.require_connections(reward.workers)
        self._lock = threading.Lock()  # of a call
        self._counting = threading.Lock()  # of the counts
        self._reset_counts()

    def apart(self) -> Reward:
        """Return this reward, its processes too, with counts of its own."""
        other = copy.copy(self)
        other._reset_counts()
        return other

    def _reset_counts(self) -> None:
        self.num_scored = 0
        self.num_timeouts = 0
        self.num_crashes = 0
        self.num_undecided = 0
        self.num_without_answer = 0
        self.num_disputed = 0

    def decode_with(self, decoder: Decoder) -> None:
        """Decode with another model's tokenizer from now on."""
        self.decoder = decoder
        if self.workers and self.workers.tokenizer != decoder.tokenizer:
            self.workers.close()
            self.workers.tokenizer = decoder.tokenizer

    def score(self, pairs: Sequence[tuple[Prompt, Sample]]) -> None:
        """Set every sample's is_correct and reward, and its text.

        True is worth +1, False −1; a number is worth itself, and means correct above
        `reward.correct_above`; a pair says both.

        Raises:
            RewardError: a function raised, or returned no such thing; a remote one cannot be reached; or data
                that one asks for cannot be read again.
            Interrupted: the run is to stop. No sample has been marked.
        """
        with self._lock:
            self._score(pairs)

    def _score(self, pairs: Sequence[tuple[Prompt, Sample]]) -> None:
        if self.by_environment:
            for _, sample in pairs:
                self._mark(sample, [(sample.reward, sample.is_correct)])
            return
        replies = self._judge(pairs)
        verdicts = [self._checked(name, pairs, replies[name]) for name in self.functions]
        grades = [list(map(self._grade, each)) for each in verdicts]
        first = replies[self.functions[0]]
        with self._counting:
            self.num_scored += len(first)
            self.num_undecided += first.count(None)
            self.num_without_answer += sum(r is not None and r.has_answer is False for r in first)
        for i, (_, sample) in enumerate(pairs):
            self._mark(sample, [each[i] for each in grades[: len(self.weights)]])
        for i, (prompt, sample) in enumerate(pairs if self.reward.shadow else []):
            if any(each[i][1] != grades[0][i][1] for each in grades[len(self.weights) :]):
                self._keep_disputed(prompt, sample, [each[i] for each in verdicts])

    def same(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Say of each pair of answers whether they are one, by `is_same` of the first function's module, else
        as text. If a call has no verdict, they are two.
        """
        if self._is_same is None:
            return [a == b for a, b in pairs]
        jobs = [Job(len(self.local), *pair) for pair in pairs]
        if self.workers:
            with self._lock:
                replies = self._judge_by_workers(jobs)
        else:
            function = Function(self._is_same)
            replies = [self._call(function, job) for job in jobs]
        return [reply is not None and reply.verdict is True for reply in replies]

    def take_metrics(self) -> dict[str, float]:
        """Count, since the last call, the calls without a verdict; and return fractions of scored responses:
        without a verdict, without an answer in them, and with a shadow verifier that disagrees.
        """
        with self._counting:
            num_scored = max(self.num_scored, 1)
            metrics: dict[str, float] = {
                "reward/timeouts": self.num_timeouts,
                "reward/crashes": self.num_crashes,
                "reward/undecided": self.num_undecided / num_scored,
            }
            if self.finds_answers:
                metrics["reward/no_answer"] = self.num_without_answer / num_scored
            if self.reward.shadow:
                metrics["reward/disagreement"] = self.num_disputed / num_scored
            self._reset_counts()
        return metrics

    def close(self) -> None:
        if self.workers:
            self.workers.close()

    def _judge(self, pairs: Sequence[tuple[Prompt, Sample]]) -> dict[str, list[Reply | None]]:
        """Return the reply of each function on each pair, by the function's name. Samples get their text."""
        is_decoded_there = bool(self.workers and self.workers.tokenizer)
        if not is_decoded_there:
            self._decode([sample for _, sample in pairs])
        functions = list(self.local.values())
        count = len(functions)
        calls: list[Job] = []
        for (prompt, sample), extras in zip(pairs, self._extras(pairs), strict=True):
            is_encoded = is_decoded_there and not sample.episode
            text, tokens = ("", sample.tokens.tobytes()) if is_encoded else (sample.text, b"")
            for i, function in enumerate(functions):
                asked = tuple((name, extras[name]) for name in function.extras)
                calls.append(Job(i, text, prompt.answer, asked, tokens))
        replies: list[Reply | None]
        if self.workers:
            replies = self._judge_by_workers(calls, together=count)
        else:
            replies = [self._call(functions[job.function], job) for job in calls]
        if is_decoded_there:
            self._take_texts([sample for _, sample in pairs], replies)
        found = {name: replies[i::count] for i, name in enumerate(self.local)}
        jobs = [Job(0, sample.text, prompt.answer) for prompt, sample in pairs]
        limits = self.reward.workers, self.reward.time_limit
        for url in filter(remote.is_remote, self.functions):
            name = f"{self._option(url)}={url}"
            verdicts = remote.judge(name, url, jobs, *limits, is_interrupted=self.is_interrupted)
            found[url] = [Reply(verdict) for verdict in verdicts]
        return found

    def _judge_by_workers(self, jobs: list[Job], together: int = 1) -> list[Reply | None]:
        assert self.workers
        before = self.workers.num_timeouts, self.workers.num_crashes
        try:
            return self.workers.judge(jobs, together)
        finally:
            with self._counting:
                self.num_timeouts += self.workers.num_timeouts - before[0]
                self.num_crashes += self.workers.num_crashes - before[1]

    def _decode(self, samples: Sequence[Sample]) -> None:
        """Set the samples' text in this process."""
        if not self.decoder:
            return
        for sample in samples:
            if self.is_interrupted():
                raise Interrupted
            if sample.episode:
                continue
            sample.text = self.decoder.here(sample.tokens)
            heartbeat()

    def _take_texts(self, samples: Sequence[Sample], replies: Sequence[Reply | None]) -> None:
        """Set the samples' text as the first function's replies have it; without one this process decodes."""
        for sample, reply in zip(samples, replies[:: len(self.local)], strict=True):
            if reply and reply.text is not None:
                sample.text = reply.text
            else:
                self._decode([sample])

    def _extras(self, pairs: Sequence[tuple[Prompt, Sample]]) -> list[dict[str, Any]]:
        """Return what functions ask for beside response and answer, of each pair. A prompt is read once."""
        of_prompts: dict[int, dict[str, Any]] = {}
        wanted = self.asked - {"truncated", "conversation"}
        for prompt, _ in pairs if wanted else []:
            if id(prompt) not in of_prompts:
                assert prompt.origin, f"prompt {prompt.index} is not from a data file"
                of_prompts[id(prompt)] = prompt.origin.read(prompt, wanted)
        return [of_prompts.get(id(p), {}) | _of_sample(sample) for p, sample in pairs]

    def _call(self, function: Function, job: Job) -> Reply:
        if self.is_interrupted():
            raise Interrupted
        return function.judge(job)

    def _checked(
        self, name: str, pairs: Sequence[tuple[Prompt, Sample]], replies: list[Reply | None]
    ) -> list[Verdict]:
        """Return the verdicts, False where a call had none. Raise RewardError if a call failed."""
        verdicts: list[Verdict] = []
        for (prompt, _), reply in zip(pairs, replies, strict=True):
            verdict = False if reply is None else reply.verdict
            if isinstance(verdict, Failure):
                failed = f"{self._option(name)}={name} {verdict.what} for prompt {prompt.index}"
                pair = "" if remote.is_remote(name) else ", or a pair (finite float, bool)"
                raise RewardError(f"{failed}; expected bool or finite float{pair}")
            verdicts.append(verdict)
        return verdicts

    def _grade(self, verdict: Verdict) -> tuple[float, bool]:
        """Return what a verdict is worth, and whether it means correct."""
        if isinstance(verdict, tuple):
            return verdict
        if isinstance(verdict, bool):
            return 1.0 if verdict else -1.0, verdict
        return verdict, verdict > self.reward.correct_above

    def _mark(self, sample: Sample, grades: list[tuple[float, bool]]) -> None:
        if self.reward.truncated_is_wrong and sample.is_truncated:
            grades = [(min(grades[0][0], -1.0), False), *grades[1:]]
        sample.is_correct = grades[0][1]
        sample.reward = sum(w * value for w, (value, _) in zip(self.weights.values(), grades, strict=True))
        if self.reward.soft_overlong_punishment:
            limits = self.max_response_length, self.reward.overlong_cache
            sample.reward += soft_overlong_penalty(sample.num_written, *limits)

    def _keep_disputed(self, prompt: Prompt, sample: Sample, verdicts: list[Verdict]) -> None:
        """Count the sample, and write it to `disputes`."""
        with self._counting:
            self.num_disputed += 1
        if self.disputes:
            row = {"prompt": prompt.index, "group": sample.group, "sample": sample.index}
            given = {"answer": prompt.answer, "verdicts": dict(zip(self.functions, verdicts, strict=True))}
            line = json.dumps(row | given | {"response": sample.text}) + "\n"
            try:
                with self.disputes.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                raise StorageError(f"{self.disputes} cannot be written: {error.strerror}") from error

    def _import(self, name: str) -> Function:
        try:
            return Function(self._path(name))
        except ValueError as error:
            raise ConfigError(f"{self._option(name)}={error}") from error

    def _path(self, name: str) -> str:
        """Return what to import for a function: the default one of another answer format has a module."""
        answer_format = self.reward.answer_format
        is_other = name == DEFAULT_FUNCTION and answer_format != "answer_line"
        return f"dapo.reward.{answer_format}:is_correct" if is_other else name

    def _option(self, name: str) -> str:
        return "reward.function" if name in self.weights else "reward.shadow"


def _of_sample(sample: Sample) -> dict[str, Any]:
    said = sample.episode.messages if sample.episode else None
    return {"truncated": sample.is_truncated, "conversation": said}


def what_is_read(reward: config.Reward) -> str:
    """Say which answers the default reward reads; nothing if it is not used."""
    if DEFAULT_FUNCTION not in reward.weights:
        return ""
    form = READS[reward.answer_format]
    return f"{DEFAULT_FUNCTION} reads the last {form} of a response: prompts have to ask for it"
