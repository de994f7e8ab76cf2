r"""Parses an expression as LaTeX or plain text writes it: 2\frac{x}{y+1}, 2 1/2, [0, \infty).

What is not understood to its last character raises Unreadable: nothing is skipped and nothing guessed. A
command that means something keeps its meaning (\overline{34} is not 34); only a closed list of wrappers is
taken off.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from dapo.reward.tokens import CLOSING, FUNCTIONS, MAX_DEPTH, WRAPPERS, Ambiguous, Costly, Token, Unreadable

# ("number", Fraction, significant digits of a decimal), ("name", text), ("sum", a, b), ("power", a, b) …
Tree = tuple[Any, ...]

MAX_DIGITS = 1000  # of an exponent's power of ten: 1e1000 is read, 1e1001 is not


_MARK_NAMES = """
    overline underline hat widehat vec bar tilde widetilde dot ddot overrightarrow mathbb mathcal mathfrak
"""
MARKS = frozenset(_MARK_NAMES.split())
_GREEK_NAMES = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau
    upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell
"""
GREEK = frozenset(_GREEK_NAMES.split())


def parse(tokens: list[Token]) -> Tree:
    """Return the tree of an expression. Raise Unreadable where not all of it is understood."""
    return _Parser(tokens).all()


class _Parser:
    """A recursive descent over the tokens of one side of a statement."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.depth = 0

    def all(self) -> Tree:
        tree = self.union()
        if self.position < len(self.tokens):
            raise Unreadable(self.tokens[self.position].text)
        return tree

    def peek(self) -> str:
        return self.tokens[self.position].text if self.position < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.position].kind if self.position < len(self.tokens) else ""

    def next(self) -> Token:
        if self.position == len(self.tokens):
            raise Unreadable("the end")
        self.position += 1
        return self.tokens[self.position - 1]

    def take(self, text: str) -> bool:
        if self.peek() != text or self.kind() == "command":
            return False
        self.position += 1
        return True

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise Unreadable(f"{self.peek()} in place of {text}")

    def union(self) -> Tree:
        parts = [self.ratio()]
        while self.take("∪"):
            parts.append(self.ratio())
        return parts[0] if len(parts) == 1 else ("union", *parts)

    def ratio(self) -> Tree:
        parts = [self.sum()]
        while self.take(":"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else ("ratio", *parts)

    def sum(self) -> Tree:
        tree = self.signed()
        while self.kind() == "sign" and self.peek() in "+-±∓":
            sign = self.next().text
            term = self.product()
            tree = ("sum", tree, _signed(sign, term))
        return tree

    def signed(self) -> Tree:
        if self.kind() == "sign" and self.peek() in "+-±∓":
            sign = self.next().text
            return _signed(sign, self.product())
        return self.product()

    def product(self) -> Tree:
        tree = last = self.power()
        while True:
            if self.take("*"):
                last = self.factor()
                tree = ("product", tree, last)
            elif self.take("/"):
                last = self.factor()
                tree = ("quotient", tree, last)
            elif self.starts_a_factor():
                is_mixed = last[0] == "number" and self.peek() == "frac"
                right = self.power()
                if is_mixed and right[0] == "quotient" and _is_integer(last):
                    if tree is not last:
                        raise Ambiguous("a mixed number in a product")
                    tree = last = _mixed(tree, right)
                else:
                    tree = last = ("product", tree, right)
            else:
                return tree

    def factor(self) -> Tree:
        return ("negative", self.power()) if self.take("-") else self.power()

    def starts_a_factor(self) -> bool:
        """True where a factor follows without a sign: a name, a command or an opening bracket."""
        if self.kind() in ("word", "command"):
            return self.peek() not in WRAPPERS and self.peek() not in ("rfloor", "rceil")
        return self.peek() in ("(", "{") or (self.kind() == "bracket" and self.peek() == "|" and self.opens())

    def opens(self) -> bool:
        """True if the bar at this place opens a pair: an even number of bars stand before it."""
        return sum(token.text == "|" for token in self.tokens[: self.position]) % 2 == 0

    def power(self) -> Tree:
        tree = self.postfix(self.atom())
        if self.take("^"):
            tree = self.postfix(("power", tree, self.script()))
        return tree

    def postfix(self, tree: Tree) -> Tree:
        while True:
            if self.take("!"):
                if tree[0] == "factorial":
                    raise Ambiguous("!!")
                tree = ("factorial", tree)
            elif self.take("°"):
                tree = ("product", tree, ("quotient", ("π",), ("number", Fraction(180), 0)))
            else:
                return tree

    def script(self) -> Tree:
        """Read an exponent: {n+1}, -3, 10 (all digits of a number, as plain text means it)."""
        if self.take("{"):
            tree = self.sum()
            self.expect("}")
            return tree
        sign = self.next().text if self.kind() == "sign" and self.peek() in "+-" else "+"
        # no mixed number: what follows in \sin^2 2x is the argument
        return _signed(sign, number(self.next().text) if self.kind() == "number" else self.atom())

    def argument(self) -> Tree:
        r"""Read what a command takes: {…}, or one character: \frac12 is 1/2."""
        if self.take("{"):
            tree = self.sum()
            self.expect("}")
            return tree
        token = self.next()
        if token.kind == "number":
            if not token.text.isdigit():
                raise Unreadable(token.text)
            if len(token.text) > 1:
                self.position -= 1
                self.tokens = [*self.tokens]
                self.tokens[self.position] = Token("number", token.text[1:])
            return ("number", Fraction(int(token.text[0])), 0)
        self.position -= 1
        return self.atom()

    def atom(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:
            raise Costly(f"{self.depth} levels deep")
        tree = self.any_atom()
        self.depth -= 1
        return tree

    def any_atom(self) -> Tree:
        token = self.next()
        if token.kind == "number":
            return self.number(token)
        if token.kind == "word":
            return self.name(token.text)
        if token.kind == "command":
            return self.command(token.text)
        if token.kind == "begin":
            return self.matrix(token.text)
        if token.text == "{":
            parts = [self.sum()]
            while self.take(","):  # {1, 2} in plain text is a set
                parts.append(self.sum())
            self.expect("}")
            return ("group", parts[0]) if len(parts) == 1 else ("\\{", "\\}", *parts)
        if token.text == "|":
            tree = self.sum()
            self.expect("|")
            return ("abs", tree)
        if token.text in ("(", "[", "\\{"):
            return self.bracket(token.text)
        if token.text == "∅":
            return ("\\{", "\\}")
        raise Unreadable(token.text)

    def bracket(self, opening: str) -> Tree:
        parts = []
        if opening == "\\{" and self.take("\\}"):
            return ("\\{", "\\}")
        while True:
            parts.append(self.sum())
            closing = self.next().text
            if closing not in (",", ";"):
                break
        if closing not in CLOSING or closing == "}" or (opening == "\\{") != (closing == "\\}"):
            raise Unreadable(closing)
        if len(parts) == 1 and opening != "\\{":
            if opening + closing != "()":
                raise Unreadable(opening)
            return ("group", parts[0])
        if opening + closing in ("(]", "[)") and len(parts) != 2:
            raise Unreadable(opening)
        return (opening, closing, *parts)

    def matrix(self, kind: str) -> Tree:
        if kind not in ("pmatrix", "bmatrix", "matrix"):
            raise Unreadable(kind)
        rows: list[Tree] = []
        row: list[Tree] = []
        while self.kind() != "end":
            row.append(self.sum())
            if self.kind() == "line":
                self.next()
                rows.append(("row", *row))
                row = []
            elif not self.take("&") and self.kind() != "end":
                raise Unreadable(self.peek())
        if self.next().text != kind:
            raise Unreadable(kind)
        return ("matrix", *rows, *([("row", *row)] if row else []))

    def number(self, token: Token) -> Tree:
        tree = number(token.text)
        if "." in token.text and self.peek() == "overline" and self.kind() == "command":  # 0.1\overline{6}
            self.next()
            self.expect("{")
            digits = self.next().text
            self.expect("}")
            places = len(token.text.partition(".")[2])
            if not digits.isdigit():
                raise Unreadable(digits)
            period = Fraction(int(digits), 10**places * (10 ** len(digits) - 1))
            return ("number", tree[1] + period, 0)
        if self.take("_"):
            if not token.text.isdigit():
                raise Unreadable("_")
            return ("name", f"{token.text.lstrip('0')}_{self.subscript()}")  # a numeral in another base
        if self.kind() == "number":  # 2 1/2
            following = [token.text for token in self.tokens[self.position : self.position + 3]]
            is_fraction = len(following) == 3 and following[1] == "/" and following[2].isdigit()
            if not (token.text.isdigit() and is_fraction and following[0].isdigit()):
                raise Unreadable("a number after a number")
            self.position += 3
            top, bottom = number(following[0]), number(following[2])
            return _mixed(tree, ("quotient", top, bottom))
        return tree

    def name(self, text: str) -> Tree:
        if text in ("e", "i") and self.peek() not in ("_", "'"):
            return (text,)
        if self.take("_"):
            text += "_" + self.subscript()
        while self.take("'"):
            text += "'"
        return ("name", text)

    def subscript(self) -> str:
        if not self.take("{"):
            return self.next().text
        text = ""
        while not self.take("}"):
            token = self.next()
            if token.text == "{":
                raise Unreadable("{")
            text += token.text
        return text

    def command(self, text: str) -> Tree:
        if text == "frac":
            top = self.argument()
            bottom = self.argument()
            return ("quotient", top, bottom)
        if text == "sqrt":
            degree: Tree = ("number", Fraction(2), 0)
            if self.take("["):
                degree = self.sum()
                self.expect("]")
            return ("root", self.argument(), degree)
        if text in ("binom", "choose"):
            top = self.argument()
            return ("binomial", top, self.argument())
        if text in ("lfloor", "lceil"):
            inner = self.sum()
            if self.next().text != {"lfloor": "rfloor", "lceil": "rceil"}[text]:
                raise Unreadable(text)
            return ("floor", inner) if text == "lfloor" else ("negative", ("floor", ("negative", inner)))
        if text in FUNCTIONS:
            return self.function(text)
        if text == "pi":
            return ("π",)
        if text == "infty":
            return ("infinity",)
        if text in GREEK:
            return self.name("\\" + text)
        if text in MARKS:
            return self.name(f"\\{text}{{{self.letters()}}}")
        if text in WRAPPERS:
            self.expect("{")
            inner = self.sum()
            self.expect("}")
            return ("group", inner)
        raise Unreadable(text)

    def letters(self) -> str:
        r"""Read the letters under a mark: \overline{AB}. \overline{34} is no letter."""
        is_group = self.take("{")
        text = self.letter()
        while is_group and not self.take("}"):
            text += self.letter()
        return text

    def letter(self) -> str:
        token = self.next()
        if token.kind not in ("word", "command"):
            raise Unreadable(token.text)
        return token.text

    def function(self, name: str) -> Tree:
        r"""Read \sin^2 2x, \log_2 8, \ln(x+1): the argument goes to the next sign, function or bracket."""
        base: Tree | None = None
        exponent: Tree | None = None
        if self.take("_"):
            base = self.argument() if name == "log" else None
            if base is None:
                raise Unreadable("_")
        if self.take("^"):
            exponent = self.script()
        if self.peek() in ("(", "{"):
            argument = self.atom()
        else:
            argument = self.power() if self.peek() not in FUNCTIONS else self.atom()
            while self.starts_a_factor() and not (self.kind() == "command" and self.peek() in FUNCTIONS):
                argument = ("product", argument, self.power())
        tree: Tree = ("function", name, argument)
        if base is not None:
            tree = ("quotient", ("function", "ln", argument), ("function", "ln", base))
        if exponent is None:
            return tree
        if exponent == ("negative", ("number", Fraction(1), 0)):
            if name not in ("sin", "cos", "tan"):
                raise Unreadable(name)
            return ("function", "arc" + name, argument)
        return ("power", tree, exponent)


def number(text: str) -> Tree:
    """Read "12", "1.50", ".5", "1e-05" exactly; the last entry counts a decimal's significant digits."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent) > 5 or abs(int(exponent or "0")) > MAX_DIGITS:
        raise Costly(text)
    is_decimal = "." in mantissa or bool(exponent)
    digits = len(mantissa.replace(".", "").lstrip("0")) if is_decimal else 0
    return ("number", Fraction(mantissa) * Fraction(10) ** int(exponent or "0"), digits)


def _signed(sign: str, tree: Tree) -> Tree:
    return tree if sign == "+" else ("negative", tree) if sign == "-" else (sign, tree)


def _is_integer(tree: Tree) -> bool:
    return bool(tree[2] == 0 and tree[1].denominator == 1)


def _mixed(whole: Tree, fraction: Tree) -> Tree:
    r"""Return 2\frac{1}{2} as 5/2. Raise Ambiguous for 2\frac{7}{2}, which may be a product."""
    top, bottom = fraction[1], fraction[2]
    if top[0] != "number" or bottom[0] != "number":
        return ("product", whole, fraction)
    if not (_is_integer(top) and _is_integer(bottom) and top[1] < bottom[1]):
        raise Ambiguous("a mixed number")
    return ("number", whole[1] + top[1] / bottom[1], 0)
