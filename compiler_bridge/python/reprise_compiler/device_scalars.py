"""Ops that take a number, as functions that take a tensor without dimensions in its place.

A dynamic scalar that lies on the GPU is read by the kernels there. That needs no word
between host and GPU, and a captured launch reads the number of its own step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Function:
    target: Callable[..., torch.Tensor]
    last: bool = False  # the number goes with the last tensor, not the first one
    casts: bool = False  # the number is cast to the tensor's dtype, and nothing is promoted


def number(scalar: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A float64 tensor without dimensions, as it takes part in an op with `other`."""
    dtype = torch.result_type(other, 0.5)
    # Kernels compute in float32 where these are stored.
    small = dtype in (torch.float16, torch.bfloat16)
    return scalar.to(torch.float32 if small else dtype)


def _add(x: Any, other: Any, alpha: Any = 1) -> torch.Tensor:
    return x + other * alpha


def _sub(x: Any, other: Any, alpha: Any = 1) -> torch.Tensor:
    return x - other * alpha


def _rsub(x: Any, other: Any, alpha: Any = 1) -> torch.Tensor:
    return other - x * alpha


def _addcmul(x: Any, a: Any, b: Any, value: Any = 1) -> torch.Tensor:
    return x + a * b * value


def _addcdiv(x: Any, a: Any, b: Any, value: Any = 1) -> torch.Tensor:
    return x + a / b * value


def _masked_fill(x: Any, mask: Any, value: Any) -> torch.Tensor:
    return torch.where(mask, value.to(x.dtype), x)


def _fill(x: Any, value: Any) -> torch.Tensor:
    return value.to(x.dtype).expand(x.shape)


def _full(size: Any, value: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
    return value.to(dtype).expand(size).clone()


def _new_full(x: Any, size: Any, value: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
    return _full(size, value, dtype or x.dtype)


def _full_like(x: Any, value: Any, dtype: Any = None, **keywords: Any) -> torch.Tensor:
    zeros = torch.zeros_like(x, dtype=dtype, **keywords)
    return zeros + value.to(zeros.dtype)


def _index_fill(x: Any, dim: Any, index: Any, value: Any) -> torch.Tensor:
    return torch.index_fill(x, dim, index, value.to(x.dtype))


def _scatter(x: Any, dim: Any, index: Any, value: Any) -> torch.Tensor:
    return torch.scatter(x, dim, index, value.to(x.dtype).expand(index.shape))


def _leaky_relu(x: Any, slope: Any = 0.01) -> torch.Tensor:
    return torch.where(x > 0, x, x * slope)


def _leaky_relu_backward(gradient: Any, x: Any, slope: Any, x_is_result: bool) -> torch.Tensor:
    return torch.where(x > 0, gradient, gradient * slope)


def _lerp(x: Any, end: Any, weight: Any) -> torch.Tensor:
    return torch.lerp(x, end, weight.to(x.dtype))


def _clamp(x: Any, low: Any = None, high: Any = None) -> torch.Tensor:
    """Bounds are numbers, tensors of no dimension that promote as they do, or None."""
    dtype = torch.result_type(x, 0.5)
    x = x.to(dtype)
    for bound, choose in ((low, torch.maximum), (high, torch.minimum)):
        if isinstance(bound, torch.Tensor):
            x = choose(x, bound.to(dtype))
        elif bound is not None:
            x = choose(x, torch.scalar_tensor(bound, dtype=dtype, device=x.device))
    return x


def _clamp_max(x: Any, high: Any) -> torch.Tensor:
    return _clamp(x, None, high)


_ARITHMETIC = {
    "add": _add, "sub": _sub, "rsub": _rsub, "mul": torch.mul, "div": torch.div,
    "addcmul": _addcmul, "addcdiv": _addcdiv, "lerp": _lerp, "masked_fill": _masked_fill,
    "clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp_max, "fill": _fill,
    "leaky_relu": _leaky_relu, "leaky_relu_backward": _leaky_relu_backward,
    "index_fill": _index_fill, "scatter": _scatter,
}  # fmt: skip
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


_CASTS = ("fill", "masked_fill", "index_fill", "scatter")


def _out_of_place(name: str, function: Callable[..., torch.Tensor]) -> Function:
    def target(x: Any, *args: Any, **keywords: Any) -> torch.Tensor:
        result = function(x, *args, **keywords)
        # Two tensors without dimensions: a number would not have changed the dtype.
        small = result.dim() == 0 and x.dtype in (torch.float16, torch.bfloat16)
        return result.to(x.dtype) if small and result.dtype == torch.float32 else result

    target.__name__ = f"{name}_with_tensor"
    return Function(target, casts=name in _CASTS)


def _in_place(name: str, function: Callable[..., torch.Tensor]) -> Function:
    def target(x: Any, *args: Any, **keywords: Any) -> torch.Tensor:
        return x.copy_(function(x, *args, **keywords))

    target.__name__ = f"{name}_with_tensor"
    return Function(target, casts=name.removesuffix("_") in _CASTS)


_FUNCTIONS = (
    {name: _out_of_place(name, f) for name, f in _ARITHMETIC.items() if name != "fill"}
    | {f"{name}_": _in_place(f"{name}_", f) for name, f in _ARITHMETIC.items()}
    | {name: Function(getattr(torch, name)) for name in _COMPARISONS}
    | {"where": Function(torch.where, last=True)}
    | {
        "full": Function(_full, casts=True),
        "new_full": Function(_new_full, casts=True),
        "full_like": Function(_full_like, casts=True),
    }
)
# Which round, have a list of numbers, or do more than to set them.
_WITHOUT = ("Tensor_mode", "Scalar_mode", "ScalarList", "value_reduce", "out")


def function_of(op: Any) -> Function | None:
    """What computes the same as the aten op `op` with tensors for numbers; None where there
    is no such thing.
    """
    if op.namespace != "aten" or op._overloadname in _WITHOUT:
        return None
    return _FUNCTIONS.get(op._schema.name.removeprefix("aten::"))
