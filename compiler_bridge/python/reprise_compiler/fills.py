"""Numbers that tensors are filled with, as the tensors hold them.

Inductor hands the number of a `full` on to what reads the tensor, also where that computes
in a wider dtype: a tensor of bfloat16 that was filled with 0.1 was 0.1 in float32, where
it is 0.10009765625 (torch 2.11.0).
"""

from __future__ import annotations

import torch
from torch.fx import Graph

_FILLS = (torch.ops.aten.full.default, torch.ops.aten.full_like.default)


def round_fills(graph: Graph) -> None:
    """A `joint_custom_pre_pass`."""
    for op in _FILLS:
        for node in graph.find_nodes(op="call_function", target=op):
            number, dtype = node.args[1], node.meta["val"].dtype
            if type(number) in (int, float) and dtype.is_floating_point:
                node.update_arg(1, torch.tensor(number, dtype=dtype).item())
