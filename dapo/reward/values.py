"""Decides whether two pieces of mathematics are one: exactly where it can, else to hundreds of digits.

Rational numbers are compared as fractions. Irrational ones are the same if their difference vanishes with
the precision that it is computed to; expressions with names, if they agree so at points of both signs. There
is no absolute tolerance. A decimal of 12 digits or more stands for the irrational numbers that round to it.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from dapo.reward.expressions import Tree
from dapo.reward.tokens import Costly, Unreadable

_MAX_BITS = 1 << 14  # of a numerator or denominator: 2^{10000} is computed, 10^{10000} is not
_MAX_ARGUMENT = 10**6  # of a function or of an exponent's effect
_MAX_FACTORIAL = 1000
_PRECISIONS = 40, 160  # decimal digits
_POINTS = 8
_DOUBLE = Fraction(1, 1 << 52)  # a unit in the last place

Value = Any  # Fraction, or a number of mpmath
Names = Mapping[str, Fraction]
_STRUCTURES = frozenset(("(", "[", "\\{", "union", "matrix", "row", "ratio"))
_REALS = ("(", ")", ("negative", ("infinity",)), ("infinity",))
_UNORDERED = frozenset(("\\{", "union"))


def is_same(tree: Tree, other: Tree) -> bool:
    """True if two sides are equal: pairs and intervals in their order, sets in any, all else by value."""
    tree, other = (_REALS if side == ("name", r"\mathbb{R}") else side for side in (bare(tree), bare(other)))
    if tree == other:
        return True
    if tree[0] in _STRUCTURES or other[0] in _STRUCTURES:
        skip = 2 if tree[0] in ("(", "[", "\\{") else 1
        if tree[:skip] != other[:skip] or len(tree) != len(other):
            return False
        if tree[0] in _UNORDERED:
            return is_matching(tree[skip:], other[skip:])
        return all(is_same(a, b) for a, b in zip(tree[skip:], other[skip:], strict=True))
    if infinity(tree) or infinity(other):
        return infinity(tree) == infinity(other)
    names = sorted(names_in(tree) | names_in(other))
    if not names:
        value, expected = evaluate(tree), evaluate(other)
        if isinstance(value, Fraction) and isinstance(expected, Fraction):
            return (
                value == expected
                or _is_its_double(tree, value, expected)
                or (_is_its_double(other, expected, value))
            )
        return _vanishes(tree, other, {}) or _rounds_to(tree, expected) or _rounds_to(other, value)
    agreed = 0
    for point in points_of(names):
        values = [try_value(side, point) for side in (tree, other)]
        if (values[0] is None) != (values[1] is None):
            return False
        if values[0] is not None:
            if not _vanishes(tree, other, point):
                return False
            agreed += 1
    return agreed > 2


def is_matching(trees: Sequence[Tree], others: Sequence[Tree]) -> bool:
    """True if each of `trees` equals another one of `others`, in any order."""
    left = list(others)
    for tree in trees:
        for i, other in enumerate(left):
            if is_same(tree, other):
                del left[i]
                break
        else:
            return False
    return not left


def at(tree: Tree, point: Names) -> Tree:
    """Put numbers in the place of names: x + 1 at x = 2 is 2 + 1."""
    if tree[0] == "name":
        return ("number", point[tree[1]], 0)
    return tuple(at(part, point) if isinstance(part, tuple) else part for part in tree)


def bare(tree: Tree) -> Tree:
    """Take grouping off: ((1, 2)) → (1, 2)."""
    while tree[0] == "group":
        tree = tree[1]
    return tree


def infinity(tree: Tree) -> int:
    """Return 1 for ∞, −1 for −∞, else 0."""
    tree = bare(tree)
    if tree[0] == "negative":
        return -infinity(tree[1])
    return int(tree[0] == "infinity")


def names_in(tree: Tree) -> frozenset[str]:
    """Return the names of a tree; \\log without a base has the name of its base."""
    if tree[0] == "name":
        return frozenset([tree[1]])
    found = frozenset(["log"]) if tree[:2] == ("function", "log") else frozenset()
    return found.union(*(names_in(part) for part in tree if isinstance(part, tuple)))


def check(tree: Tree) -> None:
    """Raise Unreadable for what has no value: 1/0, a pair inside a sum; and Costly for a number too large."""
    tree = bare(tree)
    if tree[0] in _STRUCTURES:
        for part in tree[1:]:
            if isinstance(part, tuple):
                check(part)
    elif not infinity(tree):
        points = points_of(sorted(names_in(tree)))
        if all(try_value(tree, point) is None for point in points[1:]):
            evaluate(tree, points[0])


def evaluate(tree: Tree, names: Names | None = None, digits: int = _PRECISIONS[0]) -> Value:
    """Compute a tree: a Fraction where that is exact, else a number of `digits` decimal digits.

    Raises:
        Costly: a number on the way is too large.
        Unreadable: it has no value.
    """
    try:
        return _evaluate(tree, names or {}, context_of(digits))
    except (ZeroDivisionError, OverflowError, ValueError, TypeError) as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(str(error)) from error


def try_value(tree: Tree, names: Names) -> Value | None:
    try:
        return evaluate(tree, names)
    except Costly:
        raise
    except Unreadable:
        return None


def _evaluate(tree: Tree, names: Names, context: Any) -> Value:
    kind, *parts = tree
    if kind == "number":
        return parts[0]
    if kind == "name":
        return names[parts[0]]
    if kind in ("π", "e"):
        return +(context.pi if kind == "π" else context.e)
    if kind == "i":
        return context.mpc(0, 1)
    if kind == "function":
        name, argument = parts
        return _function(name, _evaluate(argument, names, context), names, context)
    operation = _OPERATIONS.get(kind)
    if operation is None:
        raise Unreadable(kind)
    return _checked(operation(context, *(_evaluate(part, names, context) for part in parts)))


def _checked(value: Value) -> Value:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
            raise Costly("too large a number")
    elif value != value or abs(value) == math.inf:
        raise Unreadable("no number")
    return value


def _number(value: Value, context: Any) -> Value:
    if not isinstance(value, Fraction):
        return value
    return context.mpf(value.numerator) / value.denominator


def _binary(operation: Any) -> Any:
    def apply(context: Any, a: Value, b: Value) -> Value:
        if isinstance(a, Fraction) != isinstance(b, Fraction):
            a, b = _number(a, context), _number(b, context)
        return operation(a, b)

    return apply


def _power(context: Any, base: Value, exponent: Value) -> Value:
    if base == 0 and (not isinstance(exponent, Fraction) or exponent <= 0):
        raise Unreadable("0 to the power of 0")
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * (bits - 1) > _MAX_BITS:
            raise Costly("too large a power")
        return base ** int(exponent)
    if base == 0:
        return Fraction(0)
    number = _number(base, context)
    if abs(exponent) * (abs(context.log(abs(number))) + 4) > _MAX_ARGUMENT:
        raise Costly("too large a power")
    return context.power(number, _number(exponent, context))


def _root(context: Any, value: Value, degree: Value) -> Value:
    is_odd = isinstance(degree, Fraction) and degree.denominator == 1 and degree % 2 == 1
    if is_odd and isinstance(value, Fraction) and value < 0:
        return -_power(context, -value, 1 / degree)
    return _power(context, value, 1 / degree)


def _factorial(context: Any, value: Value) -> Value:
    _bound(value, _MAX_FACTORIAL)
    if isinstance(value, Fraction) and value.denominator == 1:
        return Fraction(math.factorial(int(value)))
    return context.gamma(_number(value, context) + 1)


def _binomial(context: Any, top: Value, bottom: Value) -> Value:
    _bound(top, _MAX_FACTORIAL)
    _bound(bottom, _MAX_FACTORIAL)
    if all(isinstance(value, Fraction) and value.denominator == 1 and value >= 0 for value in (top, bottom)):
        return Fraction(math.comb(int(top), int(bottom)))
    return context.binomial(_number(top, context), _number(bottom, context))


def _floor(context: Any, value: Value) -> Value:
    if isinstance(value, Fraction):
        return Fraction(math.floor(value))
    if isinstance(value, context.mpc) or abs(value) > _MAX_ARGUMENT:
        raise Unreadable("floor")
    return Fraction(int(context.floor(value)))


_OPERATIONS: dict[str, Any] = {
    "sum": _binary(lambda a, b: a + b),
    "product": _binary(lambda a, b: a * b),
    "quotient": _binary(lambda a, b: a / b),
    "negative": lambda context, a: -a,
    "group": lambda context, a: a,
    "abs": lambda context, a: abs(a),
    "power": _power,
    "root": _root,
    "factorial": _factorial,
    "binomial": _binomial,
    "floor": _floor,
}


def _function(name: str, argument: Value, names: Names, context: Any) -> Value:
    number = _number(argument, context)
    if name in ("ln", "log", "lg"):
        if argument == 0:
            raise Unreadable("the logarithm of 0")
        base = {"ln": None, "log": names.get("log"), "lg": Fraction(10)}[name]
        return context.ln(number) if base is None else context.ln(number) / context.ln(_number(base, context))
    _bound(argument, _MAX_ARGUMENT)
    if name.startswith("arc"):
        return getattr(context, "a" + name.removeprefix("arc"))(number)
    return _checked(getattr(context, name)(number))


def _bound(value: Value, limit: int) -> None:
    if abs(value) > limit:
        raise Costly("too large an argument")


def _vanishes(tree: Tree, other: Tree, names: Names) -> bool:
    """True if the difference of two values vanishes: with the precision, or exactly where both are exact."""
    differences, scale = [], Fraction(0)
    for digits in _PRECISIONS:
        try:
            values = [evaluate(side, names, digits) for side in (tree, other)]
        except Costly:
            raise
        except Unreadable:
            return False
        if all(isinstance(value, Fraction) for value in values):
            return bool(values[0] == values[1])
        a, b = (_number(value, context_of(digits)) for value in values)
        differences.append(abs(a - b))
        scale = max(abs(a), abs(b))
    low, high = _PRECISIONS
    tiny = context_of(high).mpf(10)
    return bool(
        differences[1] <= scale * tiny ** (10 - high)
        or (differences[0] > 0 and differences[1] <= differences[0] * tiny ** (low + 20 - high))
    )


def _digits(tree: Tree) -> int:
    """Return a decimal's significant digits, also in 1.5 × 10^3; 0 for what is no decimal."""
    tree = bare(tree)
    if tree[0] == "number":
        return int(tree[2])
    if tree[0] == "negative":
        return _digits(tree[1])
    if tree[0] == "product" and tree[2][0] == "power" and tree[2][1] == ("number", Fraction(10), 0):
        return _digits(tree[1])
    return 0


