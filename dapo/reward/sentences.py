"""Takes off the sentence that a value ends: "The total cost is \\$18.", "Janet makes $18 per day"."""

from __future__ import annotations

import re

from dapo.reward.quantities import DENIALS
from dapo.reward.statements import is_name

_PREAMBLE = re.compile(
    r"(?:(?:so|thus|hence|therefore|finally),? )?(?:the |my |our )?(?:final |correct )?answer(?: is)?"
    r"(?: therefore| thus)?:? *(?<=[ :])",
    re.IGNORECASE,
)
_HOPE = re.compile(r"\.? I hope it is correct\.?$")
_MAX_LENGTH = 200  # characters of a sentence
# who or what, a verb, and at once the value
_SENTENCE = re.compile(
    r"(?P<subject>[A-Za-z$][^0-9.:;=<>≤≥≈~]{0,120}?)\s+"
    r"(?:is|are|was|were|equals|makes|has|have|had|gets?|takes?|took|costs?|needs?|earns?|earned|pays|paid"
    r"|saves?|saved|spends?|spent)(?:\s+(?:exactly|therefore|thus|equal to))?\s+(?=[*_]*[-+$(\\0-9−–])"
)
_FORMULA = re.compile(r"\$([^$]*)\$|\\\((.*?)\\\)")
_WORDS = re.compile(r"(?:[A-Za-z]+(?:['’-][A-Za-z]+)*(?:,? +|,?$))*")


def without_sentence(text: str) -> str:
    """Return what follows "is" in a sentence: "There are 34 ways" → "34 ways". Other text stays as it is.

    What precedes the verb may hold words and names, no number, doubt or denial.
    """
    if len(text) > _MAX_LENGTH:
        return text
    text = _HOPE.sub("", text)
    match = _PREAMBLE.match(text) or _SENTENCE.match(text)
    if match is None or not _is_subject(match.groupdict().get("subject", "")):
        return text
    return text[match.end() :]


def _is_subject(text: str) -> bool:
    formulas = [first or second for first, second in _FORMULA.findall(text)]
    words = _FORMULA.sub("", text).strip()
    return bool(_WORDS.fullmatch(words)) and not DENIALS.search(words) and all(map(is_name, formulas))
