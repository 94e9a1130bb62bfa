"""One call of an op with one sample, on the CPU or on the lazy device, and what
may differ between the two."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from opinfo import BACKWARD, ERRORS, IN_PLACE, OUT, Group
from values import (
    Copier,
    close_values,
    describe,
    leaves,
    same_constant,
    same_values,
    sharing,
    tensors_in,
    values_line,
)

Same = Callable[[torch.Tensor, torch.Tensor], bool]


@dataclass
class Outcome:
    """What a call did: its result or error, and all that it may have changed."""

    result: Any = None
    arguments: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    error: str | None = None
    random_state: torch.Tensor | None = None
    device: str | None = None  # where results belong; None where the call names none


def error_text(error: BaseException) -> str:
    """Type and first line, with every device named alike."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: " + re.sub(r"\b(lazy|cuda|cpu)(:0)?\b", "cpu", lines[0])


class Call:
    """A sample of a group. `prepare` copies the arguments to a device, so that the
    sample itself never changes; `execute` makes the call."""

    def __init__(self, group: Group, index: int, sample: Any) -> None:
        self.group, self.index, self.sample = group, index, sample

    @property
    def name(self) -> str:
        return f"{self.group} sample {self.index}"

    def run(self, device: str) -> Outcome:
        return self.prepare(device)()

    def prepare(self, device: str) -> Callable[[], Outcome]:
        copier = Copier(device)
        sample = self.sample
        first, args, kwargs = copier((sample.input, sample.args, sample.kwargs))
        if self.group.host_arguments:
            args = sample.args
        if self.group.kind == OUT:
            kwargs = {**kwargs, "out": copier(self._out_tensors())}
        return lambda: self._execute(copier, first, args, kwargs)

    def _execute(self, copier: Copier, first: Any, args: tuple, kwargs: dict) -> Outcome:
        op = self.group.op
        function = op.inplace_variant if self.group.kind == IN_PLACE else op.op
        outcome = Outcome(
            arguments=copier.tensors, device=copier.device if copier.moves_anything else None
        )
        torch.manual_seed(0)
        try:
            outcome.result = function(first, *args, **kwargs)
            if self.group.kind == BACKWARD:
                outcome.gradients = self._backward(outcome.result, copier.tensors)
        except Exception as error:  # of whatever type: it is compared
            outcome.error = error_text(error)
        outcome.random_state = torch.get_rng_state()
        return outcome

    def _backward(self, result: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor | None]:
        outputs = [
            output
            for output in tensors_in(self.sample.output_process_fn_grad(result))
            if output.requires_grad
        ]
        if outputs:
            torch.autograd.backward(outputs, [_cotangent(output) for output in outputs])
        return [tensor.grad for tensor in tensors if tensor.requires_grad and tensor.is_leaf]

    def _out_tensors(self) -> Any:
        """Tensors for `out=`: of the result's geometry, or, for every other sample,
        empty ones that the op resizes."""
        copier = Copier("cpu")
        first, args, kwargs = copier((self.sample.input, self.sample.args, self.sample.kwargs))
        torch.manual_seed(0)
        try:
            result = self.group.op.op(first, *args, **kwargs)
        except Exception:  # the call with `out` will fail as well
            return torch.empty(0)

        def like(tensor: torch.Tensor) -> torch.Tensor:
            if self.index % 2 == 1 and tensor.layout == torch.strided:
                return tensor.new_zeros(0)
            return torch.zeros_like(tensor.detach()).resolve_conj().resolve_neg()

        if isinstance(result, torch.Tensor):
            return like(result)
        return tuple(like(tensor) for tensor in tensors_in(result))


def _cotangent(output: torch.Tensor) -> torch.Tensor:
    """Numbers that differ from place to place, the same on every device."""
    count = output.numel()
    real = torch.cos(torch.arange(count, dtype=torch.float64) * 0.7 + 0.3).reshape(output.shape)
    return real.to(output.dtype).to(output.device)


def difference(call: Call, actual: Outcome, expected: Outcome, exact: bool) -> str | None:
    """How an outcome on the lazy device is not eager's; None where it is."""
    if actual.error != expected.error:
        if expected.error is None:
            return f"lazy raises {actual.error} | eager returns"
        return f"lazy {_raises(actual)} | eager raises {expected.error}"
    if expected.error is not None and call.group.kind == ERRORS:
        return None
    same: Same = same_values if exact else close_values
    if not call.group.contents_defined:
        same = lambda actual, expected: True  # noqa: E731
    found = _compare("argument", actual.arguments, expected.arguments, same)
    if expected.error is None:
        found = (
            _compare("result", actual.result, expected.result, same)
            or _compare_device(actual)
            or _compare_sharing(actual, expected)
            or found
            or _compare("gradient", actual.gradients, expected.gradients, same)
        )
    if found is None and not torch.equal(actual.random_state, expected.random_state):
        return "other random numbers were drawn than by eager"
    return found


def _raises(outcome: Outcome) -> str:
    return "returns" if outcome.error is None else f"raises {outcome.error}"


def _compare(what: str, actual: Any, expected: Any, same: Same) -> str | None:
    ours, theirs = list(leaves(actual)), list(leaves(expected))
    for (path, a), (_, e) in zip(ours, theirs):
        where = what + path
        if isinstance(a, torch.Tensor) and isinstance(e, torch.Tensor):
            if describe(a) != describe(e):
                return f"{where}: lazy {describe(a)} | eager {describe(e)}"
            if not same(a, e):
                return f"{where}: lazy {values_line(a)} | eager {values_line(e)}"
        elif not same_constant(a, e):
            return f"{where}: lazy {_short(a)} | eager {_short(e)}"
    return None if len(ours) == len(theirs) else f"{what}: another number of parts"


def _short(value: Any) -> str:
    text = describe(value) if isinstance(value, torch.Tensor) else repr(value)
    return f"{type(value).__name__} {text.splitlines()[0][:200]}"


def _compare_device(actual: Outcome) -> str | None:
    if actual.device is None:
        return None
    for path, leaf in leaves(actual.result):
        if isinstance(leaf, torch.Tensor) and leaf.device.type != actual.device:
            return f"result{path}: on {leaf.device}, not on {actual.device}"
    return None


def _compare_sharing(actual: Outcome, expected: Outcome) -> str | None:
    ours = sharing(actual.arguments + tensors_in(actual.result))
    theirs = sharing(expected.arguments + tensors_in(expected.result))
    if ours == theirs:
        return None
    return f"storages shared by arguments and results: lazy {ours} | eager {theirs}"
