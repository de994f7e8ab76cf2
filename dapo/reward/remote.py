"""A reward over HTTP: POST {"responses": […], "answers": […]} returns a JSON list of bools or numbers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dapo import http
from dapo.config import ConfigError
from dapo.reward.worker import Failure, Job, Verdict, checked

JOBS_PER_REQUEST = 32
ATTEMPTS = 6
BACK_OFF = 1.0  # seconds before the second attempt, doubled before each further one


def is_remote(function: str) -> bool:
    return function.startswith(("http://", "https://"))


def judge(
    url: str,
    jobs: Sequence[Job],
    concurrency: int,
    limit: float,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> list[Verdict | Failure | None]:
    """Return one verdict per job, in order.

    `concurrency` requests are sent at a time; each has a timeout of `limit` seconds × its jobs.

    Raises:
        ConfigError: the server cannot be reached, refuses, or returns more or fewer verdicts than responses.
        Interrupted: `is_interrupted()` is true.
    """
    chunks = [jobs[i : i + JOBS_PER_REQUEST] for i in range(0, len(jobs), JOBS_PER_REQUEST)]
    with ThreadPoolExecutor(max(concurrency, 1)) as threads:
        answers = threads.map(lambda chunk: _ask(url, chunk, limit, is_interrupted), chunks)
        return [checked(verdict) for verdicts in answers for verdict in verdicts]


def _ask(url: str, jobs: Sequence[Job], limit: float, is_interrupted: Callable[[], bool]) -> list[Any]:
    sent = {"responses": [job.response for job in jobs], "answers": [job.answer for job in jobs]}
    body, failure = json.dumps(sent).encode(), ""
    for attempt in range(ATTEMPTS):
        if attempt:
            http.wait(asyncio.sleep(BACK_OFF * 2 ** (attempt - 1)), is_interrupted)
        try:
            answer = http.call("POST", url, body, timeout=limit * len(jobs), is_interrupted=is_interrupted)
        except http.NoAnswer as error:
            failure = str(error)
            continue
        if 200 <= answer.status < 300:
            return _parse(url, answer.body, len(jobs))
        failure = f"{answer.status} {http.one_line(answer.body)}".strip()
        if answer.status < 500 and answer.status != 429:
            raise ConfigError(f"reward.function={url}: the server answered {failure}")
    raise ConfigError(f"reward.function={url}: no answer in {ATTEMPTS} attempts, the last: {failure}")


def _parse(url: str, body: bytes, num_jobs: int) -> list[Any]:
    try:
        verdicts = json.loads(body)
    except ValueError as error:
        raise ConfigError(f"reward.function={url}: the answer is not JSON: {error}") from error
    if isinstance(verdicts, list) and len(verdicts) == num_jobs:
        return verdicts
    found = f"{len(verdicts)} of them" if isinstance(verdicts, list) else type(verdicts).__name__
    expected = f"sent {num_jobs} responses, expected a list of as many verdicts"
    raise ConfigError(f"reward.function={url}: {expected}, got {found}")
