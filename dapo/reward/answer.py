r"""The check of an answer (Eq. 7): the last "Answer:" line counts, or the last \boxed{…}.

A response's answer and a ground truth are read by the same functions. A ground truth that is written as an
integer requires one; anything else is compared as letters or as mathematics. What is not understood is wrong
in a response, and refused in data.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from dapo.reward import units, values
from dapo.reward.expressions import Tree
from dapo.reward.notation import is_notation
from dapo.reward.quantities import is_denied
from dapo.reward.sentences import without_sentence
from dapo.reward.statements import Statement, are_same, is_name, read
from dapo.reward.tokens import FUNCTIONS, WRAPPERS, Ambiguous, Costly, Unreadable, check_size

AnswerFormat = Literal["answer_line", "boxed", "either"]
_BOX = re.compile(r"\\boxed *\{")
_ANSWER = re.compile(r"(?<![a-z0-9])answer[*_]*\s*[:：]\}?(.*)", re.IGNORECASE)
# what a chat template ends a message with: <|im_end|>, </s>, <end_of_turn>, <turn|>, [|endofturn|], [e~[
_END_MARK = re.compile(
    r"(?:<[|｜][^<>|｜\s]{1,40}[|｜]>|<[a-z_]{3,20}[|｜]>|<[|｜][a-z_]{3,20}>|\[[|｜][a-z_]{3,20}[|｜]\]|</?s>"
    r"|<(?:eo[a-z]|bos|pad|(?:end|start)_?of_?[a-z]\w{0,19}|_(?:end|start)|(?:reserved|extra_id)_[0-9]+)>"
    r"|</[a-z_]{1,20}>|\[(?:/INST|EOS|UNUSED_TOKEN_[0-9]+|(?:end|start)_of_\w{1,20})\]|\[e~\[|\]~!?b[\[\]])$",
    re.IGNORECASE,
)
_MAX_END_MARKS = 8
_END_MARK_LENGTH = 64

_DIGITS = {ord(wide): narrow for wide, narrow in zip("０１２３４５６７８９", "0123456789", strict=True)}
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"))
_PLAIN_CHARACTERS = _DIGITS | _INVISIBLE | str.maketrans("−–‒－﹣＋＝，．。％＄（）", "-----+=,..%$()")
_LEFT_RIGHT = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?=\s*(?:[()\[\]|]|\\[{}]))")

# what may stand around an answer; "(" and "{" only group, where one number is inside
_PAIRS = (
    *(("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("(", ")"), ("{", "}"), ('"', '"'), ("“", "”"), ("'", "'")),
    *((f"\\{command}{{", "}") for command in WRAPPERS),
)
_WRAPPER = rf"\\(?:{'|'.join(WRAPPERS)})\{{"
_OPENING = re.compile(rf"(?:\s|\\\$|[$*_`\"“'{{(]|\\[([]|{_WRAPPER})*")
_MARKS = re.compile(rf"{_WRAPPER}|\\?\S")
_CLOSING = re.compile(r"(?:\s|[$*_`\"”'})]|\\[)\]])*")
_FORMAT = re.compile(r"\\(?:displaystyle|textstyle|large|Large|bf|rm|it|sf|tt)(?![a-zA-Z])|\\[,;:! ]")
_SPACES = ("\\,", "\\;", "\\:", "\\!", "\\ ")
_EDGES = " \t\r\n\u00a0*_`"
_SEPARATOR = r"(?P<separator>,|\{,\}|\\,|,\\!|[\u2009\u202f\u00a0])"
_GROUPED = rf"[0-9]{{1,3}}{_SEPARATOR}[0-9]{{3}}(?:(?P=separator)[0-9]{{3}})*(?![0-9])"
_INTEGER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<digits>{_GROUPED}|[0-9]+)(?:\.0*(?![0-9]))?")
_JOINS = re.compile(
    r"[,;?]|\\q?quad|\b(?:or|and|not|maybe|perhaps)\b|[<>≤≥≠≈]|[!~:]\s*$|^\s*[+-]?[0-9.]+\s+[a-z]"
    r"|\\(?:[lg]t|(?:ne|[lg]e)q?|approx|sim|equiv)(?![a-z])",
    re.IGNORECASE,
)

_ARGUMENTS = re.compile(r"\([a-zA-Z](?:, ?[a-zA-Z])+\)")  # gcd(a, b)

_SEVERAL = re.compile(r"\b(?:or|and)\b|[,;]")
_NAMED = re.compile(r"\\?[A-Za-z]\w*\s*=")
_WRAPPED = re.compile(rf"\\(?:{'|'.join(WRAPPERS)})\s*\{{([^{{}}]*)\}}")
_TEXT = re.compile(rf"{_WRAPPED.pattern}|[~$]|\\[ ,;:!]|\\q?quad")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:(?: |, |-|'|’|\. )[^\W_]+){0,15}")
_NO_WORDS = frozenset(("pi", "inf", "infinity", "oo", *FUNCTIONS))
_SHORT_WORDS = frozenset(("yes", "no", "odd", "all", "one", "two", "six", "ten", "red"))
_CHOICE = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\((?P<bracketed>[A-Ha-h])\)|(?P<letter>[A-Ha-h])(?:$|[.:)]))\s*[.:]?\s*(?P<rest>.*)",
    re.IGNORECASE,
)
_HEDGE = re.compile(r"\b(?:or|and|not|maybe|perhaps|nor)\b", re.IGNORECASE)
# where a unit may begin: at \text{, %, °, or at a word behind a number or a bracket
_UNIT_START = re.compile(
    r"(?:\s|~|\\[ ,;:!])*\\(?:text|mathrm|textrm|textit|textbf|mathit|mathbf|mbox)\s*\{"
    r"|\s*\\?%|\s*\^\s*\{?\s*\\circ|\s*°|\s*[€£¥]"
    r"|(?<=[0-9)}\]πi$])\s+(?=[^\W\d_]{2})|(?<=[0-9])(?=[a-zA-Z]{2})|(?<=[0-9$])\s+(?=[mgshlLNJWV]\b)"
)
_MAX_UNIT_STARTS = 8

_NO_VALUES = frozenset(("nan", "null", "n/a", "n.a", "n.a.", "<na>", "tbd"))
_IMAGE = re.compile(r"!\[.*\]\(.*\)|\[(?:image|img)\]|<(?:image|img)>", re.IGNORECASE)  # in Markdown
_FILE = re.compile(
    r"\.(?:png|jpe?g|gif|bmp|webp|avif|hei[cf]|svgz?|e?ps|tiff?|pdf|docx?|xlsx?|txt|tex|md|html?|json|jsonl|csv|npy"
    r"|parquet|zip|gz|mp[34]|wav)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reading:
    """An answer as mathematics: its statements, and a unit behind them ("" without one)."""

    statements: tuple[Statement, ...]
    unit: str = ""


def is_correct(response: str, answer: str, answer_format: AnswerFormat = "answer_line") -> bool:
    r"""True iff the last "Answer:" line holds `answer` and nothing else but markup, "name =" or a unit.

    With another format, iff what `answer_of` finds does.

    An integer must be written as one: `is_correct("so …\n**Answer:** 034.", "34")` → True; "68/2", "34 or
    35", "35, 34" → False. An answer of letters is compared without regard to case. Any other is mathematics:
    `is_correct("Answer: 0.5", "\\frac12")` → True.
    """
    given = answer_of(response, answer_format)
    return given is not None and _is_same(clean(given), *_ground_truth(answer))


def answer_of(response: str, answer_format: AnswerFormat = "answer_line") -> str | None:
    r"""Return the text behind the last "Answer:" to the end of its line, unwrapped; None if there is none.

    boxed: what the last \boxed{…} holds; None also if it is not closed. either: the one on the later line; on
    one line "Answer:", to which a box there belongs.
    """
    for line in reversed(response.splitlines()):
        match = None if answer_format == "boxed" else _ANSWER.search(line)
        if match:
            return unwrap(match.group(1)) or None
        if answer_format != "answer_line" and _BOX.search(line):
            return _last_box(response)
    return None


def _last_box(response: str) -> str | None:
    *_, (_, start) = (match.span() for match in _BOX.finditer(response))
    end = _partners(response[start - 1 :]).get(0)
    return None if end is None else unwrap(response[start : start - 1 + end]) or None


def refusal_of(answer: str) -> str | None:
    """Say why a ground truth cannot be used: `refusal_of("nan")` → "is not a value"; None: it can.

    It may begin with a solution, as GSM8K's do: "… #### 24".
    """
    if _INTEGER.fullmatch(answer):
        return None
    text = clean(_last_part(answer))
    if not text:
        return "is blank"
    bare = text.strip("-+[]")
    if bare.casefold() in _NO_VALUES or bare in ("None", "NA", "NaT"):
        return "is not a value"
    if _FILE.search(text) or _IMAGE.fullmatch(text):
        return "is the name of a file"
    if stated_integer(text) or choice_of(text) or words_of(text):
        return None
    is_read = False
    try:
        statements = read_mathematics(text).statements
        is_read = True
        for tree in (tree for statement in statements for tree in statement.trees):
            if tree is not None:
                values.check(tree)
    except Costly:
        return "is too long, too deep or too large a number to be compared"
    except Ambiguous:
        return None
    except Unreadable:
        if is_read or not is_notation(text):
            return "is neither a number nor words nor mathematics that can be read"
    return None


def is_same(given: str, answer: str) -> bool:
    """True if `given`, as `answer_of` returns it or as data states it, equals the ground truth `answer`."""
    return _is_same(clean(_last_part(given)), *_ground_truth(answer))


@functools.lru_cache(maxsize=1024)  # a group has one
def _ground_truth(answer: str) -> tuple[str, tuple[str, str] | None]:
    """Return a ground truth without markup; and its integer and unit, if it is written as one."""
    gold = clean(_last_part(answer))
    integer = stated_integer(gold) if "=" not in gold else None
    return gold, integer if integer and integer[1] != "percent" else None


def _last_part(answer: str) -> str:
    return answer.rpartition("####")[2]


def clean(text: str) -> str:
    """Remove the sentence before a value and markup at both ends: "The answer is **$34$**." → "34"."""
    if _INTEGER.fullmatch(text):
        return text
    text = unwrap(text)
    said = without_sentence(text)
    return text if said == text else unwrap(said)


def unwrap(text: str) -> str:
    r"""Remove markup at both ends, in linear time: `unwrap("**$\\boxed{34}$.**<|im_end|>")` → "34".

    Markup inside an answer is part of it.
    """
    text = _without_end_marks(text.translate(_PLAIN_CHARACTERS).rstrip())
    if "\\" in text:
        text = _LEFT_RIGHT.sub("", text)
    partners = _partners(text) if "{" in text else {}
    start, end = 0, len(text)
    while True:
        while start < end and text[start] in _EDGES:
            start += 1
        while start < end and text[end - 1] in _EDGES:
            end -= 1
        mark = _FORMAT.match(text, start, end)
        if mark:
            start = mark.end()
            continue
        if text.endswith(_SPACES, start, end):
            end -= 2
            continue
        bare = end - 1 if text.endswith(".", start, end) and not text.endswith("..", start, end) else end
        if start < bare < end and text[bare - 1] in _EDGES:  # **34**.
            end = bare
            continue
        for opening, closing in _PAIRS:
            if text.startswith(opening, start, bare) and text.endswith(closing, start, bare):
                break
        else:
            return text[start:bare]
        first, last = start + len(opening), bare - len(closing)
        is_part = opening in "({" and not _FORMAT.sub("", text[first:last]).strip("+-. ").isdigit()
        is_other = opening[-1] == "{" and partners.get(first - 1) != last  # {1}{2}
        if first > last or is_part or is_other:
            return text[start:bare]
        start, end = first, last


def _without_end_marks(text: str) -> str:
    for _ in range(_MAX_END_MARKS):
        match = text.endswith((">", "]", "[")) and _END_MARK.search(
            text, max(0, len(text) - _END_MARK_LENGTH)
        )
        if not match:
            break
        text = text[: match.start()].rstrip()
    return text


def _partners(text: str) -> dict[int, int]:
    """Return the place of each opening brace's closing one."""
    partners, opened = {}, []
    for match in re.finditer(r"\\.|[{}]", text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            partners[opened.pop()] = match.start()
    return partners


def _is_same(given: str, gold: str, integer: tuple[str, str] | None) -> bool:
    if not gold or not given:
        return False
    if integer:
        stated = stated_integer(given)
        if stated is None or stated[0] != integer[0]:
            return False
        if stated[1] == "percent":  # 1 % is not 1; a number beyond may be meant in percent
            return not integer[1] and integer[0] not in ("1", "-1")
        return units.are_one(stated[1], integer[1])
    if _literal(given) == _literal(gold):
        return True
    if _NAMED.match(gold) and stated_integer(gold) and not stated_integer(given):
        return False  # n = 12 asks for an integer, too
    choice = choice_of(gold)
    if choice and not choice[0].islower():
        return _is_choice(given, *choice)
    words = words_of(gold)
    if words:
        return words_of(given.strip("() ")) == words
    try:
        if not _is_same_mathematics(read_mathematics(given), read_mathematics(gold)):
            return False
    except Unreadable:
        return False
    names = (_SEVERAL.split(part)[-1] for part in given.split("=")[:-1])
    return "=" in gold or not any(map(is_denied, names))  # twice x = 1/2


def _literal(text: str) -> str:
    """Take out the wrappers of text, and spaces that separate no two words or numbers."""
    text = _WRAPPED.sub(r" \1 ", text)
    return re.sub(r"(?<![0-9A-Za-z.]) | (?![0-9A-Za-z.])", "", " ".join(text.split()))


# integers


def stated_integer(text: str) -> tuple[str, str] | None:
    r"""Return the one integer that is stated, and its unit; None for two, a doubt or a sum.

    "34 apples" → ("34", "apple"); "x = +034.0", "$34$" → ("34", ""). int() is not used: it takes quadratic
    time and refuses 4,301 digits.
    """
    match = _INTEGER.fullmatch(text)
    if match:
        return _canonical(match), ""
    *names, value = text.rsplit("=", 8) if "=" in text else [text]
    number = _with_unit(unwrap(value.replace("$", "") if names else value))
    for name in names:
        if (
            len(name) > 300
            or _JOINS.search(_ARGUMENTS.sub("", name))
            or number is None
            or not _may_name(unwrap(name), number[0])
        ):
            return None
    return number


def _may_name(text: str, integer: str) -> bool:
    """True if `text` may stand before "= 34": x, m + n, 25 + 9; not 2x or 25 + 8."""
    stated = _INTEGER.fullmatch(text)
    if stated is not None or not text:
        return stated is None or _canonical(stated) == integer
    if re.search(r"[a-zA-Z]", text.replace("\\", "")):
        return is_name(text)
    try:
        return len(integer) < 300 and are_same(read_mathematics(text).statements, tuple(read(integer)))
    except Unreadable:
        return True


def _with_unit(text: str) -> tuple[str, str] | None:
    text, currency = units.split_currency(text)
    opening = _OPENING.match(text).group()  # type: ignore[union-attr]  # it matches the empty string
    match = _INTEGER.match(text, len(opening))
    is_pair = match and match["separator"] == "," and re.search(r"(?<!\\)\(", opening)  # (1,234)
    if match is None or is_pair:
        return None
    tail = text[match.end() :].lstrip("*_`")  # **34** apples
    # "$34$ apples" has its closing marks; "$34" is an amount of money
    if opening.strip() not in ("", "$", "\\$"):
        closing = _CLOSING.match(tail).group()  # type: ignore[union-attr]
        if len(_MARKS.findall(closing)) != len(_MARKS.findall(opening)):
            return None
        tail = tail[len(closing) :]
    unit = units.unit_of(tail)
    return None if unit is None else (_canonical(match), _joined(currency, unit))


def _joined(currency: str, unit: str) -> str:
    return unit if not currency or currency == unit else f"{currency} {unit}".strip()


def _canonical(match: re.Match[str]) -> str:
    """Return an integer in its shortest form: "+034.0" → "34", "-0" → "0"."""
    digits = match["digits"].replace(match["separator"] or ",", "").lstrip("0") or "0"
    return digits if match["sign"] != "-" or digits == "0" else "-" + digits


# letters and words


def choice_of(text: str) -> tuple[str, str] | None:
    r"""Return the letter of a choice and what stands behind it: "(B) 34" → ("B", "34"), "B" → ("B", "")."""
    if len(text) > 300:
        return None
    match = _CHOICE.fullmatch(_TEXT.sub(lambda match: match[1] or " ", text).strip())
    if match is None or _HEDGE.search(match["rest"]):
        return None
    return match["bracketed"] or match["letter"], match["rest"].strip()


def _is_choice(given: str, letter: str, content: str) -> bool:
    choice = choice_of(given)
    if choice is None:
        return bool(content) and is_same(given, content)
    is_same_content = not content or not choice[1] or is_same(choice[1], content)
    return choice[0].upper() == letter.upper() and is_same_content


def words_of(text: str) -> str | None:
    r"""Return an answer of words without regard to case: "\text{No solution}" → "no solution"; else None."""
    if len(text) > 300:
        return None
    words = " ".join(_TEXT.sub(lambda match: match[1] or " ", text).split())
    if not _WORDS.fullmatch(words) or words in _NO_WORDS:
        return None
    if len(words) > 3 or words.casefold() in _SHORT_WORDS or not words.isascii():
        return words.casefold()
    return words if re.search("[aeiouAEIOU]", words) else None  # "ab" is not "AB"; "xy" is a product


# mathematics


@functools.lru_cache(maxsize=1024)  # a group has one ground truth, and many of its answers are equal
def read_mathematics(text: str) -> Reading:
    """Read a text, its unit and its money. Raise Unreadable where not all of it is understood."""
    check_size(text)
    text, currency = units.split_currency(text)
    for i, match in enumerate(_UNIT_START.finditer(text)):
        head, tail = text[: match.start()], text[match.start() :]
        if i == _MAX_UNIT_STARTS:
            break
        unit = units.unit_of(tail) if head.strip() else None
        is_angle = unit == "deg" and re.search(r"(?:sin|cos|tan|cot|sec|csc|circ|°)(?![a-z])", head)
        is_name = len(tail.strip()) == 1 and re.search(r"(?<![\\a-z])[a-zA-Z](?![a-z])", head)  # x^2 m
        if unit is not None and not is_angle and not is_name and head.count("{") == head.count("}"):
            return Reading(tuple(read(clean(head))), _joined(currency, unit))
    return Reading(tuple(read(text)), currency)


def _is_same_mathematics(given: Reading, gold: Reading) -> bool:
    if (given.unit == "percent") == (gold.unit == "percent"):
        return units.are_one(given.unit, gold.unit) and are_same(given.statements, gold.statements)
    percent, plain = (given, gold) if given.unit == "percent" else (gold, given)
    if plain.unit or len(given.statements) != 1 or len(gold.statements) != 1:
        return False
    [stated] = percent.statements
    tree = stated.value
    hundredth: Tree = ("product", tree, ("number", Fraction(1, 100), 0))
    fraction = Statement(stated.texts, (*stated.trees[:-1], hundredth), stated.relations)
    other = plain.statements
    if are_same((fraction,), other) if percent is given else are_same(other, (fraction,)):
        return True
    # 12.5 for 12.5 %, but not 0.5 for 0.5 %
    number = values.bare(tree)
    is_large = number[0] == "number" and number[1] > 1
    return is_large and are_same(given.statements, gold.statements)
