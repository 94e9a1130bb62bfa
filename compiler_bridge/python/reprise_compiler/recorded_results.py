"""Calls whose results lie as they were recorded: nothing in the arguments says how.

A program calls a package that was loaded by `reprise::call_package.as_recorded`, of the
same process's libreprise.so, which is told what comes back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

OVERLOAD = "as_recorded"


def tell_compiler(op: torch._ops.OpOverload) -> None:
    """Has the compiler know what `op`, an overload `as_recorded`, returns."""
    if op._overloadname == OVERLOAD:
        _register(op.name())


@functools.cache
def _register(name: str) -> None:
    library = torch.library.Library(name.partition("::")[0], "FRAGMENT")
    _libraries.append(library)  # what it registers goes with it
    torch.library.register_fake(name, _results, lib=library)


_libraries: list[torch.library.Library] = []


def _results(
    name: str,
    inputs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor] | None,
    dtypes: str,
    geometry: Sequence[Any],
) -> list[torch.Tensor]:
    device = (*inputs, *(weights or ()))[0].device
    numbers = iter(geometry)
    results = []
    for dtype in dtypes.split():
        rank = int(next(numbers))
        sizes, strides = ([next(numbers) for _ in range(rank)] for _ in range(2))
        results.append(
            torch.empty_strided(sizes, strides, dtype=getattr(torch, dtype), device=device)
        )
    return results
