"""A reward function's module that says what an answer is, and when two are one. It imports no torch."""

import time


def is_right(response, answer):
    found = answer_of(response)
    return found is not None and is_same(found, answer)


def answer_of(response):
    """The last word, unless it is a full stop."""
    return None if response.endswith(".") else response.split()[-1]


def is_same(a, b):
    if "sleep" in (a, b):
        time.sleep(600)
    if "raise" in (a, b):
        raise ValueError(a)
    return value(a) == value(b)


def value(text):
    return {"I": 1, "II": 2, "III": 3}.get(text) or int(text)
