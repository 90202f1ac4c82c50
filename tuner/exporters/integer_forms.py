"""Writes ops of a graph in the forms that the integer runner computes with integers."""

from typing import Any

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
_PRODUCTS: dict[Any, Any] = {
    _ATEN.addmm.default: _ATEN.mm.default,
    _ATEN.baddbmm.default: _ATEN.bmm.default,
}
_BATCHED: dict[Any, int] = {
    getattr(getattr(_ATEN, f"{name}{axes}d"), overload): axes
    for axes in (1, 2, 3)
    for name, overload in (
        ("conv", "default"),
        ("conv", "padding"),
        ("conv_transpose", "default" if axes == 1 else "input"),
        ("max_pool", "default"),
        ("avg_pool", "default"),
    )
    if overload in getattr(_ATEN, f"{name}{axes}d").overloads()
}
"""Op → how many spatial axes it has, beside those of batch and channels."""


def rewrite(graph: fx.GraphModule) -> None:
    """Rewrite a graph in place: the same values.

    A product that is added to something becomes a product and a sum; a convolution or a pooling of
    one sample `[C, …]` that of a batch of one.
    """
    for node in list(graph.graph.nodes):
        if node.target in _PRODUCTS and not node.kwargs:  # of factors alpha and beta
            _split(graph.graph, node)
        elif node.target in _BATCHED and _value(node.args[0]).ndim == _BATCHED[node.target] + 1:
            _batch(graph.graph, node)
    graph.graph.lint()
    graph.recompile()


def _split(graph: fx.Graph, node: fx.Node) -> None:
    added, *operands = node.args
    product = _put(graph, node, _PRODUCTS[node.target], *operands)
    product.meta["val"] = node.meta["val"]
    total = _put(graph, node, _ATEN.add.Tensor, product, added)
    total.meta.update(node.meta)
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _batch(graph: fx.Graph, node: fx.Node) -> None:
    sample, *rest = node.args
    batch = _put(graph, node, _ATEN.unsqueeze.default, sample, 0)
    batch.meta["val"] = _value(sample).unsqueeze(0)
    made = _put(graph, node, node.target, batch, *rest)
    made.kwargs = node.kwargs
    made.meta["val"] = _value(node).unsqueeze(0)
    first = _put(graph, node, _ATEN.squeeze.dim, made, 0)
    first.meta.update(node.meta)
    node.replace_all_uses_with(first)
    graph.erase_node(node)


def _put(graph: fx.Graph, before: fx.Node, op: object, *args: object) -> fx.Node:
    with graph.inserting_before(before):
        return graph.call_function(op, args)  # type: ignore[arg-type]


def _value(node: object) -> Tensor:
    assert isinstance(node, fx.Node)
    found = node.meta["val"]
    assert isinstance(found, Tensor)
    return found
