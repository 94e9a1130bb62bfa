"""Copies of arguments on a device, and comparison of what calls return."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch


# Where eager computes: the backing device of the lazy one.
EAGER = os.environ.get("REPRISE_BACKING", "cpu")


class Copier:
    """Copies nested arguments to a device.

    Tensors keep their sizes, strides, offsets, conjugate and negative bits, and
    what they share: one tensor in two places stays one, and tensors over one
    storage stay over one.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.tensors: list[torch.Tensor] = []
        self.moves_anything = False
        self._copies: dict[int, torch.Tensor] = {}
        self._storages: dict[int, torch.Tensor] = {}
        self._alive: list[Any] = []  # ids are keys, so nothing may be freed meanwhile

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self(item) for item in value))
        if isinstance(value, torch.Size):
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(self(item) for item in value)
        if isinstance(value, dict):
            return {name: self(item) for name, item in value.items()}
        if isinstance(value, (torch.device, str)) and str(value) == "cpu":
            self.moves_anything = True
            return torch.device(self.device)
        return value

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        self.moves_anything = True
        copy = self._copies.get(id(tensor))
        if copy is None:
            self._alive.append(tensor)
            with torch.no_grad():
                copy = self._copy_of(tensor)
            copy.requires_grad_(tensor.requires_grad)
            self._copies[id(tensor)] = copy
            self.tensors.append(copy)
        return copy

    def _copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cpu":
            return tensor.detach()  # on the meta device, where an error is wanted
        if tensor.layout != torch.strided or tensor.is_quantized:
            return tensor.detach().clone().to(self.device)
        storage = tensor.untyped_storage()
        whole = self._storages.get(storage._cdata)
        if whole is None:
            self._alive.append(storage)
            whole = torch.empty(0, dtype=torch.uint8).set_(storage).clone().to(self.device)
            self._storages[storage._cdata] = whole
        copy = torch.empty(0, dtype=tensor.dtype, device=self.device)
        copy.set_(whole.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        if tensor.is_conj():
            torch._C._set_conj(copy, True)
        if tensor.is_neg():
            torch._C._set_neg(copy, True)
        return copy


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What a nested value consists of, each with its place. Containers come first,
    as their type's name, so that equal leaves mean equal structure."""
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        yield path, (type(value).__name__, len(value))
        for k, item in enumerate(value):
            yield from leaves(item, f"{path}[{k}]")
    elif isinstance(value, dict):
        yield path, ("dict", list(value))
        for name, item in value.items():
            yield from leaves(item, f"{path}[{name!r}]")
    else:
        yield path, value


def tensors_in(value: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def describe(tensor: torch.Tensor) -> str:
    """All that can be asked of a tensor without its values and device."""
    text = f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
    if tensor.layout == torch.strided:
        text += f" strides {list(tensor.stride())} offset {tensor.storage_offset()}"
    else:
        text += f" {tensor.layout}"
    for name in ("requires_grad", "is_conj", "is_neg", "is_quantized"):
        asked = getattr(tensor, name)
        if asked() if callable(asked) else asked:
            text += f" {name}"
    return text


def sharing(tensors: list[torch.Tensor]) -> list[int]:
    """For each tensor the first one that lies over the same storage."""
    first: dict[int, int] = {}
    out = []
    for k, tensor in enumerate(tensors):
        strided = tensor.layout == torch.strided
        key = tensor.untyped_storage()._cdata if strided else -1 - k
        out.append(first.setdefault(key, k))
    return out


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_quantized:
        return tensor.int_repr()
    if tensor.layout != torch.strided:
        return tensor.to_dense()
    return tensor.resolve_conj().resolve_neg()


def same_values(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """The same bits, but any NaN equals any other, and the zeros each other."""
    actual, expected = on_host(actual), on_host(expected)
    if actual.numel() == 0 or torch.equal(_bytes(actual), _bytes(expected)):
        return True
    if not (actual.is_floating_point() or actual.is_complex()):
        return False
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    if actual.dtype.itemsize == 1:
        actual, expected = actual.float(), expected.float()
    return bool(((actual == expected) | (actual.isnan() & expected.isnan())).all())


def close_values(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    try:
        torch.testing.assert_close(on_host(actual), on_host(expected), equal_nan=True)
    except AssertionError:
        return False
    return True


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # `contiguous` would keep the strides of a single element.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return flat.copy_(tensor.reshape(-1)).view(torch.uint8)


def values_line(tensor: torch.Tensor) -> str:
    """The first values, on one line."""
    flat = on_host(tensor).reshape(-1)[:6]
    return str(flat.tolist())


def same_constant(actual: Any, expected: Any) -> bool:
    if type(actual) is not type(expected):
        return False
    if isinstance(expected, torch.device):
        return True
    if isinstance(expected, float) and math.isnan(expected):
        return math.isnan(actual)
    try:
        return bool(actual == expected)
    except Exception:  # an object that cannot be compared
        return True
