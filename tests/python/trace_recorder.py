"""Records what a Python function does as a trace (docs/trace_format.md).

A stand-in for libreprise's recorder, so that the compiler can be tested on its
own: ops are taken where the lazy device takes them, below autograd.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Recording:
    trace: dict[str, Any]
    inputs: list[torch.Tensor]

    @property
    def json(self) -> str:
        return json.dumps(self.trace)


def record(
    function: Callable[..., Any],
    inputs: list[torch.Tensor],
    scalars: tuple[float, ...] = (),
) -> Recording:
    """Runs `function(*inputs)`. What it returns are the outputs; what else it
    touches (parameters, optimizer state) are inputs, found as they are met.
    `scalars` are numbers that become inputs wherever an op is given them.
    """
    recorder = _Recorder(inputs, scalars)
    with recorder:
        outputs = function(*inputs)
    if isinstance(outputs, torch.Tensor):
        outputs = [outputs]
    return recorder.finish(list(outputs or ()))


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: list[torch.Tensor], scalars: tuple[float, ...]) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self.inputs: list[torch.Tensor] = []
        self.specs: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.values: dict[int, Any] = {}  # id(tensor) -> value
        self.storages: dict[int, Any] = {}  # storage -> value of the whole of it
        self.scalars: dict[float, Any] = {}
        self.count = 0
        for tensor in inputs:
            self.add_input(tensor)
        for number in scalars:
            tensor = torch.tensor(number, dtype=torch.float64)
            self.scalars[number] = self.add_input(tensor, kind="scalar")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace == "profiler":
            return op(*args, **kwargs)
        schema = op._schema
        bound = []
        for k, parameter in enumerate(schema.arguments):
            if k < len(args):
                bound.append(args[k])
            else:
                bound.append(kwargs.get(parameter.name, parameter.default_value))
        # Before the op runs: it may write in place what becomes an input here.
        recorded = [self.argument(a) for a in bound]
        result = op(*args, **kwargs)
        returns = result if len(schema.returns) > 1 else (result,)
        if not schema.returns:
            returns = ()
        self.steps.append(
            {
                "op": schema.name,
                "overload": schema.overload_name,
                "args": recorded,
                "results": [self.result(r) for r in returns],
            }
        )
        return result

    def add_input(self, tensor: torch.Tensor, kind: str = "tensor") -> dict[str, Any]:
        value = {"new": len(self.inputs), "input": True}
        self.inputs.append(tensor)
        self.specs.append(
            {
                "kind": kind,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "sizes": list(tensor.shape),
                "strides": list(tensor.stride()),
                "offset": tensor.storage_offset(),
            }
        )
        self.bind(tensor, value)
        return value

    def bind(self, tensor: torch.Tensor, value: Any) -> None:
        self.kept.append(tensor)
        self.values[id(tensor)] = value
        self.storages.setdefault(tensor.untyped_storage()._cdata, value)

    def value_of(self, tensor: torch.Tensor) -> Any:
        if id(tensor) in self.values:
            return self.values[id(tensor)]
        storage = tensor.untyped_storage()._cdata
        if storage not in self.storages:
            return self.add_input(tensor)
        # Another view of a storage that came in before.
        value = self.fresh()
        self.steps.append(
            {
                "op": "aten::as_strided",
                "overload": "",
                "args": [
                    {"value": self.storages[storage]},
                    {"list": [{"int": n} for n in tensor.shape]},
                    {"list": [{"int": n} for n in tensor.stride()]},
                    {"int": tensor.storage_offset()},
                ],
                "results": [{"value": value}],
            }
        )
        self.bind(tensor, value)
        return value

    def fresh(self) -> dict[str, Any]:
        self.count += 1
        return {"new": self.count, "input": False}

    def argument(self, a: Any) -> Any:
        if a is None:
            return None
        if isinstance(a, torch.Tensor):
            return {"value": self.value_of(a)}
        if isinstance(a, (list, tuple)):
            return {"list": [self.argument(x) for x in a]}
        if isinstance(a, bool):
            return {"bool": a}
        if isinstance(a, float) and a in self.scalars:
            return {"scalar": self.scalars[a]}
        if isinstance(a, int):
            return {"int": a}
        if isinstance(a, float):
            return {"float": _hex(a)}
        if isinstance(a, complex):
            return {"complex": [_hex(a.real), _hex(a.imag)]}
        if isinstance(a, str):
            return {"str": a}
        if isinstance(a, torch.device):
            return {"device": str(a)}
        for key, type_ in (
            ("dtype", torch.dtype),
            ("layout", torch.layout),
            ("memory_format", torch.memory_format),
        ):
            if isinstance(a, type_):
                return {key: str(a).removeprefix("torch.")}
        raise TypeError(f"no place for {a!r} in a trace")

    def result(self, r: Any) -> Any:
        if isinstance(r, torch.Tensor):
            if id(r) in self.values:
                return None
            value = self.fresh()
            self.bind(r, value)
            return {"value": value}
        if isinstance(r, (list, tuple)):
            return {"list": [self.result(x) for x in r]}
        return None

    def finish(self, outputs: list[torch.Tensor]) -> Recording:
        outputs_json = [self.storages[t.untyped_storage()._cdata] for t in outputs]

        def number(node: Any) -> Any:
            """Inputs first, then results: known only now."""
            if isinstance(node, dict):
                if "new" in node:
                    return node["new"] if node["input"] else len(self.inputs) + node["new"] - 1
                return {k: number(v) for k, v in node.items()}
            if isinstance(node, list):
                return [number(x) for x in node]
            return node

        device = next((str(t.device) for t in self.inputs if t.device.type != "cpu"), "cpu")
        trace = {
            "format": 1,
            "device": device,
            "inputs": self.specs,
            "steps": number(self.steps),
            "outputs": number(outputs_json),
        }
        return Recording(trace, self.inputs)


def _hex(number: float) -> str:
    return number.hex() if math.isfinite(number) else repr(number)
