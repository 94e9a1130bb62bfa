"""Numbers in a graph, as tensors hold them and as packages can."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

_aten = torch.ops.aten
_FILLS = (_aten.full.default, _aten.full_like.default)


def round_fills(graph: Graph) -> None:
    """A `joint_custom_pre_pass`: rounds the numbers of fills to the tensor's dtype.

    Inductor hands the number of a `full` on to what reads the tensor, also where that
    computes in a wider dtype: a tensor of bfloat16 that was filled with 0.1 was 0.1 in
    float32, where it is 0.10009765625 (torch 2.11.0).
    """
    for op in _FILLS:
        for node in graph.find_nodes(op="call_function", target=op):
            number, dtype = node.args[1], node.meta["val"].dtype
            if type(number) in (int, float) and dtype.is_floating_point:
                node.update_arg(1, torch.tensor(number, dtype=dtype).item())


def split_complex_numbers(graph: Graph) -> None:
    """After the passes on the graph: makes complex numbers of a real and an imaginary one.

    A package knows none (torch 2.11.0, oss_proxy_executor.cpp). Constant folding makes
    them of each complex tensor that is filled with one.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not any(type(a) is complex for a in node.args):
            continue
        with graph.inserting_before(node):
            if node.target in _FILLS:
                value = node.meta["val"]
                filled = _filled(graph, node.target, node.args[0], node.args[1], value)
                node.replace_all_uses_with(filled)
                graph.erase_node(node)
            elif (op := _with_tensors(node)) is not None:
                other = next(a.meta["val"] for a in node.args if isinstance(a, Node))
                with other.fake_mode:
                    dtype = torch.result_type(other, 1j)
                    number = torch.empty((), dtype=dtype, device=other.device)
                node.args = tuple(
                    _filled(graph, _aten.full.default, [], a, number) if type(a) is complex else a
                    for a in node.args
                )
                node.target = op


def _filled(graph: Graph, op: Any, first: Any, number: complex, value: torch.Tensor) -> Node:
    """What `op(first, number)` would be: `value`, a fake tensor."""
    parts = []
    for part in (number.real, number.imag):
        with value.fake_mode:
            half = torch.empty_like(value, dtype=value.dtype.to_real())
        keywords = {"dtype": half.dtype, "device": half.device}
        parts.append(graph.call_function(op, (first, part), keywords))
        parts[-1].meta["val"] = half
    whole = graph.call_function(_aten.complex.default, tuple(parts))
    whole.meta["val"] = value
    return whole


def _with_tensors(node: Node) -> Any:
    """The op that takes a tensor where `node` has a complex number: its own, where it takes
    either. None where there is none, nor a tensor to go by.
    """
    op = node.target
    if getattr(op, "_overloadname", None) == "Scalar":
        op = getattr(op.overloadpacket, "Tensor", None)
    schema = getattr(op, "_schema", None)
    if schema is None or not any(isinstance(a, Node) for a in node.args):
        return None
    takes_tensors = all(
        isinstance(parameter.type, torch.TensorType)
        for parameter, a in zip(schema.arguments, node.args)
        if type(a) is complex
    )
    return op if takes_tensors else None
