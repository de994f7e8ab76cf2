"""The check of an answer (Eq. 7): the last "Answer:" line counts.

Integers are compared exactly, at any size; other mathematics by math-verify.
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
_PLAIN_CHARACTERS = _DIGITS | _INVISIBLE | str.maketrans("−–‒－﹣＋＝，．。％＄（）", "-----+=,..%$()")

_TEXT_COMMANDS = ("boxed", "fbox", "text", "textbf", "textrm", "mathbf", "mathrm", "boldsymbol", "mbox")
# what may stand around an answer; "(" and "{" only group, where one number is inside
_PAIRS = (
    *(("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("(", ")"), ("{", "}"), ('"', '"'), ("“", "”"), ("'", "'")),
    *((f"\\{command}{{", "}") for command in _TEXT_COMMANDS),
)
_OPENING = re.compile(r"(?:\s|\\\$|[$*_`\"“'{(]|\\[([]|\\[a-z]+\{)*")
_CLOSING = re.compile(r"(?:\s|[$*_`\"”'})]|\\[)\]])*")
_EDGES = " \t\r\n\u00a0*_`"
_SEPARATOR = r"(?P<separator>,|\{,\}|\\,|,\\!|[\u2009\u202f\u00a0])"
_GROUPED = rf"[0-9]{{1,3}}{_SEPARATOR}[0-9]{{3}}(?:(?P=separator)[0-9]{{3}})*(?![0-9])"
_INTEGER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<digits>{_GROUPED}|[0-9]+)(?:\.0*(?![0-9]))?")

_MARKUP = re.compile(
    r"\\(?:text|textrm|textit|textbf|mathrm|mathit|mathbf|mbox)\s*\{([^{}]*)\}|\\[,;:! ]|[~$]"
)
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°(?:\s*[CF]\b)?")
_UNIT = re.compile(r"([^\W\d_]+)\.?(?:\^\{?-?[1-4]\}?|[²³])?")
_ONE_LETTER_UNITS = frozenset("mgshLlNJWV")
# words after a number that change it, doubt it or begin another
_NOT_UNITS = """
    or and but not nor if unless either both maybe perhaps possibly probably likely about approximately
    approx roughly around nearly almost circa guess think unsure uncertain wait is was are isn could might may
    should then hence because so plus minus times over divided by mod modulo squared cubed factorial choose
    point pi π sqrt root log ln sin cos tan infinity hundred hundreds thousand thousands million millions
    billion billions trillion trillions dozen dozens score half halves third thirds quarter quarters fourth
    fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth
    hundredths thousandth thousandths zero one two three four five six seven eight nine ten eleven twelve
    thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy
    eighty ninety
