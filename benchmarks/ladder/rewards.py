"""A reward in which length pays."""

from __future__ import annotations

from dapo.reward import is_correct

ECHOES = 8  # more of them pay nothing


def echoes(response: str, answer: str) -> float:
    """Return 0.2 for a right answer, 0.2 more for each time that it is said again, and −1 for a wrong one."""
    if not is_correct(response, answer):
        return -1.0
    return 0.2 + 0.2 * min(ECHOES, max(0, response.count("Answer:") - 1))
