"""A reward over HTTP: POST {"responses": […], "answers": […]} returns a JSON list of bools or numbers.

A key, if the server wants one, is in the environment: DAPO_REWARD_KEY, sent as a bearer token.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from dapo import clock, http
from dapo.reward.worker import Failure, Job, Verdict, checked
from dapo.types import RewardError

KEY_VARIABLE = "DAPO_REWARD_KEY"
JOBS_PER_REQUEST = 32
ATTEMPTS = 6
BACK_OFF = 1.0  # seconds before the second attempt, doubled before each further one
RETRY_SECONDS = 60.0  # for all attempts after the first, waits included
BYTES_PER_VERDICT, OTHER_BYTES = 64, 2**16  # of an answer, at most


def is_remote(function: str) -> bool:
    return function.lower().startswith(("http://", "https://"))


def judge(
    name: str,
    url: str,
    jobs: Sequence[Job],
    concurrency: int,
    limit: float,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> list[Verdict | Failure]:
    """Return one verdict per job, in order. `name` begins an error: "reward.function=http://…".

    `concurrency` requests are sent at a time; each has a timeout of `limit` seconds × its jobs, and its
    retries RETRY_SECONDS together.

    Raises:
        RewardError: the server cannot be reached, refuses, or returns more or fewer verdicts than responses.
        Interrupted: `is_interrupted()` is true.
    """

    def is_stopped() -> bool:
        clock.waiting()
        return is_interrupted()

    chunks = [jobs[i : i + JOBS_PER_REQUEST] for i in range(0, len(jobs), JOBS_PER_REQUEST)]
    answers = http.wait(_ask_all(name, url, chunks, max(concurrency, 1), limit), is_stopped)
    return [checked(verdict) for verdicts in answers for verdict in verdicts]


async def _ask_all(
    name: str, url: str, chunks: Sequence[Sequence[Job]], concurrency: int, limit: float
) -> list[list[Any]]:
    slots = asyncio.Semaphore(concurrency)

    async def ask(chunk: Sequence[Job]) -> list[Any]:
        async with slots:
            return await _ask(name, url, chunk, limit)

    tasks = [asyncio.create_task(ask(chunk)) for chunk in chunks]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # after an error the others would go on
            task.cancel()


async def _ask(name: str, url: str, jobs: Sequence[Job], limit: float) -> list[Any]:
    sent = {"responses": [job.response for job in jobs], "answers": [job.answer for job in jobs]}
    body, key = json.dumps(sent).encode(), os.environ.get(KEY_VARIABLE)
    timeout, max_bytes = limit * len(jobs), BYTES_PER_VERDICT * len(jobs) + OTHER_BYTES
    end, failure, attempt = time.monotonic() + timeout + RETRY_SECONDS, "", 0
    while attempt < ATTEMPTS and time.monotonic() < end:
        if attempt:
            await asyncio.sleep(BACK_OFF * 2 ** (attempt - 1))
        attempt += 1
        try:
            answer = await http.exchange(
                "POST", url, body, timeout, key, keep_alive=False, max_bytes=max_bytes
            )
        except http.NoAnswer as error:
            failure = str(error)
            timeout = min(timeout, max(end - time.monotonic(), 1.0))
            continue
        if 200 <= answer.status < 300:
            return _parse(name, answer.body, len(jobs))
        failure = f"{answer.status} {http.one_line(answer.body)}".strip()
        if answer.status < 500 and answer.status != 429:
            raise RewardError(f"{name}: the server answered {failure}")
    raise RewardError(f"{name}: no answer in {attempt} attempts, the last: {failure}")


def _parse(name: str, body: bytes, num_jobs: int) -> list[Any]:
    try:
        verdicts = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"{name}: the answer is not JSON: {error}") from None
    if isinstance(verdicts, list) and len(verdicts) == num_jobs:
        return verdicts
    found = f"{len(verdicts)} of them" if isinstance(verdicts, list) else type(verdicts).__name__
    expected = f"sent {num_jobs} responses, expected a list of as many verdicts"
    raise RewardError(f"{name}: {expected}, got {found}")
