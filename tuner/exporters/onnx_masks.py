"""Gives masked attention its outcome where a row sees nothing: 0, as PyTorch has it.

torch.onnx writes a mask as a sum with −inf, or with the lowest number: of a row that sees nothing
the softmax is then NaN, or looks at everything alike. A product with 0 is what all runtimes
compute; a choice between tensors is more than OpenVINO's compiler of kernels bears here.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
_ATTENTION = _ATEN.scaled_dot_product_attention.default
_MASK = 3  # its place among the arguments
_NOTHING = float("-inf")
_HIDING = -1e30
_LOW = -3e38


def fill_empty_rows(module: fx.GraphModule) -> None:
    """Put zeros where attention's mask hides everything, in place; a mask that cannot is left."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is not _ATTENTION:
            continue
        mask: Any = node.args[_MASK] if len(node.args) > _MASK else node.kwargs.get("attn_mask")
        below = None if mask is None else _nothing_in(mask)
        if below is None:
            continue
        users = list(node.users)
        with graph.inserting_before(node):
            node.replace_input_with(mask, graph.call_function(_finite, (mask,)))
        with graph.inserting_after(node):
            filled = graph.call_function(_filled, (node, mask, below))
        for user in users:
            user.replace_input_with(node, filled)


def _finite(mask: Tensor) -> Tensor:
    """Return a mask under which no softmax is NaN, and what is hidden stays so."""
    return mask if mask.dtype == torch.bool else mask.clamp(min=_HIDING)


def _filled(values: Tensor, mask: Tensor, below: float) -> Tensor:
    """Return attention's values, 0 where a row of the mask (bool, or added) hides everything.

    Of an added mask, numbers up to `below` hide.
    """
    is_bool = mask.dtype == torch.bool
    visible = mask.any(-1, keepdim=True) if is_bool else mask.amax(-1, keepdim=True) > below
    return values * visible.to(values.dtype)


def _nothing_in(mask: fx.Node) -> float | None:
    """Return up to which number a mask hides, None where none of its rows hides everything.

    OpenVINO makes the lowest number of a −inf in a graph.
    """
    value = _constant(mask)
    if value is not None:
        return _LOW if bool((_filled(torch.ones(()), value, _LOW) == 0).any()) else None
    made = mask.meta.get("val")
    if isinstance(made, Tensor) and made.dtype == torch.bool:
        return _NOTHING
    below = None
    seen, todo = {mask}, [mask]
    while todo:
        node = todo.pop()
        if _NOTHING in (*node.args, *node.kwargs.values()) or _holds_nothing(node):
            return _LOW
        made = node.meta.get("val")
        if node.op == "placeholder" and isinstance(made, Tensor) and made.is_floating_point():
            below = _NOTHING
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        todo += new
    return below


def _holds_nothing(node: fx.Node) -> bool:
    """Whether a tensor of the model has −inf."""
    value = _constant(node)
    return value is not None and value.is_floating_point() and bool((value == _NOTHING).any())


def _constant(node: fx.Node) -> Tensor | None:
    if node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(node.graph.owning_module)
    return value if isinstance(value, Tensor) else None
