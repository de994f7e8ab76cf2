"""Is the answer right? (Eq. 7) The last "Answer:" line counts. Integers are compared exactly, at any size;
the rest by math-verify.
"""

from __future__ import annotations

import functools
import importlib
import logging
import re
from fractions import Fraction
from typing import Any

_ANSWER = re.compile(r"(?<![a-z0-9])answer[*_]*\s*[:：](.*)", re.IGNORECASE)
_PREAMBLE = re.compile(r"(?:the |my |our )?(?:final )?answer is:? *", re.IGNORECASE)

_DIGITS = {ord(wide): narrow for wide, narrow in zip("０１２３４５６７８９", "0123456789", strict=True)}
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"))
_SPELLINGS = _DIGITS | _INVISIBLE | str.maketrans("−–‒－﹣＋＝，．。％＄（）", "-----+=,..%$()")

_PAIRS = tuple(
    (start, end)
    for start, end in [
        ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("(", ")"), ("{", "}"), ('"', '"'), ("“", "”"), ("'", "'"),
        *((f"\\{command}{{", "}") for command in ("boxed", "fbox", "text", "textbf", "textrm", "mathbf", "mathrm", "boldsymbol", "mbox")),
    ]
)  # fmt: skip  # around an answer; "(" and "{" only group, where one number is inside
_OPENING = re.compile(r"(?:\s|\\\$|[$*_`\"“'{(]|\\[([]|\\[a-z]+\{)*")
_CLOSING = re.compile(r"(?:\s|[$*_`\"”'})]|\\[)\]])*")
_EDGES = " \t\r\n\u00a0*_`"
_GROUPED = r"[0-9]{1,3}(?P<separator>,|\{,\}|\\,|,\\!|[\u2009\u202f\u00a0])[0-9]{3}(?:(?P=separator)[0-9]{3})*(?![0-9])"
_INTEGER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<digits>{_GROUPED}|[0-9]+)(?:\.0*(?![0-9]))?")

_MARKUP = re.compile(
    r"\\(?:text|textrm|textit|textbf|mathrm|mathit|mathbf|mbox)\s*\{([^{}]*)\}|\\[,;:! ]|[~$]"
)
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°(?:\s*[CF]\b)?")
_UNIT = re.compile(r"([^\W\d_]+)\.?(?:\^\{?-?[1-4]\}?|[²³])?")
_ONE_LETTER_UNITS = frozenset("mgshLlNJWV")
_NOT_UNITS = """
    or and but not nor if unless either both maybe perhaps possibly probably likely about approximately approx roughly around nearly
    almost circa guess think unsure uncertain wait is was are isn could might may should then hence because so
    plus minus times over divided by mod modulo squared cubed factorial choose point pi π sqrt root log ln sin cos tan infinity
    hundred hundreds thousand thousands million millions billion billions trillion trillions dozen dozens score half halves third thirds
    quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth
    hundredths thousandth thousandths zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
"""  # a word after the number that changes it, doubts it or begins another
_NOT_UNIT_WORDS = frozenset(_NOT_UNITS.split())
_JOINS = re.compile(
    r"[,;?]|\\q?quad|\b(?:or|and|not|maybe|perhaps)\b|[<>!~:≤≥≠≈]\s*$|^\s*[+-]?[0-9.]+\s+[a-z]", re.IGNORECASE
)

