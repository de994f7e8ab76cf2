"""A reward of your own is any function of (response, answer).

True is worth +1 and False −1; a number is its own reward, and means correct above 0, however little.
"""


def short_and_right(response: str, answer: str) -> float:
    """Return 1 or 0.5 for a correct answer, more for one of few lines, and −1 for a wrong one."""
    lines = response.strip().splitlines()
    if not lines or lines[-1] != f"Answer: {answer}":
        return -1.0
    return 1.0 if len(lines) <= 4 else 0.5
