"""Is the answer right? (Eq. 7) The last "Answer:" line counts; integers are compared exactly, at any size."""

from __future__ import annotations

import re

_ANSWER = re.compile(r"answer\**\s*[:：]\**(.*)", re.IGNORECASE)
_WRAPPINGS = (
    ("**", "**"),
    ("$", "$"),
    ("`", "`"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("\\boxed{", "}"),
)  # markdown and LaTeX around an answer
_INTEGER = re.compile(r"([+-]?)(\d{1,3}(?:,\d{3})+|\d+)(?:\.0*)?")


def is_correct(response: str, answer: str) -> bool:
    """True iff the response's last "Answer:" line holds the integer `answer`; other answers must match to the letter.

    `is_correct("so …\\n**Answer:** 034.", "34")` → True; two answers on the line, or none, → False.
    """
    given = last_answer(response)
    if given is None:
        return False
    gold = _integer(answer)
    return given == _unwrap(answer) if gold is None else _integer(given) == gold


def last_answer(response: str) -> str | None:
    """What follows the last "Answer:", to the end of its line, freed of markdown and LaTeX around it; None without such a line."""
    found = None
    for line in response.splitlines():
        match = _ANSWER.search(line)
        if match:
            found = match.group(1)
    return None if found is None else _unwrap(found)


def _unwrap(text: str) -> str:
    """`_unwrap("$\\\\boxed{34}$.")` → "34". Only at the ends: what is inside an answer is part of it."""
    text = text.strip()
    if text.endswith("**") and text.count("**") == 1:  # the other half of "**Answer: 34**"
        text = text[:-2].rstrip()
    shorter = text.removesuffix(".")
    for start, end in _WRAPPINGS:
        if shorter.startswith(start) and shorter.endswith(end) and len(shorter) >= len(start) + len(end):
            inside = shorter[len(start) : -len(end)]
            if start not in inside and end not in inside.replace("\\boxed{", ""):
                return _unwrap(inside)
    return text


def _integer(text: str) -> str | None:
    """Canonical digits, without int(): "+034.0" → "34", "−0" → "0"; None if the text is not one integer."""
    match = _INTEGER.fullmatch(text.strip().replace("−", "-"))
    if match is None:
        return None
    digits = match.group(2).replace(",", "").lstrip("0") or "0"
    return digits if match.group(1) != "-" or digits == "0" else "-" + digits
