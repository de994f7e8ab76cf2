"""Small faults that can be put into a source: each changes one expression or removes one statement.

A comparison, a boolean operator, arithmetic, a number, a default, an order of arguments is changed; a
condition is negated; a statement or a return value is removed. Docstrings, annotations, decorators, asserted
invariants, and the wording of messages are left alone.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import itertools
import marshal
import types
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
}  # fmt: skip
MESSAGES = {
    "print",
    "_warn",
    "warn",
    "ConfigError",
    "RolloutError",
    "EngineError",
}  # their texts are left alone
# what these arguments are changes no result: an assertion, the time of printing, the looks of a file
UNSEEN = {"strict", "flush", "frozen", "indent", "ensure_ascii", "daemon", "non_blocking", "copy"}
SYMMETRIC = {"max", "min"}  # the order of their arguments changes no result
TYPES = {"isinstance": 1, "issubclass": 1, "cast": 0, "TypeVar": 0}  # the argument that is a type


@dataclass(frozen=True)
class Change:
    """One change of a source: the bytes [start, end) become `text`."""

    line: int
    kind: str
    start: int
    end: int
    text: str

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()


class Finder(ast.NodeVisitor):
    """Collects the changes that a source allows."""

    def __init__(self, source: str):
        lines = source.encode().splitlines(keepends=True)
        self.starts = [0, *itertools.accumulate(map(len, lines))]
        self.changes: list[Change] = []
        self.visit(ast.parse(source))

    def add(self, kind: str, node: Any, text: str) -> None:
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        self.changes.append(Change(node.lineno, kind, start, end, text))

    def become(self, kind: str, node: ast.expr, **fields: Any) -> None:
        """Add the expression with some of its fields replaced."""
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        self.add(kind, node, f"({ast.unparse(new)})")

    def visit_all(self, nodes: Any) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    # what is left alone

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """A text; Python 3.11 does not know the places of what is in it, either."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """An invariant of ours: it holds in every test."""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.visit_all(node.body)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit_all([node.value])

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name not in ("__repr__", "__str__"):
            self.visit_all([*node.args.defaults, *node.args.kw_defaults, *node.body])

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in UNSEEN:
            self.visit(node.value)

    # statements

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            return
        self.negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add("removed statement", node, "pass")

    visit_Break = visit_Continue = visit_Delete = visit_Raise  # type: ignore[assignment]

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.add("removed statement", node, "pass")
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], ast.Attribute | ast.Subscript):
            self.add("removed statement", node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add("removed statement", node, "pass")
        if new := ARITHMETIC.get(type(node.op)):
            changed = copy.copy(node)
            changed.op = new()
            self.add("arithmetic", node, ast.unparse(changed))
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None:
            # None is as good as False
            if not (isinstance(node.value, ast.Constant) and node.value.value in (None, False)):
                self.add("removed return value", node, "return None")
            self.generic_visit(node)

    # expressions

    def negate(self, test: ast.expr) -> None:
        if not isinstance(test, ast.Compare | ast.Constant) and not _is_not(test):
            self.add("negated condition", test, f"(not ({ast.unparse(test)}))")

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.negate(test)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for place, operator in enumerate(node.ops):
            for new in COMPARISONS[type(operator)]:
                self.become("comparison", node, ops=[*node.ops[:place], new(), *node.ops[place + 1 :]])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.become("boolean operator", node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            kind = "removed not" if isinstance(node.op, ast.Not) else "arithmetic"
            self.add(kind, node, f"({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        new = ARITHMETIC.get(type(node.op))
        if new and not any(isinstance(x, ast.JoinedStr) or _is_text(x) for x in (node.left, node.right)):
            self.become("arithmetic", node, op=new())
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add("constant", node, str(not node.value))
        elif isinstance(node.value, int | float):
            for value in (node.value + 1, node.value - 1):
                self.add("constant", node, f"({value})" if value < 0 else str(value))

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in MESSAGES:
            return
        first_two = node.args[:2]
        is_wording = any(isinstance(x, ast.Starred | ast.JoinedStr) or _is_text(x) for x in first_two)
        if len(first_two) == 2 and not is_wording and name not in TYPES.keys() | SYMMETRIC:
            self.become("swapped arguments", node, args=[*reversed(first_two), *node.args[2:]])
        self.visit(node.func)
        self.visit_all([x for place, x in enumerate(node.args) if place != TYPES.get(name)])
        self.visit_all(node.keywords)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_not(node: ast.expr) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def changes(source: str) -> list[Change]:
    """Return the changes that a source allows, by place."""
    found = set(Finder(source).changes)
    return sorted(found, key=lambda change: (change.start, change.end, change.text))


def bytecode(source: str) -> bytes:
    """Return the bytecode of a source without line numbers."""

    def plain(code: types.CodeType) -> types.CodeType:
        constants = tuple(plain(x) if isinstance(x, types.CodeType) else x for x in code.co_consts)
        return code.replace(co_consts=constants, co_firstlineno=1, co_linetable=b"", co_exceptiontable=b"")

    return marshal.dumps(plain(compile(source, "", "exec", dont_inherit=True)))


@dataclass(frozen=True)
class Mutant:
    """One change of one file: its line as it was, and what a part of it becomes."""

    path: str
    line: int
    kind: str
    code: str
    before: str
    after: str
    change: Change = field(compare=False, repr=False)


def mutants_of(path: str, source: str) -> dict[int, list[Mutant]]:
    """Return the mutants of each line of a file."""
    found: dict[int, list[Mutant]] = defaultdict(list)
    lines = source.splitlines()
    for change in changes(source):
        before = " ".join(source.encode()[change.start : change.end].decode().split())
        code = lines[change.line - 1].strip()
        found[change.line].append(Mutant(path, change.line, change.kind, code, before, change.text, change))
    return found


def _place(*what: Any) -> bytes:
    """Return a place in a draw, as random as a hash is."""
    return hashlib.sha256(repr(what).encode()).digest()


def draw(
    sources: dict[str, str], count: int, seed: int, equivalent: Collection[tuple[str, ...]]
) -> list[Mutant]:
    """Draw lines, and of each line one mutant that changes its bytecode and is not known to be equivalent.

    A line's place in the draw is its own: what changes elsewhere, or becomes known, leaves the others drawn.
    """
    drawn, copies = list[Mutant](), Counter[tuple[str, str]]()
    lines = list[tuple[bytes, list[Mutant]]]()
    for path, source in sorted(sources.items()):
        for _, line in sorted(mutants_of(path, source).items()):
            code = path, line[0].code
            copies[code] += 1
            lines.append((_place(seed, *code, copies[code]), line))
    before = {path: bytecode(source) for path, source in sources.items()}
    for place, line in sorted(lines, key=lambda each: each[0]):
        for mutant in sorted(line, key=lambda mutant: _place(place, mutant.before, mutant.after)):
            is_known = (mutant.path, mutant.code, mutant.before, mutant.after) in equivalent
            if not is_known and bytecode(mutant.change.apply(sources[mutant.path])) != before[mutant.path]:
                drawn.append(mutant)
                break
        if len(drawn) == count:
            break
    return drawn