"""
_NOT_UNIT_WORDS = frozenset(_NOT_UNITS.split())
_JOINS = re.compile(
    r"[,;?]|\\q?quad|\b(?:or|and|not|maybe|perhaps)\b|[<>!~:≤≥≠≈]\s*$|^\s*[+-]?[0-9.]+\s+[a-z]", re.IGNORECASE
)

_HEDGES = re.compile(
    r"\b(?:or|maybe|perhaps|possibly|probably|either|about|approximately|roughly|not)\b"
    r"|[?≈~]|[0-9]\s+[0-9]|\\approx",
    re.IGNORECASE,
)
_LIST = re.compile(r";|,(?![0-9]{3}(?![0-9]))")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[ '-][^\W\d_]+)*|[A-Z]")
# numbers that nobody can write out, and control characters
_COSTLY = re.compile(
    r"(?:\^|\*\*)[\s{(]*[+-]?[0-9.,]{5,}"  # 2^{100000}
    r"|(?:\^|\*\*)[\s{(]*[+-]?[0-9.]+[\s})]*(?:\^|\*\*)"  # 9^{9^9}
    r"|[0-9]{4,}[\s})]*!|!.*!"  # factorials
    r"|\\?binom\{? *[0-9]{5,}|[\x00-\x08\x0e-\x1f]"
)
_FRACTION = re.compile(
    r"([+-]?) *(?:([0-9]+\.?|[0-9]*\.[0-9]+)(?: */ *([0-9]+))?"
    r"|\\[dt]?frac *(?:\{([0-9]+)\}|([0-9])) *(?:\{([0-9]+)\}|([0-9])))"
)
# what models write without LaTeX
_PLAIN_TEXT = (
    (re.compile(r"π|(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"∞|(?<![\\a-zA-Z])(?:infinity|oo)(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\(([^()]*)\)|√\(([^()]*)\)|√([0-9]+|[a-z])"), r"\\sqrt{\1\2\3}"),
)
_NO_VALUES = frozenset(("nan", "null", "n/a", "<na>"))
_FILE = re.compile(r"\.(?:png|jpe?g|gif|bmp|webp|svg|tiff?|pdf|txt|json|jsonl|csv)$", re.IGNORECASE)
_MAX_LENGTH = 1000  # characters of an answer that is parsed as mathematics
_MAX_DEPTH = 40  # of its nested brackets


def is_correct(response: str, answer: str) -> bool:
    """True iff the last "Answer:" line holds `answer` and nothing else but markup, "name =" or a unit.

    An integer must be written as one: `is_correct("so …\\n**Answer:** 034.", "34")` → True; "68/2", "34 or
    35", "35, 34" → False. An answer of letters is compared without regard to case. Any other is mathematics:
    `is_correct("Answer: 0.5", "\\\\frac12")` → True.

    Raises:
        ConfigError: `answer` is neither an integer nor a word, and math-verify is not installed.
    """
    given = answer_of(response)
    return given is not None and is_same(given, answer)


def answer_of(response: str) -> str | None:
    """Return the text behind the last "Answer:" to the end of its line, unwrapped; None if there is none."""
    for line in reversed(response.splitlines()):
        match = _ANSWER.search(line)
        if match:
            return unwrap(match.group(1)) or None
    return None


last_answer = answer_of


def refusal_of(answer: str) -> str | None:
    """Say why a ground truth cannot be used: `refusal_of("nan")` → "is not a value"; None: it can.

    It may begin with a solution, as GSM8K's do: "… #### 24".
    """
    if _INTEGER.fullmatch(answer):
        return None
    text = unwrap(_ground_truth(answer))
    if not text:
        return "is blank"
    if text.casefold() in _NO_VALUES or text in ("None", "NA", "NaT"):
        return "is not a value"
    if _FILE.search(text):
        return "is the name of a file"
    if len(text) > _MAX_LENGTH or _depth(text) > _MAX_DEPTH or _COSTLY.search(text):
        return "is too long, too deep or too large a number to be compared"
    if _integer(text) is None and not _WORDS.fullmatch(text) and not _parse(text):
        return "is neither a number nor words nor mathematics that can be read"
    return None


def is_same(given: str, answer: str) -> bool:
    """True if the answer `given`, as `answer_of` returns it, equals the ground truth `answer`."""
    gold = unwrap(_ground_truth(answer))
    integer = _integer(gold)
    return _stated_integer(given) == integer if integer is not None else _is_equivalent(given, gold)


def _ground_truth(answer: str) -> str:
    return answer.rpartition("####")[2]


def unwrap(text: str) -> str:
    """Remove markup at both ends, in linear time: `unwrap("**$\\\\boxed{34}$.**")` → "34".

    Markup inside an answer is part of it.
    """
    text = text.translate(_PLAIN_CHARACTERS)
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
        for opening, closing in _PAIRS:
            if text.startswith(opening, start, bare) and text.endswith(closing, start, bare):
                break
        else:
            return text[start:bare]
        first, last = start + len(opening), bare - len(closing)
        is_part = opening in "({" and not text[first:last].strip("+-. ").isdigit()
        if first > last or is_part:
            return text[start:bare]
        start, end = first, last


def _integer(text: str) -> str | None:
    """Return an integer in its shortest form: "+034.0" → "34", "-0" → "0"; None if the text is not one.

    int() is not used: it takes quadratic time and refuses 4,301 digits.
    """
    match = _INTEGER.fullmatch(text)
    return None if match is None else _canonical(match)


def _canonical(match: re.Match[str]) -> str:
    digits = match["digits"].replace(match["separator"] or ",", "").lstrip("0") or "0"
    return digits if match["sign"] != "-" or digits == "0" else "-" + digits


def _stated_integer(text: str) -> str | None:
    """Return the one integer stated by "34 apples", "x = 34", "$34$ cm"; None for two, a doubt or a sum."""
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
    """True if this may follow a number: "", " square cm", "%", "^\\\\circ"; not "x", " or so", " million"."""
    if len(text) > 120:
        return False
    text = _MARKUP.sub(lambda match: f" {match[1] or ''} ", _DEGREES.sub(" degrees ", text))
    text = text.replace("\\%", " percent ").replace("%", " percent ").replace("(", " ").replace(")", " ")
    words = re.split(r"[\s/·-]+|\\cdot", re.sub(r"\s+(?=[\^²³])", "", text.strip()))
    words = [word for word in words if word]
    if not words or words[0].lower() == "to":
        return not words
    units = [_UNIT.fullmatch(word) for word in words]
    return len(words) <= 6 and all(unit and _is_unit_name(unit[1]) for unit in units)


def _is_unit_name(word: str) -> bool:
    is_known = len(word) > 1 or word in _ONE_LETTER_UNITS or word > "\u2e80"
    return is_known and word.lower() not in _NOT_UNIT_WORDS


def _is_equivalent(given: str, gold: str) -> bool:
    """True if both are the same letters or mathematics. A doubt, or two answers for one, is no answer."""
    if not gold or "".join(given.split()) == "".join(gold.split()):
        return bool(gold)
    if _WORDS.fullmatch(gold):
        return given.strip("() ").casefold() == gold.casefold()
    if len(given) > _MAX_LENGTH or _depth(given) > _MAX_DEPTH or _COSTLY.search(given):
        return False
    if _HEDGES.search(given) and not _HEDGES.search(gold):
        return False
    if _LIST.search(given) and not _LIST.search(gold.replace("\\pm", ";")):
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
    if not expected or not found:
        return False
    return bool(_math_verify().verify(expected, found, float_rounding=12, timeout_seconds=None))


def _fraction(text: str) -> Fraction | None:
    """Read exactly what needs no library: "-3/4", ".75", "\\frac{3}{4}", "\\dfrac34"."""
    match = _FRACTION.fullmatch(text.replace("$", "").strip())
    if match is None:
        return None
    numerator = match[2] or match[4] or match[5]
    denominator = int(match[3] or match[6] or match[7] or "1")
    return Fraction(match[1] + numerator) / denominator if denominator else None


@functools.lru_cache(maxsize=1024)  # a group has one gold answer, and many of its answers are equal
def _parse(text: str) -> list[Any]:
    library = _math_verify()
    if text.count("$") % 2 or "\n" in text:
        return []
    formula = text.replace("$", "")
    for pattern, command in _PLAIN_TEXT:
        formula = pattern.sub(command, formula)
    latex = library.LatexExtractionConfig()
    return library.parse(f"${formula}$", [latex], fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[no-any-return]


def _first(text: str) -> str:
    return text.removeprefix("\\left").lstrip("\\")[:1]


def _depth(text: str) -> int:
    """Number of brackets open at once, at most: a parser would recurse as deep."""
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
    # it warns that its own timeout is off; the reward pool has one
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return library
