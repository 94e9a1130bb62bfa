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
            elif (op := _with_tensors(node.target)) is not None:
                number = _zero_dimensional(node)
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


def _with_tensors(op: Any) -> Any:
    """The op that takes a tensor where `op` takes a number: itself, where it takes either."""
    name = getattr(op, "_overloadname", None)
    return getattr(op.overloadpacket, "Tensor", None) if name == "Scalar" else op


def _zero_dimensional(user: Node) -> torch.Tensor:
    """A fake tensor that takes part in `user` as a complex number does."""
    other = next(a.meta["val"] for a in user.args if isinstance(a, Node))
    wide = other.dtype in (torch.float64, torch.complex128)
    with other.fake_mode:
        return torch.empty(
            (), dtype=torch.complex128 if wide else torch.complex64, device=other.device
        )