def _is_its_double(tree: Tree, value: Fraction, other: Fraction) -> bool:
    """True if `tree` is a decimal of 16 or 17 digits, as programs print a double, and `other` is as near."""
    if not 16 <= _digits(tree) <= 17 or abs(value - other) > _DOUBLE * abs(other):
        return False
    return 1e-300 < abs(value) < 1e300 and Fraction(repr(float(value))) == value


def _rounds_to(tree: Tree, value: Value) -> bool:
    """True if `tree` is a decimal of at least 12 digits, and the irrational `value` rounds to it."""
    digits = _digits(tree)
    if digits < 12 or digits > _PRECISIONS[0] - 5 or isinstance(value, Fraction):
        return False
    context = context_of(_PRECISIONS[0])
    decimal = evaluate(tree)
    if isinstance(value, context.mpc) or not isinstance(decimal, Fraction) or decimal == 0:
        return False
    unit = Fraction(10) ** (math.floor(context.log10(abs(_number(decimal, context)))) + 1 - digits)
    nearest = max(unit / 2, abs(decimal) * _DOUBLE if digits in (16, 17) else Fraction(0))
    return bool(abs(_number(decimal, context) - value) <= _number(nearest, context))


def points_of(names: Sequence[str]) -> list[dict[str, Fraction]]:
    """Return points at which to compare: all names positive, all negative, then of both signs.

    The base of a logarithm is always positive.
    """
    points = []
    for i in range(_POINTS):
        point = {}
        for name in names:
            noise = zlib.crc32(f"{name} {i}".encode())
            is_positive = name == "log" or (i == 0 if i < 2 else noise % 2 == 0)
            point[name] = (1 if is_positive else -1) * Fraction(50 + noise // 2 % 140, 97)
        points.append(point)
    return points


@functools.cache
def context_of(digits: int) -> Any:
    """Return an arithmetic of mpmath with its own precision."""
    import mpmath  # a tenth of a second: only where an answer needs it

    context = mpmath.ctx_mp.MPContext()
    context.dps = digits or _PRECISIONS[0]
    return context
