"""The tool: a calculator. It runs in worker processes."""

from __future__ import annotations

import ast
import operator

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
MOST_CHARACTERS, LARGEST = 100, 10**12


def calculator(expression: str) -> str:
    """Compute a sum exactly.

    Args:
        expression: Whole numbers with +, - and *, and parentheses, for example "12*34-56".
    """
    if len(expression) > MOST_CHARACTERS:
        raise ValueError(f"longer than {MOST_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError:
        raise ValueError("not a sum") from None
    return str(_value(tree.body))


def _value(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int() as number) if type(number) is int:
            value = number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.BinOp(op=op, left=left, right=right) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError("only whole numbers, +, - and *")
    if abs(value) > LARGEST:
        raise ValueError("too large")
    return value
