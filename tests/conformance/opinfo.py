"""PyTorch's own samples of its ops: which there are, and what is known of them."""

from __future__ import annotations

import fnmatch
import itertools
import logging
import sys
import types
import unittest
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import values

warnings.simplefilter("ignore")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA here: fine


def _stub_expecttest() -> None:
    """`torch.testing._internal` derives its own test case from expecttest's, and
    uses nothing else of it that samples need."""
    try:
        import expecttest  # noqa: F401
    except ImportError:
        stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stub


def _stub_lazy_module() -> None:
    """OpInfo's wrapper of random ops calls `torch._lazy.mark_step()`, which belongs to
    the lazy tensor core's own executor."""
    stub = types.ModuleType("torch._lazy")
    stub.mark_step = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    sys.modules["torch._lazy"] = stub
    torch._lazy = stub


_stub_expecttest()
_stub_lazy_module()
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

# How an op is called.
FORWARD, BACKWARD, IN_PLACE, OUT, ERRORS = "forward", "backward", "in-place", "out", "errors"
KINDS = (FORWARD, BACKWARD, IN_PLACE, OUT, ERRORS)

COMPILED_DTYPES = ("float32", "int64")

# Whose contents mean nothing: memory that nobody has written. Metadata is compared.
UNDEFINED_CONTENTS: dict[str, str] = {
    "empty": "uninitialised memory",
    "empty_like": "uninitialised memory",
    "empty_permuted": "uninitialised memory",
    "empty_strided": "uninitialised memory",
    "new_empty": "uninitialised memory",
    "new_empty_strided": "uninitialised memory",
    "resize_": "a larger tensor's new elements are uninitialised",
    "resize_as_": "a larger tensor's new elements are uninitialised",
}

# Whose tensor arguments beside the first belong on the host for every device.
HOST_ARGUMENTS: dict[str, str] = {
    "tensor_split": "`tensor_indices_or_sections` must be on the CPU",
}


def full_name(op: Any) -> str:
    """`name`, or `name.variant`."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def select_ops(pattern: str = "*", shard: tuple[int, int] = (1, 1), share: int = 1) -> list[int]:
    """Places in `op_db` of the ops whose full name matches: every `share`-th of
    them, and of those what belongs to shard I of N."""
    matching = [k for k, op in enumerate(op_db) if fnmatch.fnmatchcase(full_name(op), pattern)]
    index, count = shard
    return matching[::share][index - 1 :: count]


@dataclass(frozen=True)
class Group:
    """Calls that differ in their samples only."""

    op_index: int
    kind: str
    dtype: str

    @property
    def op(self) -> Any:
        return op_db[self.op_index]

    @property
    def name(self) -> str:
        return full_name(self.op)

    @property
    def contents_defined(self) -> bool:
        return self.op.name not in UNDEFINED_CONTENTS

    @property
    def host_arguments(self) -> bool:
        return self.op.name in HOST_ARGUMENTS

    def __str__(self) -> str:
        return f"{self.name} {self.kind} {self.dtype}"

    def samples(self, most: int = 0) -> Iterator[Any]:
        """OpInfo's samples on the CPU; the first `most` where that is not zero."""
        torch.manual_seed(0)
        if self.kind == ERRORS:
            found = (error.sample_input for error in self.op.error_inputs("cpu"))
        else:
            found = self.op.sample_inputs(
                "cpu", getattr(torch, self.dtype), requires_grad=self.kind == BACKWARD
            )
        return itertools.islice(found, most or None)


def groups_of(op_index: int, kinds: list[str], dtypes: list[str]) -> list[Group]:
    """How an op is called. No `dtypes` means all that the CPU supports; gradients
    are for float32 and float64."""
    op = op_db[op_index]
    supported = sorted(dtype_name(dtype) for dtype in op.supported_dtypes(values.EAGER))
    chosen = [dtype for dtype in supported if not dtypes or dtype in dtypes]
    groups = []
    for dtype in chosen:
        if FORWARD in kinds:
            groups.append(Group(op_index, FORWARD, dtype))
        if IN_PLACE in kinds and op.inplace_variant is not None:
            groups.append(Group(op_index, IN_PLACE, dtype))
        if OUT in kinds and op.supports_out:
            groups.append(Group(op_index, OUT, dtype))
        if BACKWARD in kinds and op.supports_autograd and dtype in ("float32", "float64"):
            groups.append(Group(op_index, BACKWARD, dtype))
    if ERRORS in kinds and op.error_inputs_func is not None:
        groups.append(Group(op_index, ERRORS, "any"))
    return groups
