"""Reads of an input's old value that Inductor would place after its update, and outputs
that would be an input.

AOTAutograd ends a graph with a `copy_` into each input that the program writes, one
after the other. Where the value to be copied *is* an input, or a view of one, and that
input has its own `copy_` earlier, the new value is copied: `y.copy_(x); x.zero_()`
fills `y` with zeros, and a swap through a clone, which Inductor takes for a no-op,
gives both tensors the same numbers (torch 2.11.0, stock torch.compile as well). Values
that are computed are safe: lowering realizes them before their input changes.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

_copy = torch.ops.aten.copy_.default


def copy_old_values_first(graph: Graph) -> None:
    """After the passes on the graph: what would be read too late is copied before."""
    copies = graph.find_nodes(op="call_function", target=_copy)
    written: set[Node] = set()
    for copy in copies:
        destination, value = copy.args[0], copy.args[1]
        source = _shown_by(value)
        if source in written and source is not destination:
            with graph.inserting_before(copies[0]):
                old = graph.call_function(torch.ops.aten.clone.default, (value,))
            old.meta.update(value.meta)
            copy.replace_input_with(value, old)
        written.add(destination)


def copy_returned_inputs(graph: Graph) -> None:
    """After the passes on the graph: no output is an input, or a view of one. Adding a tensor
    of zeros is taken out, and what it returned is its argument then (torch 2.11.0,
    joint_graph.remove_no_ops): the caller's own tensor, or its value after an update.
    """
    output = graph.output_node()
    copies = graph.find_nodes(op="call_function", target=_copy)

    def own(value: Node | None) -> Node | None:
        if not isinstance(value, Node) or _shown_by(value).op not in ("placeholder", "get_attr"):
            return value
        with graph.inserting_before(copies[0] if copies else output):
            copy = graph.call_function(torch.ops.aten.clone.default, (value,))
        copy.meta.update(value.meta)
        return copy

    output.args = (type(output.args[0])(own(value) for value in output.args[0]),)


def is_written(node: Node) -> bool:
    """Whether some op writes the tensor that a node makes, or one over the same storage."""
    seen = [_shown_by(node)]
    for shown in seen:
        for user in shown.users:
            if _writes(user, shown):
                return True
            if user.op == "call_function" and _is_view(user) and user not in seen:
                seen.append(user)
    return False


def _writes(user: Node, tensor: Node) -> bool:
    schema = getattr(user.target, "_schema", None)
    return schema is not None and any(
        parameter.alias_info is not None and parameter.alias_info.is_write and argument is tensor
        for parameter, argument in zip(schema.arguments, user.args)
    )


def _shown_by(node: Node) -> Node:
    """The input that a view, or a view of a view, shows."""
    while isinstance(node, Node) and node.op == "call_function" and _is_view(node):
        node = node.args[0]
    return node


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(
        r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
    )
