"""Gives attention over one head, `[N, L, E]` or `[L, E]`, an axis of heads.

torch.onnx writes attention of four axes only.
"""

from typing import Any

import torch
from torch import Tensor, fx

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_MASK = 3  # its place among the arguments


def give_heads(module: fx.GraphModule) -> None:
    """Rewrite such attention in place; what shares a batch of other axes is left as it is."""
    for node in list(module.graph.nodes):
        if node.target is not _ATTENTION or node.kwargs.get("enable_gqa"):
            continue
        axes = {_dim(operand) for operand in node.args[:_MASK]}
        if len(axes) == 1 and axes <= {2, 3}:
            _rewrite(module.graph, node)


def _rewrite(graph: fx.Graph, node: fx.Node) -> None:
    users, whole = list(node.users), node.meta["val"]
    operands: set[Any] = {*node.args, *node.kwargs.values()}
    for operand in [o for o in node.all_input_nodes if o in operands]:
        if operand not in node.args[:_MASK] and _dim(operand) < 3:
            continue  # a mask [L, S] is the same for all heads
        with graph.inserting_before(node):
            turned = graph.call_function(_with_heads, (operand,))
        turned.meta["val"] = _with_heads(operand.meta["val"])
        node.replace_input_with(operand, turned)
    node.meta["val"] = _with_heads(whole)
    with graph.inserting_after(node):
        out = graph.call_function(_without_heads, (node, whole.dim()))
    out.meta["val"] = whole
    for user in users:
        user.replace_input_with(node, out)


def _with_heads(x: Tensor) -> Tensor:
    """Return `[1, 1, L, E]` or `[N, 1, L, E]`."""
    return x[None, None] if x.dim() == 2 else x.unsqueeze(1)


def _without_heads(x: Tensor, axes: int) -> Tensor:
    return x[0, 0] if axes == 2 else x.squeeze(1)


def _dim(node: Any) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else 0
