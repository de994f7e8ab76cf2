"""Cuts mathematics, as LaTeX or plain text writes it, into tokens: \\tfrac12 → frac, 12. Limits its cost."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

MAX_LENGTH = 1000  # characters
MAX_DEPTH = 40  # brackets open at once: the parser recurses as deep
MAX_TOKENS = 300  # a sum is a tree as deep as it has terms
MAX_PARTS = 64  # of a list


class Unreadable(ValueError):
    """Not mathematics that this module reads."""


class Costly(Unreadable):
    """Too long, too deep or too large a number."""


class Ambiguous(Unreadable):
    """Has two usual meanings; only the very same text equals it."""


# commands that mean nothing; no other is taken off
_WRAPPERS = """
    boxed fbox text textbf textrm textit textsf texttt textnormal emph mbox hbox mathbf mathrm mathit mathsf
    mathtt mathnormal boldsymbol bm
"""
WRAPPERS = tuple(_WRAPPERS.split())
_FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp"
FUNCTIONS = frozenset(_FUNCTIONS.split())
_PLAIN_WORDS = {"pi": "pi", "infinity": "infty", "inf": "infty", "oo": "infty", "sqrt": "sqrt"}

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_GREEK_NAMES = "alpha beta gamma delta epsilon theta lambda mu rho sigma phi omega"
_GREEK = dict(zip("αβγδεθλμρσφω", _GREEK_NAMES.split(), strict=True))
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}"),
        (r"\\(?:mathrm|mathbf|mathit|bm|boldsymbol)\s*\{([a-zA-Z])\}", r" \1 "),
        (r"\\operatorname\*?\s*\{([a-z]+)\}", r"\\\1 "),
        (r"[αβγδεθλμρσφω]", lambda match: f"\\{_GREEK[match[0]]} "),
        (r"ℝ", r"\\mathbb{R}"),
        (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\\(?:cdot|times|ast)(?![a-zA-Z])|[×·∙⋅]", "*"),
        (r"\*\*", "^"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),
        (r"\\div(?![a-zA-Z])|÷", "/"),
        (r"\\(?:leq?|leqslant)(?![a-zA-Z])|<=", "≤"),
        (r"\\(?:geq?|geqslant)(?![a-zA-Z])|>=", "≥"),
        (r"\\(?:neq?)(?![a-zA-Z])|!=", "≠"),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\in(?![a-zA-Z])", "∈"),
        (r"\\cup(?![a-zA-Z])", "∪"),
        (r"∞", r"\\infty "),
        (r"\\pm(?![a-zA-Z])", "±"),
        (r"\\mp(?![a-zA-Z])", "∓"),
        (r"\\(?:emptyset|varnothing)(?![a-zA-Z])", "∅"),
        (r"\\(?:lvert|rvert|vert)(?![a-zA-Z])", "|"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"π", r"\\pi "),
        (r"√\(([^()]*)\)|√([0-9]+|[a-z])", r"\\sqrt{\1\2}"),
        (r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![a-zA-Z])", "°"),
        (r"\\colon(?![a-zA-Z])", ":"),
        (r"\\(?:lor|vee)(?![a-zA-Z])", " or "),
        (r"\\text(?:rm|normal)?\s*\{\s*(or|and)\s*\}", r" \1 "),
        (r"[₀₁₂₃₄₅₆₇₈₉]+", lambda match: "_{" + match[0].translate(_SUBSCRIPTS) + "}"),
        (r"[½⅓⅔¼¾⅕⅛]", lambda match: f" {_VULGAR[match[0]]}"),
    )
]

_FORMULA = re.compile(r"(?<!\\)\\[()\[\]]")  # \( and \] stand for $
_SIDE_BY_SIDE = re.compile(r"\$\s*\$")  # $3$ $4$
_SPACE = re.compile(r"(?:\s|~|\\[,;:! ]|\\q?quad(?![a-zA-Z]))+")
_EUROPEAN = re.compile(r"[0-9]\.[0-9]{3},[0-9]")  # 1.234,5
_SEPARATED = r"(?:\{,\}|\\,|,\\!|[\u2009\u202f\u00a0])"
_NUMBER = re.compile(r"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)")
_TOKEN = re.compile(
    rf"""
    (?P<grouped>[0-9]{{1,3}}(?P<separator>{_SEPARATED}|,)[0-9]{{3}}(?:(?P=separator)[0-9]{{3}})*
        (?![0-9]|{_SEPARATED}[0-9]|,[0-9])(?:\.[0-9]+)?)
    | {_NUMBER.pattern}
    | \\begin\{{(?P<begin>[a-z]+)\}} | \\end\{{(?P<end>[a-z]+)\}}
    | \\(?P<command>[a-zA-Z]+) | (?P<word>[a-zA-Z]+)
    | (?P<bracket>\\[{{}}]|[()\[\]{{}}|]) | (?P<line>\\\\)
    | (?P<sign>[-+*/^_!'°,;:=<>≤≥≠∈∪±∓∅&])
    """,
    re.VERBOSE,
)
RELATIONS = frozenset("=<>≤≥≠∈")
OPENING, CLOSING = frozenset(("(", "[", "{", "\\{")), frozenset((")", "]", "}", "\\}"))
SEPARATORS = frozenset((",", ";", "or", "and"))


class Token(NamedTuple):
    kind: str  # number, word (one letter), phrase, command, bracket, sign, begin, end, line
    text: str


def tokenize(text: str) -> list[Token]:
    """Cut a text into tokens. Raise Costly where there are too many, Unreadable where it is odd."""
    text = _FORMULA.sub("$", text)
    if text.count("$") % 2 or _SIDE_BY_SIDE.search(text):
        raise Unreadable("$")
    text = text.replace("$", " ")
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if _EUROPEAN.search(text):
        raise Ambiguous("a comma behind a point")
    tokens: list[Token] = []
    position = depth = 0
    while position < len(text):
        space = _SPACE.match(text, position)
        if space:
            position = space.end()
            continue
        match = _TOKEN.match(text, position)
        if match and match["separator"] == "," and depth:  # (100,200) is a pair
            match = _NUMBER.match(text, position)
        if match is None:
            raise Unreadable(text[position])
        kind = str(match.lastgroup)
        depth += (match[0] in OPENING) - (match[0] in CLOSING)
        if kind == "grouped":
            tokens.append(Token("number", re.sub("[^0-9.]", "", match[0])))
        elif kind == "word":
            tokens += _words(match[0])
        else:
            tokens.append(Token(kind, match[kind]))
        position = match.end()
    if len(tokens) > MAX_TOKENS:
        raise Costly(f"{len(tokens)} tokens")
    return tokens


def check_size(text: str) -> None:
    """Raise Costly for a text that is too long or whose brackets are too deep."""
    if len(text) > MAX_LENGTH:
        raise Costly(f"{len(text)} characters")
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise Costly(f"{deepest} brackets deep")


def _words(word: str) -> list[Token]:
    """Cut letters into tokens: "or" is one, "pi" a command, "xy" two names; longer ones a phrase."""
    if word in ("or", "and"):
        return [Token("sign", word)]
    if word in _PLAIN_WORDS or word in FUNCTIONS:
        return [Token("command", _PLAIN_WORDS.get(word, word))]
    if len(word) > 3:
        return [Token("phrase", word)]
    return [Token("word", letter) for letter in word]


def split(tokens: list[Token], at: frozenset[str]) -> list[list[Token]]:
    """Split where one of the signs `at` stands outside all brackets; "|" is none."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token.text in OPENING or token.kind == "begin") - (
            token.text in CLOSING or token.kind == "end"
        )
        if depth == 0 and token.kind == "sign" and token.text in at:
            parts.append([])
        else:
            parts[-1].append(token)
    parts = [part for i, part in enumerate(parts) if part or not 0 < i < len(parts)]
    if len(parts) > MAX_PARTS:
        raise Costly(f"{len(parts)} parts")
    return parts
