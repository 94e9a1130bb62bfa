"""Turns a recorded trace (docs/trace_format.md) into a torch.fx graph.

The graph is as imperative as the trace: in-place ops stay in-place ops, views
stay views. Taking mutation and aliasing out is AOTAutograd's work, later.
"""

from __future__ import annotations

import json
import keyword
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from . import device_scalars, recorded_results, retarget
from .symbols import ExpressionError, evaluate

FORMAT = 1


class TraceError(ValueError):
    """The trace is not what docs/trace_format.md promises."""


@dataclass
class TraceProgram:
    """A trace as a graph module, with inputs of the recorded geometry."""

    module: GraphModule
    inputs: list[dict[str, Any]]
    device: torch.device
    target: str | None  # the GPU that is compiled for, where it is not the machine's own
    hints: list[int]  # an example value of each symbol
    numbers: int  # of the symbols, the last ones, that no size says
    output_count: int
    export: dict[str, Any] | None  # what the package holds, where it is for a file of the user's

    def make_inputs(self, symbols: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The inputs where symbol k is `symbols[k]`, a number or a `SymInt`."""
        return tuple(
            example_input(with_symbols(spec, symbols), self.device) for spec in self.inputs
        ) + tuple(
            torch.empty_strided([k], [0], dtype=torch.uint8, device=self.device)
            for k in symbols[len(symbols) - self.numbers :]
        )


def read_trace(trace_json: str) -> TraceProgram:
    try:
        trace = json.loads(trace_json)
    except json.JSONDecodeError as error:
        raise TraceError(f"the trace is not JSON: {error}") from None
    if trace.get("format") != FORMAT:
        raise TraceError(
            f"trace format {trace.get('format')!r}, this compiler reads {FORMAT}"
        )
    export = trace.get("export")
    retargeted = "target" in trace and trace["device"] == "cpu"
    if retargeted:
        trace["device"] = retarget.DEVICE
    builder = _GraphBuilder(trace, retargeted)
    graph = builder.build()
    return TraceProgram(
        module=GraphModule(builder.root, graph),
        inputs=[trace["inputs"][k] for k in export["arguments"]] if export else trace["inputs"],
        device=torch.device(trace["device"]),
        target=trace.get("target"),
        hints=trace.get("symbols", []),
        numbers=trace.get("numbers", 0),
        output_count=len(trace["outputs"]),
        export=export,
    )


def with_symbols(spec: dict[str, Any], symbols: Sequence[Any]) -> dict[str, Any]:
    """An input's sizes, strides and offset with values in the symbols' places."""

    def value(number: int | str) -> Any:
        if isinstance(number, str):
            return evaluate(number, lambda k: symbols[k])
        return number

    return {
        **spec,
        "sizes": [value(n) for n in spec["sizes"]],
        "strides": [value(n) for n in spec["strides"]],
        "offset": value(spec["offset"]),
    }


def example_input(spec: dict[str, Any], device: torch.device) -> torch.Tensor:
    """A tensor with the recorded sizes and strides. Its values never matter, and
    it is never drawn from a random generator: that one belongs to the host.

    Its storage offset is 0, whatever the recorded one: a package only gets the
    address of the first element, and Inductor takes that for the storage's
    beginning (torch 2.11.0). `_GraphBuilder` sets what names an offset right.
    """
    dtype = torch_constant(spec["dtype"], torch.dtype)
    sizes, strides = spec["sizes"], spec["strides"]
    return torch.empty_strided(sizes, strides, dtype=dtype, device=device).zero_()


def identifiers(names: Sequence[str]) -> list[str]:
    """Names that Python can have for arguments, each another one."""
    out: list[str] = []
    for k, name in enumerate(names):
        identifier = re.sub(r"\W|^(?=\d)", "_", name)
        taken = keyword.iskeyword(identifier) or identifier in ("self", *out)
        out.append(f"{identifier}_{k}" if taken else identifier)
    return out


def _is_dense(spec: dict[str, Any]) -> bool:
    """Whether the elements fill one stretch of memory, each place once."""
    expected = 1
    for stride, size in sorted(zip(spec["strides"], spec["sizes"])):
        if size == 0:
            return True
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _may_overlap(sizes: Sequence[Any], strides: Sequence[Any]) -> bool:
    """Whether two places of the tensor may be one element: unless each stride leaps over
    all that the smaller ones reach. What is no number is not known to.
    """
    if not all(isinstance(n, int) for n in (*sizes, *strides)):
        return True
    reach = 0
    for stride, size in sorted(zip(strides, sizes)) if 0 not in sizes else ():
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


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


def _is_float(parameter: Any) -> bool:
    return str(parameter.type) in ("float", "Optional[float]")


_aten = torch.ops.aten
_CLAMPS = {
    getattr(_aten, name).default
    for name in ("clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_")
}


_SUB_AS_ADD = {
    _aten.sub.Tensor: _aten.add.Tensor,
    _aten.sub_.Tensor: _aten.add_.Tensor,
}


_FACTORIES = (_aten.full.default, _aten.new_full.default, _aten.full_like.default)


def _with_numbers_of_its_dtype(op: Any, promotes: bool) -> Any:
    """Eager casts these ops' numbers to the dtype in which it computes: that of the first
    tensor, or the one to which all are promoted. Decompositions multiply integers by the
    floats that they are, make floats of a filled tensor, or refuse (torch 2.11.0).
    """

    def call(*given: Any, **numbers: Any) -> torch.Tensor:
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        dtypes = {value.dtype for value in (tensors if promotes else tensors[:1])}
        if numbers.get("dtype") is not None:
            dtypes = {numbers["dtype"]}
        if not dtypes or any(d.is_floating_point or d.is_complex for d in dtypes):
            return op(*given, **numbers)
        are_flags = dtypes == {torch.bool}
        changes = any(isinstance(v, torch.SymFloat) for v in (*given, *numbers.values()))
        # Conditions that are symbols make no numbers for most ops: these take a tensor.
        function = device_scalars.function_of(op) if are_flags and changes else None

        def cast(value: Any) -> Any:
            if not isinstance(value, float | torch.SymFloat):
                return value
            if function is not None:
                return torch.full((), value, dtype=torch.float64)
            return value != 0 if are_flags else torch.sym_int(value)

        target = op if function is None else function.target
        return target(*map(cast, given), **{name: cast(v) for name, v in numbers.items()})

    return call


_NUMBERS_ARE_CAST = {
    op: _with_numbers_of_its_dtype(op, promotes=name == "addcmul")
    for name, overload in (
        *((name, "default") for name in ("addmm", "addmv", "addbmm", "baddbmm", "addcmul")),
        *((name, "Scalar") for name in ("fill", "masked_fill")),
        ("index_fill", "int_Scalar"),
        ("scatter", "value"),
    )
    for op in (getattr(getattr(_aten, name + suffix), overload) for suffix in ("", "_"))
} | {op: _with_numbers_of_its_dtype(op, promotes=False) for op in _FACTORIES}

# Views that may show an element in several places.
_OVERLAPPING_VIEWS = {_aten.expand.default, _aten.unfold.default}

_VIEWS_AS_ANOTHER_DTYPE = {
    _aten.view.dtype,
    _aten.view_as_real.default,
    _aten.view_as_complex.default,
}


@dataclass(frozen=True)
class _NumberOnTheDevice:
    """An argument that is the number in `tensor`, which is on the GPU."""

    tensor: Node


class _GraphBuilder:
    def __init__(self, trace: dict[str, Any], retargeted: bool = False) -> None:
        self.trace = trace
        self.retargeted = retargeted
        self.on_cpu = torch.device(trace["device"]).type == "cpu"
        self.graph = Graph()
        self.values: dict[int, Node] = {}
        self.numbers: dict[Node, Node] = {}  # of tensors without dimensions
        # Of each view: the input or result whose storage it shows.
        self.bases: dict[Node, Node] = {}
        # Overlapping views and views of them: of `_OVERLAPPING_VIEWS`, and others.
        self.overlapping: set[Node] = set()
        self.strided_overlaps: set[Node] = set()
        self.inputs: dict[Node, dict[str, Any]] = {}
        self.moving: set[Node] = set()  # inputs whose offset is no constant
        self.symbols: dict[int, Node] = {}
        self.root = torch.nn.Module()

    def add_inputs(self) -> None:
        export = self.trace.get("export")
        if export is None:
            for k in range(len(self.trace["inputs"])):
                self.values[k] = self.graph.placeholder(f"input_{k}")
            return
        # What is no argument is a weight, with the values that it has.
        for k, name in zip(export["arguments"], identifiers(export["inputs"]), strict=True):
            self.values[k] = self.graph.placeholder(name)
        weights = torch.load(export["weights"], weights_only=True)
        # Where there is no such device, they are moved when the package is loaded.
        device = "cpu" if "target" in self.trace else self.trace["device"]
        others = [k for k in range(len(self.trace["inputs"])) if k not in self.values]
        for k, name, weight, is_parameter in zip(
            others, export["names"], weights, export["parameters"], strict=True
        ):
            *modules, leaf = name.split(".")
            owner = self.root
            for module in modules:
                if not hasattr(owner, module):
                    owner.add_module(module, torch.nn.Module())
                owner = getattr(owner, module)
            if is_parameter and export["format"] == "torch.export":
                owner.register_parameter(leaf, torch.nn.Parameter(weight.to(device)))
            else:
                owner.register_buffer(leaf, weight.to(device))
            self.values[k] = self.graph.get_attr(name)

    def build(self) -> Graph:
        self.add_inputs()
        for k, spec in enumerate(self.trace["inputs"]):
            if spec["kind"] not in ("tensor", "scalar"):
                raise TraceError(f"input {k} has the unknown kind {spec['kind']!r}")
            known = with_symbols(spec, self.trace.get("symbols", []))
            self.inputs[self.values[k]] = known
            if _may_overlap(known["sizes"], known["strides"]):
                self.strided_overlaps.add(self.values[k])
            if not isinstance(spec["offset"], int):
                self.moving.add(self.values[k])
        hints, numbers = self.trace.get("symbols", []), self.trace.get("numbers", 0)
        for k in range(len(hints) - numbers, len(hints)):
            told = self.graph.placeholder(f"number_{k}")
            self.symbols[k] = self.graph.call_function(torch.ops.aten.sym_size.int, (told, 0))
        if self.on_cpu:
            for k, spec in enumerate(self.trace["inputs"]):
                if spec["kind"] == "scalar":
                    self.number(self.values[k])
        for index, step in enumerate(self.trace["steps"]):
            try:
                self.add_step(step)
            except TraceError as error:
                raise TraceError(f"step {index}, {step.get('op')}: {error}") from None
        self.graph.output(tuple(self.value(n) for n in self.trace["outputs"]))
        return self.graph

    def add_step(self, step: dict[str, Any]) -> None:
        op = find_op(step["op"], step["overload"])
        recorded_results.tell_compiler(op)
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
            if value == [] and isinstance(parameter.type, torch.OptionalType):
                value = None  # torch 2.11 loses an empty list on its way to an opaque call
            if argument is not None and not argument.keys().isdisjoint(("scalar", "number")) and _is_float(parameter):
                # A number whose schema is `Scalar` becomes a symbol; one that
                # is a C++ double in it has no symbolic form.
                raise TraceError(f"`{parameter.name}` is a float and cannot be an input")
            if not parameter.kwarg_only:
                positional.append(value)
            elif value is not None:
                keywords[parameter.name] = value
        self.refuse_overlapping_writes(schema, positional, keywords)
        if self.retargeted and (op := retarget.op_for_gpu(op)) is None:
            raise TraceError("it runs on the CPU alone")
        if isinstance(op, torch._ops.OpOverload):
            op = self.with_numbers_on_the_device(op, positional, keywords)
        op = self.without_symbolic_branches(op, keywords)
        op = self.with_tensor_bounds(op, positional)
        op = _NUMBERS_ARE_CAST.get(op, op)
        self.rebase_as_strided(schema, positional)
        node = self.graph.call_function(op, tuple(positional), keywords)
        if any(r.alias_info for r in schema.returns) and op not in _VIEWS_AS_ANOTHER_DTYPE:
            if positional and isinstance(positional[0], Node):
                self.add_view(node, positional[0])
                if op in _OVERLAPPING_VIEWS:
                    self.overlapping.add(node)
                if op is _aten.as_strided.default and _may_overlap(*positional[1:3]):
                    self.strided_overlaps.add(node)
        results = step["results"]
        if len(results) != len(schema.returns):
            raise TraceError(
                f"{len(results)} results for a schema of {len(schema.returns)}: {schema}"
            )
        for k, result in enumerate(results):
            if result is not None:
                self.bind(result, node if len(results) == 1 else self.item(node, k))

    def symbol(self, k: int) -> Node:
        """The size of an input that is nothing but the symbol."""
        if k not in self.symbols:
            for number, spec in enumerate(self.trace["inputs"]):
                if f"s{k}" in spec["sizes"]:
                    dim = spec["sizes"].index(f"s{k}")
                    self.symbols[k] = self.graph.call_function(
                        torch.ops.aten.sym_size.int, (self.values[number], dim)
                    )
                    return self.symbols[k]
            raise TraceError(f"symbol {k} is no size of an input")
        return self.symbols[k]

    def expression(self, text: str) -> Any:
        try:
            return evaluate(
                text, self.symbol, lambda f, a, b: self.graph.call_function(f, (a, b))
            )
        except ExpressionError as error:
            raise TraceError(str(error)) from None

    def scalar(self, k: int) -> Node:
        """Input `k`, which holds a number."""
        if k >= len(self.trace["inputs"]) or self.trace["inputs"][k]["kind"] != "scalar":
            raise TraceError(f"input {k} is no scalar")
        return self.values[k]

    def number(self, tensor: Node) -> Node:
        """The number that a tensor without dimensions holds, as a symbol."""
        if tensor not in self.numbers:
            self.numbers[tensor] = self.graph.call_function(
                torch.ops.aten._local_scalar_dense.default, (tensor,)
            )
        return self.numbers[tensor]

    def with_numbers_on_the_device(
        self, op: Any, positional: list[Any], keywords: dict[str, Any]
    ) -> Any:
        """On a GPU, dynamic scalars stay there: the op becomes one that takes a tensor. To
        know the number, the host would have to wait for the GPU.
        """
        given = [*positional, *keywords.values()]
        if not any(isinstance(value, _NumberOnTheDevice) for value in given):
            return op
        tensors = [v for v in given if isinstance(v, Node)]
        function = device_scalars.function_of(op)

        def resolved(value: Any) -> Any:
            if not isinstance(value, _NumberOnTheDevice):
                return value
            if function is not None and function.casts:
                return value.tensor
            if function is None or not tensors:
                return self.number(value.tensor)
            # The result has the dtype of the last tensor: `where` has its condition first.
            return self.graph.call_function(
                device_scalars.number, (value.tensor, tensors[-1 if function.last else 0])
            )

        positional[:] = [resolved(value) for value in positional]
        for name, value in keywords.items():
            keywords[name] = resolved(value)
        return function.target if function is not None and (tensors or function.casts) else op

    def without_symbolic_branches(self, op: Any, keywords: dict[str, Any]) -> Any:
        """`sub` branches on whether alpha is 1 (torch 2.11.0, _refs.sub), which a
        symbol cannot tell; `add` of the negative does not.
        """
        if op in _SUB_AS_ADD and isinstance(keywords.get("alpha"), Node):
            keywords["alpha"] = self.graph.call_function(operator.neg, (keywords["alpha"],))
            return _SUB_AS_ADD[op]
        return op

    def with_tensor_bounds(self, op: Any, positional: list[Any]) -> Any:
        """Bounds that are symbols are lost in Inductor: an integer's result stays one,
        and a fused kernel names what is not declared (torch 2.11.0).
        """
        if op not in _CLAMPS or not any(isinstance(b, Node) for b in positional[1:]):
            return op
        tensors = {number: tensor for tensor, number in self.numbers.items()}
        positional[1:] = [tensors.get(bound, bound) for bound in positional[1:]]
        return device_scalars.function_of(op).target

    def refuse_overlapping_writes(
        self, schema: Any, positional: list[Any], keywords: dict[str, Any]
    ) -> None:
        """Functionalization computes every element of a list from what was there before:
        where two lie in one storage, the second's write undoes the first's. What a view
        shows in several places, it would write as their sum (torch 2.11.0,
        FunctionalInverses.cpp, `expand_inverse` and `unfold_inverse`). Of other such views,
        loops write in no order that is promised: one number in all places will do.
        """
        fills = schema.name in ("aten::fill_", "aten::zero_")
        by_name = {p.name: value for p, value in zip(schema.arguments, positional)} | keywords
        for parameter in schema.arguments:
            value = by_name.get(parameter.name)
            if not parameter.alias_info or not parameter.alias_info.is_write:
                continue
            written = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Node)]
            if len({self.base(v) for v in written}) < len(written):
                raise TraceError("elements of a list that is written share a storage")
            unsafe = self.overlapping if fills else self.overlapping | self.strided_overlaps
            if not unsafe.isdisjoint(written):
                raise TraceError("a write through a view that may show an element twice")

    def rebase_as_strided(self, schema: Any, positional: list[Any]) -> None:
        """Applies `as_strided` and its kind, which count from the storage's
        beginning, to the base of a view: functionalization refuses to write
        through an `as_strided` of another view. Where the base is an input, they
        then count from its first element (see `example_input`).
        """
        names = [p.name for p in schema.arguments[: len(positional)]]
        if "storage_offset" not in names:
            return
        k = names.index("storage_offset")
        if positional[k] is None:
            return
        base = positional[0] = self.base(positional[0])
        if base not in self.inputs:
            return
        spec = self.inputs[base]
        if base in self.moving:
            raise TraceError("a view counts from an input whose offset is a symbol")
        is_number = isinstance(positional[k], int)
        if not _is_dense(spec) or (
            positional[k] < spec["offset"] if is_number else spec["offset"] != 0
        ):
            # A write makes a dense copy of the input, and what lies between its
            # elements is lost to the views that follow.
            raise TraceError(
                "a view of another geometry over an input that is not its whole "
                "storage; make the whole storage the input"
            )
        if is_number:
            positional[k] -= spec["offset"]

    def base(self, node: Node) -> Node:
        return self.bases.get(node, node)

    def add_view(self, view: Node, source: Node) -> None:
        self.bases[view] = self.base(source)
        for views in (self.overlapping, self.strided_overlaps):
            if source in views:
                views.add(view)

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
        item = self.graph.call_function(operator.getitem, (node, k))
        if node in self.bases:
            self.add_view(item, node)
        return item

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
            case "scalar" | "number":
                tensor = self.scalar(content) if kind == "scalar" else self.value(content)
                return self.number(tensor) if self.on_cpu else _NumberOnTheDevice(tensor)
            case "int" | "bool" | "str":
                return content
            case "expr":
                return self.expression(content)
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
                return torch.device(retarget.DEVICE if self.retargeted else content)
            case "list":
                return [self.argument(element) for element in content]
        raise TraceError(f"unknown kind of argument: {kind!r}")