_HEDGES = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|probably|either|about|approximately|roughly|not)\b|[?≈~]|[0-9]\s+[0-9]|\\approx",
    re.IGNORECASE,
)
_LIST = re.compile(r";|,(?![0-9]{3}(?![0-9]))")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*|[A-Z]")
_COSTLY = re.compile(
    r"(?:\^|\*\*)[\s{(]*[+-]?[0-9.,]{5,}"  # 2^{100000}
    r"|(?:\^|\*\*)[\s{(]*[+-]?[0-9.]+[\s})]*(?:\^|\*\*)"  # 9^{9^9}
    r"|[0-9]{4,}[\s})]*!|!.*!"  # factorials
    r"|\\?binom\{? *[0-9]{5,}|[\x00-\x08\x0e-\x1f]"
)  # numbers that nobody can write out, and control characters
_FRACTION = re.compile(
    r"([+-]?) *(?:([0-9]+\.?|[0-9]*\.[0-9]+)(?: */ *([0-9]+))?|\\[dt]?frac *(?:\{([0-9]+)\}|([0-9])) *(?:\{([0-9]+)\}|([0-9])))"
)
_PLAIN_TEXT = (
    (re.compile(r"π|(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"∞|(?<![\\a-zA-Z])(?:infinity|oo)(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\(([^()]*)\)|√\(([^()]*)\)|√([0-9]+|[a-z])"), r"\\sqrt{\1\2\3}"),
)  # what models write without LaTeX
_MAX_LENGTH, _MAX_DEPTH = 1000, 40  # of mathematics that is worth reading


def is_correct(response: str, answer: str) -> bool:
    """True iff the response's last "Answer:" line holds `answer` and nothing else but markup, a name before
    "=" or a unit after it.

    An integer must be written as one: `is_correct("so …\\n**Answer:** 034.", "34")` → True; "68/2", "34 or
    35", "35, 34" → False. An answer of letters is compared without regard to case. Any other is mathematics:
    `is_correct("Answer: 0.5", "\\\\frac12")` → True.

    Raises:
        ConfigError: `answer` is neither an integer nor a word, and math-verify is not installed.
    """
    given = last_answer(response)
    if not given:
        return False
    gold = _integer(unwrap(answer))
    return _stated_integer(given) == gold if gold is not None else _is_equivalent(given, unwrap(answer))


def last_answer(response: str) -> str | None:
    """What follows the last "Answer:", to the end of its line, freed of what is around it; None without such
    a line.
    """
    for line in reversed(response.splitlines()):
        match = _ANSWER.search(line)
        if match:
            return unwrap(match.group(1))
    return None


def unwrap(text: str) -> str:
    """`unwrap("**$\\\\boxed{34}$.**")` → "34". Only at the ends: what is inside an answer is part of it.
    Linear in the length.
    """
    text = text.translate(_SPELLINGS)
    start, end = 0, len(text)
    while True:
        while start < end and text[start] in _EDGES:
            start += 1
        while start < end and text[end - 1] in _EDGES:
            end -= 1
        if text.startswith("\\displaystyle", start, end):
            start += len("\\displaystyle")
            continue
        bare = end - 1 if start < end and text[end - 1] == "." else end
        pair = next(
            (
                pair
                for pair in _PAIRS
                if text.startswith(pair[0], start, bare) and text.endswith(pair[1], start, bare)
            ),
            None,
        )
        inside = (start + len(pair[0]), bare - len(pair[1])) if pair else (bare, start)
        if (
            not pair
            or inside[0] > inside[1]
            or (pair[0] in "({" and not text[inside[0] : inside[1]].strip("+-. ").isdigit())
        ):
            return text[start:bare]
        start, end = inside


def _integer(text: str) -> str | None:
    """Canonical digits, without int(), which is quadratic and refuses 4,301: "+034.0" → "34", "-0" → "0";
    None if it is not one integer.
    """
    match = _INTEGER.fullmatch(text)
    return None if match is None else _canonical(match)


def _canonical(match: re.Match[str]) -> str:
    digits = match["digits"].replace(match["separator"] or ",", "").lstrip("0") or "0"
    return digits if match["sign"] != "-" or digits == "0" else "-" + digits


def _stated_integer(text: str) -> str | None:
    """The one integer that the text states: "34 apples", "x = 34", "$34$ cm" → "34"; None for two, for a
    doubt, for a sum.
    """
    text = _PREAMBLE.sub("", text, count=1) if _PREAMBLE.match(text) else text
    *names, value = text.rsplit("=", 8) if "=" in text else [text]
    number = _with_unit(unwrap(value.replace("$", "") if names else value))
    for name in names:
        stated = _integer(unwrap(name))
        if len(name) > 300 or _JOINS.search(name) or (stated is not None and stated != number):
            return None
    return number


def _with_unit(text: str) -> str | None:
    opening = _OPENING.match(text).group()  # type: ignore[union-attr]  # it matches the empty string
    match = _INTEGER.match(text, len(opening))
    if match is None:
        return None
    tail = text[match.end() :].lstrip("*_`")  # **34** apples
    # "$34$ apples" has its closing marks; "$34" is an amount of money
    if opening.strip() not in ("", "$", "\\$"):
        closing = _CLOSING.match(tail).group()  # type: ignore[union-attr]
        if len(re.findall(r"\\?\S", closing)) != len(re.findall(r"\\[a-z]+\{|\\?\S", opening)):
            return None
        tail = tail[len(closing) :]
    return _canonical(match) if _is_unit(tail) else None


def _is_unit(text: str) -> bool:
    """Words that may follow a number: "" and " square cm", "^\\\\circ", "%", "\\\\text{ m}^2"; not "x", " or
    so", " million".
    """
    if len(text) > 120:
        return False
    text = _MARKUP.sub(lambda match: f" {match[1] or ''} ", _DEGREES.sub(" degrees ", text))
    text = (
        text.replace("\\%", " percent ").replace("%", " percent ").replace("(", " ").replace(")", " ").strip()
    )
    words = [word for word in re.split(r"[\s/·-]+|\\cdot", re.sub(r"\s+(?=[\^²³])", "", text)) if word]
    if not words or words[0].lower() == "to":
        return not words
    units = [_UNIT.fullmatch(word) for word in words]
    return len(words) <= 6 and all(unit and _is_unit_name(unit[1]) for unit in units)


def _is_unit_name(word: str) -> bool:
    return word.lower() not in _NOT_UNIT_WORDS and (
        len(word) > 1 or word in _ONE_LETTER_UNITS or word > "\u2e80"
    )


def _is_equivalent(given: str, gold: str) -> bool:
    """Letter by letter, or the same mathematics. A doubt, or two answers where one was asked for, is no
    answer.
    """
    if not gold or "".join(given.split()) == "".join(gold.split()):
        return bool(gold)
    if _WORDS.fullmatch(gold):
        return given.strip("() ").casefold() == gold.casefold()
    if len(given) > _MAX_LENGTH or _depth(given) > _MAX_DEPTH or _COSTLY.search(given):
        return False
    if (_HEDGES.search(given) and not _HEDGES.search(gold)) or (
        _LIST.search(given) and not _LIST.search(gold.replace("\\pm", ";"))
    ):
        return False
    *names, value = [given] if "=" in gold else given.split("=")
    for name in names:  # "x = 1/2", but not "1/3 = 1/2"
        is_number = not re.search("[a-zA-Z]", re.sub(r"\\[a-z]+", "", name))
        if _JOINS.search(name) or (is_number and not _is_same(name, gold)):
            return False
    return _is_same(value, gold)


def _is_same(given: str, gold: str) -> bool:
    # a pair is no set, though math-verify takes one for the other
    if {_first(gold), _first(given)} == {"(", "{"}:
        return False
    fractions = _fraction(gold), _fraction(given)
    if None not in fractions:
        return fractions[0] == fractions[1]
    expected, found = _parse(gold), _parse(given)
    return bool(
        expected and found and _math_verify().verify(expected, found, float_rounding=12, timeout_seconds=None)
    )


def _fraction(text: str) -> Fraction | None:
    """What needs no library: "-3/4", ".75", "\\frac{3}{4}", "\\dfrac34"; exactly."""
    match = _FRACTION.fullmatch(text.replace("$", "").strip())
    if match is None:
        return None
    sign, over, under = match[1], match[2] or match[4] or match[5], match[3] or match[6] or match[7] or "1"
    return Fraction(sign + over) / int(under) if int(under) else None


@functools.lru_cache(maxsize=1024)  # a group's gold answer is one, and so are many of its answers
def _parse(text: str) -> list[Any]:
    library = _math_verify()
    if text.count("$") % 2 or "\n" in text:
        return []
    formula = text.replace("$", "")
    for spelling, command in _PLAIN_TEXT:
        formula = spelling.sub(command, formula)
    latex = library.LatexExtractionConfig()
    return library.parse(f"${formula}$", [latex], fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[no-any-return]


def _first(text: str) -> str:
    return text.removeprefix("\\left").lstrip("\\")[:1]


def _depth(text: str) -> int:
    """How deep brackets are nested: a parser would recurse as deep."""
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest


@functools.cache
def _math_verify() -> Any:
    try:
        library = importlib.import_module("math_verify")  # half a second: only where an answer needs it
    except ImportError as error:
        from dapo.config import ConfigError

        raise ConfigError(
            "an answer in the data is no integer and math-verify is not installed: pip install math-verify"
        ) from error
    # it warns that its own time limit is off; the reward pool has one
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return library
