"""Reads and compares statements, which are sides joined by relations: values, equations, ranges, lists."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dapo.reward.expressions import Tree, parse
from dapo.reward.quantities import has_operation, has_short_word, is_denied
from dapo.reward.tokens import (
    CLOSING,
    OPENING,
    RELATIONS,
    SEPARATORS,
    Costly,
    Token,
    Unreadable,
    split,
    tokenize,
)
from dapo.reward.values import at, bare, is_same, names_in, points_of, try_value

# x, f(x), S_{10}, (x,y): what is only a name for the value behind "="
_NO_NAME = r"(?!\\?(?:[dtc]?frac|sqrt|[dt]?binom)(?![a-z]))"
_NAME = rf"\(?{_NO_NAME}\\?[A-Za-z]+(?:_?[{{}}A-Za-z0-9',]*)(?:\([A-Za-z0-9,]*\))?\)?"


@dataclass(frozen=True)
class Statement:
    """Sides joined by relations: x = 3 has the sides x, 3 and the relation "="; 3 is a side alone.

    `trees` are None where a name before "=" is no mathematics ("Area = 3").
    """

    texts: tuple[str, ...]
    trees: tuple[Tree | None, ...]
    relations: tuple[str, ...]

    @property
    def value(self) -> Tree:
        tree = self.trees[-1]
        assert tree is not None
        return tree

    @property
    def name(self) -> str:
        """The text before the first "="; "" if there is none."""
        return self.texts[0] if self.relations else ""


def read(text: str) -> list[Statement]:
    """Return the statements of a text, separated by commas, semicolons, "or" and "and".

    Raises:
        Unreadable: not all of it is understood.
    """
    tokens = tokenize(text)
    statements: list[Statement] = []
    for part in split(tokens, SEPARATORS):
        statement = _statement(part)
        previous = statements[-1] if statements else None
        if previous and previous.relations == ("=",) and not statement.relations:  # x = 1 or 2
            texts, trees = (previous.name, *statement.texts), (previous.trees[0], *statement.trees)
            statement = Statement(texts, trees, ("=",))
        statements += _both_signs(statement)
    return statements


def _statement(tokens: list[Token]) -> Statement:
    sides = split(tokens, RELATIONS)
    relations = []
    depth = 0
    for token in tokens:
        depth += (token.text in OPENING) - (token.text in CLOSING)
        if depth == 0 and token.kind == "sign" and token.text in RELATIONS:
            relations.append(token.text)
    if relations[:1] == ["="] and not sides[0]:  # "= 34"
        del sides[0], relations[0]
    if len(sides) != len(relations) + 1 or len(sides) > 8:
        raise Unreadable("relations")
    texts = tuple("".join(token.text for token in side) for side in sides)
    trees: list[Tree | None] = []
    for i, side in enumerate(sides):
        try:
            trees.append(parse(side))
        except Unreadable:
            is_name = i < len(sides) - 1 and set(relations) <= {"=", "∈"}
            if not is_name or not side:
                raise
            trees.append(None)
    return Statement(texts, tuple(trees), tuple(relations))


def _both_signs(statement: Statement) -> list[Statement]:
    """Return x = 1 ± 2 as x = 1 + 2 and x = 1 − 2."""
    both = []
    for sign in (1, -1):
        trees = tuple(tree and _with_sign(tree, sign) for tree in statement.trees)
        both.append(Statement(statement.texts, trees, statement.relations))
    return both if both[0] != both[1] else [statement]


def _with_sign(tree: Tree, sign: int) -> Tree:
    if tree[0] in ("±", "∓"):
        part = _with_sign(tree[1], sign)
        return part if (tree[0] == "±") == (sign > 0) else ("negative", part)
    return tuple(_with_sign(part, sign) if isinstance(part, tuple) else part for part in tree)


def are_same(given: tuple[Statement, ...], gold: tuple[Statement, ...]) -> bool:
    """True if two lists of statements say the same, in any order: x = 1 or x = 2, and 2, 1."""
    if len(given) == len(gold) == 1:
        return _is_same_statement(given[0], gold[0], is_named=False)
    given, gold = _members(given), _members(gold)
    if len(given) != len(gold):
        return False
    left = list(gold)
    for statement in given:
        found = next((each for each in left if _is_same_statement(statement, each, is_named=True)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _members(statements: tuple[Statement, ...]) -> tuple[Statement, ...]:
    r"""Return x = 1, x = 2 as 1, 2; and \{1, 2\} too. Different names stay."""
    if len(statements) == 1 and not statements[0].relations:
        tree = bare(statements[0].value)
        if tree[0] == "\\{" and len(tree) > 3:
            return tuple(Statement(("",), (part,), ()) for part in tree[2:])
    if len({each.name for each in statements}) == 1 and {each.relations for each in statements} == {("=",)}:
        return tuple(Statement(each.texts[1:], each.trees[1:], ()) for each in statements)
    return statements


def _is_same_statement(given: Statement, gold: Statement, is_named: bool) -> bool:
    """Compare one statement with another. `is_named`: a name must stand on both sides or on none."""
    is_equal, is_gold_equal = (set(each.relations) <= {"=", "∈"} for each in (given, gold))
    if is_named and bool(given.relations) != bool(gold.relations):
        return False
    if not is_equal or not is_gold_equal:
        return _is_same_range(given, gold)
    if not given.relations and not gold.relations:
        return is_same(given.value, gold.value)
    if not _is_consistent(given):
        return False
    if not given.relations:
        return re.fullmatch(_NAME, gold.name) is not None and is_same(given.value, gold.value)
    if not gold.relations:
        return all(map(is_name, given.texts[:-1])) and is_same(given.value, gold.value)
    if given.name == gold.name and is_same(given.value, gold.value):
        return True
    return is_same_relation(given, gold)


def is_name(text: str) -> bool:
    """True if `text` may name the value behind "=": x, f(2), m + n, 25 + 9; not 2x, x^2, y - 1 or twice.

    Those are sides of an equation, which is no answer: x^2 - 5x + 6 = 0 does not answer 0.
    """
    if is_denied(text) or (has_short_word(text) and has_operation(text)):
        return False
    if re.fullmatch(_NAME, text):
        return True
    try:
        tree = bare(parse(tokenize(text)))
    except Costly:
        return False
    except Unreadable:
        return not has_operation(text)  # words
    names = names_in(tree)
    is_rounded = tree[0] == "floor" or (tree[0] == "negative" and tree[1][0] == "floor")  # ⌊x⌋, ⌈x⌉
    is_application = tree[0] in ("function", "abs") or (tree[0] == "product" and tree[1][0] == "name")
    is_application |= is_rounded
    return not names or (
        not _has_number_added(tree) and (is_application or tree[0] == "name" or len(names) > 1)
    )


def _has_number_added(tree: Tree) -> bool:
    parts = [part for part in tree if isinstance(part, tuple)]
    if tree[0] == "sum" and any(not names_in(part) for part in parts):
        return True
    is_application = tree[0] == "product" and tree[1][0] == "name"
    return not is_application and any(map(_has_number_added, parts))


def _is_consistent(statement: Statement) -> bool:
    """True if no number stands before "=" but the value itself: x = 2/4 = 1/2, not 1/3 = 1/2."""
    numbers = [tree for tree in statement.trees[:-1] if tree is not None and not names_in(tree)]
    return all(is_same(tree, statement.value) for tree in numbers)


def _is_same_range(given: Statement, gold: Statement) -> bool:
    """Compare inequalities, as intervals where they are: x > 2, 2 < x, (2, ∞) and x ∈ (2, ∞)."""
    given_range, gold_range = _range(given), _range(gold)
    if given_range and gold_range:
        names = {given_range[0], gold_range[0]} - {""}
        return len(names) == 1 and is_same(given_range[1], gold_range[1])
    return is_same_relation(given, gold)


def _range(statement: Statement) -> tuple[str, Tree] | None:
    if set(statement.relations) <= {"∈"}:
        return statement.name, statement.value
    return interval_of(statement)


def is_same_relation(given: Statement, expected: Statement) -> bool:
    """True if one equation or inequality is the other times a constant: y = 2x and 2y − 4x = 0."""
    if len(given.relations) != 1 or len(expected.relations) != 1:
        return False
    (relation, tree), (other_relation, other) = _normal(given), _normal(expected)
    names = sorted(names_in(tree) | names_in(other))
    if relation != other_relation or not names:
        return False
    ratio: Tree = ("quotient", tree, other)
    constant = at(ratio, points_of(names)[0])
    value = try_value(constant, {})
    if not value or not is_same(ratio, constant):
        return False
    return relation in "=≠" or bool(value.imag == 0 and value.real > 0)


def interval_of(statement: Statement) -> tuple[str, Tree] | None:
    r"""Return the name and the interval of x > 2 or 1 ≤ x < 3: ("x", the tree of (2,\infty))."""
    relations = "".join(statement.relations)
    if not relations or set(relations) - set("<>≤≥") or len(relations) > 2:
        return None
    trees = [bare(tree) for tree in statement.trees if tree is not None]
    if relations[0] in ">≥":  # 3 > x ≥ 1
        trees, relations = trees[::-1], relations[::-1].translate(str.maketrans("<>≤≥", "><≥≤"))
    if set(relations) & set(">≥"):
        return None
    if len(trees) == 2 and trees[0][0] == "name":
        trees, relations = [("negative", ("infinity",)), *trees], "<" + relations
    elif len(trees) == 2:
        trees, relations = [*trees, ("infinity",)], relations + "<"
    low, name, high = trees
    if name[0] != "name" or names_in(low) | names_in(high):
        return None
    opening, closing = "[" if relations[0] == "≤" else "(", "]" if relations[1] == "≤" else ")"
    return name[1], (opening, closing, low, high)


def _normal(statement: Statement) -> tuple[str, Tree]:
    """Return a < b as (">", b − a), a = b as ("=", a − b)."""
    left, right = statement.trees
    assert right is not None
    relation = statement.relations[0]
    if left is None:
        return "", right
    if relation in "<≤":
        left, right, relation = right, left, {"<": ">", "≤": "≥"}[relation]
    return relation, ("sum", left, ("negative", right))
