"""Units after a number, and money before it: which words may stand there, and whether two units are one."""

from __future__ import annotations

import re
from collections import Counter

# words after a number that change it, doubt it or begin another
_NOT_UNITS = """
    or and but not nor if unless either both maybe perhaps possibly probably likely about approximately
    approx roughly around nearly almost circa guess think unsure uncertain wait is was are isn could might may
    should then hence because so plus minus times over divided by mod modulo squared cubed factorial choose
    point pi π sqrt root log ln sin cos tan exp infinity hundred hundreds thousand thousands million millions
    billion billions trillion trillions dozen dozens score half halves third thirds quarter quarters fourth
    fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth
    hundredths thousandth thousandths zero one two three four five six seven eight nine ten eleven twelve
    thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy
    eighty ninety less fewer more least most than below above under negative positive base remainder off short
    missing lakh lakhs crore crores mil mio grand gross pair pairs couple couples double triple twice wrong
    incorrect false right left at to from until except without with within excluding including no yes only
    inverse reciprocal conjugate complement prime repeating recurring binary hex octal decimal otherwise
    ish some something lot bit little few fails works doubled tripled halved reversed rounded truncated
    too loss losses basis permille mille never myriad myriads kilo mega giga tera milli micro nano pico centi
    deci hecto deca ones twos threes fours fives sixes sevens eights nines tens elevens twelves twenties
    thirties forties fifties sixties seventies eighties nineties millionth millionths billionth billionths
    trillionth trillionths
"""
# some of them in their place: ordered pairs, positive integers, prime numbers
_FACTORS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_NOT_FIRST = frozenset(("pair", "pairs"))
_NOT_LAST = frozenset(("positive", "negative", "prime", "binary", "right"))
_GLUED = re.compile(r"(?:(?:arc)?(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt)[abcmnpqt-z])+")  # cosx; not logs
_ORDINALS = (
    "eleven twelf thirteen fourteen fifteen sixteen seventeen eighteen nineteen twentie thirtie fortie"
)
_NOT_UNIT_WORDS = frozenset(
    [*_NOT_UNITS.split(), *(f"{stem}th{plural}" for stem in _ORDINALS.split() for plural in ("", "s"))]
)
_NAMES = {
    "cm": "centimeter centimetre",
    "mm": "millimeter millimetre",
    "km": "kilometer kilometre",
    "m": "meter metre",
    "in": "inch inche",
    "ft": "foot feet",
    "mi": "mile",
    "yd": "yard",
    "kg": "kilogram",
    "mg": "milligram",
    "g": "gram",
    "lb": "lbs",
    "oz": "ounce",
    "s": "second sec",
    "min": "minute",
    "h": "hour hr",
    "yr": "year",
    "l": "liter litre",
    "ml": "milliliter millilitre",
    "j": "joule",
    "n": "newton",
    "w": "watt",
    "v": "volt",
    "hz": "hertz",
    "rad": "radian",
    "deg": "degree",
    "dollar": "$ usd",
    "euro": "€ eur",
    "pound": "£ gbp",
    "yen": "¥ jpy",
    "cent": "¢",
    "percent": "%",
}
_SHORT = {long: short for short, names in _NAMES.items() for long in names.split()}
_SHORT |= {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "unit": ""}
# what may follow digits without a space, and needs no vowel
_ABBREVIATIONS = frozenset(
    [*_NAMES, "lbs", "hr", "hrs", "sec", "secs", "mins", "yrs", "mph", "kmh", "kph", "kw", "am", "pm"]
)
_ONE_LETTER_UNITS = frozenset("mgshlLNJWV")

_MARKUP = re.compile(
    r"\\(?:text|textrm|textit|textbf|mathrm|mathit|mathbf|mbox)\s*\{([^{}]*)\}|\\[,;:! ]|[~$]"
)
_DEGREES = re.compile(
    r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])|°)\s*(?:\\(?:text|mathrm)\{\s*([CF])\s*\}|([CF])\b)?"
)
_SCALES = {"C": "celsius", "F": "fahrenheit"}
# 34 - m and 34/m are no units
_ALGEBRA = re.compile(r"(?:^\s*(?:[/·]|\\cdot)|-)\s*[a-zA-Z](?![a-zA-Z])")
_UNIT = re.compile(r"([^\W\d_]+)\.?(?:\^\{?(-?[1-4])\}?)?")
_NOON = re.compile(r"\b([ap])\.?m\.?(?![a-z])", re.IGNORECASE)
_CURRENCY = re.compile(r"(?:US)?\\?\$|€|£|¥|\\pounds\b|\\euro\b|(?:USD|EUR|GBP)\s")
_SIGN_CURRENCY = re.compile(
    rf"(?P<sign>[+-]?)\s*(?P<mark>{_CURRENCY.pattern})\s*(?:\{{\}})?(?=\s*[-+]?[.\d\\{{])"
)
_PER = re.compile(r"\bper\b|\b(?:an?|each|every)\b(?=\s+[a-z]{2})")  # 18 dollars a day
_DANGLING = re.compile(r"(?:[-/·]|\\cdot)$")  # 34 -
_MONEY = frozenset(("dollar", "euro", "pound", "yen", "cent"))
_MAX_LENGTH = 120  # characters of a unit


