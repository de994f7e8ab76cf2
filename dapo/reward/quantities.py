"""Decides whether words name the quantity that is asked for, or deny it, or one that is computed from it."""

from __future__ import annotations

import re

# words of a subject that deny or doubt what follows, or name another quantity than the one that is asked for
DENIALS = re.compile(
    r"^when\b|\b(?:not|never|nor|neither|either|no|none|nobody|nothing|wrong|incorrect|false|if|unless|whether|or|than"
    r"|else|other|another|guess|suppose|assum\w+|maybe|perhaps|possibly|probably|about|twice|thrice|double|triple"
    r"|quadruple|half|(?:doubl|tripl|quadrupl|halv|squar|cub)ed"
    r"|root|logarithm|reciprocal|negative|inverse|opposite|minus|isn|aren|wasn|weren|doesn|don|without|except"
    r"|cannot|can|could|would|might|may|should|(?:square|cube|factorial|percent|fraction|complement|log|third"
    r"|fourth|quarter|fifth|sixth|tenth|hundredth)s? of)\b",
    re.IGNORECASE,
)
_NUMBER = r"(?:[0-9]+|one|two|three|four|five|six|seven|eight|nine|ten|a hundred|a thousand)"
_ARITHMETIC = re.compile(
    rf"\b(?:plus|times|over) {_NUMBER}\b|\b{_NUMBER} (?:plus|times)\b|\btimes the answer\b", re.IGNORECASE
)
# what is counted is no denial: the number of wrong answers, the probability of no rain
_COUNTED = re.compile(
    r"\b(?:number|no\.|count|probability|chance|odds|percentage) (?:of|that)\b.*", re.IGNORECASE
)
_DENIED_AT_THE_END = re.compile(
    r"(?:\b(?:not|never|wrong|incorrect|false|(?:doubl|tripl|quadrupl|halv|squar|cub)ed)|n['’]t)\W*$",
    re.IGNORECASE,
)
_NO_DENIALS = re.compile(
    r"\bno\.|\bnon-?negative|\b(?:larger|largest|smaller|smallest|greater|greatest|positive|negative|real|rational"
    r"|integer|double) root\b|\bopposite (?:side|angle|leg)\b|\bhalf-life\b",
    re.IGNORECASE,
)
_ARGUMENTS = re.compile(r"(?<=[A-Za-z}])\s*(?:\([^()]*\)|\[[^\[\]]*\])")
_LIMITS = re.compile(
    r"\\?(?:sum|prod|int|max|min|lim)(?:\s*[_^]\s*(?:\{[^{}]*\}|\\?\w))+|_\s*(?:\{[^{}]*\}|\w)|\^\s*\{?\s*\\?circ\}?|°"
)
_SHORT_WORD = re.compile(r"(?<![A-Za-z])(?:ans|sum|age)(?![A-Za-z])")
_COUNTING = "(?:digit|letter|sided|element|dimension|cycle|card|term|bit|by|point|day|hour|year)"  # 3-digit
# the words may come with their spaces and backslashes or, cut into tokens, without
_OPERATION = re.compile(
    rf"^[\s(]*[-−]|^[\s(]*[0-9.]+(?![0-9.]|[-\s]*{_COUNTING}|st|nd|rd|th)"  # -answer, 2 answers; not 10th
    rf"|[-+−*/·×]\s*\(?[0-9]|[0-9]\)?\s*(?:[+−*/·×]|-(?!{_COUNTING}))|\\(?:cdot|times)\s*[0-9]"  # answer - 1
    r"|(?:[A-Za-z]{4}|(?<![A-Za-z])(?:ans|sum|age))[)}]*\s*(?:\^|[²³])|!\s*$"  # answer^2
    r"|(?:frac|binom)\s*(?:\{?\s*[0-9]|\{.*\}\s*\{?\s*[0-9])|sqrt|√"
)


def is_denied(name: str) -> bool:
    """True if words before "=" deny it or change the value: twice, x isn't, the answer squared."""
    if _DENIED_AT_THE_END.search(name):
        return True
    words = _COUNTED.sub("", _NO_DENIALS.sub(" ", _ARGUMENTS.sub("", name)))
    return bool(DENIALS.search(words.strip()) or _ARITHMETIC.search(words))


def has_operation(words: str) -> bool:
    """True if words are computed with: answer/2, -answer, 2 answers; not x-coordinate, area + perimeter."""
    if any(words.count(opening) != words.count(closing) for opening, closing in ("()", "[]", "{}")):
        return False  # the half of P(X = 2)
    return bool(_OPERATION.search(_ARGUMENTS.sub("", _LIMITS.sub(" ", words))))


def has_short_word(text: str) -> bool:
    """True if three letters are a word, no product: ans."""
    return bool(_SHORT_WORD.search(text))
