"""A reward of your own is any function of (response, answer) and of the extras that it names.

True is worth +1 and False −1; a number is its own reward, and means correct above `reward.correct_above`; a
pair says both.
"""


def short_and_right(response: str, answer: str, row: dict) -> tuple[float, bool]:
    """Return what a response is worth and whether it is correct: a right one is worth 1, with more lines than
    the steps of its task 0.5, and a wrong one −1.

    `row` has the other columns of the data: {"steps": 2}.
    """
    lines = response.strip().splitlines()
    if not lines or lines[-1] != f"Answer: {answer}":
        return -1.0, False
    return (1.0 if len(lines) <= row["steps"] + 1 else 0.5), True
