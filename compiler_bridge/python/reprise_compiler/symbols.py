"""Integer expressions over symbols: read from traces, written as guards.

The prefix form of symint/expression.h: `s0`, `12`, `(* 4 s0)`, `(== (% s0 8) 0)`.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils._sympy import functions as sympy_functions

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "min": torch.sym_min,
    "max": torch.sym_max,
}


class ExpressionError(ValueError):
    """The text is no expression, or a guard has no such form."""


def evaluate(
    text: str,
    symbol: Callable[[int], Any],
    apply: Callable[[Callable[..., Any], Any, Any], Any] = lambda f, a, b: f(a, b),
) -> Any:
    """The value of an expression, where `symbol(k)` is symbol k's."""
    tokens = re.findall(r"[()]|[^\s()]+", text)

    def read() -> Any:
        if not tokens:
            raise ExpressionError(f"'{text}' ends too early")
        token = tokens.pop(0)
        if token == "(" and not tokens:
            raise ExpressionError(f"'{text}' ends too early")
        if token != "(":
            try:
                return symbol(int(token[1:])) if token[0] == "s" else int(token)
            except ValueError:
                raise ExpressionError(f"'{token}' in '{text}' is no number") from None
        name = tokens.pop(0)
        operands = []
        while tokens and tokens[0] != ")":
            operands.append(read())
        if name not in _OPERATORS or not operands or not tokens:
            raise ExpressionError(f"'{text}' is no expression")
        tokens.pop(0)
        return functools.reduce(lambda a, b: apply(_OPERATORS[name], a, b), operands)

    value = read()
    if tokens:
        raise ExpressionError(f"'{text}' does not end where it should")
    return value


class Symbols:
    """The symbols of one compile, as PyTorch's shape environment has them."""

    def __init__(self, hints: Sequence[int]) -> None:
        self.shape_env = ShapeEnv()
        self._numbers: dict[sympy.Symbol, int] = {}
        self.values: list[torch.SymInt] = []
        for k, hint in enumerate(hints):
            source = ConstantSource(f"s{k}")
            symbol = self.shape_env.create_symbol(
                hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
            )
            self._numbers[symbol] = k
            self.values.append(
                self.shape_env.create_symintnode(symbol, hint=hint, source=source)
            )

    def guards(self) -> list[str]:
        """What the compiler has taken for granted of the symbols."""
        guards = [self._text(guard.expr) for guard in self.shape_env.guards]
        for symbol, k in self._numbers.items():
            bounds = self.shape_env.var_to_range[symbol]
            guards.append(f"(>= s{k} {int(bounds.lower)})")
            if isinstance(bounds.upper, sympy.Integer) and bounds.upper < 2**62:
                guards.append(f"(<= s{k} {int(bounds.upper)})")
        return list(dict.fromkeys(guards))

    def _text(self, expr: Any) -> str:
        if expr in self._numbers:
            return f"s{self._numbers[expr]}"
        if isinstance(expr, sympy.Integer):
            return str(int(expr))
        if isinstance(expr, sympy.Pow) and isinstance(expr.exp, sympy.Integer) and expr.exp > 0:
            return f"(* {' '.join([self._text(expr.base)] * int(expr.exp))})"
        for kind, name in _SYMPY_NAMES.items():
            if isinstance(expr, kind):
                return f"({name} {' '.join(self._text(a) for a in expr.args)})"
        if expr in (sympy.true, sympy.false):
            return "(== 0 0)" if expr == sympy.true else "(== 0 1)"
        raise ExpressionError(f"a guard of the compiler cannot be checked: {expr}")


_SYMPY_NAMES = {
    sympy.Add: "+",
    sympy.Mul: "*",
    sympy_functions.FloorDiv: "//",
    sympy_functions.CleanDiv: "//",
    sympy_functions.Mod: "%",
    sympy_functions.PythonMod: "%",
    sympy.Mod: "%",
    sympy_functions.Min: "min",
    sympy_functions.Max: "max",
    sympy.Eq: "==",
    sympy.Ne: "!=",
    sympy.StrictLessThan: "<",
    sympy.LessThan: "<=",
    sympy.StrictGreaterThan: ">",
    sympy.GreaterThan: ">=",
    sympy.And: "and",
    sympy.Or: "or",
    sympy.Not: "not",
}