def split_currency(text: str) -> tuple[str, str]:
    r"""Take the mark of a currency off the front: "-\$5" → ("-5", "dollar"); "5" → ("5", "").

    A dollar sign with its partner behind it, "$5$", is markup.
    """
    match = _SIGN_CURRENCY.match(text)
    if match is None:
        return text, ""
    mark = match["mark"].strip().lower().lstrip("\\").removeprefix("us\\").rstrip("s")
    if match["mark"] == "$" and text.count("$") - text.count("\\$") != 1:
        return text, ""
    name = _SHORT.get("$" if mark.endswith("$") else mark, mark)
    return match["sign"] + text[match.end() :], name


def unit_of(text: str) -> str | None:
    r"""Return the unit that `text` names, in its shortest form; None if it is no unit, but changes a number.

    "" → ""; " square centimeters", "\text{ cm}^2" → "cm^2"; "%" → "percent"; "x", " or so", "k" → None.
    """
    if len(text) > _MAX_LENGTH:
        return None
    is_attached = text[:1].isalpha()
    if _ALGEBRA.search(text):
        return None
    text = _DEGREES.sub(
        lambda match: f" degrees {_SCALES.get(match[1] or match[2], '')} ", text.replace("~", " ")
    )
    is_marked = bool(_MARKUP.match(text.lstrip()))
    text = _MARKUP.sub(lambda match: f" {match[1] or ''} ", text)
    text = re.sub(r"\\?%|¢", lambda match: " percent " if match[0] != "¢" else " cents ", text, count=1)
    text = re.sub(r"[€£¥]|\\?\$", lambda match: f" {_SHORT[match[0].lstrip(chr(92))]} ", text, count=1)
    text = text.replace("(", " ").replace(")", " ").replace("²", "^2").replace("³", "^3")
    text = _NOON.sub(r" \1m ", text.replace("per cent", "percent"))
    text = _PER.sub("/", re.sub(r"\s+(?=\^)", "", text.strip()))
    if _DANGLING.search(text):
        return None
    parts = [part for part in re.split(r"([\s/·-]|\\cdot)", text) if part.strip(" \t\n·-")]
    words = [part for part in parts if part not in ("/", "\\cdot")]
    if len(words) > 6:
        return None
    powers: Counter[str] = Counter()
    sign, factor = 1, 1
    for part in parts:
        unit = _UNIT.fullmatch(part)
        if part in ("/", "\\cdot"):
            sign = -1 if part == "/" else sign
        elif part.lower().rstrip(".") in _FACTORS:
            factor = _FACTORS[part.lower().rstrip(".")]
        elif unit is None:
            return None
        elif unit[1] in (_NOT_LAST if part is not words[-1] else ()):
            continue
        elif unit[1] in (_NOT_FIRST if part is not words[0] else ()):
            powers[_short(unit[1])] += 1
        elif not _is_unit_name(unit[1], is_attached and part is words[0] and not is_marked):
            return None
        else:
            power = int(unit[2] or 1) * sign * factor
            for name, direction in zip(_short(unit[1]).split("/"), (1, -1), strict=False):
                powers[name] += power * direction
            factor = 1
    del powers[""]
    if factor != 1:  # square what?
        return None
    return " ".join(name if power == 1 else f"{name}^{power}" for name, power in sorted(powers.items()))


def are_one(unit: str, other: str) -> bool:
    """True if two units are the same, or one of them is left out: dollars, dollars a day."""
    if not unit or not other or unit == other:
        return True
    amounts = [re.sub(r" ?\b\w+\^-1", "", each).strip() for each in (unit, other)]
    return amounts[0] == amounts[1] and amounts[0] in _MONEY and amounts[0] in (unit, other)


def _short(word: str) -> str:
    word = word.lower()
    singular = word
    if word not in _SHORT and len(word) > 2 and word.endswith("s") and not word.endswith("ss"):
        singular = word[:-2] if word.endswith(("ses", "xes", "ches", "shes")) else word[:-1]
    return _SHORT.get(singular, singular)


def _is_unit_name(word: str, is_attached: bool) -> bool:
    lower = word.lower()
    if lower in _NOT_UNIT_WORDS or word == "Mg" or _GLUED.fullmatch(word):
        return False
    if word > "\u2e80":  # Chinese, Japanese, Korean
        return True
    if len(word) == 1:
        return word in _ONE_LETTER_UNITS and not is_attached
    if lower in _ABBREVIATIONS or (lower.endswith("s") and lower[:-1] in _ABBREVIATIONS):
        return True
    return len(word) > (3 if is_attached else 2) and bool(re.search("[aeiouy]|[^a-z]", lower))
