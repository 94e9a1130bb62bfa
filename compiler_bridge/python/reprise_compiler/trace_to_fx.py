"""Turns a recorded trace (docs/trace_format.md) into a torch.fx graph.

The graph is as imperative as the trace: in-place ops stay in-place ops, views
stay views. Taking mutation and aliasing out is AOTAutograd's work, later.
"""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

FORMAT = 1


class TraceError(ValueError):
    """The trace is not what docs/trace_format.md promises."""


@dataclass
class TraceProgram:
    """A trace as a graph module, with inputs of the recorded geometry."""

    module: GraphModule
    example_inputs: tuple[torch.Tensor, ...]
    output_count: int


def read_trace(trace_json: str) -> TraceProgram:
    try:
        trace = json.loads(trace_json)
    except json.JSONDecodeError as error:
        raise TraceError(f"the trace is not JSON: {error}") from None
    if trace.get("format") != FORMAT:
        raise TraceError(
            f"trace format {trace.get('format')!r}, this compiler reads {FORMAT}"
        )
    device = torch.device(trace["device"])
    graph = _GraphBuilder(trace).build()
    return TraceProgram(
        module=GraphModule(torch.nn.Module(), graph),
        example_inputs=tuple(example_input(spec, device) for spec in trace["inputs"]),
        output_count=len(trace["outputs"]),
    )


def example_input(spec: dict[str, Any], device: torch.device) -> torch.Tensor:
    """A tensor with the recorded geometry. Its values never matter, and it is
    never drawn from a random generator: that one belongs to the host program.
    """
    if spec["kind"] == "scalar":
        # Not 0 or 1, so that nothing is folded that holds for those alone.
        return torch.tensor(0.5, dtype=torch.float64)
    dtype = torch_constant(spec["dtype"], torch.dtype)
    sizes, strides, offset = spec["sizes"], spec["strides"], spec["offset"]
    span = 0 if 0 in sizes else 1 + sum((n - 1) * s for n, s in zip(sizes, strides))
    storage = torch.zeros(offset + span, dtype=dtype, device=device)
    return storage.as_strided(sizes, strides, offset)


def torch_constant(name: str, kind: type) -> Any:
    constant = getattr(torch, name, None)
    if not isinstance(constant, kind):
        raise TraceError(f"torch.{name} is no {kind.__name__}")
    return constant


def find_op(name: str, overload: str) -> torch._ops.OpOverload:
    namespace, _, op = name.partition("::")
    try:
        packet = getattr(getattr(torch.ops, namespace), op)
        return getattr(packet, overload or "default")
    except AttributeError:
        raise TraceError(
            f"op {name}.{overload or 'default'} is not registered in this process; "
            "is the library that defines it loaded?"
        ) from None


def parse_float(text: str) -> float:
    return float.fromhex(text)


class _GraphBuilder:
    def __init__(self, trace: dict[str, Any]) -> None:
        self.trace = trace
        self.graph = Graph()
        self.values: dict[int, Node] = {}
        self.scalars: dict[int, Node] = {}

    def build(self) -> Graph:
        for k, spec in enumerate(self.trace["inputs"]):
            self.values[k] = self.graph.placeholder(f"input_{k}")
            if spec["kind"] not in ("tensor", "scalar"):
                raise TraceError(f"input {k} has the unknown kind {spec['kind']!r}")
        # Read before the first step, so that a scalar is the input's value
        # when the program was called, whatever the steps do.
        for k, spec in enumerate(self.trace["inputs"]):
            if spec["kind"] == "scalar":
                self.scalars[k] = self.graph.call_function(
                    torch.ops.aten._local_scalar_dense.default, (self.values[k],)
                )
        for index, step in enumerate(self.trace["steps"]):
            try:
                self.add_step(step)
            except TraceError as error:
                raise TraceError(f"step {index}, {step.get('op')}: {error}") from None
        self.graph.output(tuple(self.value(n) for n in self.trace["outputs"]))
        return self.graph

    def add_step(self, step: dict[str, Any]) -> None:
        op = find_op(step["op"], step["overload"])
        schema = op._schema
        if len(step["args"]) != len(schema.arguments):
            raise TraceError(
                f"{len(step['args'])} arguments for a schema of "
                f"{len(schema.arguments)}: {schema}"
            )
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for parameter, argument in zip(schema.arguments, step["args"]):
            value = self.argument(argument)
            if not parameter.kwarg_only:
                positional.append(value)
            elif value is not None:
                keywords[parameter.name] = value
        node = self.graph.call_function(op, tuple(positional), keywords)
        results = step["results"]
        if len(results) != len(schema.returns):
            raise TraceError(
                f"{len(results)} results for a schema of {len(schema.returns)}: {schema}"
            )
        for k, result in enumerate(results):
            if result is not None:
                self.bind(result, node if len(results) == 1 else self.item(node, k))

    def bind(self, result: dict[str, Any], node: Node) -> None:
        if "list" in result:
            for k, element in enumerate(result["list"]):
                if element is not None:
                    self.bind(element, self.item(node, k))
        else:
            if result["value"] in self.values:
                raise TraceError(f"value {result['value']} is bound twice")
            self.values[result["value"]] = node

    def item(self, node: Node, k: int) -> Node:
        return self.graph.call_function(operator.getitem, (node, k))

    def value(self, number: int) -> Node:
        if number not in self.values:
            raise TraceError(f"value {number} is used before it is made")
        return self.values[number]

    def argument(self, argument: dict[str, Any] | None) -> Any:
        if argument is None:
            return None
        if len(argument) != 1:
            raise TraceError(f"an argument has one key, not {sorted(argument)}")
        ((kind, content),) = argument.items()
        match kind:
            case "value":
                return self.value(content)
            case "scalar":
                if content not in self.scalars:
                    raise TraceError(f"input {content} is no scalar")
                return self.scalars[content]
            case "int" | "bool" | "str":
                return content
            case "float":
                return parse_float(content)
            case "complex":
                real, imaginary = content
                return complex(parse_float(real), parse_float(imaginary))
            case "dtype":
                return torch_constant(content, torch.dtype)
            case "layout":
                return torch_constant(content, torch.layout)
            case "memory_format":
                return torch_constant(content, torch.memory_format)
            case "device":
                return torch.device(content)
            case "list":
                return [self.argument(element) for element in content]
        raise TraceError(f"unknown kind of argument: {kind!r}")
