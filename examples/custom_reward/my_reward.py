"""A reward of your own: any function of (response, answer). True is worth +1 and False −1; a number is its
own reward, correct above 0.
"""


def short_and_right(response: str, answer: str) -> float:
    """Right answers earn more the fewer lines they take; wrong ones lose one point."""
    lines = response.strip().splitlines()
    if not lines or lines[-1] != f"Answer: {answer}":
        return -1.0
    return 1.0 if len(lines) <= 4 else 0.5
