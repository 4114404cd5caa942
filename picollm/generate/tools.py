"""The calculator a model calls between `<|python_start|>` and `<|python_end|>`.

The expression is parsed, never evaluated as code. Without powers and with bounded length, every operation is on numbers
of at most a few hundred digits: time and memory are bounded by construction, so no alarm or process is needed.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_CHARS = 100
"""Longest expression; longer ones are not taken."""

_TAKEN = re.compile(r"[0-9+\-*/%.() ]+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str | None:
    """The value of an arithmetic expression as text, or None when it is not one that is taken.

    Taken: numbers, `+ - * / // %`, signs and parentheses, at most `MAX_CHARS` characters; a comma before three digits
    is dropped. Arithmetic is exact; a whole result is written as an integer (`8/2` is `4`), any other with ten
    significant digits. A division by zero, a power or anything else is None, and the caller forces no result.
    """
    expression = _THOUSANDS.sub("", expression.strip())
    if len(expression) > MAX_CHARS or not _TAKEN.fullmatch(expression):
        return None
    try:
        value = _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None
    if value is None:
        return None
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def _value(node: ast.expr) -> Fraction | None:
    """Value of a parsed node, None where it holds something that is not arithmetic."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # The shortest text of a float is what was written, so 0.1 + 0.2 is 0.3.
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if value is not None and isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and (apply := _BINARY.get(type(node.op))):
        left, right = _value(node.left), _value(node.right)
        return None if left is None or right is None else Fraction(apply(left, right))
    return None
