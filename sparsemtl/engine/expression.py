"""Sizes as formulas over the input's sizes: `d0_2 // 8 + 1`, where d0_2 is dim 2 of input 0.

The text comes from a capture or from a file, so it is read by a small evaluator of its own that
knows integers, fractions, comparisons and a few functions, and nothing else.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

MOST_CHARACTERS = 2_000
_LARGEST = 1 << 62
_ALLOWED = re.compile(r"[\w\s.,()+\-*/%<>=!]*")

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Div: operator.truediv,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max,
    "min": min,
    "abs": abs,
    "float": float,
    "int": int,
    "torch.sym_float": float,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
}


def symbol(index: int, dim: int) -> str:
    """The name of one size of one input."""
    return f"d{index}_{dim}"


def sizes_of(shapes: list[tuple[int, ...]]) -> dict[str, int]:
    """Every symbol with its value, for inputs of these shapes."""
    return {
        symbol(i, dim): size for i, shape in enumerate(shapes) for dim, size in enumerate(shape)
    }


def evaluate(text: str, sizes: Mapping[str, int]) -> int | bool:
    """The value of a formula.

    raises: ValueError for anything but a formula over these sizes, or a value out of range
    """
    try:
        found = _value(_parse(text), sizes)
    except (KeyError, TypeError, ArithmeticError, ValueError, RecursionError) as error:
        raise ValueError(
            f"engine: Expected a formula over {sorted(sizes)}, got {text!r}"
        ) from error
    if isinstance(found, bool):
        return found
    if found != int(found) or abs(found) > _LARGEST:
        raise ValueError(f"engine: Expected {text!r} to be an integer, got {found}")
    return int(found)


@lru_cache(maxsize=4096)
def _parse(text: str) -> ast.expr:
    if len(text) > MOST_CHARACTERS or not _ALLOWED.fullmatch(text):
        raise ValueError(f"engine: Expected a formula, got {len(text)} characters: {text[:40]!r}")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"engine: Expected a formula, got {text[:100]!r}") from error


def _value(tree: ast.AST, sizes: Mapping[str, int]) -> Any:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int | float):
        return tree.value
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_value(tree.operand, sizes)
    if isinstance(tree, ast.BinOp):
        found = _BINARY[type(tree.op)](_value(tree.left, sizes), _value(tree.right, sizes))
        if abs(found) > _LARGEST:
            raise OverflowError("a size out of range")
        return found
    if isinstance(tree, ast.Compare):
        values = [_value(part, sizes) for part in (tree.left, *tree.comparators)]
        pairs = zip(tree.ops, values[:-1], values[1:], strict=True)
        return all(_COMPARE[type(op)](left, right) for op, left, right in pairs)
    if isinstance(tree, ast.BoolOp):
        join = all if isinstance(tree.op, ast.And) else any
        return join([_value(part, sizes) for part in tree.values])
    if isinstance(tree, ast.Call) and not tree.keywords:
        function = _FUNCTIONS[ast.unparse(tree.func)]
        return function(*(_value(part, sizes) for part in tree.args))
    raise ValueError(f"an expression of type {type(tree).__name__}")
