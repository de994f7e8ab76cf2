"""A reward over HTTP: POST {"responses": [...], "answers": [...]} → a JSON list with a bool or a number for
each.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
    """One verdict a job, in order; `concurrency` requests at a time, each within `limit` seconds × its jobs.

    Raises:
        ConfigError: the server cannot be reached, refuses, or does not answer with as many verdicts as it was
            sent responses.
    """
    chunks = [jobs[i : i + JOBS_PER_REQUEST] for i in range(0, len(jobs), JOBS_PER_REQUEST)]
    with ThreadPoolExecutor(max(concurrency, 1)) as threads:
        return [
            checked(verdict)
            for verdicts in threads.map(lambda chunk: _ask(url, chunk, limit), chunks)
            for verdict in verdicts
        ]


def _ask(url: str, jobs: Sequence[Job], limit: float) -> list[Any]:
    body = json.dumps(
        {"responses": [job.response for job in jobs], "answers": [job.answer for job in jobs]}
    ).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    told = f"reward.function={url}"
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACK_OFF * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=limit * len(jobs)) as reply:
                verdicts = json.loads(reply.read())
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise ConfigError(f"{told}: the server answered {error.code} {error.reason}") from error
            last = f"{error.code} {error.reason}"
        except (OSError, http.client.HTTPException) as error:
            last = str(error) or type(error).__name__
        except ValueError as error:
            raise ConfigError(f"{told}: the answer is not JSON: {error}") from error
    else:
        raise ConfigError(f"{told}: no answer in {ATTEMPTS} attempts, the last: {last}")
    if not isinstance(verdicts, list) or len(verdicts) != len(jobs):
        found = f"{len(verdicts)} of them" if isinstance(verdicts, list) else type(verdicts).__name__
        raise ConfigError(
            f"{told}: sent {len(jobs)} responses, expected a list of as many verdicts, got {found}"
        )
    return verdicts
